"""Activations from disk, shuffled across shards with bounded memory.

The store is cut into blocks of consecutive tokens; blocks are read in a random order that runs over all shards,
and the shuffle buffer mixes their rows. An epoch serves every usable token exactly once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qscope.activation_store import ActivationStore
from qscope.errors import InputError
from qscope.training.buffer import Point, ShuffledStream, permutation
from qscope.training.filters import NORM_MULTIPLE, RowFilter

BLOCK = 256
"""Tokens read in one piece: 2 MB at width 4096 in 16 bits, where a disk or a network is near its full speed."""

BLOCKS_AT_ONCE = 32


def stored_stream(
    store: ActivationStore,
    layers: Sequence[int],
    *,
    buffer_tokens: int,
    tokens: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    first_token: str = "drop",
    norm_multiple: float | None = NORM_MULTIPLE,
    cycle: bool = False,
    block: int = BLOCK,
    blocks_at_once: int = BLOCKS_AT_ONCE,
    rank: int = 0,
    world: int = 1,
) -> ShuffledStream:
    """A shuffled stream of stored activations.

    Args:
        tokens: how many will be asked for in all; a store that holds fewer is refused.
        first_token: "drop" leaves out what stood first in the model's window, "keep" uses it.
        cycle: begin again, in another order, when all is served.
        rank, world: this reader takes every `world`-th block, beginning with number `rank`.
        The others as for `model_stream`.
    """
    producer = StoredActivations(
        store, layers, seed, torch.device(device), first_token, norm_multiple, cycle, block, blocks_at_once, rank, world
    )
    return ShuffledStream(producer, buffer_tokens, seed, tokens)


class StoredActivations:
    """A `Producer`: blocks of a store in a random order that depends on the seed and the epoch alone."""

    def __init__(
        self,
        store: ActivationStore,
        layers: Sequence[int],
        seed: int,
        device: torch.device,
        first_token: str = "drop",
        norm_multiple: float | None = NORM_MULTIPLE,
        cycle: bool = False,
        block: int = BLOCK,
        blocks_at_once: int = BLOCKS_AT_ONCE,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        absent = [layer for layer in layers if layer not in store.layers]
        if absent or not layers or len(set(layers)) < len(layers):
            raise InputError(
                f"Layers {list(layers)} were asked for, and {store.path} holds {', '.join(map(str, store.layers))}. "
                "Name some of these, each once."
            )
        if first_token not in ("drop", "keep") or block < 1 or blocks_at_once < 1 or not 0 <= rank < world:
            raise InputError(
                f"first_token {first_token!r}, blocks of {block} tokens, {blocks_at_once} at once, reader {rank} of "
                f"{world} were given. Accepted: drop or keep, at least 1 of each, readers 0 to their number less 1."
            )
        self.store, self.layers, self.seed, self.device = store, list(layers), seed, device
        self.first_token, self.cycle = first_token, cycle
        self.block, self.blocks_at_once, self.rank, self.world = block, blocks_at_once, rank, world
        self.widths: dict[Point, int] = {layer: store.widths[layer] for layer in self.layers}
        self.dtype = store.dtype(self.layers)
        self.max_rows = block * blocks_at_once
        self.filter = RowFilter(self.layers, device, norm_multiple)
        self._blocks = torch.tensor(
            [
                (record.index, start, min(start + block, record.tokens))
                for record in store.records
                for start in range(0, record.tokens, block)
            ],
            dtype=torch.int64,
        ).reshape(-1, 3)
        self.tokens = self.dropped = 0
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch, self._at = epoch, 0
        # Turns below zero are these, the others are the buffer's.
        self._order = permutation(len(self._blocks), self.seed, -1 - epoch)[self.rank :: self.world]

    @property
    def done(self) -> bool:
        return self._at >= len(self._order) and (not self.cycle or len(self._order) == 0)

    def check(self, n_tokens: int) -> None:
        firsts = sum(record.first for record in self.store.records) if self.first_token == "drop" else 0
        held = self.store.tokens - firsts
        if not self.cycle and self.world == 1 and held < n_tokens:
            raise InputError(
                f"{n_tokens:,} tokens are to be trained on, and {self.store.path} holds only {held:,} that can be "
                "used. Encode more text, train on fewer tokens, or have it read again (cycle)."
            )

    def produce(self, room: int) -> Iterator[dict[Point, Tensor]]:
        fruitless = 0
        while room >= self.max_rows and not self.done:
            if self._at >= len(self._order):
                self._begin(self.epoch + 1)
            chosen = self._order[self._at : self._at + self.blocks_at_once]
            self._at += len(chosen)
            part = self._kept(self._blocks[chosen].tolist())
            count = len(next(iter(part.values())))
            fruitless = 0 if count else fruitless + len(chosen)
            if fruitless >= len(self._order):
                raise InputError(
                    f"No activation of {self.store.path} can be used: {self.counts()}. If they are NaN, encode again "
                    "with --dtype float32; if the norm filter took them, widen it."
                )
            room -= count
            yield part

    def _kept(self, blocks: list[list[int]]) -> dict[Point, Tensor]:
        """Usable rows of some blocks, read in the order of the disk."""
        blocks = sorted(blocks)
        rows: dict[Point, Tensor] = {
            layer: torch.cat([self.store.rows(shard, layer, a, b).to(self.dtype) for shard, a, b in blocks]).to(
                self.device
            )
            for layer in self.layers
        }
        places = torch.cat([self.store.column(shard, "place", a, b).to(torch.int64) for shard, a, b in blocks])
        usable = places > 0 if self.first_token == "drop" else torch.ones_like(places, dtype=torch.bool)
        self.tokens += len(places)
        self.dropped += len(places) - int(usable.sum())
        kept = self.filter.keep(rows, usable.to(self.device)).nonzero().flatten()
        return {layer: x.index_select(0, kept) for layer, x in rows.items()}

    def counts(self) -> dict[str, Any]:
        read = {"tokens": self.tokens, "dropped_first": self.dropped, "epoch": self.epoch}
        return {**read, **self.filter.counts()}

    def settings(self) -> dict[str, Any]:
        names = ("layers", "first_token", "cycle", "block", "blocks_at_once", "rank", "world")
        return {
            **{name: getattr(self, name) for name in names},
            "dtype": str(self.dtype),
            "norm_multiple": self.filter.multiple,
            "activations": self.store.key(),
        }

    def state(self) -> dict[str, Any]:
        numbers = {"epoch": self.epoch, "at": self._at, "tokens": self.tokens, "dropped": self.dropped}
        return {**numbers, "filter": self.filter.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._begin(int(state["epoch"]))
        self._at, self.tokens, self.dropped = int(state["at"]), int(state["tokens"]), int(state["dropped"])
        self.filter.restore(state["filter"])
