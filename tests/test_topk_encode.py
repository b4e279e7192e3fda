import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from qscope_kernels.matmul import fixed_matmul
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qscope import native, reference
from qscope.ops import topk_encode

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, D, F, k: odd sizes, one panel of 32 features and less, k = F, more rows than one block of 504
SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 33, 4),
    (13, 64, 100, 100),
    (3, 2500, 96, 5),
    (600, 33, 257, 9),
    (2, 16, 5000, 300),
]
needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: the reference promises no bits")


def integers(N, D, d_sae, dtype=torch.float32):
    """Small integers: every sum is exact in float32, and equal scores are frequent."""
    torch.manual_seed(0)
    x, W, b = (torch.randint(-3, 4, s).to(dtype) for s in ((N, D), (d_sae, D), (d_sae,)))
    return x, W, b


def normals(N, D, d_sae, dtype=torch.float32):
    torch.manual_seed(0)
    x, W, b = torch.randn(N, D), torch.randn(d_sae, D) / D**0.5, torch.randn(d_sae) * 0.1
    return x.to(dtype), W.to(dtype), b.to(dtype)


def assert_equal(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_matches_the_full_sort_on_integers(shape, dtype, bias):
    N, D, d_sae, k = shape
    x, W, b = integers(N, D, d_sae, dtype)
    scores = x.double() @ W.double().T + (b.double() if bias else 0.0)
    want = scores.sort(dim=1, descending=True, stable=True)
    values, indices = topk_encode(x, W, b if bias else None, k)
    assert values.dtype == torch.float32 and indices.dtype == torch.int32
    assert_equal((values, indices), (want.values[:, :k].clamp(min=0).float(), want.indices[:, :k].int()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_is_the_top_k_of_float32_scores(dtype):
    """Values agree with float64 within the error of a D-term float32 sum; no unchosen score lies above."""
    N, D, d_sae, k = 37, 300, 1000, 20
    x, W, b = normals(N, D, d_sae, dtype)
    scores = x.double() @ W.double().T + b.double()
    bound = D * 2.0**-24 * (x.double().abs() @ W.double().abs().T + b.double().abs()).max()
    values, indices = topk_encode(x, W, b, k)
    torch.testing.assert_close(values.double(), scores.gather(1, indices.long()).relu(), rtol=0, atol=bound.item())
    smallest = values[:, -1:].double()
    unchosen = scores.scatter(1, indices.long(), -torch.inf)
    assert (unchosen <= smallest + 2 * bound).all()


def test_relu_comes_after_the_selection():
    x, W, b = normals(6, 16, 64)
    values, indices = topk_encode(x, W, b - 1.5, 64)
    raw = F.linear(x, W, b - 1.5)
    assert (raw < 0).any() and (values >= 0).all() and not values.signbit().any()
    torch.testing.assert_close(values, raw.gather(1, indices.long()).relu())


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_nan_and_infinity(precision):
    x, W, b = normals(5, 16, 100)
    x[1, 3] = torch.nan
    x[2, 3] = torch.inf
    values, indices = topk_encode(x, W, b, 7, precision)
    assert values[1].isnan().all() and indices[1].tolist() == list(range(7))
    assert (values[2] == torch.inf).all()
    want = topk_encode(x[[0, 3, 4]], W, b, 7, precision)
    torch.testing.assert_close(values[[0, 3, 4]], want[0], rtol=1e-5, atol=1e-6)
    b[40] = torch.nan
    assert topk_encode(x, W, b, 7, precision)[0].isnan().all()


def test_all_zero_input_gives_the_first_features():
    values, indices = topk_encode(torch.zeros(3, 8), torch.randn(70, 8), None, 5)
    assert (values == 0).all() and indices.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_any_strides_and_no_rows():
    x, W, b = integers(40, 24, 90)
    want = topk_encode(x[::2], W, b, 6)
    assert_equal(topk_encode(x.T.contiguous().T[::2], W.T.contiguous().T, b.repeat_interleave(2)[::2], 6), want)
    values, indices = topk_encode(x[:0], W, b, 6)
    assert values.shape == indices.shape == (0, 6)


@pytest.mark.parametrize("shape", [(3, 16, 50, 4), (9, 129, 300, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bf16_ranks_the_bf16_scores(shape, dtype):
    N, D, d_sae, k = shape
    x, W, b = normals(N, D, d_sae, dtype)
    scores = F.linear(x.bfloat16(), W.bfloat16(), b.bfloat16()).float()
    want = scores.sort(dim=1, descending=True, stable=True)
    values, indices = topk_encode(x, W, b, k, "bf16")
    assert_equal((values, indices), (want.values[:, :k].relu().bfloat16(), want.indices[:, :k].int()))


@needs_native
@pytest.mark.parametrize("D", [33, 2100])
def test_a_row_has_the_same_bits_in_any_batch(D):
    x, W, b = normals(530, D, 300)
    values, indices = topk_encode(x, W, b, 12)
    for rows in (slice(0, 1), slice(7, 9), slice(11, 24), slice(500, 530)):
        assert_equal(topk_encode(x[rows], W, b, 12), (values[rows], indices[rows]))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 31])
def test_every_instruction_set_gives_the_same_bits(rows, dtype, limit_isa):
    args = (*normals(rows, 77, 211, dtype), 13)
    results = []
    for isa in native.ISA_NAMES:
        limit_isa(isa)
        results.append(topk_encode(*args))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


@needs_native
def test_a_score_keeps_what_a_float32_product_loses():
    """(1 + e)^2 - 1 = 2e + e^2: scores are summed in float64; a product rounded to float32 would lose e^2."""
    e = 2.0**-12
    x = torch.tensor([[1.0, 1.0 + e]])
    W = torch.tensor([[-1.0, 1.0 + e]])
    assert topk_encode(x, W, None, 1)[0].item() == 2 * e + e * e


@needs_native
def test_same_bits_for_any_number_of_threads_and_every_run():
    args = (*normals(100, 64, 2000), 20)
    first = topk_encode(*args)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(4):
                assert_equal(topk_encode(*args), first)
    finally:
        torch.set_num_threads(before)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_iter(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_gradients_match_reference(precision, dtype):
    x, W, b = normals(11, 24, 90, dtype)
    grads = []
    for impl in (topk_encode, reference.topk_encode):
        leaves = [t.clone().requires_grad_() for t in (x, W, b)]
        values, _ = impl(*leaves, 30, precision)
        (values.float() * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    # Values that differ in the last bit do not change which entries are chosen here, so only sums are rounded
    # apart; autograd adds the reference's low-precision terms in that precision.
    half = dtype != torch.float32 or precision == "bf16"
    tolerance = dict(rtol=2e-2, atol=4e-2) if half else dict(rtol=1e-5, atol=1e-5)
    for got, want in zip(*grads, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance)


def test_reference_gradient_is_right():
    x, W, b = (t.double().requires_grad_() for t in normals(3, 5, 12))
    assert torch.autograd.gradcheck(lambda *a: reference.topk_encode(*a, 4)[0], (x, W, b))


def test_no_gradient_through_inactive_entries():
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    W = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]], requires_grad=True)
    values, indices = topk_encode(x, W, None, 3)
    values.sum().backward()
    assert values.tolist() == [[2.0, 0.0, 0.0]] and indices.tolist() == [[0, 1, 2]]
    assert x.grad.tolist() == [[2.0, 0.0]]
    assert W.grad.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("precision", ["exact", "bf16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_add_nothing_to_gradients(bad, precision):
    """NaN rows keep ids 0..k-1 and zero upstream would still be 0 * NaN in the weights' gradient."""
    x, W, b = normals(9, 16, 64)
    x[[2, 5], 3] = bad
    rest = [0, 1, 3, 4, 6, 7, 8]
    want = [x[rest].clone().requires_grad_(), *(t.clone().requires_grad_() for t in (W, b))]
    got = [t.clone().requires_grad_() for t in (x, W, b)]
    upstream = torch.randn(9, 50)
    upstream[[2, 5]] = torch.nan
    for leaves, grad in ((want, upstream[rest]), (got, upstream)):
        values, _ = topk_encode(*leaves, 50, precision)
        values.backward(grad.masked_fill(values == 0, torch.nan).to(values.dtype))
    assert (got[0].grad[[2, 5]] == 0).all()
    # A native row has the same bits in any batch; the reference's matrix product may differ in the last one.
    exact = native.mode() != "off" and precision == "exact"
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([got[0].grad[rest], got[1].grad, got[2].grad], [t.grad for t in want], **tolerance)


def test_gradient_of_x_is_not_rounded_to_the_dtype_of_the_weights(monkeypatch):
    x, W, _ = normals(6, 40, 64)
    W = W.bfloat16()
    monkeypatch.setattr("qscope.reference._workspace.WORKSPACE_BYTES", 64 * 4 * 7)  # blocks of 7 of the 40 columns
    x.requires_grad_()
    values, indices = topk_encode(x, W, None, 5)
    values.sum().backward()
    want = torch.einsum("nk,nkd->nd", (values > 0).double(), W[indices.long()].double())
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-6, atol=1e-6)  # five float32 additions


@pytest.mark.parametrize("given", ["tf32", "ieee", "none"])
def test_a_gpu_product_is_ieee_whatever_was_set(given):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = given
    try:
        with pytest.raises(KeyError), fixed_matmul():
            assert matmul.fp32_precision == ("none" if given == "none" else "ieee")  # torch's default is IEEE
            raise KeyError
        assert matmul.fp32_precision == given
    finally:
        matmul.fp32_precision = before


def test_the_older_tf32_switch_is_kept_too():
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    try:
        with fixed_matmul():
            assert matmul.fp32_precision == "ieee"
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"


def test_threads_do_not_restore_the_matmul_setting_under_each_other():
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    seen = []

    def work():
        for _ in range(50):
            with fixed_matmul():
                time.sleep(1e-5)
                seen.append(matmul.fp32_precision)

    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == ["ieee"] * 200 and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"


@needs_native
def test_training_step_makes_no_dense_tensor():
    N, D, d_sae, k = 64, 16, 4096, 32
    leaves = [t.requires_grad_() for t in normals(N, D, d_sae)]
    with LargestTensor() as largest:
        topk_encode(*leaves, k)[0].sum().backward()
    assert largest.numel == d_sae * D < min(N * d_sae, N * k * D * 4)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_workspace_does_not_grow_with_rows():
    code = """
import torch
from qscope.ops import topk_encode
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
W = torch.randn(16384, 8)
for precision in ("exact", "bf16"):
    topk_encode(torch.randn(700, 8), W, None, 32, precision)
before = peak()
for precision in ("exact", "bf16"):
    topk_encode(torch.randn(8000, 8), W, None, 32, precision)
print(peak() - before)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    # [8000, 16384] scores are 250 MiB in bf16 and 500 MiB in float32; one block of bf16 scores is 64 MiB
    assert int(done.stdout) < 100


def test_opcheck():
    x, W, b = (t.requires_grad_() for t in normals(5, 8, 40))
    for bias, precision in ((b, "exact"), (None, "bf16")):
        torch.library.opcheck(torch.ops.qscope.topk_encode.default, (x, W, bias, 3, precision))


def test_compiles_without_graph_break():
    x, W, b = normals(5, 8, 40)
    want = topk_encode(x, W, b, 3)
    compiled = torch.compile(lambda x, W, b: topk_encode(x, W, b, 3), fullgraph=True, backend="aot_eager")
    assert_equal(compiled(x, W, b), want)
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    compiled(*leaves)[0].sum().backward()
    eager = [t.clone().requires_grad_() for t in (x, W, b)]
    topk_encode(*eager, 3)[0].sum().backward()
    for a, e in zip(leaves, eager, strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(x=torch.zeros(3)), r"\[N, D\]"),
        (dict(x=torch.zeros(3, 5)), "share a letter"),
        (dict(x=torch.zeros(3, 4, dtype=torch.float64)), "float64"),
        (dict(W_enc=torch.zeros(9, 4, dtype=torch.int8)), "int8"),
        (dict(W_enc=torch.zeros(9, 4, dtype=torch.float8_e4m3fn)), "float8"),
        (dict(b_enc=torch.zeros(8)), r"b_enc \[F\]"),
        (dict(k=0), "1 <= k <= 9"),
        (dict(k=10), "1 <= k <= 9"),
        (dict(precision="fp8"), "'exact', 'bf16'"),
        (dict(b_enc=torch.zeros(9, device="meta")), "one device"),
    ],
)
def test_refuses(change, word):
    args = dict(x=torch.zeros(3, 4), W_enc=torch.zeros(9, 4), b_enc=torch.zeros(9), k=2, precision="exact")
    with pytest.raises(ValueError, match=word):
        topk_encode(**{**args, **change})
