"""Codes of tokens, gathered per text and feature."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Pooling = Literal["any", "mean", "last"]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PooledCodes:
    """What features do in T texts. One entry for each pair of text and feature that is active there; C features occur.

    Entries are sorted by feature, then text.
    """

    features: Ints
    """[C] ids, ascending"""
    column: Ints
    """[M] place of the entry's feature in `features`"""
    text: Ints
    """[M]"""
    total: Floats
    """[M] sum of the activation over the text's kept tokens"""
    firing: Ints
    """[M] kept tokens with an activation above 0"""
    largest: Floats
    """[M]"""
    last: Floats
    """[M] activation at the last kept token, 0 if silent there"""
    tokens: Ints
    """[T] kept tokens"""

    def values(self, pooling: Pooling) -> tuple[Floats, Floats]:
        """(activation, firing) per entry, [M] each, of the text as a whole.

        any: the largest activation, and 1; mean: the mean activation over the kept tokens, and the share of them that
        fire; last: the activation at the last kept token, and whether it is above 0.
        """
        if pooling == "any":
            return self.largest, np.ones(len(self.largest))
        if pooling == "last":
            return self.last, (self.last > 0).astype(np.float64)
        size = self.tokens[self.text]
        return self.total / size, self.firing / size


def pool(
    top_acts: npt.NDArray[np.float32],
    top_indices: npt.NDArray[np.int32],
    text: npt.NDArray[np.integer],
    keep: npt.NDArray[np.bool_],
    texts: int,
) -> PooledCodes:
    """Gather codes [N, K] of tokens that belong to the texts `text` [N] (ascending); `keep` [N]: the tokens that count.

    Entries that are not above 0 are inactive. Sums are taken in float64 in the order of the tokens.
    """
    where = np.asarray(text, np.int64)
    active = (top_acts > 0) & keep[:, None]
    row, place = np.nonzero(active)
    value = top_acts[row, place].astype(np.float64)
    features, column = np.unique(top_indices[row, place].astype(np.int64), return_inverse=True)
    order = np.lexsort((row, column))  # within a feature by token, so by text too
    row, column, value = row[order], column[order].astype(np.int64), value[order]
    of = where[row]
    starts = np.flatnonzero(np.diff(column * (texts + 1) + of, prepend=-1))
    last_row = np.full(texts, -1, np.int64)
    last_row[where[keep]] = np.flatnonzero(keep)  # the last assignment of a repeated index stays
    at_end = np.where(row == last_row[of], value, 0.0)
    empty = len(starts) == 0
    return PooledCodes(
        features=features,
        column=column[starts],
        text=of[starts],
        total=value[:0] if empty else np.add.reduceat(value, starts),
        firing=np.diff(starts, append=len(value)).astype(np.int64),
        largest=value[:0] if empty else np.maximum.reduceat(value, starts),
        last=value[:0] if empty else np.maximum.reduceat(at_end, starts),
        tokens=np.bincount(where[keep], minlength=texts).astype(np.int64),
    )
