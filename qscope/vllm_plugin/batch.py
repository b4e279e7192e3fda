"""The worker's side: which directions lie where, which tokens of a step they touch, and what was read."""

import functools
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qscope import ops
from qscope.errors import SteeringNotApplied
from qscope.steering import Edit, positions
from qscope.steering.tokens import Choice, Pass
from qscope.vllm_plugin.options import Options
from qscope.vllm_plugin.request import Request, column, directions_of, needs_ids, probe
from qscope.vllm_plugin.steer_residual_ import READING

KEPT = 1024
"""Finished requests whose activations wait to be taken; the oldest goes first."""


class Places:
    """Numbered places shared by everyone who asks for the same thing; freed with the last of them."""

    def __init__(self, size: int) -> None:
        self._free = list(range(size))
        self._at: dict[Hashable, int] = {}
        self._users: Counter[Hashable] = Counter()

    def take(self, key: Hashable) -> tuple[int, bool]:
        """(place, whether it is new). Raises IndexError when all are taken."""
        new = key not in self._at
        if new:
            self._free.sort()
            self._at[key] = self._free.pop(0)
        self._users[key] += 1
        return self._at[key], new

    def leave(self, key: Hashable) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._free.append(self._at.pop(key))


@dataclass
class _Active:
    """A request that the worker knows."""

    prompt: int
    """Its tokens before the first generated one"""
    edits: list[tuple[int, int, Choice, bool]] = field(default_factory=list)
    """(layer, bit, tokens, whether that needs their ids)"""
    taken: list[tuple[Places, Hashable]] = field(default_factory=list)
    reads: dict[int, list[int]] = field(default_factory=dict)
    """layer -> places of its probes"""
    values: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    """layer -> (first position, [tokens, R] float32)"""

    def activations(self) -> dict[int, list[list[float]]]:
        """layer -> [position][feature], NaN where no forward pass went over a position."""
        found = {}
        for layer, columns in self.reads.items():
            parts = self.values.get(layer, [])
            end = max((start + len(part) for start, part in parts), default=0)
            whole = torch.full((end, len(columns)), torch.nan)
            for start, part in parts:
                whole[start : start + len(part)] = part.cpu()[:, columns]
            found[layer] = whole.tolist()
        return found


class BatchSteering:
    """Keeps the buffers of the steered layers in step with vLLM's batch."""

    def __init__(self, options: Options, layers: dict[int, Any], width: int) -> None:
        self.options, self.layers, self.width = options, layers, width
        self._index = {layer: i for i, layer in enumerate(layers)}
        first = next(iter(layers.values())).qscope_bits
        pin = first.is_cuda
        self._host = torch.zeros(len(layers), len(first), dtype=torch.int32, pin_memory=pin)
        self._bits = self._host.numpy().view("uint32")
        self._dirty = 0
        """Tokens whose bits on the device may not be 0"""
        self._reading = False
        self._directions = {layer: Places(options.max_directions) for layer in layers}
        self._probes = {layer: Places(options.max_reads) for layer in layers}
        self.requests: dict[str, _Active] = {}
        self._wanted: list[tuple[_Active, int, int, int]] = []
        self._finished: OrderedDict[str, _Active] = OrderedDict()

    def add(self, request_id: str, request: Request, prompt: int) -> None:
        """A request enters. Raises SteeringNotApplied where its directions do not fit beside the others'."""
        self.remove(request_id)
        active = self.requests[request_id] = _Active(prompt)
        for edit, (layer, key) in zip(request.edits, directions_of(request.edits), strict=True):
            place = self._take(active, self._directions[layer], key, functools.partial(self._write_direction, edit))
            special = torch.tensor(request.special) if "special" in edit.skip else None
            after = edit.after if isinstance(edit.after, int) else None
            choice = Choice(positions.parse(edit.tokens), after, "first" in edit.skip, special)
            active.edits.append((self._index[layer], 1 << place, choice, needs_ids(edit)))
        for layer, feature in request.reads:
            write = functools.partial(self._write_probe, layer, feature)
            place = self._take(active, self._probes[layer], feature, write)
            active.reads.setdefault(layer, []).append(place)

    def remove(self, request_id: str) -> None:
        """A request leaves; its activations wait for `take`."""
        active = self.requests.pop(request_id, None)
        if active is None:
            return
        for places, key in active.taken:
            places.leave(key)
        if active.reads:
            self._finished[request_id] = active
            while len(self._finished) > KEPT:
                self._finished.popitem(last=False)

    def fill(self, rows: Iterable[tuple[str, int, int]], ids: Callable[[str, int], Tensor]) -> None:
        """Sets the bits of a step. rows: (request, first position, tokens) in the order of the step's tokens.

        ids: (request, n) -> ids [1, n] of its first n tokens; called only where an edit needs them.
        """
        if not (self.requests or self._dirty or self._reading):
            return
        self._bits[:, : self._dirty] = 0
        self._wanted = []
        offset = end = 0
        for request_id, start, count in rows:
            active = self.requests.get(request_id)
            if active is not None:
                for index, bit, choice, by_id in active.edits:
                    known = ids(request_id, start + count) if by_id else None
                    chosen = choice.of(Pass(start, count, active.prompt, ids=known))
                    if chosen is False:
                        continue
                    part = self._bits[index, offset : offset + count]
                    part[... if chosen is True else chosen[0].numpy()] |= bit
                    end = offset + count
                if active.reads:
                    self._wanted.append((active, start, offset, count))
            offset += count
        changed = max(self._dirty, end)
        self._dirty, self._reading = end, bool(self._wanted)
        for layer, index in self._index.items():
            block = self.layers[layer]
            if changed:
                block.qscope_bits[:changed].copy_(self._host[index, :changed], non_blocking=True)
            if not block.qscope_bits.is_cuda:
                block.qscope_status[READING] = any(layer in active.reads for active, *_ in self._wanted)

    def collect(self) -> None:
        """After the step's forward pass, before the next one: keeps what was read. Does not wait for the device."""
        for active, start, offset, count in self._wanted:
            for layer in active.reads:
                part = self.layers[layer].qscope_acts[offset : offset + count].clone()
                active.values.setdefault(layer, []).append((start, part))
        self._wanted = []

    def take(self, request_ids: list[str]) -> list[dict[int, list[list[float]]] | None]:
        """Activations of each request, by the id its sender knows; each can be taken once. None: nothing is known."""
        found: list[dict[int, list[list[float]]] | None] = []
        for request_id in request_ids:
            known = [key for key in (*self._finished, *self.requests) if _is_of(key, request_id)]
            active = self._finished.pop(known[0], None) or self.requests[known[0]] if known else None
            found.append(active.activations() if active is not None and active.reads else None)
            if active is not None:
                active.reads = {}
        return found

    def _take(self, active: _Active, places: Places, key: Hashable, write: Callable[[int], None]) -> int:
        try:
            place, new = places.take(key)
        except IndexError as error:
            raise SteeringNotApplied(
                "More different edits or read features of one layer are in use than max_directions or max_reads allow; "
                "the engine should have refused the request."
            ) from error
        active.taken.append((places, key))
        if new:
            write(place)
        return place

    def _write_direction(self, edit: Edit, at: int) -> None:
        made, block = column(edit, self.options, self.width), self.layers[edit.layer]
        block.qscope_directions[at].copy_(made.direction)
        block.qscope_settings[at].copy_(ops.settings_tensor([made.setting])[0])
        for buffer, row in ((block.qscope_readers, made.reader), (block.qscope_gates, made.gate)):
            buffer[at].zero_() if row is None else buffer[at].copy_(row)

    def _write_probe(self, layer: int, feature: int, at: int) -> None:
        row, bias = probe(layer, feature, self.options, self.width)
        self.layers[layer].qscope_probes[at].copy_(row)
        self.layers[layer].qscope_probe_bias[at] = bias


def _is_of(key: str, request_id: str) -> bool:
    """Whether an id of the engine is the sender's: vLLM appends a dash and 8 random characters."""
    return key == request_id or (key[:-9] == request_id and key[-9:-8] == "-")
