"""The whole certified encode on CPU tensors: the CUDA kernels on the emulator, torch's float32 product as the pass.

Results are compared to the bit with float64 sums in the kernels' order; a certificate with what float64 says is true.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="qscope_kernels is tested where Triton is installed")
from qscope_kernels import exact_encode
from qscope_kernels.exact_encode import (
    CAPACITY,
    ExactPlan,
    available,
    exact_encode_fwd,
    exact_plan,
    exact_topk_encode_fwd,
    from_packed,
    packed_tensors,
    prepare_encoder,
    typical_mean,
)

from qscope.ops import topk_encode

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FLAGS = ["-O1", "-std=c++17", "-DQSCOPE_EMULATED", "-shared", "-fPIC", "-x", "c++"]
INF, NAN = torch.inf, torch.nan


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the emulated kernels")
    out = tmp_path_factory.mktemp("exact") / "kernels.so"
    sources = [str(CUDA / name) for name in ("certify.cu", "rescore.cu")]
    done = subprocess.run(["g++", *FLAGS, *sources, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return ctypes.CDLL(str(out))


@pytest.fixture(autouse=True)
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    def check(status: int, name: str) -> None:
        assert status == 0, name

    monkeypatch.setattr(exact_encode.cuda_library, "load", lambda: library)
    monkeypatch.setattr(exact_encode.cuda_library, "stream", lambda tensor: None)
    monkeypatch.setattr(exact_encode.cuda_library, "check", check)
    library.emulator_seed(ctypes.c_uint(1))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN: what is not written is seen
    yield library
    torch.use_deterministic_algorithms(before)


def all_scores(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """[N, F] float32: 16 float64 chains and a halving tree. Products of float32 are exact in float64, so that a fused
    multiply-add and a product with an addition agree."""
    pad = -x.shape[1] % 16
    x, W = (torch.nn.functional.pad(t.double(), (0, pad)).unflatten(1, (-1, 16)) for t in (x, W))
    acc = torch.zeros(x.shape[0], W.shape[0], 16, dtype=torch.float64)
    for i in range(x.shape[1]):
        acc += x[:, None, i] * W[None, :, i]
    for half in (8, 4, 2, 1):
        acc = acc[..., :half] + acc[..., half:]
    return (acc[..., 0] + (0.0 if b is None else b.double())).float()


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    full = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    nan = scores.isnan().any(1, keepdim=True)
    values = torch.where(nan, NAN, full.values[:, :k].relu())
    return values, torch.where(nan, torch.arange(k), full.indices[:, :k]).int()


def same(got: tuple[Tensor, ...], want: tuple[Tensor, Tensor]) -> bool:
    values, indices = got[:2]
    return torch.equal(values.view(torch.int32), want[0].view(torch.int32)) and torch.equal(indices, want[1])


def sae_like(N: int, D: int, F: int, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(s, generator=gen) for s in ((N, D), (F, D), (F,)))
    return x + offset * torch.randn(D, generator=gen), W / D**0.5, b * 0.1


def check_certificate(got: tuple, scores: Tensor, k: int) -> None:
    """At most `candidates` scores lie within `margin` of the k-th or above."""
    candidates, margin = got[2]
    F = scores.shape[1]
    ordered = scores.double().sort(dim=1, descending=True).values
    for n in range(len(scores)):
        if scores[n].isnan().any():
            assert margin[n].isnan()
            continue
        c = int(candidates[n])
        assert k <= c <= F and (margin[n] == INF) == (c == F)
        if c < F:
            assert 0 <= float(margin[n]) <= float(ordered[n, k - 1] - ordered[n, c])


PLANS = [None, ExactPlan(40, 7, 704, 3), ExactPlan(5, 5, 128, 3), ExactPlan(9, 4, 320, 2), ExactPlan(3, 1, 64, 1)]


@pytest.mark.parametrize(
    "weights, plan",
    [*(("fp32", plan) for plan in PLANS), *(("bf16x2", plan) for plan in PLANS[::3]), ("bf16", PLANS[1])],
    ids=str,
)
def test_equals_the_float64_scores_to_the_bit(weights: str, plan: ExactPlan | None) -> None:
    x, W, b = sae_like(11, 40, 701, offset=3.0)
    prepared = prepare_encoder(W, b, x.mean(0), weights)
    high = W.bfloat16()
    low = (W - high.float()).bfloat16()
    meant = {"fp32": W, "bf16x2": high.double() + low.double(), "bf16": high}[weights]
    scores = all_scores(x, meant, b)
    got = exact_encode_fwd(x, prepared, 20, plan=plan, return_certificate=True)
    assert same(got, best(scores, 20))
    check_certificate(got, scores, 20)
    assert int(got[2].candidates.max()) < 400  # the pass excludes something
    assert same(exact_encode_fwd(x, prepared, 20, plan=plan), best(scores, 20))
    assert torch.equal(prepared.high, high) and (prepared.low is None or torch.equal(prepared.low, low))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("W_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(x_dtype: torch.dtype, W_dtype: torch.dtype) -> None:
    x, W, b = sae_like(6, 33, 300, 1)
    x, W, b = x.to(x_dtype), W.to(W_dtype), b.to(W_dtype)
    want = best(all_scores(x, W, b), 9)
    wide = torch.zeros(6, 50, dtype=x_dtype)
    wide[:, 5:38] = x
    for rows in (x, wide[:, 5:38], x.T.contiguous().T):
        assert same(exact_topk_encode_fwd(rows, W.T.contiguous().T, b, 9), want)
    prepared = prepare_encoder(W, b, None)
    assert prepared.master is W and (prepared.high is W) == (W_dtype == torch.bfloat16)
    assert same(exact_encode_fwd(x, prepared, 9), want)


def test_the_bits_are_those_of_the_cpu_operator() -> None:
    x, W, b = sae_like(9, 200, 900, 11, offset=2.0)
    for x_dtype, W_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        given = x.to(x_dtype), W.to(W_dtype), b
        assert same(exact_topk_encode_fwd(*given, 40), topk_encode(*given, 40, "exact"))


def test_the_result_does_not_depend_on_the_batch_or_the_mean() -> None:
    x, W, b = sae_like(9, 50, 400, 2, offset=5.0)
    want = best(all_scores(x, W, b), 16)
    for mu in (None, x.mean(0), torch.full((50,), 1e4), x[3]):
        assert same(exact_encode_fwd(x, prepare_encoder(W, b, mu), 16), want)
    for n in (1, 2, 3):  # up to two rows are scored in full, without a pass
        got = exact_topk_encode_fwd(x[:n], W, b, 16, return_certificate=True)
        assert same(got, (want[0][:n], want[1][:n]))
        assert (got[2].candidates == 400).all() == (n <= 2)


def test_centring_makes_the_candidates_few() -> None:
    x, W, b = sae_like(8, 64, 600, 3)
    x[:, 7] += 300  # an outlier dimension that the weights hardly look at
    W[:, 7] *= 0.01
    counts = []
    for mu in (None, typical_mean(x)):
        got = exact_encode_fwd(x, prepare_encoder(W, b, mu), 10, return_certificate=True)
        assert same(got, best(all_scores(x, W, b), 10))
        counts.append(int(got[2].candidates.sum()))
    assert counts[1] * 4 < counts[0], counts


def test_typical_mean_leaves_out_sinks_and_what_is_not_finite() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    want = x[3:].mean(0)
    x[0], x[1, 2], x[2, 5] = 1e4, NAN, INF
    torch.testing.assert_close(typical_mean(x), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(typical_mean(x[:0]), torch.zeros(8)) and torch.equal(typical_mean(x[1:3]), torch.zeros(8))


@pytest.mark.parametrize("plan", [None, ExactPlan(9, 4, 256, 2)], ids=str)
def test_nan_infinity_and_numbers_out_of_range(plan: ExactPlan | None) -> None:
    x, W, b = sae_like(9, 20, 600, 4)
    W[:, 3] = 0
    W[70, 3], W[300, 3], W[599, 3] = 1, -1, 1
    x[:, 3] = 0
    x[1, 0], x[2, 3], x[3, 3] = NAN, INF, 3e38
    x[4] = 1e38 * x[4]
    x[5] = 0
    b[11], b[12], b[13] = INF, -INF, 3e38
    W[200] *= 1e38
    W[201] = 3e38
    for weights in (W, torch.where(torch.arange(600)[:, None] == 444, NAN, W)):
        scores = all_scores(x, weights, b)
        got = exact_encode_fwd(x, prepare_encoder(weights, b, None), 12, plan=plan, return_certificate=True)
        assert same(got, best(scores, 12))
        check_certificate(got, scores, 12)


def test_rows_that_overflow_are_scored_in_full() -> None:
    """Every score equal: more candidates than a list holds; and one row that is not like that."""
    F = CAPACITY + 300
    x, W, b = sae_like(4, 16, F, 5)
    x[1] = x[3] = 0
    b[:] = 0.25
    b[F - 1] = 0.5
    for columns in (F, 1024):
        got = exact_encode_fwd(
            x, prepare_encoder(W, b, None), 7, return_certificate=True, plan=ExactPlan(4, 3, -(-columns // 64) * 64, 5)
        )
        scores = all_scores(x, W, b)
        assert same(got, best(scores, 7))
        assert (got[2].candidates == F).tolist() == [False, True, False, True]
        check_certificate(got, scores, 7)


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-100, 2.0**-60, 2.0**50, 2.0**110])
def test_tiny_and_huge_scales(scale: float) -> None:
    x, W, b = sae_like(5, 24, 300, 6)
    b *= 0
    x *= scale
    scores = all_scores(x, W, b)
    assert same(exact_encode_fwd(x, prepare_encoder(W, b, None), 8), best(scores, 8))
    assert same(exact_encode_fwd(x, prepare_encoder(W, b, typical_mean(x)), 8), best(scores, 8))


def near_ties(D: int, F: int, gap: float) -> tuple[Tensor, Tensor]:
    """Weights that differ by less than bfloat16 sees: features of one score, spread by `gap`, to be told apart."""
    gen = torch.Generator().manual_seed(D)
    x = torch.randn(6, D, generator=gen)
    W = torch.randn(1, D, generator=gen) / D**0.5 + gap * torch.randn(F, D, generator=gen)
    return x, W


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-5, 1e-7])
def test_adversarial_near_ties(gap: float) -> None:
    x, W = near_ties(48, 500, gap)
    scores = all_scores(x, W, None)
    got = exact_topk_encode_fwd(x, W, None, 30, return_certificate=True)
    assert same(got, best(scores, 30))
    check_certificate(got, scores, 30)


def test_a_weakened_bound_misses() -> None:
    """The tests above would see a bound that is too small: with a hundredth of it, results are wrong."""
    x, W = near_ties(48, 500, 1e-2)
    want = best(all_scores(x, W, None), 30)
    for scale, right in ((1.0, True), (0.01, False)):
        prepared = prepare_encoder(W, None, None, bound_scale=scale)
        assert same(exact_encode_fwd(x, prepared, 30, bound_scale=scale), want) == right


@pytest.mark.parametrize("side", ["x", "W"])
def test_the_bound_is_needed_in_full(side: str) -> None:
    """Every element of one operand loses nearly half a unit in the same direction: Cauchy-Schwarz is an equality. A
    feature without weights has a score between the pass's and the true one: nine tenths of the bound miss."""
    D, lossy = 256, 1 + 0.495 * 2.0**-7
    x = torch.full((4, D), lossy if side == "x" else 1.0)
    W, b = torch.zeros(70, D), torch.full((70,), -1.0)
    W[40] = lossy if side == "W" else 1.0
    b[40], b[3] = 0, D * (1 + 0.48 * 2.0**-7)
    want = best(all_scores(x, W, b), 1)
    assert (want[1] == 40).all()
    for scale, right in ((1.0, True), (0.9, False)):
        prepared = prepare_encoder(W, b, None, bound_scale=scale)
        assert same(exact_encode_fwd(x, prepared, 1, bound_scale=scale), want) == right


def tensor_core(q: Tensor, W: Tensor, block: int, extra: int) -> Tensor:
    """The adder that certify_bounds.cuh assumes: terms cut below 23 + extra bits of the largest, the sum to 24 bits."""

    def cut(t: Tensor, largest: Tensor, bits: int) -> Tensor:
        unit = torch.exp2(torch.frexp(largest).exponent.double() - bits)
        return torch.trunc(t / unit) * unit

    pad = -q.shape[1] % block
    products = torch.nn.functional.pad(q.double()[:, None] * W.double()[None], (0, pad)).unflatten(2, (-1, block))
    total = torch.zeros(q.shape[0], W.shape[0], 1, dtype=torch.float64)
    for i in range(products.shape[2]):
        terms = torch.cat([total, products[:, :, i]], 2)
        added = cut(terms, terms.abs().amax(2, keepdim=True), 24 + extra).sum(2, keepdim=True)
        total = cut(added, added.abs(), 24)
    return total[..., 0]


@pytest.mark.parametrize("block, extra, step", [(8, 1, 2.0**-19), (16, 2, 2.0**-20)])
def test_the_assumed_loss_covers_such_an_adder(block: int, extra: int, step: float) -> None:
    D = 512
    gen = torch.Generator().manual_seed(8)
    gamma, worst = (D / 16 + 16) * step, 0.0
    for bits in range(18, 29):
        q = (2.0 ** -(bits / 2) * (1 + torch.rand(8, D, generator=gen))).bfloat16()
        q[:, 0] = 1
        for other in (q, -q, torch.randn(8, D, generator=gen).bfloat16()):
            got, want = tensor_core(q, other, block, extra), q.double() @ other.double().T
            size = q.double().norm(dim=1)[:, None] * other.double().norm(dim=1)[None]
            worst = max(worst, float(((got - want).abs() / size).max()))
    assert gamma / 16 < worst <= gamma, worst / gamma


def test_exact_on_such_an_adder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_encode, "_product", lambda q, W, out: out.copy_(tensor_core(q, W, 8, 1)))
    x, W, b = sae_like(6, 200, 300, 9, offset=2.0)
    assert same(exact_topk_encode_fwd(x, W, b, 20), best(all_scores(x, W, b), 20))
    x, W = near_ties(200, 300, 1e-4)
    assert same(exact_topk_encode_fwd(x, W, None, 20), best(all_scores(x, W, None), 20))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_anything(emulated: ctypes.CDLL, data: st.DataObject) -> None:
    N, D, F = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 40)), data.draw(st.integers(1, 300))
    k = data.draw(st.integers(1, min(F, 256)))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    emulated.emulator_seed(ctypes.c_uint(data.draw(st.integers(0, 999))))
    x, W, b = (torch.randn(s, generator=gen) for s in ((N, D), (F, D), (F,)))
    for t in (x, W, b):
        kind = data.draw(st.sampled_from(["normal", "integers", "heavy", "mixed scales", "special"]))
        if kind == "integers":
            t.round_()
        elif kind == "heavy":
            t.pow_(5)
        elif kind == "mixed scales":
            t.mul_(torch.exp2(torch.randint(-60, 60, t.shape, generator=gen).float()))
        elif kind == "special" and t.numel():
            place = torch.randint(t.numel(), (2,), generator=gen)
            t.view(-1)[place] = torch.tensor(data.draw(st.sampled_from([[NAN, 0.0], [INF, -INF], [3e38, 1e-44]])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x, W = x.to(dtype), W.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    columns = data.draw(st.sampled_from([-(-F // 4) * 4, 64, 128]))
    plan = ExactPlan(data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)), max(columns, -(-k // 64) * 64), 2)
    bias = b if data.draw(st.booleans()) else None
    mu = data.draw(st.sampled_from([None, typical_mean(x)]))
    got = exact_encode_fwd(x, prepare_encoder(W, bias, mu), k, plan=plan, return_certificate=True)
    scores = all_scores(x, W, bias)
    assert same(got, best(scores, k))
    check_certificate(got, scores, k)


def test_a_plan_stays_within_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[int] = []
    empty = torch.empty

    def counted(*args: object, **options: object) -> Tensor:
        tensor = empty(*args, **options)
        allocated.append(tensor.numel() * tensor.element_size())
        return tensor

    x, W, b = sae_like(20, 24, 301, 7)
    prepared = prepare_encoder(W, b, None)
    want = best(all_scores(x, W, b), 9)
    monkeypatch.setattr(torch, "empty", counted)
    for workspace in (90_000, 200_000, 1 << 29):
        allocated.clear()
        assert same(exact_encode_fwd(x, prepared, 9, workspace_bytes=workspace), want)
        assert 0 < sum(allocated) + 4 * 302 <= workspace  # the cumulative sum may need a copy of its input
    with pytest.raises(ValueError, match="workspace_bytes=20000"):
        exact_encode_fwd(x, prepared, 9, workspace_bytes=20_000)


def test_plans_of_the_qwen_scope_shapes() -> None:
    default = exact_encode.DEFAULT_WORKSPACE_BYTES
    assert exact_plan(8192, 32768, 50, 2048, default) == ExactPlan(4096, 3072, 32768)
    assert exact_plan(8192, 65536, 100, 4096, default) == ExactPlan(2048, 1536, 65536)
    assert exact_plan(8192, 65536, 100, 4096, default, itemsize=2) == ExactPlan(4096, 1280, 65536)
    assert exact_plan(8192, 81920, 100, 5120, default).columns == 81920
    assert exact_plan(8192, 131072, 50, 2048, default).columns == 131072
    assert exact_plan(8192, 1 << 20, 100, 4096, default).columns < 1 << 20


def test_without_a_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = sae_like(5, 8, 300)
    assert not available(x)
    monkeypatch.setattr(exact_encode.cuda_library, "load", lambda: None)
    with pytest.raises(RuntimeError, match="CUDA kernel"):
        exact_topk_encode_fwd(x, W, b, 4)


def test_bad_input_is_refused() -> None:
    x, W, b = sae_like(5, 8, 300)
    prepared = prepare_encoder(W, b, None)
    for bad in (x[:, 1:], x.double(), x[0], x.to("meta")):
        with pytest.raises(ValueError, match="x \\[N, 8\\]"):
            exact_encode_fwd(bad, prepared, 4)
        with pytest.raises(ValueError, match="x \\[N, 8\\]"):
            exact_topk_encode_fwd(bad, W, b, 4)
    for k in (0, 257):
        with pytest.raises(ValueError, match="1 <= k <= 256"):
            exact_encode_fwd(x, prepared, k)
    for arguments in ((W.double(), b, None), (W, b[1:], None), (W, b, x[0].double()), (W, b.to("meta"), None)):
        with pytest.raises(ValueError, match="prepare_encoder takes"):
            prepare_encoder(*arguments)
    with pytest.raises(ValueError, match="multiple of 64"):
        exact_encode_fwd(x, prepared, 4, plan=ExactPlan(5, 5, 100))
    with pytest.raises(ValueError, match="weights='int8'"):
        prepare_encoder(W, b, None, "int8")


@pytest.mark.parametrize(
    "weights, dtype", [("fp32", torch.float32), ("bf16x2", torch.float32), ("fp32", torch.bfloat16)]
)
def test_packed_tensors_hold_all_of_a_prepared_encoder(weights: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(5)
    x, W, b = (
        torch.randn(9, 48, generator=g),
        torch.randn(200, 48, generator=g).to(dtype),
        torch.randn(200, generator=g),
    )
    mu = x.mean(0)
    prepared = prepare_encoder(W, b, mu, weights)
    tensors = packed_tensors(prepared, W)
    assert all(t.data_ptr() != W.data_ptr() for t in tensors if t.numel())  # an operator may not return its input
    again = from_packed(tensors[0] if weights == "bf16x2" else W, b, mu, tensors)
    got, want = (exact_encode_fwd(x, p, 7, return_certificate=True) for p in (again, prepared))
    torch.testing.assert_close([*got[:2], *got[2]], [*want[:2], *want[2]], rtol=0, atol=0)
