"""Thresholds of the clauses of an OR rule, from pooled activations of known texts."""

from typing import NamedTuple

import numpy as np

from qscope.errors import InputError
from qscope.finding.pooled import Floats

SCALE_QUANTILE = 0.99


class Calibration(NamedTuple):
    """Thresholds of C clauses that hold a false-positive rate on N negative texts."""

    thresholds: Floats
    """[C], >= 0"""
    level: int
    """Negative texts that each clause alone may exceed its threshold in; all N: the thresholds are 0"""
    false_positives: int
    """Negative texts in which the rule fires"""
    rate: float
    """false_positives / N"""


def calibrate(negative: Floats, target: float) -> Calibration:
    """The lowest thresholds at one common level that hold the rule's false-positive rate at or below `target`.

    At level r the threshold of each clause is the (r + 1)-th largest of its values, 0 for r = N; as a clause fires
    above its threshold, at most r texts exceed it, fewer where values are equal. With r the thresholds fall and the
    rule's false positives grow, so the largest r that holds the target is found by bisection. Level 0 has no false
    positive: there always is one.

    Args:
        negative: [N, C] pooled activations of the negative calibration texts, >= 0; of the membership that the rule
            will be used with.
        target: 0 to 1; N target is rounded down to whole texts.

    Raises:
        InputError: for no texts, a target that is no rate, and values that are negative or not finite.
    """
    if not 0 <= target <= 1:
        raise InputError(f"The false-positive rate to hold is {target}; give one between 0 and 1.")
    if not len(negative):
        raise InputError("There is no negative calibration text to hold a false-positive rate on. Give at least one.")
    if not (np.isfinite(negative).all() and (negative >= 0).all()):
        raise InputError("Activations to calibrate thresholds on must be finite and at least 0 (after the ReLU).")
    count = len(negative)
    allowed = int(np.floor(target * count + 1e-9))  # 0.29 x 100 is 28.999... in floating point
    falling = np.concatenate([-np.sort(-negative, axis=0), np.zeros((1, negative.shape[1]))])
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if _exceeding(negative, falling[middle]) <= allowed:
            low = middle
        else:
            high = middle - 1
    found = _exceeding(negative, falling[low])
    return Calibration(falling[low].copy(), low, found, found / count)


def scales(values: Floats) -> Floats:
    """[C] the 0.99 quantile (an observed value, not interpolated) of each column's values above 0; 1 if there are none.

    values: [T, C] pooled activations of the training texts.
    """
    found = np.ones(values.shape[1])
    for place, column in enumerate(values.T):
        active = column[column > 0]
        if len(active):
            found[place] = np.quantile(active, SCALE_QUANTILE, method="inverted_cdf")
    return found


def _exceeding(values: Floats, thresholds: Floats) -> int:
    return int((values > thresholds).any(axis=1).sum())
