"""Hits of features, and the n best of them kept while streaming over a feature store."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError


class FeatureHits(NamedTuple):
    """Tokens at which a feature is active, all arrays [hits]."""

    doc: npt.NDArray[np.uint32]
    position: npt.NDArray[np.uint32]
    value: npt.NDArray[np.float32]


class BestHits(NamedTuple):
    """Hits sorted by slot, then value descending, document, position."""

    slot: npt.NDArray[np.int32]
    doc: npt.NDArray[np.uint32]
    position: npt.NDArray[np.uint32]
    value: npt.NDArray[np.float32]

    @classmethod
    def empty(cls) -> "BestHits":
        return cls(np.empty(0, np.int32), np.empty(0, np.uint32), np.empty(0, np.uint32), np.empty(0, np.float32))

    def taken(self, which: npt.NDArray[Any]) -> "BestHits":
        return BestHits(self.slot[which], self.doc[which], self.position[which], self.value[which])

    def merged(self, new: "BestHits", n: int, one_per_document: bool) -> "BestHits":
        """The n best per slot of both."""
        both = BestHits(*(np.concatenate(pair) for pair in zip(self, new, strict=True)))
        if one_per_document:
            both = both.taken(np.lexsort((both.position, -both.value, both.doc, both.slot)))
            first = np.ones(len(both.slot), np.bool_)
            first[1:] = (both.slot[1:] != both.slot[:-1]) | (both.doc[1:] != both.doc[:-1])
            both = both.taken(first)
        both = both.taken(np.lexsort((both.position, both.doc, -both.value, both.slot)))
        rank = np.arange(len(both.slot)) - np.searchsorted(both.slot, both.slot, side="left")
        return both.taken(rank < n)


def row_range(rows: slice | None, size: int) -> tuple[int, int]:
    """(start, stop) of a slice over `size` rows; `InputError` for a step other than 1."""
    start, stop, step = (rows or slice(None)).indices(size)
    if step != 1:
        raise InputError(f"rows {rows} has step {step}; a feature store reads ranges with step 1.")
    return start, max(start, stop)


def join(parts: list[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    """The arrays one after the other; an empty one of `dtype` where there are none."""
    return np.concatenate(parts) if parts else np.empty(0, dtype)
