"""Scores on sparse codes against scipy and scikit-learn on the dense ones."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qscope.errors import InputError
from qscope.finding import scores
from qscope.finding.pooled import pool
from qscope.finding.scores import METRICS, Sample, ranking

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).with_name("planted.py"))
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64 sums of a few dozen terms in another order


def build(seed, pooling, **options):
    acts, indices, text, keep, positive, group = planted.codes(seed, **options)
    sample = Sample(pool(acts, indices, text, keep, len(positive)), positive, group, pooling)
    return sample, planted.dense(acts, indices, text, keep)


def spread(sample, found):
    """[F] of [C], NaN for features that never fire."""
    full = np.full(planted.F, np.nan)
    full[sample.codes.features] = found
    return full


def repeat(weight, values):
    return np.repeat(values, weight, axis=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pooling", ["any", "mean", "last"])
@pytest.mark.parametrize("weighted", [False, True])
def test_scores_equal_the_dense_ones(seed, pooling, weighted):
    sample, blocks = build(seed, pooling, planted={0: (0.6, 0.1)})
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 4, len(blocks)) if weighted else np.ones(len(blocks), np.int64)
    value, fires = planted.pooled(blocks, pooling)
    sides = [repeat(np.where(side, weight, 0), value) for side in (sample.positive, ~sample.positive)]
    firing = [repeat(np.where(side, weight, 0), fires) for side in (sample.positive, ~sample.positive)]
    occurs = sample.codes.features
    assert len(occurs) > 30

    np.testing.assert_allclose(METRICS["mean"](sample, weight), (sides[0].mean(0) - sides[1].mean(0))[occurs], **EXACT)
    np.testing.assert_allclose(
        METRICS["rate"](sample, weight), (firing[0].mean(0) - firing[1].mean(0))[occurs], **EXACT
    )
    # Pairs of texts counted one by one: the answer is a fraction of whole numbers, so equality.
    pairs = (sides[0][:, None] > sides[1][None]) + 0.5 * (sides[0][:, None] == sides[1][None])
    area = pairs.sum((0, 1)) / (len(sides[0]) * len(sides[1]))
    if pooling != "mean":  # means of equal activations may differ in the last bit between the two ways of summing
        np.testing.assert_array_equal(METRICS["auroc"](sample, weight), area[occurs])
    np.testing.assert_allclose(METRICS["auroc"](sample, weight), area[occurs], **EXACT)

    with np.errstate(invalid="ignore", divide="ignore"):
        peer = stats.ttest_ind(*sides, equal_var=False)
    defined = np.isfinite(peer.statistic[occurs])
    welch = scores.welch(sample, weight)
    np.testing.assert_allclose(welch.t[defined], peer.statistic[occurs][defined], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scores.p_values(welch)[defined], peer.pvalue[occurs][defined], rtol=1e-9)
    assert (welch.t[~defined] == 0).all() and (scores.p_values(welch)[~defined] == 1).all()


def test_auroc_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="a peer that only this test uses")
    sample, blocks = build(5, "any", planted={1: (0.5, 0.2)})
    value = planted.pooled(blocks, "any")[0]
    found = METRICS["auroc"](sample, np.ones(len(blocks), np.int64))
    for column, feature in enumerate(sample.codes.features):
        assert found[column] == pytest.approx(metrics.roc_auc_score(sample.positive, value[:, feature]), abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_nu_and_densities_are_over_tokens(weighted):
    sample, blocks = build(7, "mean", planted={2: (0.7, 0.3)})
    weight = np.arange(len(blocks)) % 3 if weighted else np.ones(len(blocks), np.int64)

    def tokens(chosen):
        return np.concatenate([b for b, w, c in zip(blocks, weight, chosen, strict=True) for _ in range(w) if c])

    own = tokens(sample.positive)
    others = [tokens(~sample.positive & (sample.group == g)) for g in (0, 1)]
    assert len(others[0]) != len(others[1])  # else a mean over all tokens would be right as well
    nu = own.mean(0) - np.mean([o.mean(0) for o in others], axis=0)
    np.testing.assert_allclose(METRICS["nu"](sample, weight), nu[sample.codes.features], **EXACT)
    left, right = scores.densities(sample, weight)
    np.testing.assert_allclose(left, (own > 0).mean(0)[sample.codes.features], **EXACT)
    np.testing.assert_allclose(right, (np.concatenate(others) > 0).mean(0)[sample.codes.features], **EXACT)


def test_texts_firing_counts_texts_with_weight():
    sample, blocks = build(3, "mean")
    weight = (np.arange(len(blocks)) % 2).astype(np.int64) * 3
    counted = sum((b > 0).any(0) for b, w in zip(blocks, weight, strict=True) if w)
    np.testing.assert_array_equal(scores.texts_firing(sample, weight), counted[sample.codes.features])


@pytest.mark.parametrize("metric", list(METRICS))
def test_the_planted_feature_comes_first(metric):
    sample, blocks = build(11, "any", texts=60, planted={0: (0.7, 0.05), 1: (0.5, 0.5)})
    weight = np.ones(len(blocks), np.int64)
    found = METRICS[metric](sample, weight)
    order = ranking(found, scores.mean_difference(sample, weight), scores.texts_firing(sample, weight) >= 3)
    assert sample.codes.features[order[0]] == 0


def test_ranking_breaks_ties_by_the_second_score_then_the_lowest_id():
    eligible = np.array([True, True, True, True, False])
    order = ranking(np.array([1.0, 2, 2, 2, 9]), np.array([0.0, 5, 7, 5, 9]), eligible)
    assert order.tolist() == [2, 1, 3, 0]


def test_false_discoveries_stay_at_the_level_on_null_data():
    """No feature differs, so every rejection is false and the rate is the chance of any: 0.1 over 200 draws.

    Four standard deviations of the count above 20 are 37. Welch's t is close to its distribution here, because every
    feature fires in most texts.
    """
    rejected = 0
    for seed in range(200):
        rng = np.random.default_rng([4, seed])
        acts = rng.random((60, 20)).astype(np.float32)
        indices = np.tile(np.arange(20, dtype=np.int32), (60, 1))
        codes = pool(acts, indices, np.arange(60), np.ones(60, bool), 60)
        sample = Sample(codes, np.arange(60) % 2 == 0, np.zeros(60, np.int64))
        q = scores.q_values(scores.p_values(scores.welch(sample, np.ones(60, np.int64))))
        rejected += bool((q <= 0.1).any())
    assert 3 < rejected < 37


def test_q_values_are_those_of_benjamini_and_hochberg():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.8])
    np.testing.assert_allclose(scores.q_values(p), [0.025, 0.05, 0.05, 0.025, 0.8], rtol=1e-12)
    assert scores.q_values(np.zeros(0)).shape == (0,)


def test_welch_says_nothing_where_it_is_undefined():
    acts = np.array([[1.0], [1], [0], [0]], np.float32)
    codes = pool(acts, np.zeros((4, 1), np.int32), np.arange(4), np.ones(4, bool), 4)
    sample = Sample(codes, np.array([True, True, False, False]), np.zeros(4, np.int64))
    found = scores.welch(sample, np.ones(4, np.int64))
    assert found.t.tolist() == [0.0] and scores.p_values(found).tolist() == [1.0]
    assert METRICS["auroc"](sample, np.ones(4, np.int64)).tolist() == [1.0]


def test_an_empty_side_is_refused():
    sample, _ = build(0, "mean")
    with pytest.raises(InputError, match="0 positive and 12 negative"):
        METRICS["mean"](sample, (~sample.positive).astype(np.int64))


def test_codes_without_a_firing_feature():
    codes = pool(np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int32), np.array([0, 1, 1]), np.ones(3, bool), 2)
    sample = Sample(codes, np.array([True, False]), np.zeros(2, np.int64))
    assert all(metric(sample, np.ones(2, np.int64)).shape == (0,) for metric in METRICS.values())


@pytest.mark.parametrize("seed", range(2))
def test_pool_gathers_what_the_dense_codes_hold(seed):
    acts, indices, text, keep, positive, _ = planted.codes(seed)
    acts[0, 0] = -1.0  # not active
    blocks = planted.dense(np.maximum(acts, 0), indices, text, keep)
    codes = pool(acts, indices, text, keep, len(positive))
    assert codes.tokens.tolist() == [len(b) for b in blocks]
    pairs = set()
    for i in range(len(codes.column)):
        block = blocks[codes.text[i]][:, codes.features[codes.column[i]]]
        pairs.add((int(codes.text[i]), int(codes.features[codes.column[i]])))
        assert (codes.total[i], codes.firing[i]) == (pytest.approx(block.sum(), rel=1e-12), (block > 0).sum())
        assert (codes.largest[i], codes.last[i]) == (block.max(), block[-1])
    assert pairs == {(t, f) for t, b in enumerate(blocks) for f in np.flatnonzero(b.any(0)).tolist()}
