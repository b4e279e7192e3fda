"""Several benchmarks as a suite: how far each pair overlaps, what each one brings, which ones sit together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qscope.coverage.footprints import Bools, FootprintCounts, Footprints
from qscope.coverage.measures import firing_probability, pooled_split_overlap, split_overlap
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints

_BLOCK = 1 << 13
"""Features at once where arrays of benchmarks x features would be copied"""


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Of B benchmarks in pairs, [B, B] each; nan where a set is empty. Row: the first benchmark, column: the second."""

    common: Floats
    """|F1 n F2|, or its expectation"""
    sizes: Floats
    """|F1| at the size at which the pair is compared"""

    @property
    def overlap(self) -> Floats:
        """Share of the row's features that the column's benchmark has."""
        return _divided(self.common, self.sizes)

    @property
    def overlap_min(self) -> Floats:
        return _divided(self.common, np.minimum(self.sizes, self.sizes.T))

    @property
    def jaccard(self) -> Floats:
        return _divided(self.common, self.sizes + self.sizes.T - self.common)


@dataclass(frozen=True, eq=False)
class Added:
    """Benchmarks in the order in which each adds most to those before it."""

    order: Ints
    """[B] places in the suite"""
    gains: Floats
    """[B] features that each adds"""
    covered: Floats
    """[B] features so far"""


@dataclass(frozen=True, eq=False)
class Suite:
    """B benchmarks of one SAE as counts."""

    counts: Ints
    """[B, F] m_j of each benchmark"""
    items: Ints
    """[B] N of each"""

    @classmethod
    def of(cls, benchmarks: Mapping[str, Footprints | FootprintCounts]) -> "Suite":
        """In the order of the mapping. Raises `InputError` for no benchmark, one without items, unequal d_sae."""
        found = {name: b if isinstance(b, FootprintCounts) else FootprintCounts.of(b) for name, b in benchmarks.items()}
        if len({b.d_sae for b in found.values()}) != 1:
            raise InputError(
                f"A suite of {len(found)} benchmarks with d_sae {sorted({b.d_sae for b in found.values()})} was given;"
                " accepted are one or more benchmarks encoded with the same SAE."
            )
        if empty := [name for name, b in found.items() if b.items == 0]:
            raise InputError(f"No items in {', '.join(empty)}; leave these benchmarks out or give them items.")
        parts = list(found.values())
        return cls(np.stack([b.counts for b in parts]), np.array([b.items for b in parts], np.int64))

    def __len__(self) -> int:
        return len(self.items)

    def present(self) -> Bools:
        """[B, F] the feature sets."""
        return self.counts > 0

    def union(self) -> Bools:
        """[F] features that any benchmark fires."""
        found: Bools = np.logical_or.reduce(self.counts > 0, axis=0)
        return found

    def overlaps(self) -> Overlaps:
        """Of the feature sets as they are."""
        common = pair_counts(self.present())
        return Overlaps(common, np.repeat(np.diag(common)[:, None], len(self), axis=1))

    def size_matched(self, n: int | None = None) -> Overlaps:
        """Of n items drawn from each benchmark; without n each pair at the size of its smaller benchmark.

        One n for all makes all pairs comparable (`linkage`); at most the smallest benchmark's items. The diagonal is a
        benchmark with itself as a set; what two samples of one benchmark share is `ceiling`.
        """
        return self._at_one_size(n) if n is not None else self._at_pair_sizes()

    def _at_one_size(self, n: int) -> Overlaps:
        p = self.probabilities(n)
        common = p @ p.T
        size = p.sum(axis=1)
        np.fill_diagonal(common, size)
        return Overlaps(common, np.repeat(size[:, None], len(self), axis=1))

    def _at_pair_sizes(self) -> Overlaps:
        """The smaller one of a pair is complete. Of the larger ones p is taken once for each size among the others."""
        B = len(self)
        common, sizes = np.zeros((B, B)), np.zeros((B, B))
        for n in np.unique(self.items).tolist():
            rows, own = np.flatnonzero(self.items >= n), np.flatnonzero(self.items == n)
            p = Suite(self.counts[rows], self.items[rows]).probabilities(n)
            part, size = p[self.items[rows] == n] @ p.T, p.sum(axis=1)
            common[np.ix_(own, rows)], common[np.ix_(rows, own)] = part, part.T
            sizes[np.ix_(rows, own)] = size[:, None]
            sizes[np.ix_(own, rows)] = (self.counts[own] > 0).sum(axis=1)[:, None]
        return Overlaps(common, sizes)

    def probabilities(self, n: int | None = None) -> Floats:
        """[B, F] p_j(n): how likely n random items of a benchmark fire j; without n 1 where any item does, else 0."""
        if n is None:
            return self.present().astype(np.float64)
        parts = zip(self.counts, self.items.tolist(), strict=True)
        return np.stack([firing_probability(m, N, n) if n != N else (m > 0).astype(np.float64) for m, N in parts])

    def ceiling(self, n: int) -> Floats:
        """[B] Jaccard of two disjoint samples of n items of the same benchmark; nan where it has fewer than 2n."""
        return np.array(
            [
                split_overlap(m, int(N), n, n).jaccard if 2 * n <= N else np.nan
                for m, N in zip(self.counts, self.items, strict=True)
            ]
        )

    def one_population(self, n: int) -> Overlaps:
        """What `size_matched(n)` would expect if the benchmarks of a pair were one population cut in two."""
        B = len(self)
        common, sizes = np.zeros((B, B)), np.zeros((B, B))
        for a in range(B):
            for b in range(a):
                pair = pooled_split_overlap(self.counts[a], int(self.items[a]), self.counts[b], int(self.items[b]), n)
                common[a, b] = common[b, a] = pair.common
                sizes[a, b], sizes[b, a] = pair.left, pair.right
            common[a, a] = sizes[a, a] = float(firing_probability(self.counts[a], int(self.items[a]), n).sum())
        return Overlaps(common, sizes)

    def marginal(self, n: int | None = None) -> Floats:
        """[B] features that each benchmark adds to all the others: that only it fires.

        With n: the expectation for n random items of it beside n of each other one.
        """
        p = self.probabilities(n)
        found = np.zeros(len(self))
        for at in _blocks(p.shape[1]):
            missed = 1 - p[:, at]
            before = np.cumprod(np.vstack([np.ones_like(missed[:1]), missed[:-1]]), axis=0)
            after = np.cumprod(np.vstack([np.ones_like(missed[:1]), missed[:0:-1]]), axis=0)[::-1]
            found += (p[:, at] * before * after).sum(axis=1)
        return found

    def order(self, n: int | None = None) -> Added:
        """Greedy order of adding benchmarks, by their sets or by n random items of each; ties the first one given.

        Any first b of it cover at least 1 - 1/e of what the best b benchmarks cover, as in `subset.smallest_cover`.
        """
        p = self.probabilities(n)
        missed, left = np.ones(p.shape[1]), np.ones(len(self), np.bool_)
        order, gains = [], []
        for _ in range(len(self)):
            gain = np.array([float((row * missed).sum()) if free else -1.0 for row, free in zip(p, left, strict=True)])
            best = int(gain.argmax())
            left[best] = False
            missed *= 1 - p[best]
            order.append(best)
            gains.append(float(gain[best]))
        added = np.array(gains)
        return Added(np.array(order, np.int64), added, np.cumsum(added))


def pair_counts(sets: Bools) -> Floats:
    """[B, B] |Fa n Fb| of feature sets [B, F]."""
    common = np.zeros((len(sets), len(sets)))
    for at in _blocks(sets.shape[1]):
        part = sets[:, at].astype(np.float32)  # sums of at most 2^13 ones are exact
        common += part @ part.T
    return common


def linkage(similarity: Floats) -> tuple[Floats, Ints]:
    """(scipy's linkage matrix [B - 1, 4], leaves [B] in drawing order) of average linkage on 1 - similarity.

    similarity [B, B]: symmetric, such as a size-matched Jaccard; an undefined one (nan) counts as 0. Needs B >= 2.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if len(similarity) < 2:
        raise InputError(f"{len(similarity)} benchmark cannot be grouped; give two or more.")
    distance = 1 - np.clip(np.nan_to_num(similarity, nan=0.0), 0, 1)
    np.fill_diagonal(distance, 0)
    tree = hierarchy.linkage(squareform((distance + distance.T) / 2), method="average", optimal_ordering=True)
    return tree, hierarchy.leaves_list(tree).astype(np.int64)


def _blocks(width: int) -> Iterator[slice]:
    return (slice(begin, begin + _BLOCK) for begin in range(0, width, _BLOCK))


def _divided(part: Floats, whole: Floats) -> Floats:
    found = np.full(part.shape, np.nan)
    np.divide(part, whole, out=found, where=whole > 0)
    return found
