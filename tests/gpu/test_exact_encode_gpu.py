"""The certified encoder on a GPU at real widths: float64 scores to the bit, the CPU operator, memory, graphs, and the
assumption about tensor cores that its proof rests on."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="qscope_kernels is tested where Triton is installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets the kernels"),
]

from qscope_kernels import cuda_library  # noqa: E402
from qscope_kernels.exact_encode import (  # noqa: E402
    ExactPlan,
    accumulation,
    exact_encode_fwd,
    exact_plan,
    exact_topk_encode_fwd,
    prepare_encoder,
    typical_mean,
)
from qscope_kernels.matmul import fixed_matmul  # noqa: E402

from qscope.ops import topk_encode  # noqa: E402

# (N, D, F, k): the four Qwen-Scope shapes on fewer tokens, and one where nothing divides.
SHAPES = [
    (600, 2048, 32768, 50),
    (600, 4096, 65536, 100),
    (300, 5120, 81920, 100),
    (300, 2048, 131072, 50),
    (333, 1531, 5003, 37),
]
SLACK = 1 << 20  # what allocations are rounded up by, and the temporary of a cumulative sum


@pytest.fixture(autouse=True)
def needs_library() -> None:
    if cuda_library.load() is None:
        pytest.skip(f"no CUDA library: {cuda_library.problem()}")


def all_scores(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """[N, F] float32 of few rows: 16 float64 chains and a halving tree; products of float32 are exact in float64."""
    pad = -x.shape[1] % 16
    x, W = (torch.nn.functional.pad(t, (0, pad)).unflatten(1, (-1, 16)) for t in (x, W))
    acc = torch.zeros(x.shape[0], W.shape[0], 16, dtype=torch.float64, device=x.device)
    for i in range(x.shape[1]):
        acc.addcmul_(x[:, None, i].double(), W[None, :, i].double())
    for half in (8, 4, 2, 1):
        acc = acc[..., :half] + acc[..., half:]
    return (acc[..., 0] + (0.0 if b is None else b.double())).float()


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    full = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    nan = scores.isnan().any(1, keepdim=True)
    values = torch.where(nan, torch.nan, full.values[:, :k].relu())
    return values, torch.where(nan, torch.arange(k, device=scores.device), full.indices[:, :k]).int()


def same(got: tuple, want: tuple) -> bool:
    return torch.equal(got[0].view(torch.int32), want[0].view(torch.int32)) and torch.equal(got[1], want[1])


def sae_like(N: int, D: int, F: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a common mean, four outlier dimensions, and a sink of a thousand times the norm."""
    gen = torch.Generator("cuda").manual_seed(seed)
    x, W, b = (torch.randn(s, generator=gen, device="cuda") for s in ((N, D), (F, D), (F,)))
    x += 2 * torch.randn(D, generator=gen, device="cuda")
    x[:, :4] += 50
    x[0] *= 1000
    return x, W / D**0.5, b * 0.1


def few(N: int) -> Tensor:
    return torch.tensor([0, 1, N // 2, N - 1], device="cuda")


@pytest.mark.parametrize("weights", ["fp32", "bf16x2", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_scores_to_the_bit(shape: tuple, weights: str) -> None:
    N, D, F, k = shape
    x, W, b = sae_like(N, D, F)
    high = W.bfloat16()
    meant = {"fp32": W, "bf16x2": high.double() + (W - high.float()).bfloat16().double(), "bf16": high}[weights]
    prepared = prepare_encoder(W, b, typical_mean(x), weights)
    values, indices, certificate = exact_encode_fwd(x, prepared, k, return_certificate=True)
    rows = few(N)
    for part in rows.split(1):
        scores = all_scores(x[part], meant, b)
        assert same((values[part], indices[part]), best(scores, k))
        count, margin = int(certificate.candidates[part]), float(certificate.margin[part])
        ordered = scores.double().sort(dim=1, descending=True).values[0]
        assert k <= count <= F
        assert margin == float("inf") if count == F else 0 <= margin <= float(ordered[k - 1] - ordered[count])
    ordinary = certificate.candidates[1:]
    assert int((ordinary == F).sum()) == 0 and float(ordinary.float().mean()) < 10 * k
    again = exact_encode_fwd(x, prepared, k, return_certificate=True)
    assert same(again, (values, indices))
    assert all(torch.equal(a, b) for a, b in zip(again[2], certificate, strict=True))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_the_cpu_operator(x_dtype: torch.dtype) -> None:
    x, W, b = sae_like(70, 512, 8192, 1)
    x[0] /= 100  # float16 ends at 65504
    x = x.to(x_dtype)
    for weights in (W, W.bfloat16()):
        got = topk_encode(x, weights, b, 64, "exact")
        want = topk_encode(x.cpu(), weights.cpu(), b.cpu(), 64, "exact")
        assert same([t.cpu() for t in got], want)


def test_every_cut_gives_the_same_bits() -> None:
    x, W, b = sae_like(1200, 512, 20003, 2)
    want = exact_topk_encode_fwd(x, W, b, 40)
    prepared = prepare_encoder(W, b, None)
    for plan in (ExactPlan(1200, 1200, 20004), ExactPlan(500, 128, 4096), ExactPlan(1024, 1000, 64 * 101, 3)):
        assert same(exact_encode_fwd(x, prepared, 40, plan=plan), want)
    for n in (1, 2, 3, 17):
        assert same(exact_topk_encode_fwd(x[:n], W, b, 40), (want[0][:n], want[1][:n]))


def test_integers_nan_infinity_and_rows_that_overflow() -> None:
    gen = torch.Generator("cuda").manual_seed(0)
    x, W, b = (torch.randint(-2, 3, s, generator=gen, device="cuda").float() for s in ((300, 56), (9001, 56), (9001,)))
    x[3], x[100, 20], x[200, 5], x[299, 5] = torch.nan, torch.nan, torch.inf, -torch.inf
    x[7] = 0
    x[8] *= 1e38
    scores = all_scores(x, W, b)
    for k in (1, 50, 256):
        values, indices, certificate = exact_topk_encode_fwd(x, W, b, k, return_certificate=True)
        assert same((values, indices), best(scores, k))
        assert bool((certificate.candidates[[3, 8, 100, 200, 299]] == 9001).all())
        assert certificate.margin[3].isnan()
    b[:] = 0.5
    got = exact_topk_encode_fwd(x * 0, W, b, 33, return_certificate=True)  # every finite row overflows
    assert same(got, best(all_scores(x * 0, W, b), 33)) and bool((got[2].candidates == 9001).all())


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_adversarial_near_ties(gap: float) -> None:
    gen = torch.Generator("cuda").manual_seed(4)
    x = torch.randn(64, 1024, generator=gen, device="cuda")
    W = torch.randn(1, 1024, generator=gen, device="cuda") / 32
    W = W + gap * torch.randn(16384, 1024, generator=gen, device="cuda")
    for part in torch.arange(64, device="cuda").split(4):
        got = exact_topk_encode_fwd(x[part], W, None, 50)
        assert same(got, best(all_scores(x[part], W, None), 50))


def test_a_weakened_bound_misses() -> None:
    gen = torch.Generator("cuda").manual_seed(4)
    x = torch.randn(64, 1024, generator=gen, device="cuda")
    W = torch.randn(1, 1024, generator=gen, device="cuda") / 32
    W = W + 1e-2 * torch.randn(4096, 1024, generator=gen, device="cuda")
    want = best(all_scores(x, W, None), 50)
    for scale, right in ((1.0, True), (0.001, False)):
        prepared = prepare_encoder(W, None, None, bound_scale=scale)
        assert same(exact_encode_fwd(x, prepared, 50, bound_scale=scale), want) == right


@pytest.mark.parametrize("side", ["x", "W"])
def test_the_bound_is_needed_in_full(side: str) -> None:
    """Every element of one operand loses nearly half a unit in the same direction: Cauchy-Schwarz is an equality. A
    feature without weights has a score between the pass's and the true one: nine tenths of the bound miss."""
    D, lossy = 256, 1 + 0.495 * 2.0**-7
    x = torch.full((4, D), lossy if side == "x" else 1.0, device="cuda")
    W, b = torch.zeros(70, D, device="cuda"), torch.full((70,), -1.0, device="cuda")
    W[40] = lossy if side == "W" else 1.0
    b[40], b[3] = 0, D * (1 + 0.48 * 2.0**-7)
    want = best(all_scores(x, W, b), 1)
    assert (want[1] == 40).all()
    for scale, right in ((1.0, True), (0.9, False)):
        prepared = prepare_encoder(W, b, None, bound_scale=scale)
        assert same(exact_encode_fwd(x, prepared, 1, bound_scale=scale), want) == right


def tensor_core_error(q: Tensor, W: Tensor) -> float:
    """The largest error of the pass's product, as a part of |q| |v|."""
    out = torch.empty(q.shape[0], W.shape[0], device="cuda")
    with fixed_matmul():
        torch.mm(q, W.t(), out_dtype=torch.float32, out=out)
    size = q.double().norm(dim=1)[:, None] * W.double().norm(dim=1)[None]
    return float(((out.double() - q.double() @ W.double().T).abs() / size).max())


@pytest.mark.parametrize("D", [2048, 4096, 5120])
def test_the_assumption_about_tensor_cores_holds(D: int) -> None:
    """Random, parallel and adversarial operands: a large first product, then many that an adder without extra bits
    would cut off. Printed, because it says how much of the assumption is used."""
    gen = torch.Generator("cuda").manual_seed(D)
    gamma = accumulation(torch.device("cuda"), D)
    q = torch.randn(256, D, generator=gen, device="cuda").bfloat16()
    cases = {"random": (q, torch.randn(512, D, generator=gen, device="cuda").bfloat16()), "parallel": (q, q)}
    for bits in (20, 22, 23, 24, 25, 26):
        small = torch.full((128, D), 2.0 ** -(bits / 2), device="cuda")
        small *= 1 + torch.rand(128, D, generator=gen, device="cuda")
        small[:, 0] = 1
        cases[f"2^-{bits} behind 1"] = (small.bfloat16(), small.bfloat16())
    for name, operands in cases.items():
        error = tensor_core_error(*operands)
        print(f"D={D} {name}: error {error:.3g} of |q||v|, {gamma:.3g} assumed")
        assert error <= gamma, name


def peak(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("F", [32768, 1 << 20])
def test_memory_is_the_results_and_the_workspace(F: int) -> None:
    N, D, k = 5000, 64, 50
    gen = torch.Generator("cuda").manual_seed(1)
    x, W, b = (torch.randn(s, generator=gen, device="cuda") for s in ((N, D), (F, D), (F,)))
    prepared = prepare_encoder(W, b, typical_mean(x))
    for workspace in (64 << 20, 300 << 20):
        used = peak(lambda size=workspace: exact_encode_fwd(x, prepared, k, workspace_bytes=size))
        assert used <= workspace + 8 * N * k + 4 * (F + 1) + SLACK, f"{used} bytes"
    assert (exact_plan(N, F, k, D, 64 << 20).columns < F) == (F > 32768)
    got = exact_encode_fwd(x, prepared, k, workspace_bytes=64 << 20)
    rows = few(N)
    assert same((got[0][rows], got[1][rows]), best(all_scores(x[rows], W, b), k))


def test_nothing_waits_and_a_graph_replays() -> None:
    x, W, b = sae_like(700, 1024, 16384, 5)
    topk_encode(x, W, b, 50, "exact")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk_encode(x, W, b, 50, "exact")
        topk_encode(x[:2], W, b, 50, "exact")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = topk_encode(x, W, b, 50, "exact")
    for change in (1.0, -0.5, 0.0):  # the last makes every row overflow
        x.mul_(change)
        captured[0].fill_(torch.nan)
        graph.replay()
        assert same(captured, topk_encode(x, W, b, 50, "exact"))


def test_a_workspace_beyond_two_to_the_31_scores() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    N, D, F = 2200, 16, 1 << 20
    gen = torch.Generator("cuda").manual_seed(2)
    x, W, b = (torch.randn(s, generator=gen, device="cuda") for s in ((N, D), (F, D), (F,)))
    got = exact_encode_fwd(x, prepare_encoder(W, b, None), 30, plan=ExactPlan(N, N, F))
    rows = few(N)
    assert same((got[0][rows], got[1][rows]), best(all_scores(x[rows], W, b), 30))


def test_the_operator_compiles_and_its_gradient_is_that_of_the_selection() -> None:
    x, W, b = sae_like(50, 64, 4096, 6)
    got = topk_encode(x, W, b, 64, "exact")
    assert same(torch.compile(topk_encode, fullgraph=True)(x, W, b, 64, "exact"), got)
    torch.library.opcheck(torch.ops.qscope.topk_encode.default, (x, W, b, 64, "exact"))
    leaf = W.clone().requires_grad_()
    topk_encode(x, leaf, b, 64, "exact")[0].sum().backward()
    live = (got[0] > 0).double()
    dense = torch.zeros(50, 4096, dtype=torch.float64, device="cuda").scatter_(1, got[1].long(), live)
    want = dense.T @ x.double()
    size = dense.T @ x.double().abs()
    assert bool(((leaf.grad.double() - want).abs() <= 51 * 2.0**-24 * size).all())
