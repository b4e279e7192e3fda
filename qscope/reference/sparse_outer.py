"""rows[f] = sum of values[n, k] * g[n] over all (n, k) with indices[n, k] == f."""

import torch
from torch import Tensor


def sparse_outer(values: Tensor, indices: Tensor, g: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Scatter values [N, K] times g [N, D] by feature: rows [d_sae, D] float32 and sums [d_sae] float32.

    sums[f] is the sum of the values that belong to feature f. Terms are added in float32.
    """
    indices = indices.long()
    values = values.float()
    rows = torch.zeros(d_sae, g.shape[1], dtype=torch.float32, device=g.device)
    sums = torch.zeros(d_sae, dtype=torch.float32, device=g.device)
    for slot in range(indices.shape[1]):
        rows.index_add_(0, indices[:, slot], values[:, slot, None] * g.float())
        sums.index_add_(0, indices[:, slot], values[:, slot])
    return rows, sums
