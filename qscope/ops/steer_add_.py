"""Steering: up to 32 directions added to the residual in place, each with its own strength, rule and condition."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import FLOATS, call, operator, shape_of

MAX_DIRECTIONS = 32
_FLAGS = (torch.bool, torch.uint8)
_below_autograd = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", None)  # not a public name of torch


@dataclass(frozen=True)
class SteerSetting:
    """The rule of one direction: a row of `settings`, in the order of its columns. Make one with a constructor.

    c = constant + slope * read, read = <h, reader> + reader_bias, negative reads cut to 0 if rectify; 0 unless
    enabled; with gate_on, 0 unless <h, gate> + gate_bias > gate_threshold.
    """

    constant: float = 0.0
    slope: float = 0.0
    reader_bias: float = 0.0
    rectify: bool = False
    gate_on: bool = False
    gate_bias: float = 0.0
    gate_threshold: float = 0.0
    enabled: bool = True

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise ValueError(f"SteerSetting: {name} is {value}; accepted are finite numbers.")

    @classmethod
    def add(cls, strength: float) -> "SteerSetting":
        """h += strength * d."""
        return cls(constant=strength)

    @classmethod
    def clamp(cls, target: float, bias: float) -> "SteerSetting":
        """h += (target - z) * d, z = relu(<h, reader> + bias): the feature's W_enc row and b_enc, its W_dec row as d.

        z is the activation before TopK: a feature outside the k largest is read as if it were selected.
        """
        return cls(constant=target, slope=-1.0, reader_bias=bias, rectify=True)

    @classmethod
    def ablate(cls, bias: float) -> "SteerSetting":
        """h -= z * d: clamp to 0, which leaves a token where the feature is silent as it is."""
        return cls(slope=-1.0, reader_bias=bias, rectify=True)

    @classmethod
    def scale(cls, factor: float, bias: float) -> "SteerSetting":
        """h += (factor - 1) * z * d: the feature's part of h, multiplied."""
        return cls(slope=factor - 1.0, reader_bias=bias, rectify=True)

    @classmethod
    def orthogonalise(cls) -> "SteerSetting":
        """h -= <h, d> d / ||d||^2, with d / ||d||^2 as the reader: what is left has no component along d."""
        return cls(slope=-1.0)

    def gated(self, bias: float, threshold: float) -> "SteerSetting":
        """The same, only for tokens with <h, gate> + bias > threshold (another feature's W_enc row and b_enc)."""
        return dataclasses.replace(self, gate_on=True, gate_bias=bias, gate_threshold=threshold)


def settings_tensor(settings: Sequence[SteerSetting], device: torch.device | str | None = None) -> Tensor:
    """The rules as the float32 tensor [S, 8] that steer_add_ takes.

    Write to it (`settings[s].copy_(...)`, or a whole new settings_tensor) between replays of a CUDA graph.
    """
    rows = [[float(value) for value in dataclasses.astuple(setting)] for setting in settings]
    width = len(dataclasses.fields(SteerSetting))
    return torch.tensor(rows, dtype=torch.float32, device=device).reshape(len(rows), width)


def steer_add_(
    h: Tensor,
    directions: Tensor,
    settings: Tensor,
    readers: Tensor | None = None,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    fired: Tensor | None = None,
) -> Tensor:
    """h[n] += sum_s c[n, s] * directions[s], in place.

        c[n, s]    = mask[n, s] * gate[n, s] * (constant[s] + slope[s] * read[n, s])
        read[n, s] = r(<h[n], readers[s]> + reader_bias[s]), r = relu where rectify[s], else identity
        gate[n, s] = <h[n], gates[s]> + gate_bias[s] > gate_threshold[s] where gate_on[s], else 1

    `SteerSetting` has the rules of h' = h + strength * d, clamp, ablate, scale and orthogonalise in these terms.

    All directions read h as it comes in and are added together. Directions that are not orthogonal therefore see
    each other's parts twice: orthogonalising against two parallel directions subtracts their component two times.
    For a subspace pass an orthonormal basis.

    Sums in float32, the directions in ascending s, one rounding per element. A pair (n, s) whose c is 0 adds nothing,
    even where its direction holds NaN; a token without any other pair keeps its bits. Columns of a part that is not
    given (slope without readers, gate_on without gates) are not read; a reader is not consulted where slope is 0. On
    a GPU: one launch, no waiting, everything read from device memory; h, directions and the rest may be rewritten
    between replays of a CUDA graph. There a token's result does not depend on the other tokens. No gradients.

    Args:
        h: the residual, [.., D], rows contiguous and at one stride, float32, bfloat16 or float16.
        directions: [S, D], S <= 32, contiguous, any of these dtypes (as readers and gates).
        settings: [S, 8] float32, contiguous; columns are the fields of SteerSetting in order.
        readers: [S, D] or None: what each direction's read is a dot with.
        gates: [S, D] or None: what each direction's gate is a dot with.
        mask: tokens to steer, bool or uint8 (not 0), shape [..] of h's leading dimensions or [.., S]; None: all.
        fired: uint8, [.., S] contiguous, set to 1 where c is not 0 and to 0 elsewhere; or None.

    Returns:
        h itself.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit; more than 32 directions; an input that
            requires a gradient while gradients are recorded.
    """
    leading, D, S = h.shape[:-1], h.shape[-1] if h.dim() else -1, directions.shape[0] if directions.dim() else -1
    _check(h, directions, settings, readers, gates, mask, fired)
    if S == 0 or h.numel() == 0:
        if fired is not None:
            fired.zero_()
        return h
    rows = h
    if h.dim() != 2:
        try:
            rows = h.view(-1, D)
        except RuntimeError as error:
            raise ValueError(
                f"steer_add_: h {shape_of(h)} has strides {h.stride()}; its rows must be at one common stride, so that"
                " the tensor can be seen as [N, D] without a copy. Steer the whole tensor with a mask instead."
            ) from error
        if mask is not None:
            mask = mask.reshape(-1) if mask.shape == leading else mask.reshape(-1, S)
        fired = None if fired is None else fired.view(-1, S)
    arguments = (rows, directions, settings, readers, gates, mask, fired)
    if torch.compiler.is_compiling() or _below_autograd is None:
        call(_op, *arguments)
    else:
        # Once per layer and token: the detour of a mutating operator through its Python autograd kernels costs more
        # than the steering. No input requires a gradient here, so only the version counters of what is written matter.
        with _below_autograd():
            call(_op, *arguments)
        torch.autograd.graph.increment_version(h if fired is None else (h, fired))
    return h


def _check(
    h: Tensor,
    directions: Tensor,
    settings: Tensor,
    readers: Tensor | None,
    gates: Tensor | None,
    mask: Tensor | None,
    fired: Tensor | None,
) -> None:
    """Refuse what does not fit. Runs for every layer and generated token: cheap tests first, words only on failure."""
    tokens, shape, device = h.shape[:-1], directions.shape, h.device
    S = shape[0] if len(shape) == 2 else -1
    floats = [t for t in (h, directions, readers, gates) if t is not None]
    others = [t for t in (mask, fired) if t is not None]
    problem = ""
    if h.dim() < 1 or len(shape) != 2 or h.shape[-1] != shape[1] or any(t.shape != shape for t in floats[2:]):
        problem = "h must be [.., D], directions, readers and gates [S, D]"
    elif S > MAX_DIRECTIONS:
        problem = f"there may be at most {MAX_DIRECTIONS} directions; call it again for the rest"
    elif settings.shape != (S, 8) or settings.dtype != torch.float32:
        problem = "settings must be [S, 8] float32, as made by settings_tensor"
    elif any(t.dtype not in FLOATS for t in floats):
        problem = "h, directions, readers and gates must be float32, bfloat16 or float16"
    elif mask is not None and (mask.dtype not in _FLAGS or (mask.shape != tokens and mask.shape != (*tokens, S))):
        problem = "mask must be bool or uint8, one element per token, [..], or per token and direction, [.., S]"
    elif fired is not None and (fired.dtype != torch.uint8 or fired.shape != (*tokens, S)):
        problem = "fired must be uint8, one element per token and direction, [.., S]"
    elif any(t.device != device for t in (settings, *floats, *others)):
        problem = "all tensors must be on one device; move them with .to(device)"
    elif not all(t.is_contiguous() for t in (settings, *floats[1:])) or (
        fired is not None and not fired.is_contiguous()
    ):
        problem = (
            "directions, settings, readers, gates and fired must be contiguous; call .contiguous() once, beforehand"
        )
    elif (h.shape[-1] > 1 and h.stride(-1) != 1) or (h.dim() == 2 and h.shape[0] > 1 and h.stride(0) < h.shape[1]):
        problem = f"h has strides {h.stride()}; its rows must be contiguous and must not overlap"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (settings, *floats)):
        problem = (
            "an input requires a gradient, and there is none through an in-place update. Call it under torch.no_grad(),"
            " or steer out of place for training: h + strength * direction"
        )
    if problem:
        names = ("h", "directions", "settings", "readers", "gates", "mask", "fired")
        tensors = zip(names, (h, directions, settings, readers, gates, mask, fired), strict=True)
        given = ", ".join(f"{name} {shape_of(t)} {t.dtype} on {t.device}" for name, t in tensors if t is not None)
        raise ValueError(f"steer_add_: {problem}. Given: {given}.")


_op = operator(
    reference.steer_add_,
    schema="(Tensor(a!) h, Tensor directions, Tensor settings, Tensor? readers, Tensor? gates, Tensor? mask,"
    " Tensor(b!)? fired) -> ()",
)


@_op.register_fake
def _(
    h: Tensor,
    directions: Tensor,
    settings: Tensor,
    readers: Tensor | None,
    gates: Tensor | None,
    mask: Tensor | None,
    fired: Tensor | None,
) -> None:
    torch._check(h.dim() == 2 and directions.dim() == 2, lambda: "h must be [N, D] and directions [S, D]")
    torch._check(h.shape[1] == directions.shape[1], lambda: "h and directions must have the same D")


@_op.register_kernel("cuda")
def _(
    h: Tensor,
    directions: Tensor,
    settings: Tensor,
    readers: Tensor | None,
    gates: Tensor | None,
    mask: Tensor | None,
    fired: Tensor | None,
) -> None:
    from qscope_kernels.steer_add import steer_add_ as launch  # triton is imported only when a GPU is used

    launch(h, directions, settings, readers, gates, mask, fired)
