"""Coverage of targets: by hand, and the closed form against all subsets."""

import itertools

import numpy as np
import pytest

from qscope.errors import InputError
from qscope.synthesis.coverage import budget_curve, budgets, coverage, missing, ordered_curve, support, weak

SEED = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool)
ADDED = np.array([[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]], bool)


def test_missing_and_weakly_covered_by_hand():
    assert support(SEED).tolist() == [2, 1, 0, 0]
    assert coverage(SEED) == 0.5
    assert missing(SEED).tolist() == [2, 3]
    assert weak(SEED, 2).tolist() == [1]
    assert weak(SEED, 1).tolist() == []


def test_the_curve_is_the_mean_over_all_subsets():
    sizes = range(len(ADDED) + 1)
    found = budget_curve(SEED, ADDED, sizes)
    for n in sizes:
        every = [
            coverage(np.concatenate([SEED, ADDED[list(chosen)]])) for chosen in itertools.combinations(range(5), n)
        ]
        assert found[n] == pytest.approx(np.mean(every), abs=1e-14)  # a few roundings of numbers up to 1
    assert found[0] == 0.5 and found[5] == 1.0


def test_in_order():
    assert ordered_curve(SEED, ADDED).tolist() == [0.5, 0.75, 0.75, 0.75, 0.75, 1.0]
    assert ordered_curve(SEED, ADDED[:0]).tolist() == [0.5]


def test_without_seed_or_without_targets():
    assert budget_curve(SEED[:0], ADDED, [0, 5]).tolist() == [0.0, 0.75]
    with pytest.raises(InputError, match="without a target"):
        coverage(SEED[:, :0])
    with pytest.raises(InputError, match="without a target"):
        budget_curve(SEED[:, :0], ADDED[:, :0], [1])


def test_budgets_rise_from_0_to_all():
    found = budgets(100, 10)
    assert found[0] == 0 and found[1] == 1 and found[-1] == 100 and found == sorted(set(found))
    assert budgets(0) == [0]
