"""What scores of a panel of models say about benchmarks, to hold beside what features say.

scipy.stats is imported where a correlation is wanted. Undefined correlations (a side is constant, fewer than two
values) are nan.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints
from qscope.finding.stability import Interval


@dataclass(frozen=True)
class PerformanceRedundancy:
    """R(D) with the quantiles over the random orders of the items: how exactly sampling gives the mean, not how far it
    depends on the items or the models."""

    value: Interval
    sizes: Ints
    """[G] sizes n of subsets"""
    tau: Floats
    """[G] tau_n, the mean over the orders"""
    orders: int


def performance_redundancy(
    correct: Floats, orders: int = 64, points: int = 256, seed: int = 0
) -> PerformanceRedundancy:
    """R(D) = 1/N times the sum over n of tau_n (Qwen-Scope, arXiv 2605.11887, equations 4 to 6).

    correct [M, N]: score of M models on N items. tau_n is the mean Kendall tau-b between the models' mean scores on all
    items and on n random ones. The items are put in `orders` random orders, and the first n of each are its subset of
    size n: 64 subsets of each size, unless told otherwise. Of more than `points` sizes evenly spaced ones are taken,
    with straight lines between them. A subset on which all models are level tells no order: its tau is 0. Raises
    `InputError` for fewer than two models, missing scores and models that are level on the whole benchmark.
    """
    if correct.ndim != 2 or correct.shape[0] < 2 or correct.shape[1] < 1:
        raise InputError(
            f"Scores of shape {list(correct.shape)} were given; accepted is [models, items], 2 models or more."
        )
    if missing := int(np.isnan(correct).sum()):
        raise InputError(
            f"{missing} of {correct.size} scores are missing; leave out the models or items that lack them."
        )
    if np.ptp(correct.mean(axis=1)) == 0:
        raise InputError(f"All {len(correct)} models score the same on this benchmark, so it orders none of them.")
    N = correct.shape[1]
    sizes = np.unique(np.rint(np.linspace(1, N, min(N, points))).astype(np.int64))
    generator = np.random.default_rng(seed)
    found = np.empty((orders, len(sizes)))
    for i in range(orders):
        shuffled = np.cumsum(correct[:, generator.permutation(N)], axis=1)
        found[i] = _tau_b(correct.sum(axis=1), shuffled[:, sizes - 1])
    each = np.array([np.interp(np.arange(1, N + 1), sizes, row).mean() for row in found])
    low, high = np.quantile(each, (0.025, 0.975))
    return PerformanceRedundancy(
        Interval(float(each.mean()), float(low), float(high)), sizes, found.mean(axis=0), orders
    )


def _tau_b(whole: Floats, parts: Floats) -> Floats:
    """Kendall's tau-b of `whole` [M] with each column of `parts` [M, G]; 0 for constant columns.

    scipy.stats.kendalltau, one column a call, takes a hundred times as long.
    """
    left, right = np.triu_indices(len(whole), 1)
    x = _sign(whole[left] - whole[right], np.abs(whole).max())
    y = _sign(parts[left] - parts[right], np.abs(parts).max())
    ordered = np.sqrt((x * x).sum() * (y * y).sum(axis=0))
    tau: Floats = np.divide(x @ y, ordered, out=np.zeros(parts.shape[1]), where=ordered > 0)
    return tau


def _sign(difference: Floats, scale: float) -> Floats:
    """Sums of the same scores in another order differ in the last digits: that is a tie."""
    found: Floats = np.sign(np.where(np.abs(difference) <= 1e-12 * scale, 0.0, difference))
    return found


@dataclass(frozen=True)
class Correlation:
    value: float
    p_value: float
    """Two-sided, of no correlation"""
    count: int


def spearman(left: Floats, right: Floats) -> Correlation:
    """Rank correlation, such as of R with R^ over benchmarks. Pairs with a nan are left out."""
    from scipy import stats

    return _correlation(left, right, stats.spearmanr)


def pearson(left: Floats, right: Floats) -> Correlation:
    from scipy import stats

    return _correlation(left, right, stats.pearsonr)


def kendall(left: Floats, right: Floats) -> Correlation:
    """tau-b, such as of two rankings of benchmarks under two settings."""
    from scipy import stats

    return _correlation(left, right, stats.kendalltau)


def _correlation(left: Floats, right: Floats, function: Callable[..., tuple[float, float]]) -> Correlation:
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    both = ~(np.isnan(left) | np.isnan(right))
    left, right = left[both], right[both]
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return Correlation(float("nan"), float("nan"), len(left))
    value, p_value = function(left, right) if len(left) > 2 else (_two(left, right), 1.0)
    return Correlation(float(value), float(p_value), len(left))


def _two(left: Floats, right: Floats) -> float:
    """Any coefficient of two points that differ in both: they say nothing about chance, so their p-value is 1."""
    return float(np.sign((left[1] - left[0]) * (right[1] - right[0])))


def score_similarity(scores: Floats) -> Floats:
    """[B, B] Pearson correlation over the models of the scores [M, B] of each pair of benchmarks.

    Models without one of both scores (nan) are left out of that pair.
    """
    B = scores.shape[1]
    found = np.full((B, B), np.nan)
    for a in range(B):
        for b in range(a + 1):
            found[a, b] = found[b, a] = pearson(scores[:, a], scores[:, b]).value
    return found


def partial_correlation(correlation: Floats, control: int) -> Floats:
    """[B, B] of a correlation matrix: what is left of rho_ij when benchmark `control` is held fixed.

        (rho_ij - rho_ic rho_jc) / (sqrt(1 - rho_ic^2) sqrt(1 - rho_jc^2))        (Qwen-Scope, section 4.3)

    nan in the control's own row and column and where a benchmark follows the control exactly.
    """
    if not 0 <= control < len(correlation):
        raise InputError(
            f"The control is benchmark {control} of {len(correlation)}; accepted are 0 to {len(correlation) - 1}."
        )
    with_control = correlation[control]
    rest = np.sqrt(np.maximum(1 - with_control**2, 0))
    rest = np.where(rest < 1e-7, 0.0, rest)  # 1 - rho^2 of a rho that is 1 but for rounding
    rest[control] = 0
    found = np.full(correlation.shape, np.nan)
    scale = np.outer(rest, rest)
    np.divide(correlation - np.outer(with_control, with_control), scale, out=found, where=scale > 0)
    return np.clip(found, -1, 1)


@dataclass(frozen=True)
class PairAgreement:
    """How two measures of pairs of benchmarks agree, over the pairs in which both are defined."""

    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float
    """Share of random relabellings of one side's benchmarks that agree at least as well (Mantel 1967), one-sided: pairs
    that share a benchmark are not independent, so the usual p-values would be too small"""
    pairs: int


def pair_agreement(
    left: Floats, right: Floats, control: int | None = None, relabellings: int = 999, seed: int = 0
) -> PairAgreement:
    """Of two symmetric [B, B] measures, such as overlap_min and score similarity (Qwen-Scope, Table 2).

    With `control` that benchmark's pairs are left out; give the partial correlations as `right` for the partial column.
    """
    chosen = np.array([b for b in range(len(left)) if b != control])
    left, right = left[np.ix_(chosen, chosen)], right[np.ix_(chosen, chosen)]
    upper = np.triu_indices(len(chosen), 1)
    observed = [function(left[upper], right[upper]) for function in (pearson, spearman)]
    generator = np.random.default_rng(seed)
    as_good = np.ones(2)
    for _ in range(relabellings):
        names = generator.permutation(len(chosen))
        moved = left[np.ix_(names, names)][upper]
        for i, function in enumerate((_pearson_value, _spearman_value)):
            as_good[i] += function(moved, right[upper]) >= observed[i].value - 1e-12
    p = np.where([np.isnan(o.value) for o in observed], np.nan, as_good / (relabellings + 1))
    return PairAgreement(observed[0].value, float(p[0]), observed[1].value, float(p[1]), observed[0].count)


def _pearson_value(left: Floats, right: Floats) -> float:
    both = ~(np.isnan(left) | np.isnan(right))
    if both.sum() < 2 or np.ptp(left[both]) == 0 or np.ptp(right[both]) == 0:
        return float("-inf")
    return float(np.corrcoef(left[both], right[both])[0, 1])


def _spearman_value(left: Floats, right: Floats) -> float:
    from scipy.stats import rankdata

    both = ~(np.isnan(left) | np.isnan(right))
    return _pearson_value(rankdata(left[both]), rankdata(right[both])) if both.any() else float("-inf")
