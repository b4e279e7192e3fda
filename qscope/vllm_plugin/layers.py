"""Decoder layers of a vLLM model that steer: what they keep, and how the operator gets into their forward."""

from typing import Any

import torch
from torch import Tensor, nn

from qscope.errors import SteeringNotApplied
from qscope.model import decoder_layers, residual_width
from qscope.vllm_plugin.steer_residual_ import CALLS

_MODELS = "vllm.model_executor.models"
LAYERS = {
    (f"{_MODELS}.llama", "LlamaDecoderLayer"),
    (f"{_MODELS}.mistral", "MistralDecoderLayer"),
    (f"{_MODELS}.qwen2", "Qwen2DecoderLayer"),
    (f"{_MODELS}.qwen2_moe", "Qwen2MoeDecoderLayer"),
    (f"{_MODELS}.qwen3", "Qwen3DecoderLayer"),
    (f"{_MODELS}.qwen3_moe", "Qwen3MoeDecoderLayer"),
    (f"{_MODELS}.gemma", "GemmaDecoderLayer"),
    (f"{_MODELS}.gemma2", "Gemma2DecoderLayer"),
    (f"{_MODELS}.gemma3", "Gemma3DecoderLayer"),
}
"""Where a `forward` was read and found to return (hidden, residual), whose sum is the block's output."""

BUFFERS = ("bits", "directions", "settings", "readers", "gates", "probes", "probe_bias", "acts", "status")


def install(model: nn.Module, layers: tuple[int, ...], tokens: int, directions: int, probes: int) -> dict[int, Any]:
    """Makes `layers` of a loaded model that was never traced steer; returns layer -> module.

    Each gets the operator's arguments as buffers (`qscope_bits` ...), zero, on the device of its weights. tokens: the
    most of one step. Raises SteeringNotApplied for layers of a kind that is not known to return (hidden, residual).
    """
    blocks, width = decoder_layers(model), residual_width(model)
    found: dict[int, Any] = {}
    kinds: dict[type[Any], type[Any]] = {}
    for layer in layers:
        if layer >= len(blocks):
            raise SteeringNotApplied(
                f"Layer {layer} was to be steered; this {type(model).__name__} has layers 0 to {len(blocks) - 1}."
            )
        block: Any = blocks[layer]
        kind = _forward_of(type(block))
        if kind not in LAYERS:
            raise SteeringNotApplied(
                f"Layer {layer} of {type(model).__name__} is a {type(block).__name__} with the forward of "
                f"{'.'.join(kind)}, and it is not known in which parts that returns the residual. The plug-in steers "
                f"{', '.join(sorted(name for _, name in LAYERS))}."
            )
        weight = next(block.parameters())
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "bits": ((tokens,), torch.int32),
            "directions": ((directions, width), torch.float32),
            "settings": ((directions, 8), torch.float32),
            "readers": ((directions, width), torch.float32),
            "gates": ((directions, width), torch.float32),
            "probes": ((probes, width), torch.float32),
            "probe_bias": ((probes,), torch.float32),
            "acts": ((tokens, probes), torch.float32),
            "status": ((2,), torch.int32),
        }
        for name, (shape, dtype) in shapes.items():
            buffer = torch.zeros(shape, dtype=dtype, device=weight.device)
            block.register_buffer(f"qscope_{name}", buffer, persistent=False)
        if type(block) not in kinds:
            kinds[type(block)] = steered(type(block))
        block.__class__ = kinds[type(block)]
        found[layer] = block
    return found


def steered(kind: type[Any]) -> type[Any]:
    """The class of layers whose forward ends with the operator. A forward hook is never called in compiled vLLM."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        hidden, residual = kind.forward(self, *args, **kwargs)
        torch.ops.qscope.steer_residual_(
            hidden,
            residual,
            self.qscope_bits,
            self.qscope_directions,
            self.qscope_settings,
            self.qscope_readers,
            self.qscope_gates,
            self.qscope_probes,
            self.qscope_probe_bias,
            self.qscope_acts,
            self.qscope_status,
        )
        return hidden, residual

    return type(f"Steered{kind.__name__}", (kind,), {"forward": forward})


def calls(layers: dict[int, Any]) -> dict[int, int]:
    """How often the operator ran in each layer; waits for the device."""
    return {layer: int(block.qscope_status[CALLS]) for layer, block in layers.items()}


def check_called(before: dict[int, int], after: dict[int, int]) -> None:
    """SteeringNotApplied unless every layer's operator ran in between."""
    silent = [layer for layer in after if after[layer] <= before[layer]]
    if silent:
        raise SteeringNotApplied(
            f"A forward pass of the engine went past the steering of layers {silent}: the compiled model does not call "
            "the operator. It was traced before the plug-in was installed, or comes out of a compile cache of another "
            "model. Clear vLLM's cache (VLLM_CACHE_ROOT) and start again; without steering, leave qscope out of "
            "additional_config."
        )


def _forward_of(kind: type[Any]) -> tuple[str, str]:
    """(module, name) of the class that defines the forward of `kind`."""
    owner = next(c for c in kind.__mro__ if "forward" in vars(c))
    return owner.__module__, owner.__qualname__
