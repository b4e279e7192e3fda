"""The penalty's kernels on a GPU at real sizes: float64 meaning, bits from run to run, tokens that do not count."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 interprets the kernels"),
]

from qscope import ops  # noqa: E402  (after the reasons to skip)

U32 = 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "D", "S"), [(8192, 2048, 2), (4097, 4096, 32), (333, 1531, 5)])
def test_sums_and_gradient_match_float64_and_repeat_to_the_bit(N: int, D: int, S: int, dtype: torch.dtype) -> None:
    gen = torch.Generator("cuda").manual_seed(N)
    x, W = (torch.randn(rows, D, generator=gen, device="cuda").to(dtype) for rows in (N, S))
    b = torch.randn(S, generator=gen, device="cuda")
    alpha = torch.randn(3, S, generator=gen, device="cuda")
    group = torch.randint(-1, 3, (N,), generator=gen, device="cuda")
    x[group < 0] = torch.nan  # not read
    x.requires_grad_()
    found = ops.feature_penalty(x, W, b, alpha, group)
    counts = group >= 0
    terms = x.detach()[counts].double()[:, None] * W.double()
    excess = terms.sum(-1) + b.double() - alpha.double()[group[counts]]
    error = (D + 3) * U32 * (terms.abs().sum(-1) + b.double().abs() + alpha.double()[group[counts]].abs())
    sure = excess.abs() > error  # nearer to 0, rounding decides which side it falls on
    assert torch.equal(found.active[counts][sure], (excess > 0)[sure]) and not found.active[~counts].any()
    want = excess.clamp(min=0).sum(0)
    assert ((found.sums.double() - want).abs() <= error.sum(0) + (N + 1) * U32 * want).all()
    (grad,) = torch.autograd.grad(found.sums.sum(), x)
    exact = found.active.double() @ W.double()
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    size = found.active.double() @ W.double().abs()
    assert ((grad.double() - exact).abs() <= (S + 1) * U32 * size + unit * (exact.abs() + S * U32 * size)).all()
    for _ in range(3):
        again = ops.feature_penalty(x, W, b, alpha, group)
        assert torch.equal(found.sums, again.sums) and torch.equal(found.active, again.active)
        assert torch.equal(grad, torch.autograd.grad(again.sums.sum(), x)[0])
