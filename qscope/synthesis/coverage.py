"""Coverage of chosen features (Qwen-Scope, equations 18 to 20 and 23): Cov(D) = share of the targets that D fires.

Everywhere fires [N, T] says which of N texts fires which of T targets. Curves by budget are expectations over random
subsets of n texts, in closed form as in `qscope.coverage.measures`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qscope.coverage.measures import firing_probability
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints

Bools = npt.NDArray[np.bool_]


def support(fires: Bools) -> Ints:
    """[T] texts that fire each target."""
    return np.asarray(fires.sum(axis=0), np.int64)


def coverage(fires: Bools) -> float:
    """Share of the targets that some text fires; InputError without targets."""
    if not fires.shape[1]:
        raise InputError("Coverage was asked for without a target feature. Name at least one.")
    return float(fires.any(axis=0).mean())


def missing(fires: Bools) -> Ints:
    """T_miss: places of the targets that no text fires."""
    return np.flatnonzero(support(fires) == 0)


def weak(fires: Bools, least: int) -> Ints:
    """Places of the targets that some text fires, and fewer than `least` do."""
    found = support(fires)
    return np.flatnonzero((found > 0) & (found < least))


def budget_curve(seed: Bools, added: Bools, sizes: Sequence[int]) -> Floats:
    """[len(sizes)] expected coverage of the seed texts with n random ones of the added texts (without replacement).

    A target that the seed fires counts 1, any other 1 - C(N - m, n) / C(N, n), m of the N added texts firing it. Raises
    InputError for a size above N.
    """
    covered: Bools = np.asarray(seed.any(axis=0), np.bool_)
    many = support(added)[~covered]
    total = len(covered)
    if not total:
        raise InputError("Coverage was asked for without a target feature. Name at least one.")
    found = []
    for n in sizes:
        gained = float(firing_probability(many, len(added), n).sum()) if n else 0.0
        found.append((float(covered.sum()) + gained) / total)
    return np.array(found)


def ordered_curve(seed: Bools, added: Bools) -> Floats:
    """[N + 1] coverage of the seed texts with the first n of the added ones, n = 0..N."""
    covered: Bools = np.asarray(seed.any(axis=0), np.bool_)
    grown = np.logical_or.accumulate(np.concatenate([covered[None], added | covered]), axis=0)
    return np.asarray(grown.mean(axis=1), np.float64)


def budgets(most: int, points: int = 24) -> list[int]:
    """0, and up to `points` sizes to `most`, evenly spaced on a logarithmic scale."""
    if most < 1:
        return [0]
    return [0, *np.unique(np.rint(np.geomspace(1, most, points)).astype(np.int64)).tolist()]
