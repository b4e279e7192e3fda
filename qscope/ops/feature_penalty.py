"""The SASFT penalty of a few features: sums of what exceeds a threshold per group, and the gradient to the residual."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qscope import reference
from qscope.ops._common import (
    INTS,
    call,
    check_devices,
    check_float,
    check_sizes,
    operator,
    shape_of,
)

MAX_FEATURES = 32


class FeatureExcess(NamedTuple):
    """What exceeds the thresholds. A loss is a weighted sum of `sums`."""

    sums: Tensor
    """[S] float32"""
    active: Tensor
    """[N, S] bool: where the excess is above 0 (or NaN), and a gradient passes"""


def feature_penalty(x: Tensor, W: Tensor, b: Tensor, alpha: Tensor, group: Tensor) -> FeatureExcess:
    """sums[s] = sum over n of ReLU(<x[n], W[s]> + b[s] - alpha[group[n], s]), over the tokens with group[n] >= 0.

    The sum inside L_reduce of SASFT (Deng et al. 2025, arXiv 2507.14894; Qwen-Scope equation 26) before it is divided
    by the number of terms. Gradients flow from `sums` to x alone, once: grad_x[n] = sum over s of grad_sums[s]
    active[n, s] W[s]. Beside `active`, N S bytes, nothing is kept for the backward pass, not even x. Accumulated in
    float32, in an order that does not change from run to run. NaN passes through, as in torch.relu; tokens of group -1
    are not read, so what they hold does not matter.

    Args:
        x: residuals, [N, D], float32, bfloat16 or float16.
        W: encoder rows of the features, [S, D], S <= 32, float32, bfloat16 or float16.
        b: their biases, [S].
        alpha: thresholds, [G, S]; infinity leaves a feature out for a group.
        group: of each token, [N], int32 or int64, -1 or 0..G-1; -1: the token does not count.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: a group of G or more, on a CPU. On a GPU, where finding it would have to wait for the device, such
            a token does not count.
    """
    op = "feature_penalty"
    for name, tensor, shape in (("x", x, "[N, D]"), ("W", W, "[S, D]"), ("b", b, "[S]"), ("alpha", alpha, "[G, S]")):
        check_float(op, name, tensor, shape)
    if group.dim() != 1 or group.dtype not in INTS:
        raise ValueError(f"{op}: group is {group.dtype} {shape_of(group)}; accepted is [N], int32 or int64.")
    check_sizes(
        op,
        f"x [N, D] is {shape_of(x)}, W [S, D] is {shape_of(W)}, b [S] is {shape_of(b)}, "
        f"alpha [G, S] is {shape_of(alpha)}, group [N] is {shape_of(group)}",
        (x.shape[1], W.shape[1]),
        (x.shape[0], group.shape[0]),
        (W.shape[0], b.shape[0]),
        (W.shape[0], alpha.shape[1]),
    )
    if not 1 <= W.shape[0] <= MAX_FEATURES:
        raise ValueError(f"{op}: W holds {W.shape[0]} rows; accepted are 1 to {MAX_FEATURES}. Split the features.")
    check_devices(op, x, W, b, alpha, group)
    return FeatureExcess(*call(_op, x, W, b, alpha, group))


_op = operator(
    reference.feature_penalty,
    schema="(Tensor x, Tensor W, Tensor b, Tensor alpha, Tensor group) -> (Tensor sums, Tensor active)",
)
_grad_op = operator(
    reference.feature_penalty_grad, schema="(Tensor active, Tensor grad, Tensor W, ScalarType dtype) -> Tensor"
)


@_op.register_fake
def _(x: Tensor, W: Tensor, b: Tensor, alpha: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[1] == W.shape[1], lambda: "x [N, D] and W [S, D] must share D")
    torch._check(x.shape[0] == group.shape[0], lambda: "x [N, D] and group [N] must share N")
    torch._check(alpha.shape[1] == W.shape[0], lambda: "alpha [G, S] and W [S, D] must share S")
    return x.new_empty(W.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], W.shape[0], dtype=torch.bool)


@_grad_op.register_fake
def _(active: Tensor, grad: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    torch._check(active.shape[1] == W.shape[0], lambda: "active [N, S] and W [S, D] must share S")
    return W.new_empty(active.shape[0], W.shape[1], dtype=dtype)


@_op.register_kernel("cuda")
def _(x: Tensor, W: Tensor, b: Tensor, alpha: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    from qscope_kernels.feature_penalty import feature_penalty_fwd  # triton is imported only when a GPU is used

    return feature_penalty_fwd(x, W, b, alpha, group)


@_grad_op.register_kernel("cuda")
def _(active: Tensor, grad: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    from qscope_kernels.feature_penalty import feature_penalty_bwd

    return feature_penalty_bwd(active, grad, W, dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, W = inputs[:2]
    active = output[1]
    ctx.save_for_backward(active, W)
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(active)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    active, W = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return None, None, None, None, None
    return _grad_op(active, grad.contiguous(), W, ctx.dtype), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)
