"""The feature statistics on a GPU at real sizes, to the bit against the CPU: sorting, barriers, graphs, memory."""

import math
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

from qscope.ops import feature_stats_, fired_bitmap  # noqa: E402


def tables(F: int, G: int, M: int | None, device: str = "cuda") -> list:
    """count, total, total_sq, peak, top_values, top_tokens."""
    sums = torch.zeros(2, G, F, dtype=torch.float64, device=device)
    t = [torch.zeros(G, F, dtype=torch.int64, device=device), sums[0], sums[1], torch.zeros(G, F, device=device)]
    if M is None:
        return [*t, None, None]
    return [*t, torch.full((F, M), -math.inf, device=device), torch.full((F, M), -1, device=device)]


def codes(N: int, K: int, F: int, G: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Heavy and absent features, one that every token has, zeros, NaN rows; bfloat16 values tie often."""
    gen = torch.Generator("cuda").manual_seed(seed)
    acts = torch.rand(N, K, generator=gen, device="cuda")
    acts[acts < 0.1] = 0.0
    acts[3 % N] = math.nan
    indices = (torch.rand(N, K, generator=gen, device="cuda") ** 3 * F).int().clamp_(max=F - 1)
    indices[:, 0] = F // 2
    return acts.to(dtype), indices, torch.randint(-1, G, (N,), generator=gen, device="cuda", dtype=torch.int32)


def equal(a: list, b: list) -> bool:
    return all(x is y or (x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu())) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(8192, 50, 32768, 1, 16), (4096, 100, 65536, 1, 64), (1003, 37, 5003, 5, 7)], ids=str
)
def test_is_the_cpu_result_to_the_bit_and_repeats(shape: tuple, dtype: torch.dtype) -> None:
    N, K, F, G, M = shape
    runs, want = [tables(F, G, M) for _ in range(3)], tables(F, G, M, "cpu")
    for batch in range(3):
        acts, indices, groups = codes(N, K, F, G, batch, dtype)
        labels = groups if G > 1 else None
        first = (N, 2 * N, 0)[batch]
        for t in runs[:2]:
            feature_stats_(acts, indices, *t[:4], labels, *t[4:], first)
        for part in torch.arange(N, device="cuda").tensor_split(7):  # the same stream, cut otherwise
            piece = slice(int(part[0]), int(part[-1]) + 1)
            cut = None if labels is None else labels[piece]
            feature_stats_(acts[piece], indices[piece], *runs[2][:4], cut, *runs[2][4:], first + piece.start)
        labels = None if labels is None else labels.cpu()
        feature_stats_(acts.cpu(), indices.cpu(), *want[:4], labels, *want[4:], first)
    assert all(equal(t, want) for t in runs)
    assert int(want[0].max()) > N // 2 // G and torch.equal(fired_bitmap(runs[0][0]).cpu(), fired_bitmap(want[0]))


def test_no_wait_bounded_memory_and_new_tokens_in_a_graph() -> None:
    N, K, F, G, M = 8192, 100, 65536, 2, 32
    acts, indices, groups = codes(N, K, F, G, 0, torch.bfloat16)
    got, want, first = tables(F, G, M), tables(F, G, M), torch.tensor(0, device="cuda")

    def add(t: list) -> None:
        feature_stats_(acts, indices, *t[:4], groups, *t[4:], first)

    add(got), add(want)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        add(got)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert used <= 64 * N * K + 16 * G * F + (1 << 20), f"{used / N / K:.1f} bytes per entry"
    add(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(got)  # only recorded
    for batch in (1, 2):
        for now, new in zip((acts, indices, groups), codes(N, K, F, G, batch, torch.bfloat16), strict=True):
            now.copy_(new)
        first.fill_(batch * N)
        graph.replay()
        add(want)
    assert equal(got, want)
    assert int(got[5].max()) > N


def test_indices_out_of_range_leave_the_context_alive() -> None:
    F, M = 1000, 8
    acts = torch.ones(512, 4, device="cuda")
    indices = torch.tensor([-1, F, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda").expand(512, 4)
    t = tables(F, 1, M)
    feature_stats_(acts, indices, *t[:4], None, *t[4:], 0)
    assert equal(t, tables(F, 1, M))
