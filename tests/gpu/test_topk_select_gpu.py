"""The row select on a GPU at real sizes, the CUDA kernel and the Triton fallback: what the emulator and the interpreter
cannot show. Results are exact, so everything is compared to the bit."""

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

from qscope_kernels import cuda_library  # noqa: E402
from qscope_kernels.topk_select import LaunchConfig, topk_select_fwd  # noqa: E402

import qscope.ops  # noqa: E402

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (N, F, k): the Qwen-Scope dictionaries on fewer tokens, few rows (more threads per row), and nothing that divides.
SHAPES = [(512, 32768, 50), (512, 65536, 100), (300, 81920, 100), (300, 131072, 256), (3, 65536, 100), (333, 5003, 37)]


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        monkeypatch.setattr(cuda_library, "load", lambda: None)
    elif cuda_library.load() is None:
        pytest.skip(f"no CUDA library: {cuda_library.problem()}")
    return request.param


def scores_of(shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> Tensor:
    N, F, _ = shape
    gen = torch.Generator("cuda").manual_seed(N + F)
    x = torch.randn(N, F, generator=gen, device="cuda")
    if kind == "integers":  # exact in every dtype, a few thousand scores share each value
        x = (x * 3).round()
    elif kind == "few above":
        x = (x - 3.2).relu()
    elif kind == "ascending":
        x = torch.arange(F, device="cuda", dtype=torch.float32).expand(N, F) / 256
    return x.to(dtype)


def oracle(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    parts = [(p + 0.0).sort(dim=1, descending=True, stable=True) for p in scores.split(64)]
    return torch.cat([p.values[:, :k] for p in parts]), torch.cat([p.indices[:, :k] for p in parts]).int()


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def poisoned(N: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    nan = torch.full((N, k), torch.nan, dtype=dtype, device="cuda")
    return nan, torch.full((N, k), -1, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("kind", ["normal", "integers", "few above", "ascending"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_stable_sort_and_repeats_to_the_bit(shape: tuple, dtype: torch.dtype, kind: str) -> None:
    scores, k = scores_of(shape, dtype, kind), shape[2]
    want = oracle(scores, k)
    for _ in range(3):
        out = poisoned(shape[0], k, dtype)
        assert same(topk_select_fwd(scores, k, out=out), want)
    relu = topk_select_fwd(scores, k, relu=True)
    assert same(relu, (want[0].relu(), want[1]))


@pytest.mark.parametrize("threads", [256, 1024])
def test_every_launch_shape(threads: int) -> None:
    for dtype in DTYPES:
        scores = scores_of((40, 70001, 0), dtype, "integers")
        got = topk_select_fwd(scores, 77, config=LaunchConfig(threads=threads))
        assert same(got, oracle(scores, 77))


def test_nan_and_infinity() -> None:
    scores = scores_of((64, 40000, 50), torch.bfloat16, "normal")
    scores[3, 39999], scores[5, 0], scores[7] = torch.nan, torch.nan, torch.nan
    scores[9, ::3], scores[11] = torch.inf, -torch.inf
    values, indices = topk_select_fwd(scores, 50)
    broken = torch.tensor([3, 5, 7], device="cuda")
    assert bool(values[broken].isnan().all()) and indices[broken].tolist() == [list(range(50))] * 3
    whole = torch.tensor([n for n in range(64) if n not in (3, 5, 7)], device="cuda")
    assert same((values[whole], indices[whole]), oracle(scores[whole], 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_rows(dtype: torch.dtype) -> None:
    base = scores_of((65, 9001, 0), dtype, "integers").flatten()
    for offset in range(9):
        rows = base[offset:].as_strided((60, 8000), (9001 + offset % 2, 1), offset)
        assert same(topk_select_fwd(rows, 64), oracle(rows.contiguous(), 64))
    columns = base[: 200 * 300].view(200, 300).t()
    assert same(topk_select_fwd(columns, 64), oracle(columns.contiguous(), 64))


def test_column_blocks_merge_into_the_result_of_the_whole() -> None:
    scores = scores_of((100, 40000, 100), torch.bfloat16, "integers")
    out = poisoned(100, 100, torch.bfloat16)
    for start in range(0, 40000, 8191):
        block = scores[:, start : start + 8191]
        topk_select_fwd(block, 100, out=out, first_column=start, merge=start > 0)
    assert same(out, oracle(scores, 100))


def test_more_than_two_to_the_31_scores() -> None:
    N, F = 70_000, 32_768  # 2.3e9 scores
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    scores = torch.zeros(N, F, dtype=torch.bfloat16, device="cuda")
    scores[-1, [5, 32767]] = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, device="cuda")
    values, indices = topk_select_fwd(scores, 3)
    assert values[-1].tolist() == [2.0, 1.0, 0.0] and indices[-1].tolist() == [32767, 5, 0]
    assert bool((indices[:-1] == torch.arange(3, device="cuda")).all()) and bool((values[:-1] == 0).all())


def test_never_waits_and_replays_in_a_cuda_graph() -> None:
    scores = scores_of((333, 5003, 37), torch.bfloat16, "normal")
    out = poisoned(333, 37, torch.bfloat16)
    topk_select_fwd(scores, 37, out=out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk_select_fwd(scores, 37)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        topk_select_fwd(scores, 37, out=out)
    scores.neg_()
    graph.replay()
    assert same(out, oracle(scores, 37))


def test_memory(implementation: str) -> None:
    """The CUDA kernel allocates the result and nothing else; the fallback's lists do not grow with N or F."""
    N, k = 4096, 100
    scores = scores_of((N, 8192, k), torch.bfloat16, "normal")
    topk_select_fwd(scores, k)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # Bytes asked for: what the allocator hands out depends on the blocks that earlier tests left behind.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = topk_select_fwd(scores, k)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    size = sum(t.numel() * t.element_size() for t in result)
    assert peak <= size + (0 if implementation == "cuda" else 2048 * 513 * 8)


def test_the_operator_calls_the_kernel_with_gradients() -> None:
    scores = scores_of((8, 3000, 20), torch.float32, "normal").requires_grad_()
    values, indices = qscope.ops.topk_select(scores, 20)
    assert same((values.detach(), indices), oracle(scores.detach(), 20))
    values.sum().backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores).scatter(1, indices.long(), 1.0))
    with pytest.raises(ValueError, match="k=300 on cuda:0; a GPU takes k <= 256"):
        qscope.ops.topk_select(scores.detach(), 300)
