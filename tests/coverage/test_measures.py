"""Closed forms against all subsets, in fractions; 1e-12 is a thousand times what the sizes here can lose."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope.coverage import measures
from qscope.coverage.footprints import Footprints
from qscope.errors import InputError
from tests.coverage.drawn import F, as_sets, exact_probability, footprints, mean, subsets, union

TIGHT = {"rel": 0, "abs": 1e-12}


def parts(found):
    return found.counts(), len(found), as_sets(found)


@given(footprints())
def test_saturation_is_the_mean_over_all_subsets(found):
    m, N, sets = parts(found)
    whole = len(union(sets, range(N)))
    curve = measures.saturation(m, N, np.arange(1, N + 1))
    for n in range(1, N + 1):
        size = mean(len(union(sets, chosen)) for chosen in subsets(N, n))
        assert measures.expected_size(m, N, n) == pytest.approx(float(size), **TIGHT)
        expected = float(size / whole) if whole else float("nan")
        assert curve[n - 1] == pytest.approx(expected, nan_ok=True, **TIGHT)


@given(footprints())
def test_redundancy_is_the_sum_of_the_curve(found):
    m, N, sets = parts(found)
    whole = len(union(sets, range(N)))
    if not whole:
        assert np.isnan(measures.redundancy(m, N)) and np.isnan(measures.saturation_area(m, N))
        return
    sizes = [mean(len(union(sets, chosen)) for chosen in subsets(N, n)) for n in range(1, N + 1)]
    assert measures.redundancy(m, N) == pytest.approx(float(sum(sizes) / whole**2), **TIGHT)
    assert measures.saturation_area(m, N) == pytest.approx(float(sum(sizes) / whole / N), **TIGHT)
    for n in range(1, N + 1):
        expected = float(sum(sizes[:n]) / sizes[n - 1] ** 2)
        assert measures.size_matched_redundancy(m, N, n) == pytest.approx(expected, **TIGHT)


@pytest.mark.parametrize(("N", "k"), [(1, 1), (2, 3), (50, 4), (3000, 100)])
def test_redundancy_has_the_limits_of_the_formula(N, k):
    assert measures.redundancy(np.full(k, N), N) == pytest.approx(N / k, rel=1e-14)
    assert measures.redundancy(np.ones(N * k, int), N) == pytest.approx((N + 1) / (2 * N * k), rel=1e-14)
    assert measures.size_matched_redundancy(np.full(k, N), N, N) == pytest.approx(N / k, rel=1e-12)
    assert measures.size_matched_redundancy(np.ones(N * k, int), N, N) == pytest.approx(
        (N + 1) / (2 * N * k), rel=1e-12
    )


@pytest.mark.parametrize("N", [1, 2, 9, 100, 1319, 30_000])
def test_probabilities_are_those_of_integers(N):
    """Absolute 1e-12 everywhere; relative too, which small probabilities need, as there are many of them."""
    sizes = sorted({n for n in (1, 2, 5, int(N**0.5), int(N**0.5) + 1, N // 3, N // 2, N - 1, N) if 1 <= n <= N})
    m = np.array(sorted({c for c in (0, 1, 2, 3, 17, int(N**0.5), N // 7, N // 2, N - 1, N) if c <= N}))
    for n in sizes:
        found = measures.firing_probability(m, N, n)
        exact = [exact_probability(int(c), N, n) for c in m]
        assert found == pytest.approx(np.array([float(p) for p in exact]), rel=1e-12, abs=0)


def test_size_matched_redundancy_keeps_its_digits():
    """The closed sum at n >= sqrt(N) subtracts nm - (N - m - n) p: about N / n units in the last place are lost."""
    N = 700
    for n in (3, 26, 27, 90, 350, 700):
        for m in (1, 2, 40, 699):
            total = sum(exact_probability(m, N, k) for k in range(1, n + 1))
            expected = float(total / exact_probability(m, N, n) ** 2)
            assert measures.size_matched_redundancy(np.array([m]), N, n) == pytest.approx(expected, rel=1e-12)


def test_sums_of_rare_features_keep_their_digits_among_a_million_items():
    """m = 1: p(k) = k / N, so the figure is N (n + 1) / 2n. With 1 - q for p it would lose 1e-11 and more."""
    N = 1_000_000
    for n in (1, 2, 30, 999, 1000, 1001, 5000):
        found = measures.size_matched_redundancy(np.array([1]), N, n)
        assert found == pytest.approx(N * (n + 1) / (2 * n), rel=1e-12)


def test_curves_of_many_items_and_features():
    m = np.minimum(30_000, np.random.default_rng(0).zipf(1.3, 131_072))
    curve = measures.saturation(m, 30_000, measures.curve_sizes(30_000))
    assert len(curve) > 50 and curve[-1] == 1 and (np.diff(curve) > 0).all()


@given(footprints(most=5), footprints(most=4))
def test_size_matched_overlap_is_the_ratio_of_means_over_all_pairs_of_subsets(one, other):
    (m1, N1, sets1), (m2, N2, sets2) = parts(one), parts(other)
    for n in range(1, min(N1, N2) + 1):
        pairs = [(union(sets1, a), union(sets2, b)) for a in subsets(N1, n) for b in subsets(N2, n)]
        expect(measures.size_matched(m1, N1, m2, N2, n), pairs)
    assert measures.size_matched(m1, N1, m2, N2) == measures.size_matched(m1, N1, m2, N2, min(N1, N2))


def expect(found, pairs):
    left, right = mean(len(a) for a, _ in pairs), mean(len(b) for _, b in pairs)
    common = mean(len(a & b) for a, b in pairs)
    assert (found.left, found.right) == pytest.approx((float(left), float(right)), **TIGHT)
    assert found.common == pytest.approx(float(common), **TIGHT)
    for value, whole in (
        (found.overlap, left),
        (found.overlap_min, min(left, right)),
        (found.jaccard, left + right - common),
    ):
        assert value == pytest.approx(float(common / whole) if whole else float("nan"), nan_ok=True, rel=0, abs=1e-11)


@given(footprints(most=6), st.data())
def test_split_overlap_is_the_mean_over_all_disjoint_pairs(found, data):
    m, N, sets = parts(found)
    n1 = data.draw(st.integers(1, N))
    n2 = data.draw(st.integers(1, N))
    if n1 + n2 > N:
        with pytest.raises(InputError, match="n1 \\+ n2 <= N"):
            measures.split_overlap(m, N, n1, n2)
        return
    pairs = [(union(sets, a), union(sets, b)) for a in subsets(N, n1) for b in subsets(N, n2) if not set(a) & set(b)]
    expect(measures.split_overlap(m, N, n1, n2), pairs)


@given(footprints(most=4), footprints(most=3))
def test_the_null_of_one_population_is_a_split_of_both_together(one, other):
    m1, N1, sets1 = parts(one)
    m2, N2, sets2 = parts(other)
    both, N = sets1 + sets2, N1 + N2
    cut = [(union(both, a), union(both, set(range(N)) - set(a))) for a in subsets(N, N1)]
    expect(measures.pooled_split_overlap(m1, N1, m2, N2), cut)
    n = min(N1, N2)
    pairs = [(union(both, a), union(both, b)) for a in subsets(N, n) for b in subsets(N, n) if not set(a) & set(b)]
    expect(measures.pooled_split_overlap(m1, N1, m2, N2, n), pairs)


@given(footprints(), footprints())
def test_overlaps_of_sets_are_bounded_and_ordered(one, other):
    a, b = one.present(), other.present()
    A, B = set(np.flatnonzero(a).tolist()), set(np.flatnonzero(b).tolist())
    if not A or not B:
        assert np.isnan(measures.overlap_min(a, b))
        return
    assert measures.overlap(a, b) == len(A & B) / len(A)
    assert measures.overlap_min(a, b) == len(A & B) / min(len(A), len(B))
    assert measures.jaccard(a, b) == len(A & B) / len(A | B)
    low, middle, high = measures.jaccard(a, b), measures.overlap(a, b), measures.overlap_min(a, b)
    assert 0 <= low <= middle <= high <= 1
    assert high == max(middle, measures.overlap(b, a)) and measures.overlap(a, a) == measures.jaccard(a, a) == 1


@given(footprints(), st.floats(0.01, 1))
def test_items_for_a_share_is_the_first_size_that_reaches_it(found, share):
    m, N, _ = parts(found)
    if not m.any():
        return
    reached = [n for n in range(1, N + 1) if measures.saturation(m, N, n) >= share]
    assert measures.items_for_share(m, N, share) == (reached[0] if reached else N)


@given(footprints())
def test_items_are_worth_their_mean_contribution_over_all_orders(found):
    import itertools

    m, N, sets = parts(found)
    each = measures.item_redundancy(found)
    for i in range(N):
        others = union(sets, set(range(N)) - {i})
        assert each.exclusive[i] == len(sets[i] - others)
        expected = len(sets[i] & others) / len(sets[i]) if sets[i] else float("nan")
        assert each.covered[i] == pytest.approx(expected, nan_ok=True, **TIGHT)
    assert each.worth.sum() == pytest.approx(int((m > 0).sum()), **TIGHT)
    if N <= 5:
        orders = list(itertools.permutations(range(N)))
        for i in range(N):
            added = Fraction(sum(len(sets[i] - union(sets, o[: o.index(i)])) for o in orders), len(orders))
            assert each.worth[i] == pytest.approx(float(added), **TIGHT)


def test_counting_different_counts_equals_sorting():
    rng = np.random.default_rng(0)
    for m in (rng.integers(0, 9, 50), np.array([10**9, 3, 3]), np.empty(0, int), rng.integers(0, 3, (2, 5))):
        values, place = measures._different(m)
        assert np.array_equal(values, np.unique(m)) and np.array_equal(values[place], m.ravel())


def test_sizes_and_counts_out_of_range_are_refused():
    m = np.array([1, 2, 0])
    for n in (0, 3, -1):
        with pytest.raises(InputError, match="from 1 to 2"):
            measures.saturation(m, 2, n)
        with pytest.raises(InputError, match="from 1 to 2"):
            measures.size_matched(m, 2, m, 5, n)
    for counts in ([3], [-1]):
        with pytest.raises(InputError, match="0 to 2 exist"):
            measures.firing_probability(np.array(counts), 2, 1)
    for share in (0, 1.1, float("nan")):
        with pytest.raises(InputError, match="share"):
            measures.items_for_share(m, 2, share)
    assert Footprints.from_sets([[]], F).counts().sum() == 0
