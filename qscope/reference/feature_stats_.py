"""Statistics of each feature's activations, added up over batches in place."""

import torch
from torch import Tensor

from qscope.reference._workspace import WORKSPACE_BYTES


def feature_stats_(
    top_acts: Tensor,
    top_indices: Tensor,
    count: Tensor,
    total: Tensor,
    total_sq: Tensor,
    peak: Tensor,
    groups: Tensor | None,
    top_values: Tensor | None,
    top_tokens: Tensor | None,
    first_token: Tensor,
) -> None:
    """Add the entries of top_acts, top_indices [N, K] to count, total, total_sq, peak [G, F], in ascending token order.

    An entry counts if its value is finite and above 0, and its token's group (groups [N], or 0) is in 0..G-1. Sums are
    a chain of float64 additions that goes on from what total and total_sq hold. top_values, top_tokens [F, M] keep the
    M entries of each feature that are largest, then of lowest token; token n has id first_token + n.
    """
    (N, K), (G, F) = top_indices.shape, count.shape
    if not N * K * F:
        return
    live = (top_acts > 0) & top_acts.isfinite()
    if groups is not None:
        live &= ((groups >= 0) & (groups < G))[:, None]
    at = live.view(-1).nonzero().view(-1)
    values, feature = top_acts.reshape(-1)[at].float(), top_indices.reshape(-1)[at].long()
    if ((feature < 0) | (feature >= F)).any():
        raise IndexError(f"feature_stats_: an active entry has a feature outside 0..{F - 1}")
    token = at // K
    cell = feature if groups is None else groups[token].long() * F + feature
    # In one dimension index_add_ adds one entry after the other.
    count.view(-1).index_add_(0, cell, torch.ones_like(cell))
    total.view(-1).index_add_(0, cell, values.double())
    total_sq.view(-1).index_add_(0, cell, values.double() ** 2)
    peak.view(-1).scatter_reduce_(0, cell, values, "amax")
    if top_values is not None and top_tokens is not None and top_values.shape[1]:
        _merge_top(values, feature, token + first_token, top_values, top_tokens)


def _merge_top(values: Tensor, feature: Tensor, token: Tensor, top_values: Tensor, top_tokens: Tensor) -> None:
    M = top_values.shape[1]
    able = values >= top_values[feature, M - 1]
    values, feature, token = values[able], feature[able], token[able]
    if not len(values):
        return
    later = token.min() > top_tokens.max()  # then the table's rows, followed by the newcomers, are in token order
    order = values.sort(stable=True, descending=True).indices  # entries came in ascending token order
    order = order[feature[order].sort(stable=True).indices]
    values, feature, token = values[order], feature[order], token[order]
    features, sizes = feature.unique_consecutive(return_counts=True)
    slot = torch.arange(len(feature)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    row = torch.arange(len(features)).repeat_interleave(sizes)
    values, token, slot, row = (t[slot < M] for t in (values, token, slot, row))
    ends = torch.searchsorted(row, torch.arange(len(features) + 1))
    step = max(1, WORKSPACE_BYTES // (96 * M))  # about 96 bytes per slot of a row, its newcomers and their sorting
    for first in range(0, len(features), step):
        chosen = features[first : first + step]
        part = slice(int(ends[first]), int(ends[first + len(chosen)]))
        merged_values = torch.full((len(chosen), 2 * M), -torch.inf)
        merged_tokens = torch.full((len(chosen), 2 * M), -1)
        merged_values[:, :M], merged_tokens[:, :M] = top_values[chosen], top_tokens[chosen]
        merged_values[row[part] - first, M + slot[part]] = values[part]
        merged_tokens[row[part] - first, M + slot[part]] = token[part]
        if not later:
            by_token = merged_tokens.argsort(dim=1, stable=True)
            merged_values, merged_tokens = merged_values.gather(1, by_token), merged_tokens.gather(1, by_token)
        by_value = merged_values.argsort(dim=1, stable=True, descending=True)[:, :M]
        top_values[chosen] = merged_values.gather(1, by_value)
        top_tokens[chosen] = merged_tokens.gather(1, by_value)
