"""Half-samples, the jackknife and permutations: what they draw, and whether intervals hold a known truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope.coverage import measures, resampling
from qscope.coverage.footprints import Footprints
from qscope.coverage.suite import Suite
from qscope.errors import InputError
from tests.coverage.drawn import F, footprints, planted_suite, zipf

D_SAE, K = 300, 8


def of(seed, items, exponent=1.1):
    ids = zipf(seed, items, K, D_SAE, exponent)
    return Footprints.from_topk(np.ones(ids.shape), ids, D_SAE)


@given(footprints(least=2), st.integers(0, 5))
def test_halves_are_items_drawn_without_replacement(found, seed):
    drawn = list(resampling.half_counts(found, 3, seed))
    rng = np.random.default_rng(seed)
    for m, N in drawn:
        chosen = np.sort(rng.permutation(len(found))[: len(found) // 2])
        assert len(found) // 2 == N and np.array_equal(m, found.rows(chosen).counts())
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(drawn, resampling.half_counts(found, 3, seed), strict=True))


def test_the_jackknife_leaves_out_each_item():
    found = of(0, 30)
    each = [np.arange(30) != i for i in range(30)]
    without = np.array([measures.redundancy(found.rows(keep).counts(), 29) for keep in each])
    spread = 1.959964 * np.sqrt(29 * without.var())
    interval = resampling.redundancy_interval(found)
    assert interval.value == measures.redundancy(found.counts(), 30)
    assert interval.high - interval.value == pytest.approx(spread, rel=1e-9)
    assert interval.value - interval.low == pytest.approx(spread, rel=1e-9)


def test_half_samples_hold_the_truth_where_the_bootstrap_does_not():
    """40 benchmarks of 60 items from a known population, figures at n = 30. Exact 95 % intervals hold the truth in at
    least 36 of 40 with probability 0.95; these are a bit wide. Bootstrap intervals hold it nearly never."""
    big, n, trials = of(1000, 20_000), 30, 40
    measure = [
        lambda m, N: measures.size_matched_redundancy(m, N, n),
        lambda m, N: measures.expected_size(m, N, n),
    ]
    truth = [figure(big.counts(), len(big)) for figure in measure]
    held, booted, bias = np.zeros(2), np.zeros(2), np.zeros(2)
    for t in range(trials):
        found = of(t, 60)
        rng = np.random.default_rng(t)
        again = [found.rows(rng.integers(60, size=60)).counts() for _ in range(80)]
        for i, figure in enumerate(measure):
            half = resampling.interval(found, figure, 80, seed=t)
            held[i] += half.low <= truth[i] <= half.high
            low, high = np.quantile([figure(m, 60) for m in again], (0.025, 0.975))
            booted[i] += low <= truth[i] <= high
            bias[i] += half.value / truth[i] - 1
    assert (held >= 0.9 * trials).all() and (booted <= 0.1 * trials).all()
    assert (np.abs(bias / trials) < 0.02).all()


def test_intervals_of_pairs_and_suites_hold_the_value_and_agree():
    parts = list(planted_suite()[0].values())
    bounds = resampling.suite_intervals(parts, 20, 60)
    suite = Suite.of({str(i): part for i, part in enumerate(parts)}).size_matched(20)
    for table, value in ((bounds.jaccard, suite.jaccard), (bounds.overlap, suite.overlap)):
        assert np.array_equal(table.value, value)
        assert (table.low <= value + 1e-9).all() and (value <= table.high + 1e-9).all()
    pair = resampling.overlap_intervals(parts[0], parts[2], 20, 60)
    assert pair.jaccard.value == pytest.approx(suite.jaccard[0, 2], rel=1e-12)
    assert pair.overlap.low <= pair.overlap.value <= pair.overlap.high
    assert pair == resampling.overlap_intervals(parts[0], parts[2], 20, 60)
    same = resampling.overlap_intervals(parts[0], parts[1], 20, 60).jaccard
    assert same.low > pair.jaccard.high and bounds.overlap_min.low[0, 1] > bounds.overlap_min.high[0, 3]


def test_excess_over_the_null_text_is_found_where_it_is():
    parts, _ = planted_suite()
    found = resampling.excess_over_null(parts["a"], parts["b"], parts["d"], 20, replicates=99)
    assert found.value.low > 0 and found.p_value == pytest.approx(0.02)
    none = resampling.excess_over_null(parts["c"], parts["a"], parts["b"], 20, replicates=99)
    assert none.value.low < 0 < none.value.high and none.p_value > 0.1


def test_permutations_tell_one_source_from_two():
    parts, _ = planted_suite()
    other = resampling.permutation_test(parts["a"], parts["d"], 20, permutations=99)
    assert other.p_value == 0.01 and other.observed < other.null.low
    expected = measures.pooled_split_overlap(parts["a"].counts(), 60, parts["d"].counts(), 60, 20).jaccard
    assert other.null.value == pytest.approx(expected, rel=0.01)
    same = [
        resampling.permutation_test(of(2 * t, 25), of(2 * t + 1, 25), permutations=39, seed=t).p_value
        for t in range(40)
    ]
    assert 0.3 < np.mean(same) < 0.7 and min(same) < 0.3  # uniform: 0.5, of standard error 0.05


def test_sizes_beyond_half_and_benchmarks_too_small_are_refused():
    small, large = Footprints.from_sets([[0], [1], [2]], F), Footprints.from_sets([[0]] * 10, F)
    for call in (
        lambda: resampling.redundancy_interval(small, 2),
        lambda: resampling.overlap_intervals(small, large, 2),
        lambda: resampling.suite_intervals([large, small], 2),
        lambda: resampling.excess_over_null(large, large, small, 2),
    ):
        with pytest.raises(InputError, match="n from 1 to 1"):
            call()
    one = Footprints.from_sets([[0]], F)
    with pytest.raises(InputError, match="two items or more"):
        resampling.redundancy_interval(one)
    with pytest.raises(InputError, match="no halves"):
        next(resampling.half_counts(one, 1))
