"""decode_loss on a GPU at real sizes: what the interpreter cannot show.

That is bfloat16 rounding, run-to-run bits under real scheduling, 64-bit addresses, launches that never wait, memory.
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

from qscope_kernels.decode_loss import LossConfig, decode_loss_fwd, loss_config, total_variance_fwd  # noqa: E402
from qscope_kernels.sparse_decode import sparse_decode_fwd  # noqa: E402

from qscope import ops  # noqa: E402

U32, U16 = 2.0**-24, {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# (N, K, D, F): the 1.7B and 8B Qwen-Scope shapes on fewer tokens, one where nothing divides, one of two gathers.
SHAPES = [(1024, 50, 2048, 32768), (512, 100, 4096, 65536), (333, 37, 1531, 5003), (64, 300, 1024, 8192)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    N, K, D, F = shape
    gen = torch.Generator("cuda").manual_seed(N)
    acts = torch.rand(N, K, generator=gen, device="cuda")
    indices = (torch.rand(N, K, generator=gen, device="cuda") ** 3 * F).int().clamp_(max=F - 1)
    W, x = (torch.randn(rows, D, generator=gen, device="cuda").to(dtype) for rows in (F, N))
    return acts, indices, W, torch.randn(D, generator=gen, device="cuda").to(dtype), x


def worst(got: Tensor, want: Tensor, bound: Tensor) -> float:
    return ((got.double() - want).abs() / bound.clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_and_repeats_to_the_bit(shape: tuple, dtype: torch.dtype) -> None:
    N, K, D, _ = shape
    args = acts, indices, W, b, x = inputs(shape, dtype)
    got = decode_loss_fwd(*args)
    for tokens in torch.arange(N, device="cuda").split(16):
        rows = W[indices[tokens].long()].double()
        terms = acts[tokens].double()[..., None] * rows
        r = terms.sum(1) + b.double()
        off_r = (K + 2) * U32 * (terms.abs().sum(1) + b.double().abs())
        tiny = 2.0**-25 * (dtype == torch.float16)
        assert worst(got.x_hat[tokens], r, off_r + (r.abs() + off_r) * U16[dtype] + tiny) <= 1
        e = r - x[tokens].double()
        off_e = off_r + U32 * (e.abs() + off_r)
        assert worst(got.error[tokens], e, off_e) <= 1
        size = e.abs() + off_e
        off_sq = (2 * e.abs() * off_e + off_e**2 + (D + 1) * U32 * size**2).sum(1)
        assert worst(got.sq_err[tokens], e.square().sum(1), off_sq) <= 1
        off_dots = ((off_e + (D + 1) * U32 * size)[:, None] * rows.abs()).sum(-1)
        assert worst(got.act_grads[tokens], 2 * (e[:, None] * rows).sum(-1), 2 * off_dots) <= 1
    for _ in range(3):
        assert all(torch.equal(first, second) for first, second in zip(got, decode_loss_fwd(*args), strict=True))


def test_more_slots_than_one_gather_holds_give_the_bits_of_sparse_decode() -> None:
    args = inputs(SHAPES[3], torch.bfloat16)
    assert torch.equal(decode_loss_fwd(*args).x_hat, sparse_decode_fwd(*args[:4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [1, 127, 8192, 100_001])
def test_total_variance_far_from_zero(N: int, dtype: torch.dtype) -> None:
    gen = torch.Generator("cuda").manual_seed(N)
    x = (1000 + torch.randn(N, 333, generator=gen, device="cuda")).to(dtype)
    x[0, 5] = 30_000.0
    want = (x.double() - x.double().mean(0)).square().sum()
    # Tiles of 32 rows, N / (64 * 32) merges of tiles and 64 of chunks, each a few roundings.
    bound = (200 + N / 512) * U32 * want
    got = total_variance_fwd(x)
    assert worst(got, want, bound) <= 1
    assert torch.equal(got, total_variance_fwd(x))


def test_launches_in_pieces_give_the_same_bits() -> None:
    args = inputs(SHAPES[2], torch.bfloat16)
    cfg = loss_config(37, 1531, 2)
    pieces = LossConfig(cfg.block_d, cfg.rows, cfg.num_warps, max_partial_bytes=1 << 18)
    got, want = decode_loss_fwd(*args, config=pieces), decode_loss_fwd(*args)
    assert all(torch.equal(first, second) for first, second in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_and_its_gradients_match_the_cpu(dtype: torch.dtype) -> None:
    """The CPU operator is tested against float64; here each side rounds its own sums."""
    acts, indices, W, b, x = inputs((64, 20, 300, 1000), dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.detach().to(device).requires_grad_() for t in (acts, W, b, x)]
        out = ops.decode_loss(leaves[0], indices.to(device), *leaves[1:])
        loss = out.x_hat.float().sin().sum() + out.sq_err.sum() + out.total_variance
        results.append([t.cpu().float() for t in (*out, *torch.autograd.grad(loss, leaves))])
    for first, second in zip(*results, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(second, first, rtol=8 * eps, atol=8 * eps * first.abs().max().item())


def test_no_launch_waits_for_the_gpu() -> None:
    for shape in (SHAPES[2], SHAPES[3]):
        args = inputs(shape, torch.bfloat16)
        decode_loss_fwd(*args)  # compiles; only later calls are held to it
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode_loss_fwd(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_replays_in_a_cuda_graph() -> None:
    args = inputs(SHAPES[2], torch.bfloat16)
    decode_loss_fwd(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_loss_fwd(*args)
    args[0].mul_(2.0)
    args[4].neg_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, decode_loss_fwd(*args), strict=True))


def test_peak_memory_is_the_results_and_the_partial_sums() -> None:
    N, K, D, _ = shape = (2048, 100, 4096, 65536)
    args = inputs(shape, torch.bfloat16)
    decode_loss_fwd(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = decode_loss_fwd(*args)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    kept = sum(t.numel() * t.element_size() for t in results)
    slices = D // loss_config(K, D, 2).block_d
    partial = 4 * slices * N * (K + 1)
    assert peak <= kept + partial + 8 * 64 * D + (2 << 20)  # the allocator rounds each of a dozen tensors up
    assert peak < N * K * D * 2 / 8  # nowhere near the gathered rows


def test_rows_beyond_two_to_the_31_elements_are_addressed_and_foreign_ids_are_not() -> None:
    F, D = 1_100_000, 2048  # 2.25e9 elements
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    W = torch.zeros(F, D, dtype=torch.bfloat16, device="cuda")
    W[-2:] = torch.tensor([[1.0], [2.0]], device="cuda")
    ids = torch.tensor([[F - 1, F - 2, 0, F, -1]], dtype=torch.int32, device="cuda")
    acts, x = torch.tensor([[1.0, 4.0, 8.0, 1.0, 1.0]], device="cuda"), torch.ones(1, D, device="cuda")
    got = decode_loss_fwd(acts, ids, W, None, x)
    assert torch.equal(got.x_hat, torch.full_like(W[:1], 6.0)) and got.sq_err.tolist() == [25.0 * D]
    assert got.act_grads.tolist() == [[20.0 * D, 10.0 * D, 0.0, 0.0, 0.0]]
