"""Which features each item of a benchmark fires: sets of ids in one flat array, nothing of the size items x features.

What that takes: 4 bytes a feature and 8 an item. Last-token footprints have at most K features, so a hundred
benchmarks of 30,000 items at K = 100 take 1.2 GB, in memory or mapped from disk. An any-token footprint is the union
over the item's tokens: up to tokens x K features, typically some hundred to some thousand, so ten times as much and
more. Where that is too large, `FootprintCounts` is added up chunk by chunk and holds no item; all measures but those
of single items need nothing else.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError, StoreError
from qscope.files import safetensors_header, write_file
from qscope.finding.pooled import Ints, PooledCodes, Pooling

Ids = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

FORMAT = "qscope-footprints"
_BLOCK = 1 << 22
"""Ids counted at once: bincount makes an int64 copy of what it is given"""
_LONGEST_HEADER = 1 << 12
_NO_FEATURE = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Footprints:
    """The sets of features of N items, with M ids in all. An item may fire nothing."""

    starts: Ints
    """[N + 1] item i has features[starts[i] : starts[i + 1]]"""
    features: Ids
    """[M] ascending within an item"""
    d_sae: int

    def __post_init__(self) -> None:
        if self.starts.ndim != 1 or len(self.starts) == 0 or self.starts[0] != 0 or self.starts[-1] != self.entries:
            raise InputError(
                f"Footprints were given {len(self.starts)} starts for {self.entries} ids; accepted are N + 1 of them,"
                " from 0 to the number of ids, as the class methods make them."
            )

    @classmethod
    def from_codes(
        cls,
        codes: PooledCodes,
        d_sae: int,
        pooling: Pooling = "last",
        threshold: float = 0.0,
        top_n: int | None = None,
    ) -> "Footprints":
        """Of pooled codes: the features whose pooled activation (any: the largest, mean, last) is above `threshold`.

        top_n: at most so many of an item, the strongest; of equal ones the lowest ids. Items without kept tokens stay,
        with an empty set. Raises `InputError` for a negative threshold, a top_n below 1 and ids beyond d_sae.
        """
        _check_choice(threshold, top_n)
        if len(codes.features) and int(codes.features[-1]) >= d_sae:
            raise InputError(
                f"The codes hold feature {int(codes.features[-1])}, but the SAE is said to have d_sae = {d_sae}. Give"
                " the d_sae of the SAE that made them."
            )
        value = codes.values(pooling)[0]
        chosen = np.flatnonzero(value > threshold)
        item, ids, value = codes.text[chosen], codes.features[codes.column[chosen]], value[chosen]
        order = np.lexsort((ids, item)) if top_n is None else np.lexsort((ids, -value, item))
        starts = _starts(np.bincount(item, minlength=len(codes.tokens)))
        if top_n is not None:
            order = order[np.arange(len(order)) - starts[item[order]] < top_n]
            order = order[np.lexsort((ids[order], item[order]))]
            starts = _starts(np.bincount(item[order], minlength=len(codes.tokens)))
        return cls(starts, ids[order].astype(np.int32), d_sae)

    @classmethod
    def from_topk(
        cls,
        top_acts: npt.NDArray[np.floating],
        top_indices: Ids,
        d_sae: int,
        threshold: float = 0.0,
        top_n: int | None = None,
    ) -> "Footprints":
        """Of one token per item as `SAE.encode_topk` gives it: [N, K] each, activations descending in a row.

        A NaN activation is not above any threshold. Raises `InputError` as `from_codes` does.
        """
        _check_choice(threshold, top_n)
        top_acts, top_indices = top_acts[:, :top_n], top_indices[:, :top_n]
        ids = np.where(top_acts > threshold, top_indices, _NO_FEATURE).astype(np.int32, copy=False)
        ids.sort(axis=1)
        fired = ids != _NO_FEATURE
        sets = cls(_starts(fired.sum(axis=1)), ids[fired], d_sae)
        if len(sets.features) and not 0 <= int(sets.features.min()) <= int(sets.features.max()) < d_sae:
            raise InputError(
                f"The codes hold features {int(sets.features.min())} to {int(sets.features.max())}, but the SAE is said"
                f" to have d_sae = {d_sae}. Give the d_sae of the SAE that made them."
            )
        return sets

    @classmethod
    def from_sets(cls, sets: Sequence[Sequence[int]], d_sae: int) -> "Footprints":
        """Of ids in any order, each counted once."""
        rows = [np.unique(np.asarray(ids, np.int32)) for ids in sets]
        if any(len(row) and not 0 <= int(row[0]) <= int(row[-1]) < d_sae for row in rows):
            raise InputError(f"The sets hold ids outside 0 to {d_sae - 1}; give the d_sae of the SAE that made them.")
        return cls(_starts(np.array([len(row) for row in rows], np.int64)), _joined(rows), d_sae)

    @classmethod
    def concatenate(cls, parts: Sequence["Footprints"]) -> "Footprints":
        """The items of all parts in order. Raises `InputError` for no part and for parts of unequal d_sae."""
        if len({part.d_sae for part in parts}) != 1:
            raise InputError(
                f"Footprints of d_sae {sorted({part.d_sae for part in parts})} were to be joined; accepted are one or"
                " more of the same SAE."
            )
        sizes = np.concatenate([part.sizes for part in parts])
        return cls(_starts(sizes), _joined([part.features for part in parts]), parts[0].d_sae)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def entries(self) -> int:
        """M: ids of all items together."""
        return len(self.features)

    @property
    def sizes(self) -> Ints:
        """[N] features of each item."""
        return np.diff(self.starts)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, on disk or in memory."""
        return self.starts.nbytes + self.features.nbytes

    def item(self, index: int) -> Ids:
        """The features of one item."""
        return self.features[self.starts[index] : self.starts[index + 1]]

    def owners(self) -> Ints:
        """[M] the item of each id."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def counts(self) -> Ints:
        """[F] m_j: how many items fire feature j."""
        found = np.zeros(self.d_sae, np.int64)
        for begin in range(0, self.entries, _BLOCK):
            found += np.bincount(self.features[begin : begin + _BLOCK], minlength=self.d_sae)
        return found

    def present(self) -> Bools:
        """[F] whether any item fires feature j: the feature set of the benchmark."""
        found = np.zeros(self.d_sae, np.bool_)
        found[self.features] = True
        return found

    def rows(self, index: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> "Footprints":
        """The items at these places, in their order."""
        index = np.flatnonzero(index) if index.dtype == np.bool_ else np.asarray(index, np.int64)
        index = np.where(index < 0, index + len(self), index)
        sizes = self.sizes[index]
        starts = _starts(sizes)
        places = np.repeat(self.starts[index] - starts[:-1], sizes) + np.arange(starts[-1])
        return Footprints(starts, np.asarray(self.features[places]), self.d_sae)

    def save(self, path: Path) -> None:
        """One safetensors file, replaced as a whole. Raises `StorageError`."""
        arrays = (np.ascontiguousarray(self.starts, "<i8"), np.ascontiguousarray(self.features, "<i4"))
        header, size = _header(len(self), self.entries, self.d_sae)
        write_file(path, [header, *(array.tobytes() for array in arrays)], size)

    @classmethod
    def load(cls, path: Path) -> "Footprints":
        """What `save` wrote; the ids stay on disk and are mapped.

        Everything that the measures rely on is checked in one pass: sizes, order and range. A changed id that still
        makes an ascending set is not found. Raises `StoreError` for a file that is something else, cut or damaged.
        """
        try:
            items, entries, d_sae, begin = _read_header(path)
            starts = np.fromfile(path, "<i8", items + 1, offset=begin)
            where = begin + 8 * (items + 1)
            mapped = np.memmap(path, "<i4", "r", where, (entries,)) if entries else np.empty(0, "<i4")
        except OSError as error:
            raise StoreError(f"{path} could not be read: {error.strerror or error}.") from error
        if (
            starts[0] != 0
            or starts[-1] != entries
            or (np.diff(starts) < 0).any()
            or not _ascending(mapped, starts, d_sae)
        ):
            raise _damaged(path, "its sets are not ascending ids below d_sae")
        return cls(starts, mapped, d_sae)


@dataclass(frozen=True, eq=False)
class FootprintCounts:
    """What a benchmark's footprints add up to, without the items: chunks are added with `+` in any order."""

    items: int
    """N"""
    counts: Ints
    """[F] m_j: how many items fire feature j"""
    sizes: Ints
    """[F + 1] how many items have a footprint of that many features"""

    @classmethod
    def empty(cls, d_sae: int) -> "FootprintCounts":
        return cls(0, np.zeros(d_sae, np.int64), np.zeros(d_sae + 1, np.int64))

    @classmethod
    def of(cls, footprints: Footprints) -> "FootprintCounts":
        sizes = np.bincount(footprints.sizes, minlength=footprints.d_sae + 1)
        return cls(len(footprints), footprints.counts(), sizes)

    @property
    def d_sae(self) -> int:
        return len(self.counts)

    def present(self) -> Bools:
        """[F] whether any item fires feature j."""
        return self.counts > 0

    def __add__(self, other: "FootprintCounts") -> "FootprintCounts":
        if self.d_sae != other.d_sae:
            raise InputError(
                f"Counts of d_sae {self.d_sae} and {other.d_sae} were to be added; accepted are counts of one SAE."
            )
        return FootprintCounts(self.items + other.items, self.counts + other.counts, self.sizes + other.sizes)


def _check_choice(threshold: float, top_n: int | None) -> None:
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise InputError(f"The threshold is {threshold}; accepted are numbers from 0 on: silent features have 0.")
    if top_n is not None and top_n < 1:
        raise InputError(f"top_n is {top_n}; accepted is 1 or more, or none for all features above the threshold.")


def _starts(sizes: Ints) -> Ints:
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def _joined(parts: Sequence[Ids]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *parts])


def _ascending(features: Ids, starts: Ints, d_sae: int) -> bool:
    first = np.zeros(len(features), np.bool_)
    first[starts[:-1][np.diff(starts) > 0]] = True
    for part, opens in _blocks(features, first):
        if int(part.min()) < 0 or int(part.max()) >= d_sae or not ((part[1:] > part[:-1]) | opens[1:]).all():
            return False
    return True


def _blocks(features: Ids, first: Bools) -> Iterator[tuple[Ids, Bools]]:
    """Blocks that overlap in one place, so that every neighbour is seen."""
    for begin in range(0, len(features), _BLOCK):
        at = slice(max(0, begin - 1), begin + _BLOCK)
        yield features[at], first[at]


def _header(items: int, entries: int, d_sae: int) -> tuple[bytes, int]:
    forms = [("starts", "I64", (items + 1,), 8 * (items + 1)), ("features", "I32", (entries,), 4 * entries)]
    return safetensors_header(forms, {"format": FORMAT, "version": "1", "d_sae": str(d_sae)})


def _read_header(path: Path) -> tuple[int, int, int, int]:
    """(items, ids, d_sae, first byte of the data) of a file that has exactly the header and size they ask for."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LONGEST_HEADER:
            raise _damaged(path, "it does not begin as one")
        text = stream.read(length)
    try:
        held = json.loads(text)
        items, entries = held["starts"]["shape"][0] - 1, held["features"]["shape"][0]
        d_sae = int(held["__metadata__"]["d_sae"])
        header, size = _header(items, entries, d_sae)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if items < 0 or header[8:] != text:
        raise _damaged(path, "its header is another one")
    if path.stat().st_size != size:
        raise _damaged(path, f"it has {path.stat().st_size} bytes instead of {size}")
    return items, entries, d_sae, len(header)


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is not a footprint file of qscope: {why}. Delete it and run the same command again.")
