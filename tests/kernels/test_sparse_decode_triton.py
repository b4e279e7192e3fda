"""The Triton gather kernels against float64, in Triton's interpreter or, if there is one, on the GPU.

Bounds are the rigorous ones of a float32 sum: n rounded products and n rounded additions give at most (n + 1)
u times the sum of absolute terms (u = 2^-24, Higham 2002, section 3.1), then one rounding to the output's
type.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels.sparse_decode import (
    LaunchConfig,
    launch_config,
    sparse_decode_fwd,
    sparse_dot_fwd,
    sparse_outer_fwd,
)

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
U32 = 2.0**-24
# Rounding to the output's type: half a unit, but a whole one for bfloat16 because the interpreter truncates.
ROUND = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
TINY = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
SMALL = LaunchConfig(block_d=32, num_warps=1, unroll=4, chunk=3)
# (N, K, D, F): K below, at and above the unrolling, D below, at and above a slice, all odd somewhere.
SHAPES = [(5, 7, 33, 29), (3, 8, 64, 11), (1, 1, 1, 1), (4, 13, 70, 61), (6, 3, 17, 2)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output or partial sum that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, ids: torch.dtype = torch.int32) -> tuple[Tensor, ...]:
    """top_acts with some zeros and negatives, ids with repeats inside a row, W_dec, b_dec, g."""
    N, K, D, F = shape
    gen = torch.Generator().manual_seed(N * 1000 + K)
    acts = torch.randn(N, K, generator=gen)
    acts[:, ::5] = 0.0
    indices = torch.randint(0, F, (N, K), generator=gen, dtype=ids)
    indices[:, K // 2] = indices[:, 0]
    floats = (
        acts,
        torch.randn(F, D, generator=gen),
        torch.randn(D, generator=gen),
        torch.randn(N, D, generator=gen),
    )
    acts, W, b, g = (t.to(dtype).to(DEVICE) for t in floats)
    return acts, indices.to(DEVICE), W, b, g


def within(got: Tensor, want: Tensor, terms: int | Tensor, magnitude: Tensor, dtype: torch.dtype) -> None:
    bound = (terms + 1) * U32 * magnitude
    bound = bound + (want.abs() + bound) * ROUND[dtype] + TINY[dtype]
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"{(error - bound).max().item():.3e} above the bound"


def outer_meaning(values: Tensor, indices: Tensor, g: Tensor, F: int) -> tuple[Tensor, Tensor]:
    N = indices.shape[0]
    one_hot = torch.zeros(N, F, dtype=torch.float64, device=g.device)
    one_hot.scatter_add_(1, indices.long(), values.double())
    return one_hot.T @ g.double(), one_hot.sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    acts, indices, W, b, _ = inputs(shape, dtype)
    terms = acts.double()[..., None] * W.double()[indices.long()]
    for bias in (None, b):
        shift = 0.0 if bias is None else bias.double()
        magnitude = terms.abs().sum(1) + (0.0 if bias is None else bias.double().abs())
        got = sparse_decode_fwd(acts, indices, W, bias, SMALL)
        assert got.dtype == dtype
        within(got, terms.sum(1) + shift, shape[1] + 1, magnitude, dtype)
        assert torch.equal(got, sparse_decode_fwd(acts, indices, W, bias, SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dot(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    _, indices, W, _, g = inputs(shape, dtype)
    terms = g.double()[:, None] * W.double()[indices.long()]
    got = sparse_dot_fwd(g, indices, W, SMALL)
    assert got.dtype == torch.float32
    within(got, terms.sum(-1), shape[2], terms.abs().sum(-1), torch.float32)
    assert torch.equal(got, sparse_dot_fwd(g, indices, W, SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    acts, indices, _, _, g = inputs(shape, dtype)
    F = shape[3]
    want_rows, want_sums = outer_meaning(acts, indices, g, F)
    size_rows, size_sums = outer_meaning(acts.abs(), indices, g.abs(), F)
    count = torch.bincount(indices.reshape(-1).long(), minlength=F)
    for config in (SMALL, None):  # chunks of 3 split most features; the default splits none of these
        rows, sums = sparse_outer_fwd(acts, indices, g, F, config)
        within(rows, want_rows, count[:, None], size_rows, torch.float32)
        within(sums, want_sums, count, size_sums, torch.float32)
        untouched = count == 0
        assert bool((rows[untouched] == 0).all()) and bool((sums[untouched] == 0).all())
        again = sparse_outer_fwd(acts, indices, g, F, config)
        assert torch.equal(rows, again[0]) and torch.equal(sums, again[1])


def test_default_configuration_with_a_ragged_last_slice() -> None:
    N, K, D, F = 2, 9, 300, 7
    acts, indices, W, b, g = inputs((N, K, D, F), torch.float32)
    assert 0 < D % launch_config(F, D, 4).block_d < D
    terms = acts.double()[..., None] * W.double()[indices.long()]
    want = terms.sum(1) + b.double()
    within(
        sparse_decode_fwd(acts, indices, W, b),
        want,
        K + 1,
        terms.abs().sum(1) + b.double().abs(),
        torch.float32,
    )
    terms = g.double()[:, None] * W.double()[indices.long()]
    within(sparse_dot_fwd(g, indices, W), terms.sum(-1), D, terms.abs().sum(-1), torch.float32)
    rows, _ = sparse_outer_fwd(acts, indices, g, F)
    within(
        rows,
        outer_meaning(acts, indices, g, F)[0],
        N * K,
        outer_meaning(acts.abs(), indices, g.abs(), F)[0],
        g.dtype,
    )


def test_ids_may_be_int64_and_inputs_strided() -> None:
    acts, indices, W, b, g = inputs((5, 7, 33, 29), torch.float32)
    wide = indices.long()
    strided = torch.stack([W, W + 1], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(sparse_decode_fwd(acts, wide, strided, b), sparse_decode_fwd(acts, indices, W, b))
    assert torch.equal(sparse_dot_fwd(g, wide, strided), sparse_dot_fwd(g, indices, W))
    got, want = sparse_outer_fwd(acts.T.contiguous().T, wide, g, 29), sparse_outer_fwd(acts, indices, g, 29)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_decode_adds_in_ascending_slot_order() -> None:
    """Powers of two make every product exact, fused or not: only the order of additions decides the bits."""
    _, indices, W, b, _ = inputs((4, 13, 33, 300), torch.float32)
    acts = 2.0 ** torch.randint(-3, 4, (4, 13), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    forward, backward = torch.zeros(4, 33, device=DEVICE), torch.zeros(4, 33, device=DEVICE)
    for k in range(13):
        forward = forward + acts[:, k, None] * W[indices[:, k].long()]
        backward = backward + acts[:, 12 - k, None] * W[indices[:, 12 - k].long()]
    assert not torch.equal(forward, backward)  # the input can tell the two apart
    assert torch.equal(sparse_decode_fwd(acts, indices, W, b, SMALL), forward + b)


def test_outer_adds_in_token_order_and_merges_chunks_in_order() -> None:
    N, K, D, chunk = 11, 2, 33, SMALL.chunk
    g = torch.randn(N, D, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    values = 2.0 ** torch.randint(-3, 4, (N, K), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    indices = torch.tensor([[1, 4]] * N, dtype=torch.int32, device=DEVICE)  # hit by every token
    rows, sums = sparse_outer_fwd(values, indices, g, 6, SMALL)
    for slot, feature in enumerate((1, 4)):
        row, total = torch.zeros(D, device=DEVICE), torch.zeros((), device=DEVICE)
        for start in range(0, N, chunk):
            part, part_sum = torch.zeros(D, device=DEVICE), torch.zeros((), device=DEVICE)
            for n in range(start, min(start + chunk, N)):
                part, part_sum = part + values[n, slot] * g[n], part_sum + values[n, slot]
            row, total = row + part, total + part_sum
        assert torch.equal(rows[feature], row) and torch.equal(sums[feature], total)
    assert bool((rows[[0, 2, 3, 5]] == 0).all()) and bool((sums[[0, 2, 3, 5]] == 0).all())


@pytest.mark.parametrize("counts", [[4, 4, 4], [3, 4, 5], [12], [1] * 12, [7, 0, 5]])
def test_chunk_bound_holds_at_its_edge(counts: list[int]) -> None:
    """Lists just above the chunk need the most chunks: a bound one too small would leave a row NaN."""
    ids = torch.cat([torch.full((c,), f, dtype=torch.int32) for f, c in enumerate(counts)]).view(-1, 1).to(DEVICE)
    values, g = torch.ones(len(ids), 1, device=DEVICE), torch.ones(len(ids), 5, device=DEVICE)
    rows, sums = sparse_outer_fwd(values, ids, g, len(counts), SMALL)
    assert sums.tolist() == counts and rows.tolist() == [[float(c)] * 5 for c in counts]


def test_dot_in_several_launches_gives_the_same_bits() -> None:
    _, indices, W, _, g = inputs((7, 5, 70, 29), torch.float32)
    whole = sparse_dot_fwd(g, indices, W, SMALL)
    # 3 slices x 5 entries x 4 bytes per token: two tokens per launch, the last one short.
    pieces = sparse_dot_fwd(g, indices, W, LaunchConfig(32, 1, unroll=4, max_partial_bytes=2 * 3 * 5 * 4))
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize(("N", "K", "D"), [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_empty(N: int, K: int, D: int) -> None:
    acts, indices = torch.ones(N, K, device=DEVICE), torch.zeros(N, K, dtype=torch.int32, device=DEVICE)
    W, b, g = (
        torch.ones(5, D, device=DEVICE),
        torch.full((D,), 2.0, device=DEVICE),
        torch.ones(N, D, device=DEVICE),
    )
    assert torch.equal(sparse_decode_fwd(acts, indices, W, b), (b + K).expand(N, D))
    assert torch.equal(sparse_dot_fwd(g, indices, W), torch.full((N, K), float(D), device=DEVICE))
    rows, sums = sparse_outer_fwd(acts, indices, g, 5)
    assert rows.shape == (5, D) and bool((rows == 0).all())
    assert sums.tolist() == [float(N * K), 0.0, 0.0, 0.0, 0.0]


def test_nan_and_infinity_pass_through_and_touch_nothing_else() -> None:
    acts, indices, W, _, g = inputs((4, 5, 33, 29), torch.float32)
    indices = torch.arange(20, dtype=torch.int32, device=DEVICE).view(4, 5)
    W[7, 2], g[2, 3], acts[:] = float("nan"), float("inf"), 1.0
    W[10:15, 3] = 1.0  # infinity times 1, not times something that may be 0
    decoded, dots = sparse_decode_fwd(acts, indices, W), sparse_dot_fwd(g, indices, W)
    assert torch.nonzero(decoded.isnan()).tolist() == [[1, 2]]
    assert torch.nonzero(dots.isnan()).tolist() == [[1, 2]] and bool(dots[2].isinf().all())
    rows, _ = sparse_outer_fwd(acts, indices, g, 29, SMALL)
    assert torch.nonzero(rows.isinf()).tolist() == [[f, 3] for f in range(10, 15)] and not bool(rows.isnan().any())


def test_wrong_input_is_refused_with_what_was_given() -> None:
    acts, indices, W, b, g = inputs((5, 7, 33, 29), torch.float32)
    with pytest.raises(ValueError, match=r"W_dec \[29, 33\]"):
        sparse_decode_fwd(acts[:, :-1], indices, W, b)
    with pytest.raises(ValueError, match=r"b_dec \[32\]"):
        sparse_decode_fwd(acts, indices, W, b[:-1])
    with pytest.raises(ValueError, match="int32 or int64"):
        sparse_decode_fwd(acts, indices.float(), W, b)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        sparse_dot_fwd(g.double(), indices, W)
    with pytest.raises(ValueError, match=r"g \[5, 32\]"):
        sparse_dot_fwd(g[:, :-1], indices, W)
    with pytest.raises(ValueError, match=r"values \[4, 7\]"):
        sparse_outer_fwd(acts[:-1], indices, g, 29)
    with pytest.raises(ValueError, match="one device"):
        sparse_dot_fwd(g.to("meta"), indices, W)


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_ids_outside_the_dictionary_read_nothing(ids: torch.dtype) -> None:
    """Reading them would end the CUDA context; they count as rows of zeros, and lists leave them out."""
    acts, indices, W, b, g = inputs((4, 13, 70, 61), torch.float32, ids)
    bad = torch.zeros_like(indices, dtype=torch.bool)
    for n, (slot, value) in enumerate([(0, -1), (7, 61), (12, torch.iinfo(ids).min), (9, torch.iinfo(ids).max)]):
        indices[n, slot], bad[n, slot] = value, True
    safe, kept = indices.masked_fill(bad, 0), acts.masked_fill(bad, 0)
    for config in (SMALL, None):
        assert torch.equal(sparse_decode_fwd(acts, indices, W, b, config), sparse_decode_fwd(kept, safe, W, b, config))
        want = sparse_dot_fwd(g, safe, W, config).masked_fill(bad, 0)
        assert torch.equal(sparse_dot_fwd(g, indices, W, config), want)
        rows, sums = sparse_outer_fwd(acts, indices, g, 61, config)
        want = torch.zeros(61, dtype=torch.float64).index_add_(
            0, safe.flatten().long().cpu(), kept.flatten().double().cpu()
        )
        assert (sums.double().cpu() - want).abs().max() < 1e-5 and bool(rows.isfinite().all())
