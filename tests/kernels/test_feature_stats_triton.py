"""The statistics kernels against the plain PyTorch meaning (itself tested against loops), to the bit, in Triton's
interpreter or, if there is one, on the GPU."""

import math
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels.feature_stats import LaunchConfig, feature_stats_

from qscope import reference

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
CONFIGS = {"default": None, "small": LaunchConfig(cells=4, unroll=2, chunk=4)}


def tables(F: int, G: int, M: int | None, device: str = DEVICE) -> list:
    sums = torch.zeros(2, G, F, dtype=torch.float64, device=device)
    t = [torch.zeros(G, F, dtype=torch.int64, device=device), sums[0], sums[1], torch.zeros(G, F, device=device)]
    if M is None:
        return [*t, None, None]
    empty = torch.full((F, M), -1, device=device)
    return [*t, torch.full((F, M), -math.inf, device=device), empty]


def codes(N: int, K: int, F: int, G: int, seed: int, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ties (multiples of 1/grid), repeated ids, zeros, negatives, NaN, infinities; groups from -1 to G."""
    gen = torch.Generator().manual_seed(seed)
    acts = (torch.randn(N, K, generator=gen) * grid).round() / grid if grid else torch.randn(N, K, generator=gen)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    where = torch.rand(N, K, generator=gen) < 0.1
    acts = torch.where(where, special[torch.randint(0, 5, (N, K), generator=gen)], acts)
    indices = (torch.rand(N, K, generator=gen) ** 3 * F).int().clamp(max=F - 1)
    return acts, indices, torch.randint(-1, G + 1, (N,), generator=gen, dtype=torch.int32)


def add(t: list, acts: Tensor, indices: Tensor, groups: Tensor | None, first: int, config: str = "default") -> None:
    acts, indices = acts.to(DEVICE), indices.to(DEVICE)
    groups = None if groups is None else groups.to(DEVICE)
    feature_stats_(
        acts, indices, *t[:4], groups, t[4], t[5], torch.tensor(first, device=DEVICE), config=CONFIGS[config]
    )


def equal(a: list, b: list) -> bool:
    return all(x is y or (x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("M", [None, 1, 5, 16])
@pytest.mark.parametrize(("N", "K", "F", "G"), [(40, 7, 13, 1), (33, 4, 5, 3), (1, 1, 1, 1), (9, 1, 37, 2)])
def test_is_the_reference_to_the_bit(config: str, M: int | None, N: int, K: int, F: int, G: int) -> None:
    got, want = tables(F, G, M), tables(F, G, M, "cpu")
    for batch in range(3):  # random float32 first, then ties
        acts, indices, groups = codes(N, K, F, G, seed=batch + N, grid=(0, 2, 4)[batch])
        dtype = (torch.float32, torch.bfloat16, torch.float16)[batch]
        acts, indices, chosen = acts.to(dtype), indices.long() if batch else indices, groups if G > 1 else None
        first = (2**40, 1000, 0)[batch]  # a later batch may be an earlier piece of the text
        add(got, acts, indices, chosen, first, config)
        reference.feature_stats_(acts, indices, *want[:4], chosen, want[4], want[5], torch.tensor(first))
    assert equal(got, want)


def test_any_cut_of_the_stream_gives_the_same_bits() -> None:
    acts, indices, groups = codes(50, 5, 9, 2, seed=1, grid=0)
    whole, pieces = tables(9, 2, 6), tables(9, 2, 6)
    add(whole, acts, indices, groups, 7)
    for first, end in ((0, 1), (1, 20), (20, 20), (20, 47), (47, 50)):
        add(pieces, acts[first:end], indices[first:end], groups[first:end], 7 + first, "small")
    assert equal(whole, pieces) and int(whole[0].max()) > 5


def test_the_largest_table_and_a_list_of_several_chunks() -> None:
    acts, indices = torch.arange(1.0, 151.0).view(-1, 1), torch.zeros(150, 1, dtype=torch.int32)
    t = tables(2, 1, 64)
    add(t, acts, indices, None, 0)
    assert t[4][0].tolist() == [float(v) for v in range(150, 86, -1)] and t[5][0].tolist() == list(range(149, 85, -1))
    assert t[0].tolist() == [[150, 0]] and t[1].tolist() == [[150 * 151 / 2, 0]] and t[5][1].tolist() == [-1] * 64
    before = [x.clone() for x in t]
    add(t, acts.clamp(max=86.0), indices, None, 0)  # nothing reaches the 64th
    assert equal(t[4:], before[4:])


def test_ties_go_to_the_lowest_token_and_a_token_may_hold_a_feature_twice() -> None:
    t = tables(1, 1, 3)
    add(t, torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int32), None, 100)
    assert t[5].tolist() == [[100, 100, 101]]
    add(t, torch.ones(5, 2), torch.zeros(5, 2, dtype=torch.int32), None, 2)
    assert t[5].tolist() == [[2, 2, 3]]


def test_features_and_groups_out_of_range_write_nothing() -> None:
    """Where an index would raise on a CPU, a GPU leaves the entry out."""
    indices = torch.tensor([[-1, 3, 2**31 - 1, -(2**31)]] * 4, dtype=torch.int32)
    groups = torch.tensor([0, 1, -1, 2], dtype=torch.int32)
    t = tables(3, 2, 2)
    add(t, torch.ones(4, 4), indices, groups, 0)
    assert equal(t, tables(3, 2, 2))
    add(t, torch.ones(4, 1), torch.full((4, 1), 1, dtype=torch.int64), groups, 0)
    assert t[0].tolist() == [[0, 1, 0], [0, 1, 0]] and t[5].tolist() == [[-1, -1], [0, 1], [-1, -1]]


def test_strided_codes_and_empty() -> None:
    acts, indices, groups = codes(20, 6, 9, 2, seed=3, grid=2)
    want, got = tables(9, 2, 3), tables(9, 2, 3)
    add(want, acts[::2, ::3].contiguous(), indices[::2, ::3].contiguous(), groups[::2].contiguous(), 0)
    add(got, acts[::2, ::3], indices[::2, ::3], groups[::2], 0)
    add(got, acts[:0], indices[:0], groups[:0], 0)
    add(got, acts[:, :0], indices[:, :0], groups, 0)
    assert equal(want, got)


def test_wrong_input_is_refused_with_what_was_given() -> None:
    acts, indices, groups = codes(4, 3, 9, 2, seed=4, grid=2)
    wrong = tables(9, 2, 4)
    for place, tensor, word in (
        (1, wrong[1].float(), "total and total_sq float64"),
        (3, wrong[3][:, :8], r"peak \[2, 8\]"),
        (0, wrong[0].T.contiguous().T, "count is not"),
        (4, torch.zeros(9, 65, device=DEVICE), "M <= 64"),
        (5, None, "or neither"),
    ):
        t = [*wrong[:place], tensor, *wrong[place + 1 :]]
        with pytest.raises(ValueError, match=word):
            add(t, acts, indices, groups, 0)
    for bad in ((acts[:3], indices, groups), (acts.double(), indices, groups), (acts, indices.float(), groups)):
        with pytest.raises(ValueError, match="takes top_acts"):
            add(wrong, *bad, 0)
    for bad in (None, groups[:3], groups.long()):
        with pytest.raises(ValueError, match=r"groups \[N\] int32"):
            add(wrong, acts, indices, bad, 0)
