"""The greedy cover against its definition, lazy greedy with a heap, and all subsets."""

import heapq
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qscope.coverage.footprints import Footprints
from qscope.coverage.subset import smallest_cover
from qscope.errors import InputError
from tests.coverage.drawn import F, as_sets, footprints, subsets, union, zipf


def lazy(sets, wanted):
    """Minoux 1978: (items, gains)."""
    heap = [(-len(ids), i) for i, ids in enumerate(sets)]
    heapq.heapify(heap)
    seen, items, gains = set(), [], []
    while len(seen) < wanted:
        _, i = heapq.heappop(heap)
        gain = len(sets[i] - seen)
        if not heap or (-gain, i) <= heap[0]:
            items.append(i)
            gains.append(gain)
            seen |= sets[i]
        else:
            heapq.heappush(heap, (-gain, i))
    return items, gains


@given(footprints(), st.sampled_from([0.1, 0.5, 0.7, 0.9, 1.0]))
def test_picks_are_those_of_lazy_greedy(found, share):
    sets = as_sets(found)
    cover = smallest_cover(found, share)
    items, gains = lazy(sets, cover.wanted)
    assert cover.items.tolist() == items and cover.gains.tolist() == gains
    assert cover.covered.tolist() == np.cumsum(gains).astype(int).tolist()
    whole = len(union(sets, range(len(sets))))
    assert cover.features == whole and cover.reached
    assert cover.wanted == min(c for c in range(whole + 1) if c >= share * whole - 1e-9)
    assert cover.share == pytest.approx(len(union(sets, items)) / whole if whole else float("nan"), nan_ok=True)


def test_picks_equal_lazy_greedy_on_larger_input():
    ids = zipf(0, 800, 12, 600)
    found = Footprints.from_topk(np.ones(ids.shape), ids, 600)
    cover = smallest_cover(found, 0.95)
    assert (cover.items.tolist(), cover.gains.tolist()) == lazy(as_sets(found), cover.wanted)
    assert len(cover.items) < 300 and (np.diff(cover.gains) <= 0).all()


@given(footprints(least=2))
def test_a_budget_reaches_the_guaranteed_share_of_the_best(found):
    sets = as_sets(found)
    for budget in range(1, len(sets) + 1):
        best = max(len(union(sets, chosen)) for chosen in subsets(len(sets), budget))
        cover = smallest_cover(found, 1.0, budget)
        assert len(cover.items) <= budget
        assert int(cover.gains.sum()) >= (1 - (1 - 1 / budget) ** budget) * best - 1e-9
        assert cover.reached == (int(cover.gains.sum()) == cover.features)


@given(footprints(), st.sampled_from([0.3, 0.6, 1.0]))
def test_a_share_takes_at_most_the_harmonic_number_times_the_fewest_items(found, share):
    sets = as_sets(found)
    cover = smallest_cover(found, share)
    sizes = range(len(sets) + 1)
    fewest = next(n for n in sizes if any(len(union(sets, c)) >= cover.wanted for c in subsets(len(sets), n)))
    largest = max(map(len, sets))
    bound = sum(1 / s for s in range(1, largest + 1))
    assert len(cover.items) <= bound * fewest + 1e-9
    assert bound <= 1 + math.log(max(1, largest))


def test_greedy_can_miss_the_best_and_ties_take_the_lowest_item():
    """The standard trap: two items cover all six, the greedy one begins with the four in the middle."""
    trap = Footprints.from_sets([[0, 1, 2], [3, 4, 5], [1, 2, 3, 4], [1, 2, 3, 4]], F)
    cover = smallest_cover(trap)
    assert cover.items.tolist() == [2, 0, 1] and cover.gains.tolist() == [4, 1, 1]
    assert smallest_cover(trap, 0.6).items.tolist() == [2]
    assert smallest_cover(trap, 1.0, most=2).items.tolist() == [2, 0]


def test_shares_are_taken_as_they_are_written():
    ten = Footprints.from_sets([[i] for i in range(10)], 10)
    for share, items in ((0.7, 7), (0.9, 9), (0.3, 3), (0.31, 4), (1.0, 10)):
        assert len(smallest_cover(ten, share).items) == items
    hundred = Footprints.from_sets([[i] for i in range(100)], 100)
    assert 0.55 * 100 > 55 and len(smallest_cover(hundred, 0.55).items) == 55


def test_an_empty_benchmark_needs_no_item():
    cover = smallest_cover(Footprints.from_sets([[], []], F))
    assert len(cover.items) == 0 and cover.reached and np.isnan(cover.share)


def test_shares_and_budgets_out_of_range_are_refused():
    found = Footprints.from_sets([[1]], F)
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(InputError, match="up to 1"):
            smallest_cover(found, share)
    with pytest.raises(InputError, match="1 or more"):
        smallest_cover(found, 1.0, 0)
