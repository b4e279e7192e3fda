"""Feature-major lists: the active entries of a batch grouped by feature, each list in ascending token order.

    feature_lists   one stable sort of the flat ids; gradients and statistics read the lists
    split_lists     chunk tables for the few features whose list is too long for one program

Everything stays on the device: no shape depends on the data, so a launch neither waits for the GPU nor breaks
a CUDA graph. N tokens, K active features per token, F dictionary size.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FeatureLists(NamedTuple):
    """The entries (n, k) of indices [N, K], grouped by feature."""

    order: Tensor
    """[N * K] int64: flat positions n * K + k, by feature, then ascending."""
    offsets: Tensor
    """[F + 1] int64: feature f owns order[offsets[f] : offsets[f + 1]]; entries that belong to no feature
    (ids outside 0..F-1, or not live) lie outside all of these ranges."""


class SplitLists(NamedTuple):
    """How the lists longer than `chunk` entries are cut. `chunks` bounds their number for any data."""

    chunks: int
    chunk_feature: Tensor
    """[chunks] int64: the feature of each chunk, F for the unused tail."""
    first_chunk: Tensor
    """[F] int64: the first chunk of each feature that is split."""


def feature_lists(indices: Tensor, d_sae: int, live: Tensor | None = None) -> FeatureLists:
    """Group the entries of indices [N, K] (int32 or int64) by feature with one stable sort.

    live [N, K] bool, or None for all: entries that are False belong to no list. Beside the result it holds the
    sort's temporaries, about 40 bytes per entry.
    """
    flat = indices.reshape(-1)
    if live is not None:
        flat = flat.masked_fill(~live.reshape(-1), d_sae)
    features, order = torch.sort(flat, stable=True)
    edges = torch.arange(d_sae + 1, dtype=features.dtype, device=indices.device)
    return FeatureLists(order, torch.searchsorted(features, edges))


def split_lists(offsets: Tensor, entries: int, chunk: int) -> SplitLists | None:
    """Cut every list of more than `chunk` entries into chunks; None if no list can be that long.

    offsets [F + 1] int64 of FeatureLists, entries = N * K. A list of c > chunk entries has ceil(c / chunk) <=
    2 c / (chunk + 1) chunks, which bounds their number without asking the GPU.
    """
    if chunk >= entries:
        return None
    chunks = 2 * entries // (chunk + 1)
    count = offsets.diff()
    chunk_count = torch.where(count > chunk, (count + chunk - 1) // chunk, 0)
    last_chunk = chunk_count.cumsum(0)
    numbers = torch.arange(chunks, device=offsets.device)
    return SplitLists(chunks, torch.searchsorted(last_chunk, numbers, right=True), last_chunk - chunk_count)
