"""y[n] = sum_k top_acts[n, k] * W_dec[top_indices[n, k]] + b_dec."""

import torch
from torch import Tensor


def sparse_decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Reconstruct [N, D] from top_acts [N, K] and top_indices [N, K]; W_dec [F, D], b_dec [D].

    Accumulates in float32 (float64 for float64 weights) in ascending slot order, adds b_dec last, rounds once
    to the dtype of W_dec.
    """
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    indices = top_indices.long()
    y = torch.zeros(top_acts.shape[0], W_dec.shape[1], dtype=dtype, device=W_dec.device)
    for slot in range(top_acts.shape[1]):
        y = y + top_acts[:, slot, None].to(dtype) * W_dec.index_select(0, indices[:, slot]).to(dtype)
    if b_dec is not None:
        y = y + b_dec.to(dtype)
    return y.to(W_dec.dtype)
