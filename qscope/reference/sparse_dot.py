"""out[n, k] = <g[n], W[indices[n, k]]>."""

import torch
from torch import Tensor


def sparse_dot(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Dot products of each row of g [N, D] with its selected rows of W [F, D] -> [N, K] float32."""
    indices = indices.long()
    out = torch.empty(indices.shape, dtype=torch.float32, device=g.device)
    for slot in range(indices.shape[1]):
        out[:, slot] = (g.float() * W.index_select(0, indices[:, slot]).float()).sum(1)
    return out
