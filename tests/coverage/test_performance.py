"""Figures of score tables against scipy, all subsets, and the formulas by other ways."""

import itertools

import numpy as np
import pytest
from scipy import stats

from qscope.coverage import performance
from qscope.errors import InputError


def table(seed, models=6, items=9):
    rng = np.random.default_rng(seed)
    return (rng.random((models, items)) < np.linspace(0.3, 0.8, models)[:, None]).astype(float)


def tau(one, other):
    value = stats.kendalltau(one, other).statistic
    return 0.0 if np.isnan(value) else value


def test_tau_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(50):
        whole, parts = rng.integers(0, 5, 7).astype(float), rng.integers(0, 4, (7, 3)).astype(float)
        expected = [tau(whole, parts[:, i]) for i in range(3)]
        assert performance._tau_b(whole, parts) == pytest.approx(expected, rel=0, abs=1e-12)


def test_performance_redundancy_is_the_mean_over_the_same_orders():
    correct = table(1)
    found = performance.performance_redundancy(correct, orders=5, seed=3)
    generator, expected = np.random.default_rng(3), []
    for _ in range(5):
        order = generator.permutation(9)
        expected.append([tau(correct.mean(1), correct[:, order[:n]].mean(1)) for n in range(1, 10)])
    assert found.tau == pytest.approx(np.mean(expected, axis=0), rel=0, abs=1e-12)
    assert found.value.value == pytest.approx(np.mean(expected), rel=0, abs=1e-12)
    assert found.tau[-1] == pytest.approx(1) and found.orders == 5 and found.sizes.tolist() == list(range(1, 10))
    assert found.value.low <= found.value.value <= found.value.high


def test_performance_redundancy_approaches_all_subsets():
    correct = table(2, items=7)
    expected = np.mean(
        [
            np.mean([tau(correct.mean(1), correct[:, list(c)].mean(1)) for c in itertools.combinations(range(7), n)])
            for n in range(1, 8)
        ]
    )
    found = performance.performance_redundancy(correct, orders=2000)
    each = (found.value.high - found.value.low) / 4  # about one standard deviation of an order
    assert abs(found.value.value - expected) < 4 * each / np.sqrt(2000)


def test_identical_items_are_fully_redundant_and_points_hardly_matter():
    assert performance.performance_redundancy(np.repeat(np.arange(5.0)[:, None], 8, 1)).value.value == pytest.approx(1)
    correct = table(3, models=8, items=300)
    whole, few = (performance.performance_redundancy(correct, 16, points).value.value for points in (300, 60))
    assert whole == pytest.approx(few, abs=0.005)


def test_equal_sums_in_another_order_are_ties():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last digit."""
    correct = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.9, 0.9, 0.9]])
    assert performance._tau_b(correct.sum(1), np.cumsum(correct, axis=1)[:, [2]])[0] == pytest.approx(1)
    assert performance._tau_b(np.array([1.0, 1, 2]), np.cumsum(correct, axis=1)[:, [2]])[0] == pytest.approx(1)


def test_scores_that_order_nothing_are_refused():
    for scores, words in (
        (np.ones((1, 4)), "2 models or more"),
        (np.ones((3, 4)), "orders none"),
        (np.array([[1, np.nan], [0, 1]]), "1 of 4 scores are missing"),
    ):
        with pytest.raises(InputError, match=words):
            performance.performance_redundancy(scores)


def test_correlations_are_scipys_without_the_missing_pairs():
    rng = np.random.default_rng(4)
    x, y = rng.random(12), rng.random(12)
    x[3], y[5] = np.nan, np.nan
    both = ~np.isnan(x + y)
    for ours, theirs in (
        (performance.pearson, stats.pearsonr),
        (performance.spearman, stats.spearmanr),
        (performance.kendall, stats.kendalltau),
    ):
        found, expected = ours(x, y), theirs(x[both], y[both])
        assert (found.value, found.p_value, found.count) == (expected.statistic, expected.pvalue, 10)
        assert np.isnan(ours(np.ones(5), rng.random(5)).value) and np.isnan(ours(x[:1], y[:1]).value)
        assert (ours(x[:2], y[:2]).value, ours(x[:2], y[:2]).p_value) == (np.sign((x[1] - x[0]) * (y[1] - y[0])), 1)


def test_partial_correlation_is_that_of_the_residuals():
    scores = np.random.default_rng(5).random((20, 4))
    scores[:, :3] += scores[:, 3:]
    similarity = performance.score_similarity(scores)
    np.testing.assert_allclose(similarity, np.corrcoef(scores.T), atol=1e-12)
    found = performance.partial_correlation(similarity, 3)
    design = np.column_stack([np.ones(20), scores[:, 3]])
    residuals = scores[:, :3] - design @ np.linalg.lstsq(design, scores[:, :3], rcond=None)[0]
    np.testing.assert_allclose(found[:3, :3], np.corrcoef(residuals.T), atol=1e-12)
    assert np.isnan(found[3]).all() and np.isnan(found[:, 3]).all()
    follows = np.column_stack([scores, 2 * scores[:, 3] + 1])
    assert np.isnan(performance.partial_correlation(performance.score_similarity(follows), 3)[4]).all()
    with pytest.raises(InputError, match="0 to 3"):
        performance.partial_correlation(similarity, 4)


def test_pairs_agree_by_pearson_and_spearman_over_the_upper_triangle():
    rng = np.random.default_rng(6)
    left, noise = rng.random((7, 7)), rng.random((7, 7))
    left, noise = left + left.T, noise + noise.T
    right = left + 0.2 * noise
    right[1, 2] = right[2, 1] = np.nan
    kept = [0, 1, 2, 3, 5, 6]
    pairs = [(a, b) for a, b in itertools.combinations(kept, 2) if (a, b) != (1, 2)]
    x, y = np.array([left[p] for p in pairs]), np.array([right[p] for p in pairs])
    found = performance.pair_agreement(left, right, control=4, relabellings=199)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert found.pairs == 14 and found.pearson_p < 0.05 and found.spearman_p < 0.05
    against = performance.pair_agreement(-left, right, control=4, relabellings=199)
    assert against.pearson_p > 0.9 and found == performance.pair_agreement(left, right, 4, 199)


def test_relabellings_that_all_agree_as_well_give_a_p_value_of_one():
    level = performance.pair_agreement(1 - np.eye(4), 1 - np.eye(4), relabellings=9)
    assert np.isnan(level.pearson) and np.isnan(level.pearson_p)
