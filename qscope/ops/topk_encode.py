"""TopK-SAE encoder: relu(topk(x W_enc^T + b_enc)) without ever holding the [N, F] scores."""

from typing import Any

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import call, check_devices, check_float, check_k, check_sizes, operator, shape_of
from qscope.ops.sparse_decode import sparse_decode
from qscope.ops.sparse_outer import sparse_outer

PRECISIONS = ("exact", "bf16")


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, precision: str = "exact"
) -> tuple[Tensor, Tensor]:
    """Encode residuals into their k largest features: relu(topk(x W_enc^T + b_enc)).

    Order: value descending, then lowest index; -0 equals +0. ReLU comes after the selection, so fewer than k
    positive scores give zeros at the end of a row. A row of scores that holds a NaN returns NaN for all its
    values and indices 0..k-1. The workspace does not grow with N. The gradient flows to x, W_enc and b_enc
    through the selected entries whose value is positive and finite: a row of x that holds NaN or
    infinity adds nothing to any gradient. It is summed in float32 and rounded once to the dtype of its input.

    Args:
        x: residuals, [N, D], float32, bfloat16 or float16; any strides.
        W_enc: encoder rows, [F, D], same dtypes; contiguous is fastest (other layouts are copied).
        b_enc: encoder bias, [F], or None.
        k: how many features to keep, 1 <= k <= F; on a GPU at most 256.
        precision: "exact" ranks the float64 scores of the given inputs and weights, each rounded to float32, at about
            the price of a bfloat16 product (docs/exact.md); values are these. "bf16" casts the inputs to bfloat16 and
            ranks the bfloat16 output of the matrix product, values are bfloat16. On a GPU the last bit of a bfloat16
            score can depend on how many rows are encoded together; it never changes from run to run.

    Returns:
        top_acts [N, k] and top_indices [N, k] int32.

    Raises:
        ValueError: shapes, dtypes, devices, k or precision that do not fit.
    """
    op = "topk_encode"
    check_float(op, "x", x, "[N, D]")
    check_float(op, "W_enc", W_enc, "[F, D]")
    check_sizes(op, f"x [N, D] is {shape_of(x)}, W_enc [F, D] is {shape_of(W_enc)}", (x.shape[1], W_enc.shape[1]))
    if b_enc is not None:
        check_float(op, "b_enc", b_enc, "[F]")
        check_sizes(
            op,
            f"W_enc [F, D] is {shape_of(W_enc)}, b_enc [F] is {shape_of(b_enc)}",
            (b_enc.shape[0], W_enc.shape[0]),
        )
    check_k(op, k, W_enc.shape[0], x)
    check_devices(op, x, W_enc, b_enc)
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision={precision!r}; accepted are {', '.join(map(repr, PRECISIONS))}.")
    return call(_op, x, W_enc, b_enc, k, precision)


# No default for precision: the dispatcher drops arguments equal to a default, and the gradient counts them.
_op = operator(
    reference.topk_encode,
    schema="(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, str precision) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, precision: str) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 2 and W_enc.dim() == 2, lambda: "x must be [N, D] and W_enc [F, D]")
    torch._check(x.shape[1] == W_enc.shape[1], lambda: "x [N, D] and W_enc [F, D] must share D")
    torch._check(1 <= k <= W_enc.shape[0], lambda: f"k={k} must be in 1..{W_enc.shape[0]}")
    torch._check(precision in PRECISIONS, lambda: f"precision must be one of {PRECISIONS}")
    shape = (x.shape[0], k)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int32)


@_op.register_kernel("cuda")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, precision: str) -> tuple[Tensor, Tensor]:
    from qscope_kernels.exact_encode import available, exact_topk_encode_fwd
    from qscope_kernels.topk_encode import topk_encode_fwd

    if precision == "exact" and available(x):
        return exact_topk_encode_fwd(x, W_enc, b_enc, k)[:2]
    return topk_encode_fwd(x, W_enc, b_enc, k, precision=precision)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, W_enc, b_enc, _, _ = inputs
    top_acts, top_indices = output
    ctx.save_for_backward(x, W_enc, top_acts, top_indices)
    ctx.bias_dtype = None if b_enc is None else b_enc.dtype


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, W_enc, top_acts, top_indices = ctx.saved_tensors
    live = (top_acts > 0) & top_acts.isfinite()
    dead_row = ~live.any(1, keepdim=True)
    grad = grad.float().masked_fill(~live, 0)  # not a product: a dead entry may be handed NaN
    grad_x = grad_W = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_of_x(grad, top_indices, W_enc, x.dtype).masked_fill(dead_row, 0)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        # The dead entries of a row add 0 * x to features of their own, which must not be 0 * NaN.
        rows, sums = sparse_outer(grad, top_indices, x.masked_fill(dead_row, 0), W_enc.shape[0])
        grad_W = rows.to(W_enc.dtype) if ctx.needs_input_grad[1] else None
        grad_b = sums.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return grad_x, grad_W, grad_b, None, None


def _grad_of_x(grad: Tensor, top_indices: Tensor, W_enc: Tensor, dtype: torch.dtype) -> Tensor:
    """sparse_decode rounds to the dtype of the weights. Where x has another one, upcast weights are decoded a
    block of columns at a time: one pass over W_enc, without a float32 copy of it."""
    if W_enc.dtype in (dtype, torch.float32):
        return sparse_decode(grad, top_indices, W_enc, None).to(dtype)
    step = reference.rows_per_block(W_enc.shape[0], torch.float32.itemsize)
    parts = [sparse_decode(grad, top_indices, part.float(), None).to(dtype) for part in W_enc.split(step, dim=1)]
    return torch.cat(parts, dim=1)


_op.register_autograd(_backward, setup_context=_setup)
