"""Half-samples of all benchmarks and their random texts at once, so that differences between figures are paired."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qscope.coverage.footprints import Footprints
from qscope.coverage.measures import size_matched_redundancy
from qscope.coverage.resampling import half_counts
from qscope.coverage.suite import Suite
from qscope.finding.pooled import Floats, Ints
from qscope.finding.stability import Interval


@dataclass(frozen=True)
class Figures:
    """Of B benchmarks and, behind them, their random texts (C = B or 2 B), at n items each; nan: undefined."""

    jaccard: Floats
    """[C, C]"""
    features: Floats
    """[C]"""
    redundancy: Floats
    """[C]"""


@dataclass(frozen=True)
class Measured:
    """The figures of all items, and of each half-sample in turn (empty: there are none)."""

    value: Figures
    drawn: tuple[Figures, ...]
    benchmarks: int

    @property
    def null(self) -> bool:
        return len(self.value.features) > self.benchmarks

    def jaccard(self, a: int, b: int) -> tuple[float | None, Interval | None]:
        return self._with_interval(self.value.jaccard[a, b], [d.jaccard[a, b] for d in self.drawn])

    def features(self, b: int) -> tuple[float | None, Interval | None]:
        return self._with_interval(self.value.features[b], [d.features[b] for d in self.drawn])

    def redundancy(self, b: int) -> tuple[float | None, Interval | None]:
        return self._with_interval(self.value.redundancy[b], [d.redundancy[b] for d in self.drawn])

    def above_null(self, a: int, b: int) -> tuple[Interval | None, float | None]:
        """(jaccard of the pair - that of the random texts in place of both, its p)."""
        return self._difference([_above_null(f, a, b, self.benchmarks) for f in (self.value, *self.drawn)])

    def above_cross(self, a: int, b: int) -> tuple[Interval | None, float | None]:
        """(jaccard of the pair - mean of each one's with the random text in the other's place, its p)."""
        values = [f.jaccard[a, b] - self.cross(f, a, b) for f in (self.value, *self.drawn)]
        return self._difference(values)

    def cross(self, figures: Figures, a: int, b: int) -> float:
        j, size = figures.jaccard, self.benchmarks
        return float(j[a, size + b] + j[size + a, b]) / 2

    def _with_interval(self, value: float, drawn: Sequence[float]) -> tuple[float | None, Interval | None]:
        if not np.isfinite(value):
            return None, None
        return float(value), _interval(float(value), drawn)

    def _difference(self, values: Sequence[float]) -> tuple[Interval | None, float | None]:
        """The first one is that of all items. p: two-sided, twice the smaller share of half-samples beyond 0."""
        value, drawn = values[0], np.array(values[1:])
        found = _interval(float(value), drawn.tolist()) if np.isfinite(value) else None
        if found is None:
            return None, None
        drawn = drawn[np.isfinite(drawn)]
        tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) + 1
        return found, min(1.0, 2 * tail / (len(drawn) + 1))


def resampled(benchmarks: Sequence[Footprints], null: Sequence[Footprints], n: int, count: int, seed: int) -> Measured:
    """Figures at n items. There are half-samples only where half of every benchmark has n items."""
    parts = [*benchmarks, *null]
    value = _figures([(part.counts(), len(part)) for part in parts], n)
    drawn = []
    if count and 2 * n <= min(map(len, parts)):
        halves = [half_counts(part, count, (seed, i)) for i, part in enumerate(parts)]
        drawn = [_figures(list(counted), n) for counted in zip(*halves, strict=True)]
    return Measured(value, tuple(drawn), len(benchmarks))


def _figures(parts: Sequence[tuple[Ints, int]], n: int) -> Figures:
    overlaps = Suite(np.stack([m for m, _ in parts]), np.array([N for _, N in parts], np.int64)).size_matched(n)
    redundancy = np.array([size_matched_redundancy(m, N, n) for m, N in parts])
    return Figures(overlaps.jaccard, np.diag(overlaps.common).copy(), redundancy)


def _above_null(figures: Figures, a: int, b: int, size: int) -> float:
    return float(figures.jaccard[a, b] - figures.jaccard[size + a, size + b])


def _interval(value: float, drawn: Sequence[float]) -> Interval | None:
    known = np.array([x for x in drawn if np.isfinite(x)])
    if not len(known):
        return None
    low, high = np.quantile(known, (0.025, 0.975))
    return Interval(value, float(low), float(high))
