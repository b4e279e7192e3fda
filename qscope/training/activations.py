"""Activations of a language model while it reads text: one forward pass serves all layers.

The model runs no further than the deepest layer that is wanted. On a GPU the host runs ahead: while the
device works on one batch of windows, the next is tokenised, and how many rows of a batch are kept is read
only once the next one is launched. Training steps queue on the same stream; a forward pass and a step each
fill the device, so no second stream is used.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qscope.distributed import Axis
from qscope.errors import InputError, ModelError
from qscope.model import decoder_layers, num_layers, residuals, tokenizer_hash
from qscope.training.buffer import Point, ShuffledStream, Stream
from qscope.training.filters import NORM_MULTIPLE, RowFilter
from qscope.training.text import DatasetText, PackedWindows, Text, TextFiles

__all__ = ["DatasetText", "ModelActivations", "Point", "ShuffledStream", "Stream", "TextFiles", "model_stream"]

MODEL_TOKENS = {False: 1024, True: 8192}
"""Tokens per forward pass on a CPU and on a GPU, as in `qscope encode`."""

_COUNT_LIMIT = 200_000_000  # tokens; tokenising that many takes minutes, training on them much longer
_FRUITLESS = 16  # batches in a row without one usable row: the model does not work


def model_stream(
    model: Any,
    tokenizer: Any,
    text: Text,
    points: Iterable[Point],
    *,
    buffer_tokens: int,
    tokens: int | None = None,
    seed: int = 0,
    context_size: int = 512,
    model_tokens: int | None = None,
    separator: bool = True,
    bos: bool = False,
    first_token: str = "drop",
    norm_multiple: float | None = NORM_MULTIPLE,
    cycle: bool = False,
    rank: int = 0,
    world: int = 1,
) -> ShuffledStream:
    """A shuffled stream of what `model` computes on `text`.

    Args:
        points: layers (whose residual is read) and "mlp_in.l" or "mlp_out.l". A transcoder takes its input from
            one and its target from another.
        buffer_tokens: rows of the shuffle buffer; 64 batches is usual. Memory: see `qscope.training.buffer`, and
            beside it two forward passes' worth of activations.
        tokens: how many will be asked for in all; text that holds fewer is refused before anything is computed.
        model_tokens: per forward pass; 1024 on a CPU, 8192 on a GPU.
        separator: join documents by the tokenizer's EOS token, where it has one.
        bos: put the tokenizer's BOS token before every window.
        first_token, cycle, rank, world: see `PackedWindows`. norm_multiple: see `RowFilter`; None: no norm filter.
    """
    if bos and tokenizer.bos_token_id is None:
        raise InputError("A BOS token before every window was asked for, and the tokenizer has none. Leave it out.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and context_size > longest:
        raise InputError(
            f"Windows of {context_size} tokens were asked for, and the model was made for at most {longest}. Give a "
            "smaller context size."
        )
    device = next(model.parameters()).device
    windows = PackedWindows(
        text,
        tokenizer,
        context_size,
        max(1, (model_tokens or MODEL_TOKENS[device.type == "cuda"]) // context_size),
        separator=tokenizer.eos_token_id if separator else None,
        bos=tokenizer.bos_token_id if bos else None,
        first_token=first_token,
        cycle=cycle,
        rank=rank,
        world=world,
    )
    producer = ModelActivations(model, windows, list(points), norm_multiple)
    return ShuffledStream(producer, buffer_tokens, seed, tokens)


class _Launched(NamedTuple):
    """A forward pass that the device may still be working on."""

    rows: dict[Point, Tensor]
    """[M, D] per point"""
    order: Tensor
    """[M] rows that are kept, in their order, before the others"""
    kept: Tensor
    """On the host, once `ready`: how many are"""
    ready: Any


class ModelActivations:
    """A `Producer`: rows of a model's activations in the order of the text."""

    def __init__(
        self, model: Any, windows: PackedWindows, points: Sequence[Point], norm_multiple: float | None = NORM_MULTIPLE
    ) -> None:
        self.model, self.windows = model, windows
        self.windows_at_once: int | None = None
        """Most windows that the model is given in one piece; None: a batch of them. No setting: rows and their order
        are those of whole batches."""
        self.axis = Axis()
        """Processes that divide the windows of every batch among them; all get the rows of all windows."""
        self.points = parse_points(points, num_layers(model))
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.max_rows = windows.windows * windows.context_size
        self.filter = RowFilter(list(self.points), self.device, norm_multiple)
        probe = self._forward(torch.zeros(1, 1, dtype=torch.int64))
        self.widths = {point: rows.shape[-1] for point, rows in probe.items()}
        self._fruitless = 0
        self._tokenizer_hash = tokenizer_hash(windows.tokenizer)  # takes a second; every state asks for it

    @property
    def done(self) -> bool:
        return self.windows.done

    def check(self, n_tokens: int) -> None:
        if self.windows.cycle or not self.windows.text.countable() or n_tokens > _COUNT_LIMIT:
            return  # running dry later says the same
        found = self.windows.count(n_tokens)
        if found < n_tokens:
            raise InputError(
                f"{n_tokens:,} tokens are to be trained on, and the text holds only {found:,} that can be used. Give "
                "more text, train on fewer tokens, or have it read again from its beginning (cycle)."
            )

    def produce(self, room: int) -> Iterator[dict[Point, Tensor]]:
        waiting: _Launched | None = None
        while True:
            unknown = 0 if waiting is None else len(waiting.order)
            launched = self._launch() if room - unknown >= self.max_rows else None
            if waiting is not None:
                part = self._collect(waiting)
                room -= len(next(iter(part.values())))
                yield part
            elif launched is None:
                return
            waiting = launched

    def _launch(self) -> _Launched | None:
        batch = self.windows.next()
        if batch is None:
            return None
        try:
            found = self._forward(batch.ids)
            rows = {point: x.reshape(-1, x.shape[-1]) for point, x in found.items()}
            usable = batch.usable.reshape(-1).to(self.device, non_blocking=True)
            keep = self.filter.keep(rows, usable)
            order = torch.argsort((~keep).to(torch.uint8), stable=True)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"A forward pass of {batch.ids.shape[0]} x {batch.ids.shape[1]} tokens did not fit into the device's "
                "memory beside the shuffle buffer. Give fewer tokens per forward pass, or a smaller buffer."
            ) from error
        return _Launched(rows, order, *self._to_host(keep.sum()))

    def _to_host(self, count: Tensor) -> tuple[Tensor, Any]:
        if self.device.type != "cuda":
            return count, None
        host = torch.empty((), dtype=count.dtype, pin_memory=True)
        host.copy_(count, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return host, ready

    def _collect(self, launched: _Launched) -> dict[Point, Tensor]:
        if launched.ready is not None:
            launched.ready.synchronize()
        count = int(launched.kept)
        self._fruitless = 0 if count else self._fruitless + 1
        if self._fruitless >= _FRUITLESS:
            raise ModelError(
                f"No activation of {_FRUITLESS} forward passes in a row could be used: {self.filter.counts()}. If "
                "they are NaN, load the model in float32 or bfloat16; if the norm filter took them, widen it."
            )
        kept = launched.order[:count]
        return {point: x.index_select(0, kept) for point, x in launched.rows.items()}

    def _forward(self, ids: Tensor) -> dict[Point, Tensor]:
        """Activations of every point: [B, S, D]."""
        axis = self.axis
        if axis.size == 1:
            return self._forward_here(ids)
        each = -(-len(ids) // axis.size)
        windows = torch.cat([ids, ids[:1].expand(each * axis.size - len(ids), -1)])  # every process has some
        found = self._forward_here(windows[axis.rank * each : (axis.rank + 1) * each])
        return {point: axis.gather(rows).flatten(0, 1)[: len(ids)] for point, rows in found.items()}

    def _forward_here(self, ids: Tensor) -> dict[Point, Tensor]:
        parts = [self._forward_piece(part) for part in ids.split(self.windows_at_once or len(ids))]
        if len(parts) == 1:
            return parts[0]
        return {point: torch.cat([part[point] for part in parts]) for point in self.points}

    def _forward_piece(self, ids: Tensor) -> dict[Point, Tensor]:
        blocks = decoder_layers(self.model)
        layers = {layer for layer, _ in self.points.values()}
        found: dict[Point, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for point, (layer, end) in self.points.items():
                if end is not None:
                    hooks.enter_context(_mlp_hook(blocks[layer], layer, end, point, found))
            residual = residuals(self.model, ids, layers)
        missed = [point for point, (_, end) in self.points.items() if end is not None and point not in found]
        if missed:
            raise ModelError(f"Nothing was captured at {missed}: the model passes its MLPs by. Use residuals.")
        return {p: residual[layer] if end is None else found[p] for p, (layer, end) in self.points.items()}

    def counts(self) -> dict[str, Any]:
        return {**self.windows.counts(), **self.filter.counts()}

    def settings(self) -> dict[str, Any]:
        return {
            "points": [str(point) for point in self.points],
            "dtype": str(self.dtype),
            "norm_multiple": self.filter.multiple,
            "tokenizer": self._tokenizer_hash,
            **self.windows.settings(),
        }

    def state(self) -> dict[str, Any]:
        return {"windows": self.windows.state(), "filter": self.filter.state(), "fruitless": self._fruitless}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.windows.restore(state["windows"])
        self.filter.restore(state["filter"])
        self._fruitless = int(state["fruitless"])


def parse_points(points: Sequence[Point], layers: int) -> dict[Point, tuple[int, str | None]]:
    """point -> (layer, "in" or "out" of its MLP, or None for the residual). Raises InputError for anything else."""
    parsed: dict[Point, tuple[int, str | None]] = {}
    for point in points:
        match = re.fullmatch(r"mlp_(in|out)\.(\d+)", point) if isinstance(point, str) else None
        layer = int(match[2]) if match else point
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < layers or point in parsed:
            raise InputError(
                f"Activations at {list(points)} were asked for. Accepted: layers 0 to {layers - 1} and mlp_in.LAYER or "
                "mlp_out.LAYER of these, each once."
            )
        parsed[point] = (layer, match[1] if match else None)
    if not parsed:
        raise InputError(f"No layer was named. Accepted: at least one of 0 to {layers - 1}.")
    return parsed


@contextlib.contextmanager
def _mlp_hook(block: nn.Module, layer: int, end: str, point: Point, found: dict[Point, Tensor]) -> Iterator[None]:
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise ModelError(
            f"Block {layer} ({type(block).__name__}) has no module called mlp, so its MLP's input and output cannot be "
            "read. Use the residuals of two layers instead."
        )

    def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
        x = inputs[0] if end == "in" else output[0] if isinstance(output, tuple) else output
        found[point] = x.detach().clone()

    handle = mlp.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
