"""Feature-major lists against a plain loop: every entry once, in order, heavy lists cut without gaps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="qscope_kernels is tested where Triton is installed")
from qscope_kernels.feature_lists import feature_lists, split_lists


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lists_hold_each_live_entry_once_in_ascending_order(data):
    N, K, F = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 5)), data.draw(st.integers(1, 6))
    ids = data.draw(st.lists(st.integers(-1, F + 1), min_size=N * K, max_size=N * K))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    flags = data.draw(st.none() | st.lists(st.booleans(), min_size=N * K, max_size=N * K))
    live = None if flags is None else torch.tensor(flags, dtype=torch.bool).view(N, K)
    lists = feature_lists(torch.tensor(ids, dtype=dtype).view(N, K), F, live)
    for f in range(F):
        want = [p for p, i in enumerate(ids) if i == f and (flags is None or flags[p])]
        assert lists.order[lists.offsets[f] : lists.offsets[f + 1]].tolist() == want


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 6))
def test_split_lists_cover_exactly_the_long_lists(counts, chunk):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    split = split_lists(offsets, sum(counts), chunk)
    long = {f: -(-c // chunk) for f, c in enumerate(counts) if c > chunk}
    if split is None:
        assert not long
        return
    assert sum(long.values()) <= split.chunks
    want = [f for f, chunks in long.items() for _ in range(chunks)]
    assert split.chunk_feature.tolist() == want + [len(counts)] * (split.chunks - len(want))
    for f in long:
        assert split.chunk_feature[split.first_chunk[f]] == f
        assert split.first_chunk[f] == 0 or split.chunk_feature[split.first_chunk[f] - 1] != f
