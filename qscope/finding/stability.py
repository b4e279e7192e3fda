"""How far a ranking of features depends on which texts happened to be in the sets."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qscope.finding.pooled import Floats, Ints
from qscope.finding.scores import METRICS, Metric, Sample, mean_difference, ranking


@dataclass(frozen=True)
class Interval:
    """A figure with the 2.5 % and 97.5 % quantiles of its replicates."""

    value: float
    low: float
    high: float


def over(values: Sequence[float] | Floats, value: float | None = None) -> Interval:
    """The quantiles of `values` around `value` (default: their mean)."""
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(float(np.mean(values)) if value is None else value, float(low), float(high))


@dataclass(frozen=True)
class Agreement:
    """Between pairs of rankings of the same features."""

    jaccard: Interval
    """|A n B| / |A u B| of the two sets of top features"""
    rank_correlation: Interval
    """Spearman's, over all features that are ranked"""
    pairs: int


@dataclass(frozen=True)
class Bootstrap:
    """Replicates of the texts, drawn with replacement within the positive texts and within each negative group."""

    agreement: Agreement
    """Of each replicate with the ranking of all texts: replicates share most texts with it, so this is the upper end"""
    inclusion: Floats
    """[C] share of the replicates that have the feature among their top ones"""
    low: Floats
    """[C] 2.5 % quantile of the score over the replicates"""
    high: Floats
    """[C] 97.5 %"""


def replicates(sample: Sample, weight: Ints, count: int, seed: int) -> Iterator[Ints]:
    """Weights [T] of `count` bootstrap replicates; the same for the same seed."""
    generator = np.random.default_rng(seed)
    strata = [np.flatnonzero(part) for part in _strata(sample, weight)]
    for _ in range(count):
        drawn = np.zeros_like(weight)
        for part in strata:
            drawn[part] = np.bincount(generator.integers(len(part), size=len(part)), minlength=len(part))
        yield drawn


def halves(sample: Sample, weight: Ints, count: int, seed: int) -> Iterator[tuple[Ints, Ints]]:
    """`count` splits of the texts into two halves with no text in common, each stratum halved."""
    generator = np.random.default_rng(seed)
    strata = [np.flatnonzero(part) for part in _strata(sample, weight)]
    for _ in range(count):
        first = np.zeros_like(weight)
        for part in strata:
            first[generator.permutation(part)[: (len(part) + 1) // 2]] = 1
        yield first, np.where(weight > 0, 1, 0) - first


def _strata(sample: Sample, weight: Ints) -> Iterator[npt.NDArray[np.bool_]]:
    used = weight > 0
    yield used & sample.positive
    for group in np.unique(sample.group[used & ~sample.positive]):
        yield used & ~sample.positive & (sample.group == group)


def bootstrap(
    sample: Sample,
    weight: Ints,
    eligible: npt.NDArray[np.bool_],
    metric: Metric,
    top: int,
    count: int,
    seed: int,
) -> Bootstrap:
    """Rank `count` replicates of the texts that have a weight. Of the scores, [count, eligible features] are kept."""
    columns = np.flatnonzero(eligible)
    full = _scores(sample, weight, metric)
    reference = set(ranking(*full, eligible)[:top].tolist())
    inclusion = np.zeros(len(eligible))
    kept = np.empty((count, len(columns)))
    overlaps, correlations = [], []
    for i, drawn in enumerate(replicates(sample, weight, count, seed)):
        found = _scores(sample, drawn, metric)
        best = ranking(*found, eligible)[:top]
        inclusion[best] += 1
        kept[i] = found[0][columns]
        overlaps.append(_jaccard(reference, set(best.tolist())))
        correlations.append(rank_correlation(full[0][columns], kept[i]))
    low, high = np.zeros(len(eligible)), np.zeros(len(eligible))
    low[columns], high[columns] = np.quantile(kept, (0.025, 0.975), axis=0)
    return Bootstrap(Agreement(over(overlaps), over(correlations), count), inclusion / count, low, high)


def split_agreement(
    sample: Sample, pairs: Sequence[tuple[Ints, Ints]], eligible: npt.NDArray[np.bool_], metric: Metric, top: int
) -> Agreement:
    """Agreement of the two rankings of each pair of weights: random halves, or sets in other words."""
    overlaps, correlations = [], []
    for pair in pairs:
        found = [_scores(sample, weight, metric) for weight in pair]
        best = [set(ranking(*scores, eligible)[:top].tolist()) for scores in found]
        overlaps.append(_jaccard(*best))
        correlations.append(rank_correlation(*(scores[0][eligible] for scores in found)))
    return Agreement(over(overlaps), over(correlations), len(pairs))


def _scores(sample: Sample, weight: Ints, metric: Metric) -> tuple[Floats, Floats]:
    scores = METRICS[metric](sample, weight)
    return scores, scores if metric == "mean" else mean_difference(sample, weight)


def _jaccard(left: set[int], right: set[int]) -> float:
    return len(left & right) / len(left | right) if left | right else 1.0


def rank_correlation(left: Floats, right: Floats) -> float:
    """Spearman's; 0 where a side has no order (constant or fewer than two features)."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    rank = importlib.import_module("scipy.stats").rankdata
    return float(np.corrcoef(rank(left), rank(right))[0, 1])


@dataclass(frozen=True)
class LayerTop:
    """The top1 difference of one layer: the largest firing-rate difference of a feature (Qwen-Scope, equation 16)."""

    difference: Interval
    """Its interval is of the maximum over the replicates, which lies above the value of all texts: they are noisier"""
    chosen: float
    """Share of the replicates in which this layer has the largest one; the first layer wins ties"""


def top1_differences(
    samples: dict[int, tuple[Sample, npt.NDArray[np.bool_]]], weight: Ints, count: int, seed: int
) -> dict[int, LayerTop]:
    """Layer -> top1 difference; samples: layer -> (codes pooled by any, features that are ranked).

    The replicates are the same texts at every layer.
    """
    value = {layer: _top1(sample, weight, eligible) for layer, (sample, eligible) in samples.items()}
    drawn = {
        layer: [_top1(sample, w, eligible) for w in replicates(sample, weight, count, seed)]
        for layer, (sample, eligible) in samples.items()
    }
    winners = np.array(list(drawn.values())).reshape(len(samples), count).argmax(axis=0).tolist()
    return {
        layer: LayerTop(over(drawn[layer] or [value[layer]], value[layer]), winners.count(i) / max(1, count))
        for i, layer in enumerate(samples)
    }


def _top1(sample: Sample, weight: Ints, eligible: npt.NDArray[np.bool_]) -> float:
    difference = METRICS["rate"](sample, weight)[eligible]
    return float(difference.max()) if len(difference) else 0.0
