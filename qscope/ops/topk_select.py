"""The k largest scores of every row, in a fixed order."""

from typing import Any

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import call, check_float, check_k, operator


def topk_select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of each row, ordered by value descending, then lowest index.

    -0 equals +0 and is returned as +0. A row that holds a NaN returns NaN for all its values and indices
    0..k-1. The gradient of a value flows to the score it was taken from; rows with NaN get no gradient.

    Args:
        scores: [N, F], float32, bfloat16 or float16; any strides.
        k: how many to keep, 1 <= k <= F; on a GPU at most 256.

    Returns:
        values [N, k] in the dtype of scores, indices [N, k] int32.

    Raises:
        ValueError: scores is not a [N, F] float tensor, or k is out of range.
    """
    check_float("topk_select", "scores", scores, "[N, F]")
    check_k("topk_select", k, scores.shape[1], scores)
    return call(_op, scores, k)


_op = operator(reference.topk_select)


@_op.register_kernel("cuda")
def _(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    from qscope_kernels.topk_select import topk_select_fwd

    return topk_select_fwd(scores, k)


@_op.register_fake
def _(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    torch._check(scores.dim() == 2, lambda: "scores must be [N, F]")
    torch._check(1 <= k <= scores.shape[1], lambda: f"k={k} must be in 1..{scores.shape[1]}")
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, indices = output
    ctx.save_for_backward(values, indices)
    ctx.d_sae = inputs[0].shape[1]


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    values, indices = ctx.saved_tensors
    grad = grad.masked_fill(values.isnan(), 0)
    return grad.new_zeros(grad.shape[0], ctx.d_sae).scatter(1, indices.long(), grad), None


_op.register_autograd(_backward, setup_context=_setup)
