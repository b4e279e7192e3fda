"""Sparse decode, its squared error against x, and the gradient of that error with respect to the values."""

import torch
from torch import Tensor

from qscope.reference._workspace import rows_per_block


def decode_loss(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_hat [N, D], sq_err [N], total_variance [], error [N, D] and act_grads [N, K].

    r = b_dec + sum_k top_acts[:, k] * W_dec[top_indices[:, k]] in float32 (float64 for float64 weights), in
    ascending slot order, b_dec last; x_hat is r in the dtype of W_dec, error = r - x, sq_err = sum of error^2 over
    D, act_grads[n, k] = 2 <error[n], W_dec[top_indices[n, k]]>. total_variance: see there.
    """
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    indices = top_indices.long()
    r = torch.zeros(x.shape, dtype=dtype, device=W_dec.device)
    for slot in range(top_acts.shape[1]):
        r = r + top_acts[:, slot, None].to(dtype) * W_dec.index_select(0, indices[:, slot]).to(dtype)
    if b_dec is not None:
        r = r + b_dec.to(dtype)
    error = r - x.to(dtype)
    act_grads = [2 * (error * W_dec.index_select(0, ids).to(dtype)).sum(1) for ids in indices.unbind(1)]
    stacked = torch.stack(act_grads, dim=1) if act_grads else error.new_zeros(top_acts.shape)
    x_hat = r.to(W_dec.dtype, copy=True)
    return x_hat, error.square().sum(1), total_variance(x).to(dtype), error, stacked


def total_variance(x: Tensor) -> Tensor:
    """sum_n ||x[n] - mean(x)||^2 of x [N, D], as a float64 scalar; two passes, a block of rows at a time."""
    if x.shape[0] == 0:
        return x.new_zeros((), dtype=torch.float64)
    mean = x.mean(0, dtype=torch.float64)
    blocks = x.split(rows_per_block(x.shape[1], torch.float64.itemsize))
    return torch.stack([(block.double() - mean).square().sum(1).sum() for block in blocks]).sum()
