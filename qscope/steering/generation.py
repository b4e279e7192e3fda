"""What `generate` of a Hugging Face model knows and its forward does not: what is prompt, and where tokens stand."""

import functools
import threading
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qscope.errors import InputError
from qscope.steering.tokens import Pass

if TYPE_CHECKING:
    from qscope.steering.attach import Steering

_ATTACHED = "_qscope_steering"
_METHODS = ("generate", "prepare_inputs_for_generation")


@dataclass
class Generation:
    """One call of generate."""

    prompt: int
    """Columns before the first generated token"""
    told: bool = False
    """Whether a pass of it has been announced; one that is not comes from elsewhere, as that of a negative prompt"""
    padded: bool = False
    ids: Tensor | None = None
    """[B, columns so far]"""
    unnamed: int = 0
    """Columns that are not in generate's input_ids: embeddings, and a cache whose tokens were not given again"""
    thread: int = field(default_factory=threading.get_ident)


@dataclass
class _Attached:
    """What a steered model carries."""

    sessions: list["Steering"] = field(default_factory=list)
    own: dict[str, Any] = field(default_factory=dict)
    """Methods that the model object itself had, instead of its class"""


def generator_of(model: nn.Module, trunk: nn.Module) -> nn.Module:
    """The innermost module around the trunk that generates, which wrappers such as PEFT's call; else the model."""
    around = (m for m in model.modules() if hasattr(type(m), _METHODS[0]) and any(x is trunk for x in m.modules()))
    return min(around, key=lambda m: sum(1 for _ in m.modules()), default=model)


def join(model: Any, steering: "Steering") -> None:
    """Lets `steering` know what generate of `model` was given, and what every pass of it is given."""
    attached = model.__dict__.setdefault(_ATTACHED, _Attached())
    attached.sessions.append(steering)
    if len(attached.sessions) == 1 and hasattr(type(model), _METHODS[0]):
        attached.own = {name: model.__dict__[name] for name in _METHODS if name in model.__dict__}
        for name, wrap in zip(_METHODS, (_generating, _preparing), strict=True):
            model.__dict__[name] = types.MethodType(wrap(_original(model, name)), model)


def leave(model: Any, steering: "Steering") -> None:
    """Undoes `join`."""
    attached = model.__dict__[_ATTACHED]
    attached.sessions.remove(steering)
    if not attached.sessions:
        for name in (_ATTACHED, *_METHODS):
            model.__dict__.pop(name, None)
        model.__dict__.update(attached.own)


def _original(model: Any, name: str) -> Any:
    """The method as it is without steering: looked up at each call, for a copy of a steered model has its own."""
    own = model.__dict__[_ATTACHED].own
    return own[name] if name in own else getattr(type(model), name).__get__(model)


def _generating(original: Any) -> Any:
    @functools.wraps(getattr(original, "__func__", original))
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        now: list[Steering] = list(self.__dict__[_ATTACHED].sessions)
        _check_thread(now)
        outer = [steering._begin_generation(Generation(_prompt_of(args, kwargs))) for steering in now]
        result = None
        try:
            result = _original(self, "generate")(*args, **kwargs)
            return result
        finally:
            sequences = getattr(result, "sequences", result)
            made = sequences.shape[1] if isinstance(sequences, Tensor) else None
            for steering, before in zip(now, outer, strict=True):
                steering._end_generation(before, made)

    return generate


def _check_thread(steerings: "list[Steering]") -> None:
    running = [steering._generation for steering in steerings if steering._generation is not None]
    if any(generation.thread != threading.get_ident() for generation in running):
        raise InputError(
            "generate was called while another thread generates with this steered model; where tokens stand is known "
            "of one pass at a time. Let the threads take turns, or give the prompts as one batch."
        )


def _preparing(original: Any) -> Any:
    # transformers looks at the parameters of this method: it must not lose its signature.
    @functools.wraps(getattr(original, "__func__", original))
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = _original(self, "prepare_inputs_for_generation")(input_ids, *args, **kwargs)
        for steering in self.__dict__[_ATTACHED].sessions:
            if steering._generation is not None:
                steering._tell(_pass_of(prepared, input_ids, kwargs.get("attention_mask"), steering._generation))
        return prepared

    return prepare_inputs_for_generation


def _prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Columns before the first generated token."""
    ids, attention = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), kwargs.get("attention_mask")
    given = [x for x in (ids, kwargs.get("inputs_embeds"), attention) if isinstance(x, Tensor)]
    return max((x.shape[1] for x in given), default=1)


def _pass_of(prepared: dict[str, Any], input_ids: Tensor, attention: Any, now: Generation) -> Pass:
    fed = prepared.get("input_ids")
    fed = prepared["inputs_embeds"] if fed is None else fed
    rows, length = fed.shape[:2]
    attention = attention if isinstance(attention, Tensor) and attention.dim() == 2 else None
    end = input_ids.shape[1]
    if attention is not None:  # embeddings of the prompt, and what a cache holds already, are not in input_ids
        end = max(end, attention.shape[1])
    elif (cache := prepared.get("past_key_values")) is not None:
        end = max(end, int(cache.get_seq_length()) + length)
    start = end - length
    if attention is not None and length > 1:  # generate itself may have found the padding; looked at before decoding
        now.padded = now.padded or not bool((attention != 0).all())
    mask = attention if now.padded and attention is not None and attention.shape[1] == end else None
    now.told, now.unnamed = True, end - input_ids.shape[1]
    ids = input_ids if input_ids.shape[1] >= length else None
    if ids is not None and ids.shape[1] < end and now.ids is not None and now.ids.shape == (rows, start):
        ids = torch.cat([now.ids, ids], dim=1)  # the prompt comes in chunks
    now.ids = ids
    return Pass(start, length, now.prompt, mask, ids, None, fed.device, rows)
