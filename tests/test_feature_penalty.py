"""The penalty operator against its definition in float64: values, gradients, schema, compile."""

import sys

import pytest
import torch

from qscope import reference
from qscope.ops import feature_penalty

U32 = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(N=40, D=33, S=3, G=2, dtype=torch.float32):
    gen = torch.Generator().manual_seed(N + D + S)
    x, W, b, alpha = (torch.randn(*size, generator=gen) for size in ((N, D), (S, D), (S,), (G, S)))
    return x.to(dtype), W, b, alpha, torch.randint(-1, G, (N,), generator=gen)


def definition(x, W, b, alpha, group):
    """float64, differentiable, nothing of ours: excess before ReLU [N', S] of the tokens that count."""
    counts = group >= 0
    return x[counts].double() @ W.double().T + b.double() - alpha.double()[group[counts].long()]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 33, 3, 2), (1, 1, 1, 1), (300, 64, 32, 5), (0, 8, 2, 1)], ids=str)
def test_matches_float64(shape, dtype, index_dtype):
    """A float32 dot of D terms, b and alpha: (D + 3) u of the absolute terms. The sum over tokens is float64."""
    x, W, b, alpha, group = inputs(*shape, dtype)
    group = group.to(index_dtype)
    leaf = x.clone().requires_grad_()
    out = feature_penalty(leaf, W, b, alpha, group)
    raw = definition(x, W, b, alpha, group)
    counts = group >= 0
    bound = (x.shape[1] + 3) * U32 * definition(x.abs(), W.abs(), b.abs(), -alpha.abs(), group)
    want = raw.relu().sum(0)
    assert bool(((out.sums.double() - want).abs() <= bound.sum(0) + U32 * want).all())
    clear = raw.abs() > bound
    assert torch.equal(out.active[counts][clear], (raw > 0)[clear]) and not out.active[~counts].any()
    assert out.sums.dtype == torch.float32 and out.active.dtype == torch.bool

    scale = torch.linspace(-1, 2, len(W))
    (grad,) = torch.autograd.grad((out.sums * scale).sum(), leaf)
    factor = out.active.double() * scale.double()
    exact, size = factor @ W.double(), factor.abs() @ W.double().abs()
    half = torch.finfo(dtype).eps / 2
    tiny = 2.0**-25 if dtype == torch.float16 else 0.0
    assert grad.dtype == dtype
    assert bool(((grad.double() - exact).abs() <= (len(W) + 2) * U32 * size + half * exact.abs() * 1.001 + tiny).all())
    assert not grad[~counts].any()


def test_reference_is_differentiable_and_equals_the_op_in_float64():
    x, W, b, alpha, group = (t.double() if t.is_floating_point() else t for t in inputs())
    sums, active = reference.feature_penalty(x, W, b, alpha, group)
    torch.testing.assert_close(sums, definition(x, W, b, alpha, group).relu().sum(0), rtol=1e-13, atol=0)
    leaf = x.requires_grad_()
    (want,) = torch.autograd.grad((definition(leaf, W, b, alpha, group).relu().sum(0) * b).sum(), leaf)
    torch.testing.assert_close(
        reference.feature_penalty_grad(active, b, W, torch.float64), want, rtol=1e-12, atol=1e-14
    )


def test_zero_below_alpha_and_infinity_leaves_a_feature_out():
    x, W, b, alpha, group = inputs()
    x.requires_grad_()
    out = feature_penalty(x, W, b, alpha + 1000, group)
    out.sums.sum().backward()
    assert out.sums.tolist() == [0, 0, 0] and not x.grad.any() and not out.active.any()
    alpha[:, 1] = float("inf")
    sums = feature_penalty(x, W, b, alpha, group).sums
    assert sums[1] == 0 and sums[0] > 0


def test_nan_passes_and_tokens_that_do_not_count_may_hold_anything():
    x, W, b, alpha, _ = inputs(N=4)
    x[1] = float("nan")
    assert feature_penalty(x, W, b, alpha, torch.tensor([0, -1, 1, 0])).sums.isfinite().all()
    assert feature_penalty(x, W, b, alpha, torch.tensor([0, 1, 1, 0])).sums.isnan().all()


def test_only_x_has_a_gradient_and_only_bits_are_kept():
    x, W, b, alpha, group = inputs()
    leaves = [t.requires_grad_() for t in (x, W, b, alpha)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = feature_penalty(*leaves, group)
    got = torch.autograd.grad(out.sums.sum(), leaves, allow_unused=True, create_graph=True)
    assert got[0] is not None and got[1:] == (None, None, None)
    assert sorted(map(tuple, (t.shape for t in saved))) == [(3, 33), (40, 3)]
    assert not out.active.requires_grad


def test_blocks_of_bfloat16_change_nothing(monkeypatch):
    args = inputs(100, 64, 4, 3, torch.bfloat16)
    whole = feature_penalty(*args)
    monkeypatch.setattr(sys.modules["qscope.reference.feature_penalty"], "_BLOCK", 1)  # 16 tokens at a time
    x, W = args[:2]
    blocks = feature_penalty(*args)
    size = (64 + 3) * U32 * (x.double().abs() @ W.double().abs().T).sum(0) * 2
    assert bool(((blocks.sums - whole.sums).abs() <= size).all())


def test_same_bits_again_strided_and_under_autocast():
    x, W, b, alpha, group = inputs(64, 48, 4, 3)
    want = feature_penalty(x, W, b, alpha, group)
    for _ in range(3):
        torch.testing.assert_close(tuple(feature_penalty(x, W, b, alpha, group)), tuple(want), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(tuple(feature_penalty(x, W, b, alpha, group)), tuple(want), rtol=0, atol=0)
    wide = torch.zeros(64, 96)
    wide[:, ::2] = x
    strided = feature_penalty(wide[:, ::2], W, b, alpha, group).sums
    torch.testing.assert_close(strided, want.sums, rtol=1e-5, atol=1e-4)


def test_opcheck_and_compile():
    x, W, b, alpha, group = inputs()
    x.requires_grad_()
    torch.library.opcheck(torch.ops.qscope.feature_penalty.default, (x, W, b, alpha, group))
    active = feature_penalty(x, W, b, alpha, group).active
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.qscope.feature_penalty_grad.default, (active, torch.randn(3), W, dtype))

    def loss(x):
        return feature_penalty(x, W, b, alpha, group).sums.sum() / 7

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x), x)[0] for f in (compiled, loss))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "position, tensor, word",
    [
        (0, torch.zeros(40), r"\[N, D\]"),
        (0, torch.zeros(40, 32), "share a letter"),
        (0, torch.zeros(40, 33, dtype=torch.float64), "float64"),
        (1, torch.zeros(3, 33, dtype=torch.int8), "int8"),
        (2, torch.zeros(4), r"b \[S\] is \[4\]"),
        (3, torch.zeros(2, 4), r"alpha \[G, S\] is \[2, 4\]"),
        (4, torch.zeros(40), "int32 or int64"),
        (4, torch.zeros(39, dtype=torch.int64), r"group \[N\] is \[39\]"),
        (4, torch.zeros(40, dtype=torch.int64, device="meta"), "one device"),
    ],
)
def test_refuses(position, tensor, word):
    args = list(inputs())
    args[position] = tensor
    with pytest.raises(ValueError, match=word):
        feature_penalty(*args)


def test_refuses_too_many_features_and_unknown_groups():
    x, W, b, alpha, group = inputs(S=33)
    with pytest.raises(ValueError, match="1 to 32"):
        feature_penalty(x, W, b, alpha, group)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        feature_penalty(*inputs()[:4], torch.full((40,), 2))
