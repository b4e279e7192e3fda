"""Decoder and reconstruction loss of a sparse autoencoder in one operator, with the gradients a trainer needs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from qscope.ops.sparse_decode import sparse_decode
from qscope.ops.sparse_dot import sparse_dot
from qscope.ops.sparse_outer import sparse_outer
from qscope.reference.decode_loss import total_variance


class DecodeLoss(NamedTuple):
    """Reconstruction and how far it is from x. FVU = sq_err.sum() / total_variance."""

    x_hat: Tensor
    """Reconstruction [N, D] in the dtype of W_dec."""
    sq_err: Tensor
    """[N] float32: sum over D of (reconstruction - x)^2, from the float32 reconstruction before it is rounded."""
    total_variance: Tensor
    """[] float32: sum over n of ||x[n] - mean over the tokens of x||^2, the squared error of predicting the mean."""
    error: Tensor
    """[N, D] float32: the reconstruction before it is rounded, minus x."""
    act_grads: Tensor
    """[N, K] float32: gradient of sq_err.sum() with respect to top_acts, 2 <error[n], W_dec[top_indices[n, k]]>.
    It carries no gradient of its own: requires_grad is False."""


def decode_loss(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor) -> DecodeLoss:
    """x_hat[n] = sum_k top_acts[n, k] * W_dec[top_indices[n, k]] + b_dec, and its squared error against x.

    The fraction of variance unexplained of these N tokens is sq_err.sum() / total_variance, the mean squared error
    sq_err.sum() / x.numel(). On a GPU one gather of W_dec (for K <= 256) gives x_hat, the error and the gradient of
    sq_err with respect to top_acts; the backward pass gathers W_dec again only if a gradient arrives at x_hat
    or error. Gradients flow from x_hat, sq_err, total_variance and error to top_acts, W_dec, b_dec and x, once (no
    second derivatives, and none from act_grads, which is a gradient itself); they are summed in float32 and rounded
    once. x_hat is sparse_decode's: the same bits on a CPU, and on a GPU the same float32 sum with its slots added in
    another fixed order. NaN and infinity pass through as in plain arithmetic, so leave tokens out beforehand that
    must not count. No [N, F] and no [N, K, D] tensor is made.

    A training step without autograd hands the last two results to `sparse_grads`: for the loss c sq_err.sum(), g is
    2 c error and act_grads is c act_grads, set to 0 where top_acts is 0.

    Args:
        top_acts: values of the active features, [N, K], float32, bfloat16 or float16.
        top_indices: their ids, [N, K], int32 or int64, each in 0..F-1.
        W_dec: decoder rows, [F, D], float32, bfloat16 or float16.
        b_dec: decoder bias, [D], or None.
        x: what is reconstructed, [N, D], float32, bfloat16 or float16.

    Returns:
        DecodeLoss(x_hat, sq_err, total_variance, error, act_grads).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: an index outside 0..F-1, on a CPU or with QSCOPE_DEBUG=1. On a GPU, where finding it would have
            to wait for the device, it counts as a row of zeros.
    """
    op = "decode_loss"
    check_float(op, "top_acts", top_acts, "[N, K]")
    check_indices(op, "top_indices", top_indices)
    check_float(op, "W_dec", W_dec, "[F, D]")
    check_float(op, "x", x, "[N, D]")
    check_sizes(
        op,
        f"top_acts [N, K] is {shape_of(top_acts)}, top_indices [N, K] is {shape_of(top_indices)}, "
        f"W_dec [F, D] is {shape_of(W_dec)}, x [N, D] is {shape_of(x)}",
        *zip(top_acts.shape, top_indices.shape, strict=True),
        (x.shape[0], top_acts.shape[0]),
        (x.shape[1], W_dec.shape[1]),
    )
    if b_dec is not None:
        check_float(op, "b_dec", b_dec, "[D]")
        check_sizes(
            op,
            f"W_dec [F, D] is {shape_of(W_dec)}, b_dec [D] is {shape_of(b_dec)}",
            (W_dec.shape[1], b_dec.shape[0]),
        )
    check_devices(op, top_acts, top_indices, W_dec, b_dec, x)
    check_index_range(op, "top_indices", top_indices, W_dec.shape[0])
    return DecodeLoss(*call(_op, top_acts, top_indices, W_dec, b_dec, x))


# No default for b_dec: the dispatcher drops arguments that equal their default, and the gradient counts them.
_op = operator(
    reference.decode_loss,
    schema="(Tensor top_acts, Tensor top_indices, Tensor W_dec, Tensor? b_dec, Tensor x) "
    "-> (Tensor x_hat, Tensor sq_err, Tensor total_variance, Tensor error, Tensor act_grads)",
)


@_op.register_fake
def _(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(top_acts.dim() == 2 and W_dec.dim() == 2, lambda: "top_acts must be [N, K] and W_dec [F, D]")
    torch._check(top_acts.shape == top_indices.shape, lambda: "top_acts and top_indices must both be [N, K]")
    torch._check(x.shape == (top_acts.shape[0], W_dec.shape[1]), lambda: "x must be [N, D]")
    N, D = x.shape

    def float32(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return W_dec.new_empty(N, D), float32(N), float32(), float32(N, D), float32(*top_acts.shape)


@_op.register_kernel("cuda")
def _(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from qscope_kernels.decode_loss import decode_loss_fwd  # triton is imported only when a GPU is used

    return tuple(decode_loss_fwd(top_acts, top_indices, W_dec, b_dec, x))


@_op.register_kernel("cpu")
def _on_cpu(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    error = _decode_float32(top_acts, top_indices, W_dec, b_dec)
    x_hat = error.to(W_dec.dtype, copy=True)
    error -= x
    act_grads = sparse_dot(error, top_indices, W_dec).mul_(2)
    return x_hat, error.square().sum(1), total_variance(x).float(), error, act_grads


def _decode_float32(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """sparse_decode before it rounds to the dtype of W_dec: upcast only the rows that occur, a block of columns
    at a time, which changes no sum."""
    if W_dec.dtype == torch.float32:
        return sparse_decode(top_acts, top_indices, W_dec, b_dec)
    rows, ids = top_indices.unique(return_inverse=True)
    if rows.numel() and not 0 <= rows[0] <= rows[-1] < W_dec.shape[0]:
        raise IndexError(
            f"decode_loss: top_indices reach from {rows[0]} to {rows[-1]}, outside 0..{W_dec.shape[0] - 1}."
        )
    out = top_acts.new_empty(top_acts.shape[0], W_dec.shape[1], dtype=torch.float32)
    step = reference.rows_per_block(rows.numel(), torch.float32.itemsize)
    for first in range(0, W_dec.shape[1], step):
        columns = slice(first, first + step)
        bias = None if b_dec is None else b_dec[columns]
        out[:, columns] = sparse_decode(top_acts, ids, W_dec[:, columns][rows].float(), bias)
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    top_acts, top_indices, W_dec, b_dec, x = inputs
    _, _, _, error, act_grads = output
    ctx.save_for_backward(top_acts, top_indices, W_dec, x, error, act_grads)
    ctx.bias_dtype = None if b_dec is None else b_dec.dtype
    ctx.mark_non_differentiable(act_grads)
    ctx.set_materialize_grads(False)  # gradients of zeros at x_hat and error would cost a second gather of W_dec


@once_differentiable
def _backward(
    ctx: Any,
    grad_x_hat: Tensor | None,
    grad_sq: Tensor | None,
    grad_variance: Tensor | None,
    grad_error: Tensor | None,
    _: None,
) -> tuple[Tensor | None, ...]:
    top_acts, top_indices, W_dec, x, error, act_grads = ctx.saved_tensors
    needs = ctx.needs_input_grad
    above = _add([grad.float() for grad in (grad_x_hat, grad_error) if grad is not None])
    grad_acts = grad_W = grad_b = None
    if above is not None or grad_sq is not None:
        if needs[0]:
            parts = [] if grad_sq is None else [act_grads * grad_sq[:, None]]
            parts += [] if above is None else [sparse_dot(above.contiguous(), top_indices, W_dec)]
            grad_acts = _add(parts).to(top_acts.dtype)
        if needs[2] or needs[3]:
            grad = _grad_of_reconstruction(error, grad_sq, above)
            grad_W = sparse_outer(top_acts, top_indices, grad, len(W_dec))[0].to(W_dec.dtype) if needs[2] else None
            grad_b = grad.sum(0).to(ctx.bias_dtype) if needs[3] else None
    grad_x = _grad_of_x(x, error, grad_sq, grad_variance, grad_error) if needs[4] else None
    return grad_acts, None, grad_W, grad_b, grad_x


def _add(parts: list[Tensor]) -> Any:
    """Sum of tensors, None if there are none."""
    return sum(parts[1:], start=parts[0]) if parts else None


def _grad_of_reconstruction(error: Tensor, grad_sq: Tensor | None, above: Tensor | None) -> Tensor:
    """[N, D] float32: what arrives at the float32 reconstruction through sq_err, and from above directly."""
    if grad_sq is None:
        assert above is not None
        return above.contiguous()
    grad = error * (2 * grad_sq)[:, None]
    return grad if above is None else grad.add_(above)


def _grad_of_x(
    x: Tensor, error: Tensor, grad_sq: Tensor | None, grad_variance: Tensor | None, grad_error: Tensor | None
) -> Tensor | None:
    """-2 grad_sq error - grad_error, and 2 grad_variance (x - mean): moving one token also moves the mean, but
    deviations from a mean add up to zero."""
    parts = [] if grad_sq is None else [error * (-2 * grad_sq)[:, None]]
    if grad_error is not None:
        parts.append(-grad_error)
    if grad_variance is not None:
        shifted = x.float() - x[:1].float()  # keeps the digits of values that lie far from zero
        parts.append((shifted - shifted.mean(0)) * (2 * grad_variance))
    total = _add(parts)
    return None if total is None else total.to(x.dtype)


_op.register_autograd(_backward, setup_context=_setup)
