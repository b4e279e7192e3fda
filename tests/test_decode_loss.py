import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qscope import native, reference
from qscope.ops import decode_loss, sparse_decode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (5, 8, 200, 64), (3, 7, 257, 33), (9, 50, 96, 1000), (2, 5, 33, 3)]  # N, K, D, F
U32 = 2.0**-24
needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there are no native kernels")


def inputs(shape, dtype=torch.float32, index_dtype=torch.int32):
    N, K, D, F = shape
    torch.manual_seed(0)
    indices = torch.randint(0, F, (N, K), dtype=index_dtype)
    acts = torch.randn(N, K).clamp(min=-0.5)
    return acts.to(dtype), indices, torch.randn(F, D).to(dtype), torch.randn(D).to(dtype), torch.randn(N, D).to(dtype)


def composition(acts, indices, W, b, x):
    """float64, differentiable, nothing of ours: x_hat (not rounded), sq_err, total_variance, error."""
    r = torch.einsum("nk,nkd->nd", acts.double(), W.double()[indices.long()])
    r = r if b is None else r + b.double()
    return r, (r - x.double()).square().sum(1), (x.double() - x.double().mean(0)).square().sum(), r - x.double()


def below(got, want, bound):
    assert bool(((got.double() - want).abs() <= bound).all()), ((got.double() - want).abs() - bound).max()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", [torch.ops.qscope.decode_loss, reference.decode_loss], ids=["op", "reference"])
def test_matches_float64(impl, shape, dtype, index_dtype):
    """Bounds of float32 sums in any order: (terms + 1) u times the sum of absolute terms, u = 2^-24."""
    acts, indices, W, b, x = inputs(shape, dtype, index_dtype)
    _, K, D, _ = shape
    for bias in (None, b):
        x_hat, sq_err, variance, error, act_grads = impl(acts, indices, W, bias, x)
        r, want_sq, want_variance, _ = composition(acts, indices, W, bias, x)
        rows = W.double()[indices.long()]
        shift = 0.0 if bias is None else bias.double().abs()
        off_r = (K + 2) * U32 * ((acts.double().abs()[..., None] * rows.abs()).sum(1) + shift)
        tiny = 2.0**-25 if dtype == torch.float16 else 0.0
        half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        below(x_hat, r, off_r + half * (r.abs() + off_r) + tiny)
        e = r - x.double()
        off_e = off_r + U32 * (e.abs() + off_r)
        below(error, e, off_e)
        size = e.abs() + off_e
        below(sq_err, want_sq, (2 * e.abs() * off_e + off_e**2 + (D + 1) * U32 * size**2).sum(1))
        dots, off_dots = (e[:, None] * rows).sum(-1), ((off_e + (D + 1) * U32 * size)[:, None] * rows.abs()).sum(-1)
        below(act_grads, 2 * dots, 2 * off_dots)
        below(variance, want_variance, U32 * want_variance * 1.001)  # float64 inside, rounded once
        assert x_hat.dtype == dtype and error.dtype == sq_err.dtype == variance.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reconstruction_has_the_bits_of_sparse_decode(dtype, monkeypatch):
    acts, indices, W, b, x = inputs((9, 50, 300, 1000), dtype)
    for bias in (None, b):
        want = sparse_decode(acts, indices, W, bias)
        torch.testing.assert_close(decode_loss(acts, indices, W, bias, x).x_hat, want, rtol=0, atol=0)
    # Weights of 16 bits are decoded a block of columns at a time: here 7 columns, the last block short.
    rows = indices.unique().numel()
    monkeypatch.setattr(reference._workspace, "WORKSPACE_BYTES", rows * 4 * 7)
    torch.testing.assert_close(decode_loss(acts, indices, W, b, x).x_hat, want, rtol=0, atol=0)


def test_fvu_is_one_for_the_mean_and_zero_for_x_itself():
    x = torch.randn(40, 30) + 3
    acts, indices = torch.ones(40, 1), torch.arange(40, dtype=torch.int32)[:, None]
    perfect = decode_loss(acts, indices, x, None, x)
    assert perfect.sq_err.sum() == 0
    mean = decode_loss(0 * acts, indices, x, x.mean(0), x)
    torch.testing.assert_close(mean.sq_err.sum() / mean.total_variance, torch.tensor(1.0), rtol=1e-6, atol=0)


OUTPUTS = ["x_hat", "sq_err", "total_variance", "error"]
SUBSETS = [s for n in (1, 2, 3, 4) for s in itertools.combinations(range(4), n)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("used", SUBSETS, ids=lambda used: "+".join(OUTPUTS[i] for i in used))
def test_gradients_from_every_combination_of_outputs(used, bias):
    """A gradient that arrives at any output reaches every input it depends on; the others get none."""
    acts, indices, W, b, x = inputs((6, 8, 33, 20))
    weights = torch.randn(6, 33), torch.randn(6), torch.tensor(0.7), torch.randn(6, 33)

    def gradients(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (acts, W, x, *([b] if bias else []))]
        out = impl(leaves[0], indices, leaves[1], leaves[3] if bias else None, leaves[2])
        loss = sum((out[i] * weights[i]).sum() for i in used)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    got, want = gradients(decode_loss, torch.float32), gradients(composition, torch.float64)
    for ours, exact in zip(got, want, strict=True):
        if exact is None:
            assert ours is None or bool((ours == 0).all())
        else:
            # Sums of at most 8 + 33 float32 terms, three of them in a row: about 100 u of the largest terms.
            scale = 100 * U32 * (exact.abs().max() + 30)
            below(ours, exact, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_once_to_the_dtype_of_their_input(dtype):
    acts, indices, W, b, x = inputs((6, 8, 33, 20), dtype)

    def gradients(impl, convert):
        leaves = [convert(t).requires_grad_() for t in (acts, W, b, x)]
        out = impl(leaves[0], indices, *leaves[1:])
        return torch.autograd.grad(out[1].sum() + out[2], leaves)

    for ours, exact in zip(
        gradients(decode_loss, torch.clone), gradients(composition, torch.Tensor.double), strict=True
    ):
        assert ours.dtype == dtype
        below(ours, exact, exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 100 * U32 * (exact.abs().max() + 30))


def test_reference_gradient_is_right():
    acts, indices, W, b, x = (t.double() if t.is_floating_point() else t for t in inputs((3, 4, 5, 6)))
    leaves = [t.requires_grad_() for t in (acts, W, b, x)]

    def outputs(a, W, b, x):
        return reference.decode_loss(a, indices, W, b, x)

    assert torch.autograd.gradcheck(outputs, leaves)


def test_gradients_of_sums_and_of_tokens_whose_loss_is_left_out():
    """sum() hands the backward pass a tensor of stride 0; a token with weight 0 adds exactly nothing."""
    acts, indices, W, b, x = inputs((6, 3, 10, 12))
    acts.requires_grad_()
    grad = torch.autograd.grad(decode_loss(acts, indices, W, b, x).sq_err.sum(), acts)[0]
    torch.testing.assert_close(grad, torch.ops.qscope.decode_loss(acts, indices, W, b, x)[4], rtol=0, atol=0)
    keep = torch.tensor([1.0, 0, 1, 0, 0, 1])
    part = torch.autograd.grad((decode_loss(acts, indices, W, b, x).sq_err * keep).sum(), acts)[0]
    torch.testing.assert_close(part, grad * keep[:, None], rtol=0, atol=0)


def test_no_second_derivative_is_made_up():
    acts, indices, W, b, x = inputs((4, 3, 10, 12))
    acts.requires_grad_()
    assert not decode_loss(acts, indices, W, b, x).act_grads.requires_grad
    scale = torch.ones(4, requires_grad=True)
    loss = (decode_loss(acts, indices, W, b, x).sq_err * scale).sum()
    (grad,) = torch.autograd.grad(loss, acts, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


class Watch(TorchDispatchMode):
    """The largest tensor made, and how often each operator of ours ran."""

    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_iter(out) if isinstance(t, torch.Tensor))])
        self.calls += [str(func)] if "qscope" in str(func) else []
        return out


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_all_gathered_rows_and_no_second_gather_for_the_loss(dtype):
    N, K, D, F = 64, 32, 48, 1000
    acts, indices, W, b, x = inputs((N, K, D, F), dtype)
    leaves = [t.requires_grad_() for t in (acts, W, b)]
    with Watch() as watch:
        out = decode_loss(leaves[0], indices, leaves[1], leaves[2], x)
        torch.autograd.grad(out.sq_err.sum(), leaves, retain_graph=True)
    assert watch.largest == F * D < min(N * K * D, N * F)
    assert watch.calls == ["qscope.decode_loss.default", "qscope.sparse_outer.default"]
    with Watch() as watch:
        torch.autograd.grad(out.x_hat.sum(), leaves)
    assert watch.calls == ["qscope.sparse_dot.default", "qscope.sparse_outer.default"]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_kernel_copies_neither_the_weights_nor_all_gathered_rows(dtype, monkeypatch):
    """Called as a function: what an operator does inside is hidden from a dispatch mode."""
    from qscope.ops.decode_loss import _on_cpu

    N, K, D, F = 40, 12, 48, 1000
    acts, indices, W, b, x = inputs((N, K, D, F), dtype)
    rows = indices.unique().numel()
    monkeypatch.setattr(reference._workspace, "WORKSPACE_BYTES", rows * 4 * 7)
    with Watch() as watch:
        got = _on_cpu(acts, indices, W, b, x)
    # W[:, columns] is a view of 7 columns of all rows, N x D the largest of the results.
    assert watch.largest <= max(7 * F, N * D) < min(F * D, N * K * D)
    torch.testing.assert_close(got, tuple(torch.ops.qscope.decode_loss(acts, indices, W, b, x)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_total_variance_where_the_mean_is_a_thousand_deviations_away(dtype):
    acts, indices, W, b, _ = inputs((500, 1, 20, 7), dtype)
    x = (1000 + torch.randn(500, 20)).to(dtype)
    want = composition(acts, indices, W, b, x)[2]
    below(decode_loss(acts, indices, W, b, x).total_variance, want, U32 * want * 1.001)


def test_any_strides_mixed_dtypes_and_empty():
    acts, indices, W, b, x = inputs((8, 6, 40, 30))
    want = decode_loss(acts[::2, 1::2].contiguous(), indices[::2, 1::2].contiguous(), W, b, x[::2].contiguous())
    strided = decode_loss(acts[::2, 1::2], indices[::2, 1::2], W.T.contiguous().T, b.repeat_interleave(2)[::2], x[::2])
    torch.testing.assert_close(tuple(strided), tuple(want), rtol=0, atol=0)
    mixed = decode_loss(acts.half(), indices, W.bfloat16(), b, x.half())
    assert mixed.x_hat.dtype == torch.bfloat16
    no_slots = decode_loss(acts[:, :0], indices[:, :0], W.bfloat16(), b, x)
    torch.testing.assert_close(no_slots.x_hat, b.bfloat16().expand(8, 40), rtol=0, atol=0)
    nothing = decode_loss(acts[:0], indices[:0], W, b, x[:0])
    assert nothing.x_hat.shape == (0, 40) and nothing.sq_err.shape == (0,) and nothing.total_variance == 0


def test_nan_and_infinity_stay_in_their_token():
    acts, indices, W, b, x = inputs((4, 6, 40, 30))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    acts.requires_grad_()
    out = decode_loss(acts, indices, W, b, x)
    assert out.sq_err.isnan().tolist() == [False, True, False, False]
    assert out.sq_err.isinf().tolist() == [False, False, True, False] and out.total_variance.isnan()
    out.sq_err.sum().backward()
    assert acts.grad.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [-1, 30, 2**31 + 5])
def test_index_out_of_range_raises(bad, dtype):
    acts, indices, W, b, x = inputs((4, 6, 40, 30), dtype, index_dtype=torch.int64)
    indices[2, 3] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of|outside"):
        decode_loss(acts, indices, W, b, x)


@pytest.mark.parametrize(
    "position, tensor, word",
    [
        (0, torch.zeros(4), r"\[N, K\]"),
        (0, torch.zeros(4, 5), "share a letter"),
        (1, torch.zeros(4, 6), "int32 and int64"),
        (2, torch.zeros(30, 40, dtype=torch.int8), "int8"),
        (3, torch.zeros(41), r"b_dec \[D\]"),
        (4, torch.zeros(3, 40), r"x \[N, D\] is \[3, 40\]"),
        (4, torch.zeros(4, 40, dtype=torch.float64), "float64"),
        (4, torch.zeros(4, 40, device="meta"), "one device"),
    ],
)
def test_refuses(position, tensor, word):
    args = list(inputs((4, 6, 40, 30)))
    args[position] = tensor
    with pytest.raises(ValueError, match=word):
        decode_loss(*args)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_instruction_set_thread_count_and_run(dtype, limit_isa):
    args = inputs((33, 19, 75, 120), dtype)
    results = []
    for isa in native.ISA_NAMES:
        limit_isa(isa)
        results.append(tuple(decode_loss(*args)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [tuple(decode_loss(*args)) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_opcheck():
    acts, indices, W, b, x = inputs((5, 8, 33, 20))
    leaves = acts.requires_grad_(), indices, W.requires_grad_(), b.requires_grad_(), x.requires_grad_()
    torch.library.opcheck(torch.ops.qscope.decode_loss.default, leaves)
    torch.library.opcheck(torch.ops.qscope.decode_loss.default, (*leaves[:3], None, leaves[4]))


def test_compiles_without_graph_break_forward_and_backward():
    acts, indices, W, b, x = inputs((5, 8, 33, 20))
    leaves = [t.requires_grad_() for t in (acts, W, b, x)]

    def fvu(acts, W, b, x):
        out = decode_loss(acts, indices, W, b, x)
        return out.sq_err.sum() / out.total_variance, *out

    compiled = torch.compile(fvu, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*leaves)[0], leaves) for f in (compiled, fvu))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled(*leaves), fvu(*leaves), rtol=0, atol=0)
