"""How much the odds that a feature fires differ between positive and negative texts."""

import importlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints
from qscope.finding.scores import Sample, q_values


class LogOdds(NamedTuple):
    """Of C features."""

    log_odds: Floats
    """[C] log of (odds of firing in a positive text / odds in a negative one), 1/2 added to each of the four counts"""
    error: Floats
    """[C] standard error: sqrt of the sum of 1 / (count + 1/2)"""
    z: Floats
    """[C] log_odds / error"""
    p: Floats
    """[C] Fisher's exact test, two-sided: twice the smaller tail, at most 1"""
    q: Floats
    """[C] Benjamini-Hochberg adjusted p over the tested features; 1 for the others"""


def log_odds(sample: Sample, weight: Ints, tested: npt.NDArray[np.bool_] | None = None) -> LogOdds:
    """Log odds ratios of firing (pooled firing above 0) with the correction of Haldane (1956) and Anscombe (1956).

    p is not that of z: where a feature never fires on one side, 1 / (0 + 1/2) makes the error so large that features
    which separate well pass for chance (24 of 72 texts against 0 of 72: z = 3.0, so p = 0.003; Fisher's p is 1e-8).

    weight: [T] as in `qscope.finding.scores`; tested: [C] bool, the features that count as tests (default: those that
    fire in a text with weight). Raises InputError if a side is empty or scipy is missing.
    """
    positive, negative, n, m = sample.sides(weight)
    fires = (sample.pooled[1] > 0).astype(np.float64)
    a, b = sample.sum(positive, fires) + 0.5, sample.sum(negative, fires) + 0.5
    c, d = n + 1 - a, m + 1 - b
    ratio = np.log(a) + np.log(d) - np.log(b) - np.log(c)
    error = np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    try:
        hypergeom = importlib.import_module("scipy.stats").hypergeom
    except ImportError as problem:
        raise InputError("Log odds need scipy for their statistics: pip install 'qscope[classify]'.") from problem
    hits, fired = a - 0.5, a + b - 1
    upper: Floats = hypergeom.sf(hits - 1, n + m, n, fired)
    lower: Floats = hypergeom.cdf(hits, n + m, n, fired)
    p = np.minimum(1.0, 2 * np.minimum(upper, lower))
    chosen = fired > 0 if tested is None else tested
    q = np.ones(len(p))
    q[chosen] = q_values(p[chosen])
    return LogOdds(ratio, error, ratio / error, p, q)
