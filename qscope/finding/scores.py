"""Scores that say how much more a feature belongs to the positive texts than to the negative ones.

Every score is a function of a `Sample` and of whole-number weights, one per text: how often the text counts. Weights of
0 leave texts out, so training texts, held-out texts, halves and bootstrap replicates are the same codes under other
weights.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints, PooledCodes, Pooling

Metric = Literal["mean", "rate", "auroc", "t", "nu"]


@dataclass(frozen=True)
class Sample:
    """Codes of texts with what each text is."""

    codes: PooledCodes
    positive: npt.NDArray[np.bool_]
    """[T]"""
    group: Ints
    """[T] of negative texts: a number for the file or language that they come from; of positive ones without meaning"""
    pooling: Pooling = "mean"

    @cached_property
    def pooled(self) -> tuple[Floats, Floats]:
        return self.codes.values(self.pooling)

    @cached_property
    def by_value(self) -> tuple[Ints, Ints]:
        """(entries with a value above 0 by feature, then value; number [M'] of the run of equal values of each)."""
        value, column = self.pooled[0], self.codes.column
        entries = np.flatnonzero(value > 0)
        order = entries[np.lexsort((value[entries], column[entries]))]
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(column[order]) != 0) | (np.diff(value[order]) != 0)
        return order, np.cumsum(new) - 1

    def sum(self, weight: Ints, entries: Floats) -> Floats:
        """[C]: sum over texts of weight x entry."""
        codes = self.codes
        found = np.bincount(codes.column, weights=weight[codes.text] * entries, minlength=len(codes.features))
        return found.astype(np.float64)  # without entries bincount gives whole numbers

    def sides(self, weight: Ints) -> tuple[Ints, Ints, int, int]:
        """(weights of the positive texts, of the negative ones, their sums). Raises InputError if a side is empty."""
        positive, negative = np.where(self.positive, weight, 0), np.where(self.positive, 0, weight)
        sizes = int(positive.sum()), int(negative.sum())
        if 0 in sizes:
            raise InputError(
                f"There are {sizes[0]} positive and {sizes[1]} negative texts to compare; at least one "
                "of each is needed."
            )
        return positive, negative, *sizes


def means(sample: Sample, weight: Ints) -> tuple[Floats, Floats]:
    """[C] each: mean over the positive and over the negative texts of the pooled activation."""
    positive, negative, n, m = sample.sides(weight)
    return sample.sum(positive, sample.pooled[0]) / n, sample.sum(negative, sample.pooled[0]) / m


def rates(sample: Sample, weight: Ints) -> tuple[Floats, Floats]:
    """[C] each: the same of firing, pooled likewise."""
    positive, negative, n, m = sample.sides(weight)
    return sample.sum(positive, sample.pooled[1]) / n, sample.sum(negative, sample.pooled[1]) / m


def mean_difference(sample: Sample, weight: Ints) -> Floats:
    """[C] mean over positive texts - mean over negative texts of the pooled activation (Qwen-Scope 3.2)."""
    left, right = means(sample, weight)
    return left - right


def rate_difference(sample: Sample, weight: Ints) -> Floats:
    """[C] the same of firing; with pooling any, Qwen-Scope's equation 14."""
    left, right = rates(sample, weight)
    return left - right


def auroc(sample: Sample, weight: Ints) -> Floats:
    """[C] P(positive text above negative text) + 1/2 P(equal), of the pooled activation; 0.5 where it tells nothing.

    Counted in whole numbers, so exact. Silent texts are ties at 0: entries that are not there are never made.
    """
    positive, negative, n, m = sample.sides(weight)
    order, run = sample.by_value
    columns = len(sample.codes.features)
    if not len(order):
        return np.full(columns, 0.5)
    column, text = sample.codes.column[order], sample.codes.text[order]
    starts = np.flatnonzero(np.diff(run, prepend=-1))
    above, below = (np.add.reduceat(side[text], starts) for side in (positive, negative))
    owner = column[starts]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    running = np.cumsum(below) - below
    inside = running - np.repeat(running[first], np.diff(first, append=len(owner)))  # negatives lower, but above 0
    active = [_whole(owner, side, columns) for side in (above, below)]
    silent = n - active[0], m - active[1]
    doubled = _whole(owner, above * (2 * (inside + silent[1][owner]) + below), columns) + silent[0] * silent[1]
    return doubled / (2.0 * n * m)


def _whole(column: Ints, values: Ints, columns: int) -> Ints:
    """Sums per column in whole numbers (bincount would go through float64)."""
    found = np.zeros(columns, np.int64)
    np.add.at(found, column, values)
    return found


class Welch(NamedTuple):
    t: Floats
    """[C]"""
    freedom: Floats
    """[C] degrees of freedom (Welch and Satterthwaite)"""


def welch(sample: Sample, weight: Ints) -> Welch:
    """Welch's t of the pooled activation between positive and negative texts: (a - b) / sqrt(va / n + vb / m).

    Where it is undefined (neither side varies, or a side has one text), t is 0: no evidence.
    """
    positive, negative, n, m = sample.sides(weight)
    left, right = means(sample, weight)
    shares = []
    for side, mean, size in ((positive, left, n), (negative, right, m)):
        squares = sample.sum(side, (sample.pooled[0] - mean[sample.codes.column]) ** 2)
        present = sample.sum(side, np.ones(len(sample.codes.column)))
        shares.append((squares + (size - present) * mean**2) / max(1, size - 1) / size)
    both = shares[0] + shares[1]
    usable = (both > 0) & (min(n, m) > 1)
    safe = np.where(usable, both, 1.0)
    t = np.where(usable, (left - right) / np.sqrt(safe), 0.0)
    spread = shares[0] ** 2 / max(1, n - 1) + shares[1] ** 2 / max(1, m - 1)
    freedom = np.where(usable, safe**2 / np.where(spread > 0, spread, 1.0), 1.0)
    return Welch(t, freedom)


def p_values(found: Welch) -> Floats:
    """[C] two-sided, of the t distribution."""
    special = _scipy("special")
    tail: Floats = special.stdtr(found.freedom, -np.abs(found.t))
    return 2 * tail


def q_values(p: Floats) -> Floats:
    """Benjamini-Hochberg adjusted p-values of the tests `p`: rejecting q <= x holds the false discovery rate at x."""
    if not len(p):
        return p
    adjusted: Floats = _scipy("stats").false_discovery_control(p)
    return adjusted


def _scipy(part: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError as error:
        raise InputError("Finding features needs scipy for its statistics: pip install 'qscope[steer]'.") from error


def nu(sample: Sample, weight: Ints) -> Floats:
    """[C] mean over the tokens of the positive texts - mean over the groups of the mean over their tokens.

    The language measure of SASFT (Deng et al. 2025; Qwen-Scope 7.3): with languages as groups, those with many tokens
    count no more than others. Groups without weight are left out.
    """
    positive, negative, _, _ = sample.sides(weight)
    tokens = sample.codes.tokens
    others = []
    for group in np.unique(sample.group[negative > 0]):
        side = np.where(sample.group == group, negative, 0)
        others.append(sample.sum(side, sample.codes.total) / max(1, int((side * tokens).sum())))
    own = sample.sum(positive, sample.codes.total) / max(1, int((positive * tokens).sum()))
    return own - np.mean(others, axis=0)


def densities(sample: Sample, weight: Ints) -> tuple[Floats, Floats]:
    """[C] each: share of the kept tokens of the positive and of the negative texts at which the feature fires."""
    positive, negative, _, _ = sample.sides(weight)
    firing, tokens = sample.codes.firing.astype(np.float64), sample.codes.tokens
    left, right = (sample.sum(side, firing) / max(1, int((side * tokens).sum())) for side in (positive, negative))
    return left, right


def texts_firing(sample: Sample, weight: Ints) -> Ints:
    """[C] texts with weight in which the feature fires at some kept token, on both sides together."""
    codes = sample.codes
    return np.bincount(codes.column[weight[codes.text] > 0], minlength=len(codes.features))


METRICS: dict[Metric, Callable[[Sample, Ints], Floats]] = {
    "mean": mean_difference,
    "rate": rate_difference,
    "auroc": auroc,
    "t": lambda sample, weight: welch(sample, weight).t,
    "nu": nu,
}
NEUTRAL: dict[Metric, float] = {"mean": 0.0, "rate": 0.0, "auroc": 0.5, "t": 0.0, "nu": 0.0}
"""The score of a feature that never fires."""


def ranking(scores: Floats, second: Floats, eligible: npt.NDArray[np.bool_]) -> Ints:
    """Columns that are eligible, highest score first; ties by the highest `second`, then the lowest feature id."""
    columns = np.flatnonzero(eligible)
    return columns[np.lexsort((columns, -second[columns], -scores[columns]))]
