"""How far figures depend on which texts were tested: percentile intervals by drawing the texts again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qscope.classification.metrics import Prediction, figure, measure
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints

_CELLS = 1 << 19  # of a block of replicates: 4 MB, which stays in the cache


@dataclass(frozen=True)
class Estimate:
    """A figure of the texts as they are, between the 2.5 % and 97.5 % quantiles of its replicates."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None
    """Why there is no value"""
    undefined: int = 0
    """Replicates in which the figure is not defined: they are left out of the quantiles"""


@dataclass(frozen=True)
class Bootstrap:
    """Figures of several methods on the same replicates of the same texts."""

    texts: int
    value: dict[str, dict[str, float]]
    """method -> figure -> value of all texts; NaN where undefined"""
    replicates: dict[str, dict[str, Floats]]
    """method -> figure -> [R]"""

    def interval(self, method: str, name: str) -> Estimate:
        return self._estimate(name, self.value[method][name], self.replicates[method][name])

    def difference(self, method: str, other: str, name: str) -> Estimate:
        """Figure of `method` minus that of `other`, replicate by replicate: what both share cancels."""
        value = self.value[method][name] - self.value[other][name]
        return self._estimate(name, value, self.replicates[method][name] - self.replicates[other][name])

    def _estimate(self, name: str, value: float, found: Floats) -> Estimate:
        defined = found[~np.isnan(found)]
        undefined = len(found) - len(defined)
        if np.isnan(value):
            return Estimate(None, None, None, figure(name, value, self.texts).reason, undefined)
        if not len(defined):
            return Estimate(value, None, None, None, undefined)
        low, high = np.quantile(defined, (0.025, 0.975)).tolist()
        return Estimate(value, low, high, None, undefined)


def bootstrap(
    label: Ints,
    classes: int,
    predictions: Mapping[str, Prediction],
    replicates: int = 1000,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Bootstrap:
    """Percentile intervals (Efron 1979) of the figures of `metrics.figures`, texts drawn with replacement.

    Nothing is fitted again: the intervals are of the test texts drawn, not of the training texts.

    Args:
        label: [T].
        predictions: method -> its prediction of the same T texts.
        names: figures to find; default all that the number of classes has.

    Raises:
        InputError: as `metrics.measure`; for a negative number of replicates.
    """
    if replicates < 0:
        raise InputError(f"{replicates} replicates were asked for; give 0 or more.")
    measures = {method: measure(label, classes, found) for method, found in predictions.items()}
    wanted = {method: tuple(names or found.names) for method, found in measures.items()}
    ones = np.ones((1, len(label)))
    value = {
        method: {name: float(v[0]) for name, v in found.values(ones, wanted[method]).items()}
        for method, found in measures.items()
    }
    drawn = {method: {name: np.full(replicates, np.nan) for name in wanted[method]} for method in measures}
    first = 0
    for counts in draws(len(label), replicates, seed):
        for method, found in measures.items():
            for name, values in found.values(counts, wanted[method]).items():
                drawn[method][name][first : first + len(counts)] = values
        first += len(counts)
    return Bootstrap(len(label), value, drawn)


def draws(texts: int, replicates: int, seed: int) -> Iterator[Floats]:
    """Blocks [B, T] of how often each text is drawn, `replicates` rows in all; the same for the same seed."""
    if not texts:
        return
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // texts)
    for start in range(0, replicates, block):
        rows = min(block, replicates - start)
        places = generator.integers(texts, size=(rows, texts)) + np.arange(rows)[:, None] * texts
        yield np.bincount(places.ravel(), minlength=rows * texts).reshape(rows, texts).astype(np.float64)
