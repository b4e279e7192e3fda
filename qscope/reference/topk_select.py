"""The k largest scores of every row: value descending, then lowest index."""

import torch
from torch import Tensor

from qscope.reference._workspace import rows_per_block


def topk_select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of each row of scores [N, F], ordered by value descending, then lowest
    index.

    -0 counts as +0 and is returned as +0. A row that holds a NaN returns NaN values and indices 0..k-1.
    Returns values [N, k] in the dtype of scores and indices [N, k] int32.
    """
    blocks = [_select_block(b, k) for b in scores.split(rows_per_block(scores.shape[1], scores.element_size()))]
    return torch.cat([values for values, _ in blocks]), torch.cat([indices for _, indices in blocks])


def _select_block(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices = _select_indices(scores.detach(), k)
    values = scores.gather(1, indices) + 0.0
    nan_row = scores.detach().isnan().any(dim=1, keepdim=True)
    first = torch.arange(k, device=scores.device).expand_as(indices)
    values = torch.where(nan_row, torch.nan, values)
    return values, torch.where(nan_row, first, indices).to(torch.int32)


def _select_indices(scores: Tensor, k: int) -> Tensor:
    """torch.topk leaves open which of several equal scores it keeps: repair the rows where that matters."""
    values, indices = scores.topk(k, dim=1)
    smallest = values[:, -1:]
    ambiguous = ((scores == smallest).sum(1) != (values == smallest).sum(1)).nonzero().squeeze(1)
    for rows in ambiguous.split(rows_per_block(scores.shape[1], indices.element_size())):
        full = scores[rows].sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = full.values[:, :k], full.indices[:, :k]
    indices, by_index = indices.sort(dim=1)
    by_value = values.gather(1, by_index).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, by_value)
