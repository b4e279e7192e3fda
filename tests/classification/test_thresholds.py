"""Calibrated thresholds against trying every level."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope.classification.thresholds import calibrate, scales
from qscope.errors import InputError


def every_level(negative, allowed):
    """The definition: all levels from N down, the first that holds; thresholds are order statistics."""
    count, clauses = negative.shape
    for level in range(count, -1, -1):
        cuts = [sorted(negative[:, c], reverse=True)[level] if level < count else 0.0 for c in range(clauses)]
        fired = sum(any(row[c] > cuts[c] for c in range(clauses)) for row in negative)
        if fired <= allowed:
            return cuts, level, fired
    raise AssertionError


def test_every_small_case():
    """All 3 x 2 tables of the values 0, 1, 2, and every number of false positives that may be allowed."""
    for numbers in itertools.product((0.0, 1.0, 2.0), repeat=6):
        negative = np.array(numbers).reshape(3, 2)
        for allowed in range(4):
            found = calibrate(negative, allowed / 3)
            cuts, level, fired = every_level(negative, allowed)
            assert (found.thresholds.tolist(), found.level, found.false_positives) == (cuts, level, fired)
            assert found.rate == fired / 3 <= allowed / 3


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_larger_cases(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    count, clauses = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    negative = np.maximum(rng.integers(-5, 8, (count, clauses)) / 4, 0)
    target = data.draw(st.floats(0, 1))
    found = calibrate(negative, target)
    cuts, level, fired = every_level(negative, int(np.floor(target * count + 1e-9)))
    assert (found.thresholds.tolist(), found.level, found.false_positives) == (cuts, level, fired)
    looser = calibrate(negative, min(1, target + 0.2))
    assert (looser.thresholds <= found.thresholds).all()


def test_one_clause_is_the_order_statistic():
    negative = np.arange(1.0, 101.0)[:, None]
    for target, cut in ((0, 100), (0.01, 99), (0.29, 71), (0.995, 1), (1, 0)):  # 0.29 x 100 is 28.99... in binary
        assert calibrate(negative, target).thresholds[0] == cut


def test_equal_values_are_never_exceeded():
    found = calibrate(np.array([[2.0]] * 9 + [[1.0]]), 0.5)
    assert (found.thresholds[0], found.false_positives) == (2.0, 0)


def test_what_cannot_be_calibrated():
    good = np.ones((3, 1))
    for negative, target, message in (
        (good, 1.5, "between 0 and 1"),
        (good, float("nan"), "between 0 and 1"),
        (good[:0], 0.1, "no negative calibration text"),
        (-good, 0.1, "at least 0"),
        (good * np.nan, 0.1, "finite"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(negative, target)


def test_scales_are_observed_values():
    values = np.zeros((300, 3))
    values[:200, 0] = np.arange(1, 201)
    values[0, 1] = 4.5
    np.testing.assert_array_equal(scales(values), [198, 4.5, 1])  # the 198th of 200: the first with 99 % at or below
