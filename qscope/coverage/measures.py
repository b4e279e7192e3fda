"""Coverage, redundancy and overlap of benchmarks in closed form.

Everywhere m [F] are counts: m_j of the N items of a benchmark fire feature j. A random subset S of n items, drawn
without replacement, misses feature j with probability

    q_j(n) = C(N - m_j, n) / C(N, n),        and fires it with p_j(n) = 1 - q_j(n).

Sums of p_j and products of them answer what the report estimates by drawing subsets (Qwen-Scope, arXiv 2605.11887,
equations 7 to 12); nothing is drawn here. Features with equal m_j have equal p_j, so a curve costs as much as there are
different counts, whatever F is. Figures that are not defined (nothing fires) are nan, without a warning.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qscope.coverage.footprints import Bools, Footprints
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints

Counts = npt.NDArray[np.integer]


def firing_probability(m: Counts, N: int, n: int) -> Floats:
    """p_j(n), of the shape of `m`. Absolute error at most about 4 sqrt(N) 1e-16; relative too while p is small.

    q is a product of min(m, n) ratios at best. The one over m gives all m at once, with an error of m units in the last
    place of a value below exp(-nm/N): sqrt(N) units where n >= sqrt(N). Below, the product over n has so few factors.
    Logarithms of factorials would lose five digits more at N = 30,000.
    """
    _check_size(N, n)
    m = np.asarray(m)
    values, place = _different(m)
    if len(values) and not 0 <= int(values[0]) <= int(values[-1]) <= N:
        raise InputError(f"Counts from {int(values[0])} to {int(values[-1])} were given for {N} items; 0 to {N} exist.")
    return _probability(values, N, n)[0][place].reshape(m.shape)


def _different(m: Counts) -> tuple[Ints, Ints]:
    """np.unique with its inverse; by counting, which is ten times faster than sorting."""
    flat = np.asarray(m, np.int64).ravel()
    if not len(flat) or int(flat.min()) < 0 or int(flat.max()) > 4 * len(flat) + 1024:
        values, place = np.unique(flat, return_inverse=True)
        return values, place.reshape(-1)
    seen = np.zeros(int(flat.max()) + 1, np.bool_)
    seen[flat] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[flat]


def _probability(m: Ints, N: int, n: int) -> tuple[Floats, Floats]:
    """(p(n), sum of p(k) for k = 1..n) for ascending counts m. p adds up q ratios, so small p keep their digits."""
    if n * n < N:
        missed, found, total = np.ones(len(m)), np.zeros(len(m)), np.zeros(len(m))
        for k in range(n):
            found += missed * (m / (N - k))
            missed *= np.maximum(N - k - m, 0) / (N - k)
            total += found
        return np.where(missed < 0.5, 1 - missed, found), total
    i = np.arange(int(m[-1]) if len(m) else 0)
    q = np.concatenate([[1.0], np.cumprod(np.maximum(N - n - i, 0) / (N - i))])
    p = np.concatenate([[0.0], np.cumsum(q[:-1] * (n / (N - i)))])
    p = np.where(q < 0.5, 1 - q, p)[m]
    return p, (n * m - (N - m - n) * p) / (m + 1)  # (N + 1 - k) q(k) - (N - k) q(k + 1) = (m + 1) q(k) telescopes


def _grouped(m: Counts) -> tuple[Ints, Ints]:
    """(different counts above 0, how many features have each)."""
    m = np.asarray(m, np.int64)
    many = np.bincount(m[m > 0])
    values = np.flatnonzero(many)
    return values, many[values]


def expected_size(m: Counts, N: int, n: int) -> float:
    """E |F(S)| over the subsets S of n items."""
    _check_size(N, n)
    values, many = _grouped(m)
    return float(many @ _probability(values, N, n)[0])


def saturation(m: Counts, N: int, n: npt.ArrayLike) -> Floats:
    """c_n = E |F(S)| / |F(D)| for each size in `n`; of its shape (equation 8). `curve_sizes` gives sizes for a plot."""
    sizes = np.asarray(n, np.int64)
    values, many = _grouped(m)
    if not len(values):
        return np.full(sizes.shape, np.nan)
    found = []
    for size in sizes.ravel().tolist():
        _check_size(N, size)
        found.append(float(many @ _probability(values, N, size)[0]) / float(many.sum()))
    return np.array(found).reshape(sizes.shape)


def curve_sizes(N: int, points: int = 64) -> Ints:
    """At most `points` sizes from 1 to N, evenly spaced on a logarithmic scale."""
    return np.unique(np.rint(np.geomspace(1, N, points)).astype(np.int64))


def items_for_share(m: Counts, N: int, share: float) -> int:
    """The smallest n at which n random items are expected to fire at least `share` of the features (0 < share <= 1)."""
    if not 0 < share <= 1:
        raise InputError(f"The share is {share}; accepted are numbers above 0 and up to 1.")
    low, high = 1, N
    while low < high:
        middle = (low + high) // 2
        if float(saturation(m, N, middle)) >= share:
            high = middle
        else:
            low = middle + 1
    return low


def redundancy(m: Counts, N: int) -> float:
    """R^ = sum over n = 1..N of c_n, divided by |F| (equation 9): (N + 1) / |F|^2 times the sum of m_j / (m_j + 1).

    All items alike, of k features: N / k. No feature in two items: (N + 1) / (2 N k). It grows with N, so benchmarks of
    unequal size are compared by `size_matched_redundancy`.
    """
    values, many = _grouped(m)
    if not len(values):
        return float("nan")
    return float((N + 1) * (many @ (values / (values + 1)))) / float(many.sum()) ** 2


def saturation_area(m: Counts, N: int) -> float:
    """AUC(c) = 1/N times the sum of c_n for n = 1..N, in (0, 1]."""
    values, many = _grouped(m)
    return redundancy(m, N) * float(many.sum()) / N if len(values) else float("nan")


def size_matched_redundancy(m: Counts, N: int, n: int) -> float:
    """R^ of n of the items: the sum of E |F(S_k)| for k = 1..n, divided by (E |F(S_n)|)^2.

    A ratio of expectations over subsets. At n = N it is `redundancy`.
    """
    _check_size(N, n)
    values, many = _grouped(m)
    if not len(values):
        return float("nan")
    p, total = _probability(values, N, n)
    return float(many @ total) / float(many @ p) ** 2


# --- two benchmarks ------------------------------------------------------------------------------------------


def overlap(left: Bools, right: Bools) -> float:
    """|F1 n F2| / |F1| of two feature sets [F] (equation 10): the share of the first one that the second one has."""
    return _ratio(float((left & right).sum()), float(left.sum()))


def overlap_min(left: Bools, right: Bools) -> float:
    """|F1 n F2| / min(|F1|, |F2|) (equation 11)."""
    return _ratio(float((left & right).sum()), float(min(left.sum(), right.sum())))


def jaccard(left: Bools, right: Bools) -> float:
    """|F1 n F2| / |F1 u F2|."""
    return _ratio(float((left & right).sum()), float((left | right).sum()))


@dataclass(frozen=True)
class SizeMatched:
    """Expected sizes of the feature sets of two random subsets, and the overlaps as ratios of these expectations."""

    left: float
    """E |F(S1)|"""
    right: float
    """E |F(S2)|"""
    common: float
    """E |F(S1) n F(S2)|"""

    @property
    def overlap(self) -> float:
        return _ratio(self.common, self.left)

    @property
    def overlap_min(self) -> float:
        return _ratio(self.common, min(self.left, self.right))

    @property
    def jaccard(self) -> float:
        return _ratio(self.common, self.left + self.right - self.common)


def size_matched(m1: Counts, N1: int, m2: Counts, N2: int, n: int | None = None) -> SizeMatched:
    """Of n items of each benchmark, drawn independently; n: the size of the smaller benchmark unless told.

    |F| grows with N, so the raw overlaps of benchmarks of unequal size speak of size as well as of content.
    """
    n = min(N1, N2) if n is None else n
    p1, p2 = firing_probability(m1, N1, n), firing_probability(m2, N2, n)
    return SizeMatched(float(p1.sum()), float(p2.sum()), float((p1 * p2).sum()))


def split_overlap(m: Counts, N: int, n1: int, n2: int) -> SizeMatched:
    """Of two disjoint random subsets of one benchmark, n1 and n2 items: what overlap the same source gives.

    Both fire j with probability 1 - q_j(n1) - q_j(n2) + q_j(n1 + n2).
    """
    values, many = _grouped(m)
    if n1 + n2 > N:
        raise InputError(f"Two disjoint subsets of {n1} and {n2} items were asked of {N} items; n1 + n2 <= N fits.")
    _check_size(N, min(n1, n2))
    p1, p2, both = (_probability(values, N, n)[0] for n in (n1, n2, n1 + n2))
    return SizeMatched(float(many @ p1), float(many @ p2), float(many @ (p1 + p2 - both)))


def pooled_split_overlap(m1: Counts, N1: int, m2: Counts, N2: int, n: int | None = None) -> SizeMatched:
    """The null hypothesis of one population: both benchmarks are pooled and cut at random into two.

    Cut into N1 and N2 items; with `n` into two of n items each, to compare with `size_matched` at n. The benchmarks
    overlap less than this where their contents differ.
    """
    sizes = (N1, N2) if n is None else (n, n)
    return split_overlap(np.asarray(m1, np.int64) + m2, N1 + N2, *sizes)


# --- single items --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemRedundancy:
    covered: Floats
    """[N] share of the item's features that some other item fires too; nan where it fires none"""
    exclusive: Ints
    """[N] features that no other item fires: what the benchmark loses with the item"""
    worth: Floats
    """[N] sum of 1 / m_j over the item's features: its mean contribution over all orders in which the items could be
    added (the Shapley value of |F|). The items' worths sum to |F|."""


def item_redundancy(footprints: Footprints) -> ItemRedundancy:
    m, N = footprints.counts(), len(footprints)
    owner, count = footprints.owners(), m[footprints.features]
    sizes = footprints.sizes
    exclusive = np.bincount(owner[count == 1], minlength=N)
    worth: Floats = np.bincount(owner, weights=1 / count, minlength=N).astype(np.float64)
    covered = np.full(N, np.nan)
    np.divide(sizes - exclusive, sizes, out=covered, where=sizes > 0)
    return ItemRedundancy(covered, exclusive, worth)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _check_size(N: int, n: int) -> None:
    if not 1 <= n <= N:
        raise InputError(f"Subsets of {n} items were asked of a benchmark of {N}; accepted are sizes from 1 to {N}.")
