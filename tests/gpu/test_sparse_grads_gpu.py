"""sparse_grads on a GPU at real sizes: what the interpreter cannot show."""

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

from qscope_kernels.sparse_decode import sparse_outer_fwd  # noqa: E402
from qscope_kernels.sparse_grads import grads_config, sparse_grads_fwd  # noqa: E402

from qscope import ops  # noqa: E402

U32 = 2.0**-24
# (N, K, D, F): the 1.7B and 8B Qwen-Scope shapes on fewer tokens, and one where nothing divides.
SHAPES = [(1024, 50, 2048, 32768), (512, 100, 4096, 65536), (333, 37, 1531, 5003)]


def inputs(shape: tuple[int, int, int, int], g_dtype: torch.dtype, x_dtype: torch.dtype) -> tuple[Tensor, ...]:
    N, K, D, F = shape
    gen = torch.Generator("cuda").manual_seed(N)
    acts = torch.randn(N, K, generator=gen, device="cuda").add_(0.5).relu_()
    grads = torch.randn(N, K, generator=gen, device="cuda") * (acts > 0)
    # Cubed uniforms: a few heavy features with many entries, many with none, as in a real SAE.
    indices = (torch.rand(N, K, generator=gen, device="cuda") ** 3 * F).int().clamp_(max=F - 1)
    indices[:, :2] = F // 2  # hit twice by every token
    g, x = (torch.randn(N, D, generator=gen, device="cuda").to(t) for t in (g_dtype, x_dtype))
    return acts, grads, indices, g, x


def worst(got: Tensor, want: Tensor, bound: Tensor) -> float:
    return ((got.double() - want).abs() / bound.clamp(min=1e-300)).max().item()


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_and_repeats_to_the_bit(shape: tuple, dtypes: tuple) -> None:
    N, _, _, F = shape
    args = acts, grads, indices, g, x = inputs(shape, *dtypes)
    got = sparse_grads_fwd(*args, F)
    count = torch.bincount(indices[(acts != 0) | (grads != 0)].long(), minlength=F)
    assert N < 500 or int(count.max()) > 512, "no feature reaches the split path"
    for values, source, rows in ((acts, g, got.W_dec), (grads, x, got.W_enc)):
        dense, size = (torch.zeros(N, F, dtype=torch.float64, device="cuda") for _ in range(2))
        dense.scatter_add_(1, indices.long(), values.double())
        size.scatter_add_(1, indices.long(), values.double().abs())
        for cols in torch.arange(F, device="cuda").split(8192):
            bound = (count[cols, None] + 1) * U32 * (size[:, cols].T @ source.double().abs())
            # A millionth more, for the error of the float64 reference itself.
            assert worst(rows[cols], dense[:, cols].T @ source.double(), bound * (1 + 1e-6) + 1e-300) <= 1
    assert worst(got.b_enc, dense.sum(0), (count + 1) * U32 * size.sum(0) * (1 + 1e-6)) <= 1
    assert worst(got.b_dec, g.double().sum(0), (N + 1) * U32 * g.double().abs().sum(0)) <= 1
    assert all(bool((part[count == 0] == 0).all()) for part in got[:3])
    for _ in range(3):
        assert all(torch.equal(first, second) for first, second in zip(got, sparse_grads_fwd(*args, F), strict=True))


def test_has_the_bits_of_sparse_outer() -> None:
    shape = SHAPES[1]
    acts, grads, indices, g, x = inputs(shape, torch.bfloat16, torch.bfloat16)
    acts = acts + 0.25  # no dead entries: both see the same lists, hence the same chunks
    got = sparse_grads_fwd(acts, grads, indices, g, x, shape[3])
    assert torch.equal(got.W_dec, sparse_outer_fwd(acts, indices, g, shape[3])[0])
    W_enc, b_enc = sparse_outer_fwd(grads, indices, x, shape[3])
    assert torch.equal(got.W_enc, W_enc) and torch.equal(got.b_enc, b_enc)


def test_the_operator_matches_the_cpu() -> None:
    args = inputs((64, 20, 300, 1000), torch.float32, torch.bfloat16)
    got, want = ops.sparse_grads(*args, 1000), ops.sparse_grads(*(t.cpu() for t in args), 1000)
    for first, second in zip(got, want, strict=True):
        torch.testing.assert_close(first.cpu(), second, rtol=1e-5, atol=1e-4)


def test_no_launch_waits_for_the_gpu_and_a_cuda_graph_replays() -> None:
    F = SHAPES[2][3]
    args = inputs(SHAPES[2], torch.float32, torch.bfloat16)
    sparse_grads_fwd(*args, F)  # compiles; only later calls are held to it
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_grads_fwd(*args, F)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sparse_grads_fwd(*args, F)
    args[0].mul_(2.0)
    args[2].copy_(args[2].flip(0))
    args[3].neg_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, sparse_grads_fwd(*args, F), strict=True))


def test_peak_memory_is_the_results_the_lists_and_the_chunks() -> None:
    N, K, D, F = shape = (2048, 100, 4096, 65536)
    args = inputs(shape, torch.bfloat16, torch.bfloat16)
    sparse_grads_fwd(*args, F)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = sparse_grads_fwd(*args, F)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    kept = sum(t.numel() * t.element_size() for t in results)
    chunks = 2 * N * K // (grads_config(N, D, 2).chunk + 1)
    tables = 5 * 8 * (F + 1) + 8 * 64 * D
    assert peak <= kept + 60 * N * K + 2 * 4 * chunks * D + tables + (4 << 20)
    assert peak - kept < N * K * D * 2 / 16  # nowhere near the gathered rows


def test_rows_beyond_two_to_the_31_elements_are_addressed() -> None:
    F, D = 1_100_000, 2048  # 2.25e9 elements in each gradient
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    ids = torch.tensor([[F - 1, F - 2, 0, F, -1]], dtype=torch.int32, device="cuda")
    acts = torch.tensor([[1.0, 4.0, 8.0, 1.0, 1.0]], device="cuda")
    g, x = torch.ones(1, D, device="cuda"), torch.full((1, D), 3.0, device="cuda")
    got = sparse_grads_fwd(acts, acts, ids, g, x, F)
    assert got.W_dec[[0, F - 2, F - 1], -1].tolist() == [8.0, 4.0, 1.0]
    assert got.W_enc[[0, F - 2, F - 1], -1].tolist() == [24.0, 12.0, 3.0]
    assert int(got.W_enc.count_nonzero()) == 3 * D and int(got.b_enc.count_nonzero()) == 3
