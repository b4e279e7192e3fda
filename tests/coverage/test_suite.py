"""Suites against sets, pairs and a planted case whose answer is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope.coverage import measures
from qscope.coverage.footprints import FootprintCounts, Footprints
from qscope.coverage.suite import Suite, linkage
from qscope.errors import InputError
from tests.coverage.drawn import F, as_sets, footprints, mean, planted_suite, subsets, union

TIGHT = {"rel": 0, "abs": 1e-12}
suites = st.lists(footprints(most=4), min_size=1, max_size=4)


def made(parts):
    return Suite.of({str(i): part for i, part in enumerate(parts)})


@given(suites)
def test_matrices_hold_the_measures_of_pairs(parts):
    suite = made(parts)
    raw, matched = suite.overlaps(), suite.size_matched()
    n = min(map(len, parts))
    fixed, null = suite.size_matched(n), suite.one_population(n)
    for (a, left), (b, right) in itertools.product(enumerate(parts), repeat=2):
        one, other = left.present(), right.present()
        assert raw.overlap[a, b] == pytest.approx(measures.overlap(one, other), nan_ok=True, **TIGHT)
        assert raw.overlap_min[a, b] == pytest.approx(measures.overlap_min(one, other), nan_ok=True, **TIGHT)
        assert raw.jaccard[a, b] == pytest.approx(measures.jaccard(one, other), nan_ok=True, **TIGHT)
        if a == b:
            for table in (raw, matched, fixed):
                assert table.jaccard[a, a] == pytest.approx(1 if one.any() else np.nan, nan_ok=True, **TIGHT)
            continue
        arguments = left.counts(), len(left), right.counts(), len(right)
        for table, pair in (
            (matched, measures.size_matched(*arguments)),
            (fixed, measures.size_matched(*arguments, n)),
            (null, measures.pooled_split_overlap(*arguments, n)),
        ):
            assert table.overlap[a, b] == pytest.approx(pair.overlap, nan_ok=True, **TIGHT)
            assert table.overlap_min[a, b] == pytest.approx(pair.overlap_min, nan_ok=True, **TIGHT)
            assert table.jaccard[a, b] == pytest.approx(pair.jaccard, nan_ok=True, **TIGHT)


@given(suites)
def test_a_benchmark_adds_what_only_it_fires(parts):
    sets = [set(np.flatnonzero(part.present()).tolist()) for part in parts]
    found = made(parts).marginal()
    for b, own in enumerate(sets):
        assert found[b] == len(own - union(sets, set(range(len(sets))) - {b}))
    assert made(parts).union().sum() == len(union(sets, range(len(sets))))


@given(st.lists(footprints(most=3), min_size=1, max_size=3))
def test_size_matched_addition_is_the_mean_over_all_subsets(parts):
    n = min(map(len, parts))
    sets = [as_sets(part) for part in parts]
    drawn = list(itertools.product(*([union(s, c) for c in subsets(len(s), n)] for s in sets)))
    found = made(parts).marginal(n)
    for b in range(len(parts)):
        added = mean(len(pick[b] - union(pick, set(range(len(parts))) - {b})) for pick in drawn)
        assert found[b] == pytest.approx(float(added), **TIGHT)
    covered = made(parts).order(n).covered[-1]
    assert covered == pytest.approx(float(mean(len(set().union(*pick)) for pick in drawn)), **TIGHT)


@given(suites)
def test_the_order_takes_what_adds_most_first(parts):
    sets = [set(np.flatnonzero(part.present()).tolist()) for part in parts]
    added = made(parts).order()
    left, seen = list(range(len(sets))), set()
    for b, gain, covered in zip(added.order.tolist(), added.gains, added.covered, strict=True):
        assert b == max(left, key=lambda i: (len(sets[i] - seen), -i)) and gain == len(sets[b] - seen)
        seen |= sets[b]
        left.remove(b)
        assert covered == len(seen)


def test_blocks_of_features_change_nothing(monkeypatch):
    parts, _ = planted_suite()
    whole = Suite.of(parts)
    before = whole.overlaps().common, whole.marginal(), whole.marginal(20)
    monkeypatch.setattr("qscope.coverage.suite._BLOCK", 7)
    after = whole.overlaps().common, whole.marginal(), whole.marginal(20)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13)


def test_a_planted_suite_comes_out_as_it_was_made():
    """a and b are one source, c shares half of its features, d none but the two that all fire; sets are complete."""
    parts, pools = planted_suite()
    suite = Suite.of(parts)
    full = {name: {0, 1, *pool} for name, pool in pools.items()}
    for a, b in itertools.product(range(4), repeat=2):
        one, other = full["abcd"[a]], full["abcd"[b]]
        assert suite.overlaps().overlap[a, b] == len(one & other) / len(one)
    assert suite.marginal().tolist() == [0, 0, 10, 20]
    assert suite.order().order.tolist() == [0, 3, 2, 1] and suite.order().gains.tolist() == [22, 20, 10, 0]
    matched = suite.size_matched(5).jaccard
    assert matched[0, 1] > 1.5 * matched[0, 2] > 1.5 * matched[0, 3]
    null = suite.one_population(5).jaccard
    assert null[0, 1] == pytest.approx(matched[0, 1], rel=0.02) and null[0, 3] > 1.5 * matched[0, 3]
    assert suite.ceiling(5)[:2] == pytest.approx(matched[0, 1], rel=0.1)  # both have six of the same twenty
    tree, leaves = linkage(matched)
    assert set(tree[0, :2]) == {0, 1} and set(tree[1, :2]) == {2, 4}
    assert abs(leaves.tolist().index(0) - leaves.tolist().index(1)) == 1


def test_linkage_is_scipys_and_takes_undefined_pairs():
    from scipy.cluster import hierarchy

    similarity = np.array([[1, 0.8, 0.1], [0.8, 1, np.nan], [0.1, np.nan, 1]])
    tree, _ = linkage(similarity)
    expected = hierarchy.linkage([0.2, 0.9, 1.0], "average", optimal_ordering=True)
    np.testing.assert_allclose(tree, expected, rtol=1e-12)
    with pytest.raises(InputError, match="two or more"):
        linkage(np.ones((1, 1)))


def test_ceilings_need_twice_the_items():
    suite = Suite.of({"a": Footprints.from_sets([[0], [0], [1]], F), "b": Footprints.from_sets([[0]] * 4, F)})
    assert np.isnan(suite.ceiling(2)[0]) and suite.ceiling(2)[1] == 1


def test_streamed_counts_make_the_same_suite():
    parts, _ = planted_suite()
    one = Suite.of(parts)
    other = Suite.of({name: FootprintCounts.of(part) for name, part in parts.items()})
    assert np.array_equal(one.counts, other.counts) and np.array_equal(one.items, other.items)


def test_suites_of_nothing_are_refused():
    with pytest.raises(InputError, match="one or more"):
        Suite.of({})
    with pytest.raises(InputError, match="same SAE"):
        Suite.of({"a": FootprintCounts.empty(3), "b": FootprintCounts.empty(4)})
    with pytest.raises(InputError, match="No items in b"):
        Suite.of({"a": Footprints.from_sets([[1]], F), "b": FootprintCounts.empty(F)})
