"""TopK-SAE decoder: the weighted sum of the active features' rows."""

from typing import Any

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import (
    call,
    check_devices,
    check_float,
    check_index_range,
    check_indices,
    check_sizes,
    operator,
    shape_of,
)
from qscope.ops.sparse_dot import sparse_dot
from qscope.ops.sparse_outer import sparse_outer


def sparse_decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """y[n] = sum_k top_acts[n, k] * W_dec[top_indices[n, k]] + b_dec.

    Accumulates in float32 in ascending slot order, adds b_dec last and rounds once. An index may occur more
    than once in a row. Gradients flow to top_acts, W_dec and b_dec; no [N, F] or [N, K, D] tensor is made.

    Args:
        top_acts: values of the active features, [N, K], float32, bfloat16 or float16.
        top_indices: their ids, [N, K], int32 or int64, each in 0..F-1.
        W_dec: decoder rows, [F, D], float32, bfloat16 or float16.
        b_dec: decoder bias, [D], or None.

    Returns:
        Reconstruction [N, D] in the dtype of W_dec.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: an index outside 0..F-1, on a CPU or with QSCOPE_DEBUG=1. On a GPU, where finding it would have
            to wait for the device, it counts as a row of zeros.
    """
    op = "sparse_decode"
    check_float(op, "top_acts", top_acts, "[N, K]")
    check_indices(op, "top_indices", top_indices)
    check_float(op, "W_dec", W_dec, "[F, D]")
    check_sizes(
        op,
        f"top_acts [N, K] is {shape_of(top_acts)}, top_indices [N, K] is {shape_of(top_indices)}",
        *zip(top_acts.shape, top_indices.shape, strict=True),
    )
    if b_dec is not None:
        check_float(op, "b_dec", b_dec, "[D]")
        check_sizes(
            op,
            f"W_dec [F, D] is {shape_of(W_dec)}, b_dec [D] is {shape_of(b_dec)}",
            (W_dec.shape[1], b_dec.shape[0]),
        )
    check_devices(op, top_acts, top_indices, W_dec, b_dec)
    check_index_range(op, "top_indices", top_indices, W_dec.shape[0])
    return call(_op, top_acts, top_indices, W_dec, b_dec)


# No default for b_dec: the dispatcher drops arguments that equal their default, and the gradient counts them.
_op = operator(
    reference.sparse_decode,
    schema="(Tensor top_acts, Tensor top_indices, Tensor W_dec, Tensor? b_dec) -> Tensor",
)


@_op.register_fake
def _(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    torch._check(top_acts.dim() == 2 and W_dec.dim() == 2, lambda: "top_acts must be [N, K] and W_dec [F, D]")
    torch._check(top_acts.shape == top_indices.shape, lambda: "top_acts and top_indices must both be [N, K]")
    return W_dec.new_empty(top_acts.shape[0], W_dec.shape[1])


@_op.register_kernel("cuda")
def _(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    from qscope_kernels.sparse_decode import sparse_decode_fwd  # triton is imported only when a GPU is used

    return sparse_decode_fwd(top_acts, top_indices, W_dec, b_dec)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    top_acts, top_indices, W_dec, b_dec = inputs
    ctx.save_for_backward(top_acts, top_indices, W_dec)
    ctx.bias_dtype = None if b_dec is None else b_dec.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    top_acts, top_indices, W_dec = ctx.saved_tensors
    grad = grad.contiguous()  # sum().backward() hands over a stride-0 tensor
    grad_acts = grad_W = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_acts = sparse_dot(grad, top_indices, W_dec).to(top_acts.dtype)
    if ctx.needs_input_grad[2]:
        grad_W = sparse_outer(top_acts, top_indices, grad, W_dec.shape[0])[0].to(W_dec.dtype)
    if ctx.needs_input_grad[3]:
        grad_b = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_acts, None, grad_W, grad_b


_op.register_autograd(_backward, setup_context=_setup)
