"""The paired gradient kernel against float64 and against sparse_outer's bits, in the interpreter or on a GPU.

Bounds are the rigorous ones of a float32 sum in any order: (terms + 1) u times the sum of absolute terms, u = 2^-24
(Higham 2002, section 3.1).
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels.sparse_decode import LaunchConfig, sparse_outer_fwd
from qscope_kernels.sparse_grads import SparseGrads, column_sum_fwd, grads_config, sparse_grads_fwd

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
U32 = 2.0**-24
SMALL = LaunchConfig(block_d=32, num_warps=1, unroll=2, chunk=3)
# (N, K, D, F): few and many entries per feature, D below, at and above a slice, all odd somewhere.
SHAPES = [(5, 7, 33, 29), (3, 8, 64, 11), (1, 1, 1, 1), (4, 13, 70, 61), (6, 3, 17, 2)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output or partial sum that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Acts, some of them dead with a gradient of 0, gradients, ids with repeats inside a row, g, x."""
    N, K, D, F = shape
    gen = torch.Generator().manual_seed(N * 1000 + K)
    acts = torch.randn(N, K, generator=gen).abs()
    acts[:, 1::5] = 0.0
    grads = torch.randn(N, K, generator=gen) * (acts > 0)
    indices = torch.randint(0, F, (N, K), generator=gen, dtype=torch.int32)
    indices[:, K // 2] = indices[:, 0]
    floats = acts, grads, torch.randn(N, D, generator=gen), torch.randn(N, D, generator=gen)
    acts, grads, g, x = (t.to(dtype).to(DEVICE) for t in floats)
    return acts, grads, indices.to(DEVICE), g, x


def meaning(acts: Tensor, grads: Tensor, indices: Tensor, g: Tensor, x: Tensor, F: int) -> tuple[Tensor, ...]:
    dense = torch.zeros(2, indices.shape[0], F, dtype=torch.float64, device=g.device)
    dense[0].scatter_add_(1, indices.long(), acts.double())
    dense[1].scatter_add_(1, indices.long(), grads.double())
    return dense[0].T @ g.double(), dense[1].T @ x.double(), dense[1].sum(0), g.double().sum(0)


def within(got: SparseGrads, args: tuple[Tensor, ...], F: int) -> None:
    indices, N = args[2], len(args[2])
    want, size = meaning(*args, F), meaning(*(t if t is indices else t.abs() for t in args), F)
    count = torch.bincount(indices.reshape(-1).long(), minlength=F)
    for ours, exact, scale, terms in zip(got, want, size, (count[:, None], count[:, None], count, N), strict=True):
        assert ours.dtype == torch.float32
        assert bool(((ours.double() - exact).abs() <= (terms + 1) * U32 * scale).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64_and_leaves_untouched_rows_zero(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    args = inputs(shape, dtype)
    F = shape[3]
    for config in (SMALL, None):  # chunks of 3 split most features; the default splits none of these
        got = sparse_grads_fwd(*args, F, config)
        within(got, args, F)
        untouched = torch.bincount(args[2][args[0] != 0].long(), minlength=F) == 0
        assert all(bool((part[untouched] == 0).all()) for part in got[:3])
        again = sparse_grads_fwd(*args, F, config)
        assert all(torch.equal(first, second) for first, second in zip(got, again, strict=True))


@pytest.mark.parametrize("config", [SMALL, None], ids=["chunks of 3", "default"])
def test_has_the_bits_of_sparse_outer(config: LaunchConfig | None) -> None:
    acts, grads, indices, g, x = inputs((11, 7, 70, 13))
    acts = acts + 0.25  # no dead entries: both see the same lists, hence the same chunks
    same = LaunchConfig(32, 1, chunk=3) if config else LaunchConfig(128, 1)
    got = sparse_grads_fwd(acts, grads, indices, g, x, 13, config)
    W_dec, _ = sparse_outer_fwd(acts, indices, g, 13, same)
    W_enc, b_enc = sparse_outer_fwd(grads, indices, x, 13, same)
    assert torch.equal(got.W_dec, W_dec) and torch.equal(got.W_enc, W_enc) and torch.equal(got.b_enc, b_enc)


@pytest.mark.parametrize("counts", [[4, 4, 4], [3, 4, 5], [12], [7, 0, 5]])
def test_heavy_features_at_the_edge_of_a_chunk(counts: list[int]) -> None:
    """Lists just above the chunk need the most chunks: a bound one too small would leave a row NaN."""
    ids = torch.cat([torch.full((c,), f, dtype=torch.int32) for f, c in enumerate(counts)]).view(-1, 1).to(DEVICE)
    ones, rows = torch.ones(len(ids), 1, device=DEVICE), torch.ones(len(ids), 5, device=DEVICE)
    got = sparse_grads_fwd(ones, 2 * ones, ids, rows, 3 * rows, len(counts), SMALL)
    assert got.W_dec.tolist() == [[float(c)] * 5 for c in counts]
    assert got.W_enc.tolist() == [[6.0 * c] * 5 for c in counts]
    assert got.b_enc.tolist() == [2.0 * c for c in counts] and got.b_dec.tolist() == [float(len(ids))] * 5


def test_a_dead_entry_reads_neither_row() -> None:
    acts, grads, _, g, x = inputs((4, 5, 33, 40))
    indices = torch.arange(20, dtype=torch.int32, device=DEVICE).view(4, 5)
    acts[:], grads[:] = 1.0, 1.0
    acts[2, 3] = grads[2, 3] = 0.0
    acts[2, 4], grads[2, 0] = 0.0, 0.0  # alive: only one of the two is 0
    g[2], x[2, 7] = float("nan"), float("inf")
    got = sparse_grads_fwd(acts, grads, indices, g, x, 40, SMALL)
    assert got.W_dec.isnan().all(1).nonzero().flatten().tolist() == [10, 11, 12, 14]
    assert got.W_enc.isnan().any(1).nonzero().flatten().tolist() == [10]  # 0 times infinity
    assert torch.nonzero(got.W_enc.isinf()).tolist() == [[11, 7], [12, 7], [14, 7]]
    assert bool((got.W_dec[13] == 0).all()) and bool((got.W_enc[13] == 0).all()) and bool(got.b_dec.isnan().all())


def test_ids_outside_are_left_out_and_inputs_may_be_int64_strided_and_of_several_dtypes() -> None:
    acts, grads, indices, g, x = inputs((5, 7, 33, 29))
    x = x.bfloat16()
    want = sparse_grads_fwd(acts, grads, indices, g, x, 29)
    strided = (t.T.contiguous().T for t in (acts, grads, indices.long(), g, x))
    got = sparse_grads_fwd(*strided, 29)
    assert all(torch.equal(first, second) for first, second in zip(got, want, strict=True))
    outside = indices.clone()
    outside[:, 2], outside[:, 3] = -1, 29
    drop = torch.tensor([2, 3], device=DEVICE)
    got = sparse_grads_fwd(acts, grads, outside, g, x, 29)
    want = sparse_grads_fwd(acts.index_fill(1, drop, 0.0), grads.index_fill(1, drop, 0.0), indices, g, x, 29)
    assert all(torch.equal(first, second) for first, second in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 33, 128, 300])
def test_column_sum(N: int, dtype: torch.dtype) -> None:
    g = torch.randn(N, 150, generator=torch.Generator().manual_seed(N)).to(dtype).to(DEVICE)
    got = column_sum_fwd(g, max_chunks=2)
    error = (got.double() - g.double().sum(0)).abs()
    assert bool((error <= (N + 1) * U32 * g.double().abs().sum(0)).all())
    assert torch.equal(got, column_sum_fwd(g, max_chunks=2))


@pytest.mark.parametrize(("N", "K", "D"), [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_empty(N: int, K: int, D: int) -> None:
    acts, indices = torch.ones(N, K, device=DEVICE), torch.zeros(N, K, dtype=torch.int32, device=DEVICE)
    g, x = torch.ones(N, D, device=DEVICE), torch.ones(N, D, device=DEVICE)
    got = sparse_grads_fwd(acts, acts, indices, g, x, 5)
    for rows in got[:2]:
        assert rows.shape == (5, D) and bool((rows == 0).all())
    assert got.b_enc.tolist() == [float(N * K), 0.0, 0.0, 0.0, 0.0] and got.b_dec.tolist() == [float(N)] * D


def test_the_wider_of_two_dtypes_chooses_the_launch() -> None:
    assert grads_config(8192, 4096, 4).block_d * 2 == grads_config(8192, 4096, 2).block_d


def test_wrong_input_is_refused_with_what_was_given() -> None:
    acts, grads, indices, g, x = inputs((5, 7, 33, 29))
    with pytest.raises(ValueError, match=r"act_grads \[5, 6\]"):
        sparse_grads_fwd(acts, grads[:, :-1], indices, g, x, 29)
    with pytest.raises(ValueError, match=r"x \[5, 32\]"):
        sparse_grads_fwd(acts, grads, indices, g, x[:, :-1], 29)
    with pytest.raises(ValueError, match="int32 or int64"):
        sparse_grads_fwd(acts, grads, indices.float(), g, x, 29)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        sparse_grads_fwd(acts.double(), grads, indices, g, x, 29)
    with pytest.raises(ValueError, match="one device"):
        sparse_grads_fwd(acts, grads, indices, g, x.to("meta"), 29)
