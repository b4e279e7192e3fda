"""The gather kernels on a GPU at real sizes: what the interpreter cannot show.

That is bfloat16 rounding, run-to-run bits under real scheduling, 64-bit addresses, launches that never wait.
"""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets the kernels"),
]

from qscope_kernels.sparse_decode import sparse_decode_fwd, sparse_dot_fwd, sparse_outer_fwd  # noqa: E402

U32, U16 = 2.0**-24, {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# (N, K, D, F): the 1.7B and 8B Qwen-Scope shapes on fewer tokens, and one where nothing divides.
SHAPES = [(1024, 50, 2048, 32768), (512, 100, 4096, 65536), (333, 37, 1531, 5003)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    N, K, D, F = shape
    gen = torch.Generator("cuda").manual_seed(N)
    acts = torch.rand(N, K, generator=gen, device="cuda")
    # Cubed uniforms: a few heavy features with thousands of entries, many with none, as in a real SAE.
    indices = (torch.rand(N, K, generator=gen, device="cuda") ** 3 * F).int().clamp_(max=F - 1)
    indices[:, 0] = F // 2  # hit by every token
    W, g = (torch.randn(rows, D, generator=gen, device="cuda").to(dtype) for rows in (F, N))
    return acts, indices, W, torch.randn(D, generator=gen, device="cuda").to(dtype), g


def worst(got: Tensor, want: Tensor, bound: Tensor) -> float:
    return ((got.double() - want).abs() / bound.clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_and_dot_match_float64_and_repeat_to_the_bit(shape: tuple, dtype: torch.dtype) -> None:
    N, K, D, _ = shape
    acts, indices, W, b, g = inputs(shape, dtype)
    decoded, dots = sparse_decode_fwd(acts, indices, W, b), sparse_dot_fwd(g, indices, W)
    for rows in torch.arange(N, device="cuda").split(32):
        selected = W[indices[rows].long()].double()
        terms = acts[rows].double()[..., None] * selected
        want = terms.sum(1) + b.double()
        exact = (K + 2) * U32 * (terms.abs().sum(1) + b.double().abs())
        bound = exact + (want.abs() + exact) * U16[dtype] + 2.0**-25 * (dtype == torch.float16)
        assert worst(decoded[rows], want, bound) <= 1
        terms = g[rows].double()[:, None] * selected
        assert worst(dots[rows], terms.sum(-1), (D + 1) * U32 * terms.abs().sum(-1)) <= 1
    for _ in range(3):
        assert torch.equal(decoded, sparse_decode_fwd(acts, indices, W, b))
        assert torch.equal(dots, sparse_dot_fwd(g, indices, W))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outer_matches_float64_and_repeats_to_the_bit(shape: tuple, dtype: torch.dtype) -> None:
    N, _, _, F = shape
    acts, indices, _, _, g = inputs(shape, dtype)
    rows, sums = sparse_outer_fwd(acts, indices, g, F)
    count = torch.bincount(indices.flatten().long(), minlength=F)
    assert int(count.max()) > 512, "no feature reaches the split path"
    dense = torch.zeros(N, F, dtype=torch.float64, device="cuda").scatter_add_(1, indices.long(), acts.double())
    for cols in torch.arange(F, device="cuda").split(8192):
        part = dense[:, cols].T
        bound = (count[cols, None] + 1) * U32 * (part @ g.double().abs())
        # A millionth more, for the error of the float64 reference itself.
        assert worst(rows[cols], part @ g.double(), bound * (1 + 1e-6) + 1e-300) <= 1
        total = part.sum(1)
        assert worst(sums[cols], total, (count[cols] + 1) * U32 * total * (1 + 1e-6)) <= 1
    assert bool((rows[count == 0] == 0).all()) and bool((sums[count == 0] == 0).all())
    for _ in range(3):
        again = sparse_outer_fwd(acts, indices, g, F)
        assert torch.equal(rows, again[0]) and torch.equal(sums, again[1])


def test_no_launcher_waits_for_the_gpu() -> None:
    acts, indices, W, b, g = inputs(SHAPES[2], torch.bfloat16)
    calls = (
        lambda: sparse_decode_fwd(acts, indices, W, b),
        lambda: sparse_dot_fwd(g, indices, W),
        lambda: sparse_outer_fwd(acts, indices, g, SHAPES[2][3]),
    )
    for call in calls:
        call()  # compiles; only later calls are held to it
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_decode_and_dot_replay_in_a_cuda_graph() -> None:
    acts, indices, W, b, g = inputs(SHAPES[2], torch.bfloat16)
    sparse_decode_fwd(acts, indices, W, b), sparse_dot_fwd(g, indices, W)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoded, dots = sparse_decode_fwd(acts, indices, W, b), sparse_dot_fwd(g, indices, W)
    acts.mul_(2.0)
    g.neg_()
    graph.replay()
    assert torch.equal(decoded, sparse_decode_fwd(acts, indices, W, b))
    assert torch.equal(dots, sparse_dot_fwd(g, indices, W))


def test_rows_beyond_two_to_the_31_elements_are_addressed() -> None:
    F, D = 1_100_000, 2048  # 2.25e9 elements
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    W = torch.zeros(F, D, dtype=torch.bfloat16, device="cuda")
    W[-2:] = torch.tensor([[1.0], [2.0]], device="cuda")
    ids = torch.tensor([[F - 1, F - 2, 0]], dtype=torch.int32, device="cuda")
    acts, g = torch.tensor([[1.0, 4.0, 8.0]], device="cuda"), torch.ones(1, D, device="cuda")
    assert torch.equal(sparse_decode_fwd(acts, ids, W), torch.full_like(W[:1], 6.0))
    assert sparse_dot_fwd(g, ids, W).tolist() == [[2.0 * D, 1.0 * D, 0.0]]
    del W
    rows, _ = sparse_outer_fwd(acts, ids, g, F)
    assert rows[[0, F - 2, F - 1], -1].tolist() == [8.0, 4.0, 1.0] and int(rows.count_nonzero()) == 3 * D


def test_ids_outside_the_dictionary_leave_the_context_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    from qscope import ops

    acts, indices, W, b, g = inputs(SHAPES[2], torch.bfloat16)
    want = sparse_decode_fwd(acts.index_fill(1, torch.tensor([5], device="cuda"), 0), indices, W, b)
    indices[:, 5] = torch.arange(len(indices), device="cuda", dtype=torch.int32) * 2**20 + len(W)
    indices[::2, 5] = -1
    assert torch.equal(ops.sparse_decode(acts, indices, W, b), want)
    assert bool((ops.sparse_dot(g, indices, W)[:, 5] == 0).all())
    ops.sparse_outer(acts, indices, g, len(W))
    torch.cuda.synchronize()
    monkeypatch.setenv("QSCOPE_DEBUG", "1")
    with pytest.raises(IndexError, match=r"top_indices holds -1\.\..*accepted is 0\.\.5002"):
        ops.sparse_decode(acts, indices, W, b)
