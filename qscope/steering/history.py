"""Where steering fired: one record for each forward pass, column after column."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Record:
    """Of one forward pass."""

    start: int
    """Column of its first token"""
    rows: int
    tokens: int
    fired: list[tuple[list[int], Tensor]]
    """([edit of each column], bool or uint8 [rows, tokens, columns])"""

    @property
    def end(self) -> int:
        return self.start + self.tokens

    def dense(self, edits: int) -> Tensor:
        """bool [rows, tokens, edits], on the CPU."""
        found = torch.zeros(self.rows, self.tokens, edits, dtype=torch.bool)
        for each, where in self.fired:
            where = where.cpu().bool()
            for i, edit in enumerate(each):
                found[..., edit] |= where[..., i]
        return found


def before(records: Sequence[Record], column: int) -> list[Record]:
    """What lies before `column`: candidates that assisted decoding has rejected are fed in anew from there."""
    kept = [record for record in records if record.start < column]
    if kept and kept[-1].end > column:
        last, tokens = kept[-1], column - kept[-1].start
        kept[-1] = replace(last, tokens=tokens, fired=[(each, where[:, :tokens]) for each, where in last.fired])
    return kept


def continued(records: Sequence[Record], start: int, rows: int) -> list[Record]:
    """The records that a pass of `rows` rows from column `start` on goes on with; none where they are of others."""
    kept = before(records, start)
    return kept if kept and kept[-1].end == start and kept[-1].rows == rows else []


def joined(records: Sequence[Record], edits: int) -> list[Record]:
    """The same as at most one record, so that reading after every token stays cheap."""
    if len(records) < 2:
        return list(records)
    found = torch.cat([record.dense(edits) for record in records], dim=1)
    return [Record(records[0].start, records[0].rows, found.shape[1], [(list(range(edits)), found)])]
