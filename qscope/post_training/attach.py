"""Hooks that keep the residuals of a few layers with their gradient, for a loss taken after the forward pass."""

import functools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qscope.errors import InputError, ModelError
from qscope.model import decoder_layers, residual_width


class Residuals:
    """Keeps the residuals of `layers` of `model` from the latest forward pass, until `take` or `detach`.

    The tensors are those of the model's own graph: no copy is made and no number of the model changes. With gradient
    checkpointing, blocks run again in the backward pass; what they put out there is not kept. Where the hook fires
    inside a checkpoint with use_reentrant=True, the tensor has no gradient yet: autograd sets it on the same tensor
    when the checkpoint returns it, so whether there is one can be told only when the loss is taken.
    """

    def __init__(self, model: nn.Module, layers: Iterable[int]) -> None:
        self.layers = tuple(layers)
        whole = _unwrapped(model)
        self.name = type(whole).__name__
        self.blocks = decoder_layers(whole)
        if max(self.layers) >= len(self.blocks):
            raise InputError(
                f"Layer {max(self.layers)} was given; {self.name} has the layers 0 to {len(self.blocks) - 1}."
            )
        self.width = residual_width(whole)
        self._kept: dict[int, Tensor] = {}
        self._versions: dict[int, int | None] = {}
        self._handles: list[Any] = []
        for layer in self.layers:
            self._handles.append(self.blocks[layer].register_forward_hook(functools.partial(self._after, layer)))
        _forget_compiled()

    def detach(self) -> None:
        """Removes the hooks and lets go of what was kept."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            _forget_compiled()
        self._handles = []
        self._clear()

    def take(self) -> dict[int, Tensor]:
        """layer -> [B, S, D] of the latest forward pass; they are let go of here, and can be taken once.

        Raises ModelError where there are none, where the model has overwritten one since, and where a model in
        training has one that no gradient would flow through.
        """
        missed = [layer for layer in self.layers if layer not in self._kept]
        if missed:
            self._clear()
            raise ModelError(
                f"Nothing was kept at layers {missed} of {self.name}: since the last loss no forward pass went through "
                "these blocks, or it skipped their hooks, as a model does whose compiled code was made before "
                "attach(). Call the model first, one loss after each call, and attach before compiling."
            )
        found = {layer: self._kept[layer] for layer in self.layers}
        versions = dict(self._versions)
        self._clear()
        for layer, hidden in found.items():
            if versions[layer] not in (None, _version(hidden)):
                raise ModelError(
                    f"{self.name} overwrites the residual of layer {layer} in place after its block, so its value is "
                    "lost. It is not supported."
                )
            if torch.is_grad_enabled() and self.blocks[layer].training and not hidden.requires_grad:
                raise ModelError(
                    f"No gradient would flow through the residual of layer {layer}: the forward pass ran without "
                    "gradients, or nothing that is trained lies at or below this layer. With gradient checkpointing "
                    "and frozen embeddings call model.enable_input_require_grads(); for an evaluation call "
                    "model.eval() or take the loss under torch.no_grad()."
                )
        return found

    def _clear(self) -> None:
        self._kept.clear()
        self._versions.clear()

    def _after(self, layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not self._handles or _in_backward():  # compiled code may hold on to a hook
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[-1] != self.width:
            what = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ModelError(
                f"Block {layer} of {self.name} puts out {what}; a residual stream [batch, sequence, {self.width}], "
                "alone or first in a tuple, is expected. It is not supported."
            )
        self._kept[layer] = hidden
        self._versions[layer] = None if torch.compiler.is_compiling() else _version(hidden)


def _version(hidden: Tensor) -> int | None:
    """How often it has been written to; tensors of inference mode do not count."""
    return None if hidden.is_inference() else hidden._version


def _in_backward() -> bool:
    """Whether autograd is running: a forward pass inside it is a recomputation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _forget_compiled() -> None:
    """Code compiled before hooks were added or removed would go on without, or with, them."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
