"""A bounded shuffle buffer between what makes activations and what trains on them.

Rows of one token at all points share a slot, so points stay aligned. The buffer holds at most `capacity` rows:

    memory = capacity * (sum of the points' widths) * bytes per number

on the producer's device, and `state()` holds what is left of them once more on the host. When fewer than
half remain, the free slots are filled and everything that is in the buffer is put into a new random order;
the order depends on the seed and on how often that has happened, on nothing else.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.files import differences

Point = int | str
"""Where activations are read: l, the residual behind block l; "mlp_in.l" and "mlp_out.l", the ends of its MLP."""

_STATE_ROWS = 1 << 14  # rows gathered at once for `state`: the device needs room for these only


class Stream(Protocol):
    """Where a trainer gets its activations from."""

    def next(self, n_tokens: int) -> dict[Point, Tensor]:
        """The next `n_tokens` rows of every point, [n, D]. Raises StopIteration when so many are not left."""

    def state(self) -> dict[str, Any]:
        """Everything that decides the rows to come: tensors and plain values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, to the bit."""


class Producer(Protocol):
    """Makes rows in a fixed order."""

    widths: dict[Point, int]
    dtype: torch.dtype
    device: torch.device
    max_rows: int
    """Rows of one part, at most."""

    def produce(self, room: int) -> Iterator[dict[Point, Tensor]]:
        """Parts of at most `max_rows` rows, `room` in all at most and more than room - max_rows unless it is done."""

    @property
    def done(self) -> bool:
        """Whether there is nothing more to come."""

    def check(self, n_tokens: int) -> None:
        """Raises InputError if it can tell that it holds fewer than `n_tokens` rows."""

    def settings(self) -> dict[str, Any]:
        """What must be equal for a state to fit, as JSON."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def counts(self) -> dict[str, Any]:
        """What was read and what was left out."""


class ShuffledStream:
    """A `Stream`: the rows of a producer through a shuffle buffer.

    capacity: rows that the buffer holds, at least twice what the producer makes at once.
    tokens: how many rows will be asked for in all. With it, a producer that is known to hold fewer is refused
        before anything is computed, and running dry is an InputError that says how many there were.
    """

    def __init__(self, producer: Producer, capacity: int, seed: int = 0, tokens: int | None = None) -> None:
        if capacity < 2 * producer.max_rows:
            raise InputError(
                f"A shuffle buffer of {capacity} tokens was asked for, and {producer.max_rows} are made at once. "
                f"Give it at least {2 * producer.max_rows}, or make fewer at once."
            )
        self.producer, self.capacity, self.seed, self.tokens = producer, capacity, seed, tokens
        self.served = 0
        """Rows handed out so far."""
        self._refills = 0
        self._broken = False
        self._rows = {
            point: torch.zeros(capacity, width, dtype=producer.dtype, device=producer.device)
            for point, width in producer.widths.items()
        }
        self._slots = torch.arange(capacity, device=producer.device)
        self._at = self._left = 0  # the rows to serve lie in the slots _slots[_at : _at + _left], in this order

    @property
    def left(self) -> int:
        """Rows in the buffer that were not handed out yet."""
        return self._left

    def memory(self) -> int:
        """Bytes of the buffer on the device; a `state` has at most as many."""
        return sum(rows.nbytes for rows in self._rows.values())

    def counts(self) -> dict[str, Any]:
        """What was read and what was left out so far, and why. Waits for the device."""
        return {"served": self.served, **self.producer.counts()}

    def next(self, n_tokens: int) -> dict[Point, Tensor]:
        """As `Stream.next`; at most half of the buffer at once. Raises InputError when `tokens` cannot be had."""
        if not 1 <= n_tokens <= self.capacity // 2:
            raise InputError(
                f"{n_tokens} tokens were asked for at once, from a shuffle buffer of {self.capacity}. Accepted: 1 to "
                f"{self.capacity // 2}, half of it; enlarge the buffer for larger batches."
            )
        if self.tokens is not None and self.served == 0 and self._refills == 0:
            self.producer.check(self.tokens)
        enough = self.tokens is not None and self._left >= self.tokens - self.served
        if self._left < self.capacity // 2 and not self.producer.done and not enough:
            self._refill()
        if self._left < n_tokens:
            if self.tokens is not None and self.served + n_tokens <= self.tokens:
                raise InputError(
                    f"{self.tokens:,} tokens are to be trained on, and the text gave only "
                    f"{self.served + self._left:,}. Give more text, train on fewer tokens, or have it read again "
                    "from its beginning (cycle)."
                )
            raise StopIteration
        chosen = self._slots[self._at : self._at + n_tokens]
        batch = {point: rows.index_select(0, chosen) for point, rows in self._rows.items()}
        self._at += n_tokens
        self._left -= n_tokens
        self.served += n_tokens
        return batch

    def _refill(self) -> None:
        """Fills the free slots and mixes all that is in the buffer.

        The new order is a permutation of (rows left, in the order in which they would have been served; new rows,
        in the order of their making), so it does not depend on which slots they lie in.
        """
        waiting = self._slots[self._at : self._at + self._left]
        free = torch.cat([self._slots[self._at + self._left :], self._slots[: self._at]])
        used = 0
        self._broken = True
        for part in self.producer.produce(len(free)):
            count = len(next(iter(part.values())))
            for point, rows in part.items():
                self._rows[point].index_copy_(0, free[used : used + count], rows)
            used += count
        filled = torch.cat([waiting, free[:used]])
        order = permutation(len(filled), self.seed, self._refills).to(filled.device)
        self._slots = torch.cat([filled[order], free[used:]])
        self._at, self._left = 0, len(filled)
        self._refills += 1
        self._broken = False

    def state(self) -> dict[str, Any]:
        """Tensors on the host and plain values; the buffer's rows are the bulk of it (`memory` at most)."""
        if self._broken:
            raise RuntimeError("The stream failed while its buffer was filled; go on from an earlier state.")
        chosen = self._slots[self._at : self._at + self._left]
        return {
            "settings": self.settings(),
            "served": self.served,
            "refills": self._refills,
            "rows": {str(point): _gather(rows, chosen) for point, rows in self._rows.items()},
            "producer": self.producer.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Raises InputError, naming the fields, if it is of a stream with other settings."""
        changed = differences(state["settings"], self.settings())
        if changed:
            raise InputError(
                f"The saved stream of activations had other settings: {'; '.join(changed[:12])}. Use the old ones to "
                "go on, or begin a new run in another folder."
            )
        self.producer.restore(state["producer"])
        self.served, self._refills, self._broken = int(state["served"]), int(state["refills"]), False
        self._at, self._left = 0, 0
        for point, rows in self._rows.items():
            saved = state["rows"][str(point)]
            self._left = len(saved)
            rows[: self._left].copy_(saved)
        self._slots = torch.arange(self.capacity, device=self.producer.device)

    def settings(self) -> dict[str, Any]:
        """What must be equal for a state to fit."""
        return {"buffer_tokens": self.capacity, "seed": self.seed, **self.producer.settings()}


def _generator(seed: int, turn: int) -> torch.Generator:
    """A generator for one shuffle: the seed and its number, hashed, so that neighbouring seeds share nothing."""
    digest = hashlib.sha256(f"{seed} {turn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def permutation(count: int, seed: int, turn: int) -> Tensor:
    """A random order of 0..count-1 that depends on `seed` and `turn` alone: [count] int64 on the host."""
    return torch.randperm(count, generator=_generator(seed, turn))


def _gather(rows: Tensor, chosen: Tensor) -> Tensor:
    """rows[chosen] on the host, through a bounded piece of device memory."""
    out = torch.empty(len(chosen), rows.shape[1], dtype=rows.dtype)
    for start in range(0, len(chosen), _STATE_ROWS):
        piece = chosen[start : start + _STATE_ROWS]
        out[start : start + len(piece)] = rows.index_select(0, piece).cpu()
    return out
