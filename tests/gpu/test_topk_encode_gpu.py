"""The encoder on a GPU at real widths: bits of the matrix product, ties, memory, graphs, and the group design."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets the kernels"),
]

from qscope_kernels import cuda_library  # noqa: E402
from qscope_kernels.group_encode import GROUP, group_problem, group_scores  # noqa: E402
from qscope_kernels.topk_encode import DTYPES, EncodePlan, encode_plan, topk_encode_fwd  # noqa: E402

from qscope.ops import topk_encode  # noqa: E402

# (N, D, F, k): the four Qwen-Scope shapes on fewer tokens, and one where nothing divides.
SHAPES = [
    (600, 2048, 32768, 50),
    (600, 4096, 65536, 100),
    (300, 5120, 81920, 100),
    (300, 2048, 131072, 50),
    (333, 1531, 5003, 37),
]
SLACK = 1 << 20  # the cast bias


def normals(N: int, D: int, d_sae: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator("cuda").manual_seed(N + D)
    x, W, b = (torch.randn(s, generator=gen, device="cuda") for s in ((N, D), (d_sae, D), (d_sae,)))
    return x.to(dtype), (W / D**0.5).to(dtype), (b * 0.1).to(dtype)


def integers(N: int, D: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of -2..2, at most 60 of them per sum: every |score| <= 242 is exact in bfloat16, with massive ties."""
    assert D <= 60
    gen = torch.Generator("cuda").manual_seed(N + D)
    return tuple(  # type: ignore[return-value]
        torch.randint(-2, 3, s, generator=gen, device="cuda").bfloat16() for s in ((N, D), (d_sae, D), (d_sae,))
    )


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """relu(topk) of whole rows by a stable sort; a row with NaN is NaN."""
    full = (scores.float() + 0.0).sort(dim=1, descending=True, stable=True)
    nan = scores.isnan().any(1, keepdim=True)
    first = torch.arange(k, device=scores.device).expand(len(scores), k)
    values = torch.where(nan, torch.nan, full.values[:, :k].relu())
    return values.to(scores.dtype), torch.where(nan, first, full.indices[:, :k]).int()


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1], want[1])
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)


def needs_group(x: Tensor, W: Tensor, k: int) -> None:
    problem = group_problem(x, W, k)
    if problem:
        pytest.skip(f"the group design cannot run here: {problem}")


@pytest.fixture
def strict_matmul() -> Iterator[None]:
    """The settings under which F.linear gives the launcher's bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision
    matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision = False, "ieee"
    yield
    matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision = before


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_is_the_stable_sort_of_what_linear_gives(shape: tuple, bias: bool, strict_matmul: None) -> None:
    N, D, d_sae, k = shape
    x, W, b = normals(N, D, d_sae)
    plan = EncodePlan(256, d_sae)
    got = topk_encode_fwd(x, W, b if bias else None, k, config=plan, method="cublas")
    for rows in torch.arange(N, device="cuda").split(plan.rows):
        tile = x[rows[0] : rows[-1] + 1]
        want = best(F.linear(tile, W, b if bias else None), k)
        assert_same((got[0][rows], got[1][rows]), want)
    for _ in range(2):
        assert_same(topk_encode_fwd(x, W, b if bias else None, k, config=plan, method="cublas"), got)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
def test_exact_is_the_top_k_of_float32_scores(shape: tuple) -> None:
    N, D, d_sae, k = shape
    x, W, b = normals(N, D, d_sae, torch.float32)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        results = []
        for setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
            results.append(topk_encode(x, W, b, k, "exact"))
        torch.set_float32_matmul_precision("high")  # the older way to ask for TF32
        results.append(topk_encode(x, W, b, k, "exact"))
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    values, indices = results[0]
    for other in results[1:]:
        assert_same(other, results[0])
    scores = x.double() @ W.double().T + b.double()
    bound = (D + 1) * 2.0**-24 * (x.double().abs() @ W.double().abs().T + b.double().abs())
    error = (values.double() - scores.gather(1, indices.long()).relu()).abs()
    assert bool((error <= bound.gather(1, indices.long())).all())
    unchosen = (scores - bound).scatter(1, indices.long(), -torch.inf)
    assert bool((unchosen.amax(1) <= values[:, -1].double() + bound.amax(1)).all())


@pytest.mark.parametrize("plan", [None, EncodePlan(1000, 1000), EncodePlan(4096, 20480), EncodePlan(100, 64)], ids=str)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("size", [(1, 56, 40000), (8191, 60, 20011), (100, 33, 257), (7, 1, 300)], ids=str)
def test_ties_on_integers(size: tuple, precision: str, plan: EncodePlan | None) -> None:
    N, D, d_sae = size
    if plan == EncodePlan(100, 64) and N * d_sae > 10**7:
        pytest.skip("25,000 tiny launches would say nothing more")
    x, W, b = integers(N, D, d_sae)
    values, indices = topk_encode_fwd(x, W, b, 50, precision=precision, config=plan, method="cublas")
    for rows in torch.arange(N, device="cuda").split(1024):
        want = best((x[rows].double() @ W.double().T + b.double()).float(), 50)
        assert_same((values[rows].float(), indices[rows]), want)


@pytest.mark.parametrize("method", ["cublas", "group"])
def test_nan_infinity_and_no_rows(method: str) -> None:
    x, W, b = integers(300, 56, 4104)
    if method == "group":
        needs_group(x, W, 20)
    W[:, 5] = 0
    W[77, 5] = W[4103, 5] = 1
    x[3], x[100, 20], x[200, 5], x[299, 5] = torch.nan, torch.nan, torch.inf, -torch.inf
    values, indices = topk_encode_fwd(x, W, b, 20, method=method)
    clean = torch.ones(300, dtype=torch.bool, device="cuda")
    clean[[3, 100, 200, 299]] = False
    # inf times a zero weight is NaN: four rows of NaN.
    assert values[~clean].isnan().all() and indices[~clean].tolist() == [list(range(20))] * 4
    want = best((x[clean].double() @ W.double().T + b.double()).float(), 20)
    assert_same((values[clean].float(), indices[clean]), want)
    b[9], b[10] = torch.inf, -torch.inf
    values, indices = topk_encode_fwd(x[clean], W, b, 20, method=method)
    assert bool((values[:, 0] == torch.inf).all()) and bool((indices[:, 0] == 9).all())
    values, indices = topk_encode_fwd(x[:0], W, b, 20, method=method)
    assert values.shape == indices.shape == (0, 20)


@pytest.mark.parametrize("method", ["cublas", "group"])
def test_settings_of_the_caller_do_not_change_bits(method: str) -> None:
    x, W, b = normals(256, 4096, 8192)
    if method == "group":
        needs_group(x, W, 50)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    results = []
    try:
        for setting in (True, False):
            matmul.allow_bf16_reduced_precision_reduction = setting
            results.append(topk_encode_fwd(x, W, b, 50, method=method))
            assert matmul.allow_bf16_reduced_precision_reduction is setting
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    assert_same(*results)


def peak(call: Callable[[], object]) -> int:
    """Bytes asked for at the worst moment of a call, above what was there before it. What the allocator hands out can
    be a MiB more for each tensor, depending on the blocks that earlier tests left behind."""
    call()  # compiles, and cuBLAS allocates the workspace that it keeps
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    call()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def library_scratch(dtype: torch.dtype) -> int:
    """What a product with a bias allocates and gives back when its output exists already."""
    x, W, b = (torch.ones(s, dtype=dtype, device="cuda") for s in ((256, 1024), (2048, 1024), (2048,)))
    out = torch.empty(256, 2048, dtype=dtype, device="cuda")
    return peak(lambda: torch.addmm(b, x, W.t(), out=out))


def needs_library() -> None:
    if cuda_library.load() is None:
        pytest.skip(f"the Triton fallback of the select allocates lists of its own: {cuda_library.problem()}")


def result_bytes(N: int, k: int, precision: str) -> int:
    return N * k * (4 + (2 if precision == "bf16" else 4))


@pytest.fixture
def lean_memory() -> Iterator[None]:
    """Deterministic mode fills torch.empty, which does not change what is allocated, but the suite may switch it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_the_results_and_the_workspace(precision: str, dtype: torch.dtype, lean_memory: None) -> None:
    needs_library()
    N, k = 5000, 50
    x, W, b = normals(N, 1024, 32768, dtype)
    for workspace in (16 << 20, 100 << 20):
        used = peak(lambda size=workspace: topk_encode_fwd(x, W, b, k, precision=precision, workspace_bytes=size))
        fixed = result_bytes(N, k, precision) + library_scratch(
            torch.bfloat16 if precision == "bf16" else torch.float32
        )
        assert used <= workspace + fixed + SLACK, f"{used} bytes, {fixed} of them for results and cuBLAS"


def test_a_million_features_in_33_megabytes(lean_memory: None) -> None:
    needs_library()
    N, D, d_sae, k = 300, 60, 1 << 20, 100
    x, W, b = integers(N, D, d_sae)
    workspace = 33 << 20
    assert encode_plan(N, d_sae, k, D, 2, workspace).columns < d_sae
    used = peak(lambda: topk_encode_fwd(x, W, b, k, workspace_bytes=workspace))
    assert used <= workspace + result_bytes(N, k, "bf16") + library_scratch(torch.bfloat16) + SLACK, f"{used} bytes"
    got = topk_encode_fwd(x, W, b, k, workspace_bytes=workspace)
    for rows in torch.arange(N, device="cuda").split(64):
        scores = x[rows].double() @ W.double().T + b.double()
        assert_same((got[0][rows].float(), got[1][rows]), best(scores.float(), k))


@pytest.mark.parametrize("method", ["cublas", "group"])
def test_nothing_waits_and_a_graph_replays(method: str) -> None:
    x, W, b = normals(700, 1024, 16384)
    options = {"method": method, "workspace_bytes": 16 << 20}
    if method == "group":
        needs_group(x, W, 50)
    topk_encode_fwd(x, W, b, 50, **options)  # compiles; only later calls are held to it
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        topk_encode_fwd(x, W, b, 50, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = topk_encode_fwd(x, W, b, 50, **options)
    for scale in (1.0, -0.5):
        x.mul_(scale)
        captured[0].fill_(torch.nan)
        graph.replay()
        assert_same(captured, topk_encode_fwd(x, W, b, 50, **options))


def test_a_column_chunked_graph_replays() -> None:
    x, W, b = integers(200, 60, 50000)
    options = {"config": EncodePlan(128, 4096), "method": "cublas"}
    topk_encode_fwd(x, W, b, 50, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = topk_encode_fwd(x, W, b, 50, **options)
    x.neg_()
    graph.replay()
    want = best((x.double() @ W.double().T + b.double()).float(), 50)
    assert_same((captured[0].float(), captured[1]), want)


@pytest.mark.parametrize("k", [1, 50, 256])
@pytest.mark.parametrize("shape", [(300, 2048, 32768), (129, 4096, 65536), (50, 72, 5000), (40, 8, 264)], ids=str)
def test_group_product_and_select(shape: tuple[int, int, int], k: int) -> None:
    """Scores within a rounding of float64, maxima of the stored scores, top-k of the stored scores."""
    x, W, b = normals(*shape)
    needs_group(x, W, k)
    for bias in (b, None):
        scores, maxima = group_scores(x, W, bias)
        want = x.double() @ W.double().T + (0.0 if bias is None else bias.double())
        size = x.double().abs() @ W.double().abs().T + (0.0 if bias is None else bias.double().abs())
        error = (shape[1] + 1) * 2.0**-24 * size
        assert bool(((scores.double() - want).abs() <= error + (want.abs() + error) * 2.0**-8).all())
        padded = F.pad(scores.float(), (0, -shape[2] % GROUP), value=-torch.inf)
        assert torch.equal(maxima, padded.view(shape[0], -1, GROUP).amax(2).bfloat16())
        got = topk_encode_fwd(x, W, bias, k, method="group")
        assert_same(got, best(scores, k))
        assert_same(topk_encode_fwd(x, W, bias, k, method="group"), got)


@pytest.mark.parametrize("size", [(1, 56, 40000), (8191, 56, 8200), (100, 40, 256), (130, 56, 393216)], ids=str)
def test_group_design_on_integers(size: tuple[int, int, int]) -> None:
    x, W, b = integers(*size)
    needs_group(x, W, 100)
    got = topk_encode_fwd(x.float(), W, b, 100, method="group")  # a cast x takes the same way
    for rows in torch.arange(size[0], device="cuda").split(1024):
        want = best((x[rows].double() @ W.double().T + b.double()).float(), 100)
        assert_same((got[0][rows].float(), got[1][rows]), want)
    assert_same(topk_encode_fwd(x, W, b, 100, method="cublas"), got)


def test_group_design_says_what_it_cannot_take() -> None:
    x, W, _ = integers(20, 56, 4096)
    for bad_x, bad_W in ((x[:, :50], W[:, :50]), (x, W[:4095])):
        with pytest.raises(ValueError, match="method='group'"):
            topk_encode_fwd(bad_x, bad_W, None, 20, method="group")
        assert_same(topk_encode_fwd(bad_x, bad_W, None, 20), topk_encode_fwd(bad_x, bad_W, None, 20, method="cublas"))


@pytest.mark.parametrize("method, N, d_sae", [("cublas", 2200, 1 << 20), ("group", 5700, 393216)])
def test_a_workspace_beyond_two_to_the_31_scores(method: str, N: int, d_sae: int) -> None:
    assert N * d_sae > 2**31
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x, W, b = integers(N, 16, d_sae)
    if method == "group":
        needs_group(x, W, 30)
    got = topk_encode_fwd(x, W, b, 30, config=EncodePlan(N, d_sae), method=method)
    for rows in ([0, 1], [N - 2, N - 1]):
        want = best((x[rows].double() @ W.double().T + b.double()).float(), 30)
        assert_same((got[0][rows].float(), got[1][rows]), want)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_operator(precision: str) -> None:
    x, W, b = integers(50, 56, 4096)
    want = best((x.double() @ W.double().T + b.double()).float(), 64)
    got = topk_encode(x, W, b, 64, precision)
    assert_same((got[0].float(), got[1]), want)
    compiled = torch.compile(topk_encode, fullgraph=True)(x, W, b, 64, precision)
    assert_same(compiled, got)
    torch.library.opcheck(torch.ops.qscope.topk_encode.default, (x, W, b, 64, precision))
    with pytest.raises(ValueError, match="k <= 256"):
        topk_encode(x, W, b, 257, precision)
    leaf = W.float().requires_grad_()
    topk_encode(x, leaf, b, 64, precision)[0].float().sum().backward()
    live = (got[0] > 0).float()
    dense = torch.zeros(50, 4096, device="cuda").scatter_(1, got[1].long(), live)
    torch.testing.assert_close(leaf.grad, dense.T @ x.float(), rtol=0, atol=0)  # sums of small integers
