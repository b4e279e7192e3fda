"""The gradients of all four parameters of a sparse autoencoder, for a training step without autograd."""

from typing import NamedTuple

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
from qscope.ops.sparse_outer import sparse_outer


class SparseGrads(NamedTuple):
    """Gradients of one batch, all float32; a feature without an active entry has exactly zero in all of its rows."""

    W_dec: Tensor
    """[F, D]: sum over the entries of a feature of top_acts[n, k] * g[n]."""
    W_enc: Tensor
    """[F, D]: sum over the same entries of act_grads[n, k] * x[n]."""
    b_enc: Tensor
    """[F]: sum over the same entries of act_grads[n, k]."""
    b_dec: Tensor
    """[D]: sum over the tokens of g[n]."""


def sparse_grads(
    top_acts: Tensor, act_grads: Tensor, top_indices: Tensor, g: Tensor, x: Tensor, d_sae: int
) -> SparseGrads:
    """The gradients of W_dec, W_enc, b_enc and b_dec from the active entries of a batch.

    For x_hat = sparse_decode(top_acts, top_indices, W_dec, b_dec) and (top_acts, top_indices) =
    topk_encode(x, W_enc, b_enc, k): g is the gradient of the loss with respect to x_hat and act_grads the one
    with respect to top_acts. On a GPU one sort of the ids and one pass over the entries of each feature give both
    weight gradients. Accumulates in float32 in ascending n order, without atomics: the same bits every time. Has no
    gradient of its own.

    ReLU passes no gradient where top_acts is 0, so the caller must set act_grads to 0 there. An entry with
    both equal to 0 reads neither g nor x, so a NaN there does not reach its feature; b_dec sums all rows of g.

    Args:
        top_acts: values of the active features, [N, K], float32, bfloat16 or float16.
        act_grads: gradient with respect to them, [N, K], same dtypes.
        top_indices: their ids, [N, K], int32 or int64, each in 0..d_sae-1.
        g: gradient with respect to the reconstruction, [N, D], same dtypes.
        x: what the encoder read, [N, D], same dtypes.
        d_sae: number of features F.

    Returns:
        SparseGrads(W_dec, W_enc, b_enc, b_dec).

    Raises:
        ValueError: shapes, dtypes, devices or d_sae that do not fit.
        IndexError: an index outside 0..d_sae-1, on a CPU or with QSCOPE_DEBUG=1. On a GPU, where finding it would
            have to wait for the device, the entry is left out.
    """
    op = "sparse_grads"
    check_float(op, "top_acts", top_acts, "[N, K]")
    check_float(op, "act_grads", act_grads, "[N, K]")
    check_indices(op, "top_indices", top_indices)
    check_float(op, "g", g, "[N, D]")
    check_float(op, "x", x, "[N, D]")
    check_sizes(
        op,
        f"top_acts [N, K] is {shape_of(top_acts)}, act_grads [N, K] is {shape_of(act_grads)}, top_indices [N, K] is "
        f"{shape_of(top_indices)}, g [N, D] is {shape_of(g)}, x [N, D] is {shape_of(x)}",
        *zip(top_acts.shape, top_indices.shape, strict=True),
        *zip(act_grads.shape, top_indices.shape, strict=True),
        *zip(g.shape, x.shape, strict=True),
        (g.shape[0], top_acts.shape[0]),
    )
    if d_sae < 1:
        raise ValueError(f"{op}: d_sae={d_sae}; it must be at least 1.")
    check_devices(op, top_acts, act_grads, top_indices, g, x)
    check_index_range(op, "top_indices", top_indices, d_sae)
    return SparseGrads(*call(_op, top_acts, act_grads, top_indices, g, x, d_sae))


_op = operator(reference.sparse_grads)


@_op.register_fake
def _(
    top_acts: Tensor, act_grads: Tensor, top_indices: Tensor, g: Tensor, x: Tensor, d_sae: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(top_acts.shape == top_indices.shape, lambda: "top_acts and top_indices must both be [N, K]")
    torch._check(act_grads.shape == top_indices.shape, lambda: "act_grads and top_indices must both be [N, K]")
    torch._check(g.shape == x.shape, lambda: "g and x must both be [N, D]")
    torch._check(g.shape[0] == top_acts.shape[0], lambda: "top_acts [N, K] and g [N, D] must share N")
    W_dec, W_enc = (g.new_empty(d_sae, g.shape[1], dtype=torch.float32) for _ in range(2))
    return W_dec, W_enc, W_dec.new_empty(d_sae), W_dec.new_empty(g.shape[1])


@_op.register_kernel("cuda")
def _(
    top_acts: Tensor, act_grads: Tensor, top_indices: Tensor, g: Tensor, x: Tensor, d_sae: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from qscope_kernels.sparse_grads import sparse_grads_fwd  # triton is imported only when a GPU is used

    return tuple(sparse_grads_fwd(top_acts, act_grads, top_indices, g, x, d_sae))


@_op.register_kernel("cpu")
def _on_cpu(
    top_acts: Tensor, act_grads: Tensor, top_indices: Tensor, g: Tensor, x: Tensor, d_sae: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dead = (top_acts == 0) & (act_grads == 0)
    if top_indices.numel() and not 0 <= top_indices.min() <= top_indices.max() < d_sae:
        given = f"{int(top_indices.min())}..{int(top_indices.max())}"
        raise IndexError(f"sparse_grads: top_indices holds {given}, outside 0..{d_sae - 1}.")
    # Dead entries go to a feature of their own, whose row is then left out: 0 times a NaN must not reach another.
    ids = top_indices.masked_fill(dead, d_sae)
    W_dec, _ = sparse_outer(top_acts, ids, g, d_sae + 1)
    W_enc, b_enc = sparse_outer(act_grads, ids, x, d_sae + 1)
    return W_dec[:d_sae], W_enc[:d_sae], b_enc[:d_sae], g.sum(0, dtype=torch.float32)
