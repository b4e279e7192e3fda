"""The Triton penalty kernels against float64, in Triton's interpreter or, if there is one, on the GPU.

Bounds are the rigorous ones of float32 sums (Higham 2002, section 3.1).
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels.feature_penalty import PenaltyConfig, feature_penalty_bwd, feature_penalty_fwd

INTERPRETED = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
U32 = 2.0**-24
ROUND = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-7,
}  # the interpreter truncates bfloat16
# Several tiles of a row and several groups of features, a ragged last one of each.
SMALL = PenaltyConfig(rows=2, features=2, block_d=128, num_warps=1, vec=4)


def inputs(N, D, S, dtype=torch.float32, G=3):
    gen = torch.Generator().manual_seed(N + 10 * D + S)
    x, W, b, alpha = (torch.randn(*size, generator=gen) for size in ((N, D), (S, D), (S,), (G, S)))
    group = torch.randint(-1, G + 1, (N,), generator=gen)  # G is out of range: does not count on a GPU
    return [t.to(DEVICE) for t in (x.to(dtype), W / D**0.5, b, alpha, group)]


def expect(x, W, b, alpha, group):
    """excess [N, S] in float64, a bound on float32's error, and which tokens count."""
    counts = (group >= 0) & (group < len(alpha))
    threshold = alpha.double()[torch.where(counts, group, 0).long()]
    X, rows = x.double(), W.double()
    size = X.abs() @ rows.abs().T + b.double().abs() + threshold.abs()
    return X @ rows.T + b.double() - threshold, (x.shape[1] + 3) * U32 * size, counts


@pytest.mark.parametrize("config", [SMALL, None], ids=["small", "default"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 300, 3), (1, 1, 1), (7, 160, 5)], ids=str)
def test_against_float64(size, dtype, config):
    x, W, b, alpha, group = inputs(*size, dtype)
    raw, bound, counts = expect(x, W, b, alpha, group)
    sums, active = feature_penalty_fwd(x, W, b, alpha, group, config)
    clear = raw.abs() > bound
    want = (raw > 0) & counts[:, None]
    assert torch.equal(active[clear], want[clear]) and not active[~counts].any()
    excess = torch.where(counts[:, None], raw.relu(), 0.0)
    limit = (torch.where(counts[:, None], bound, 0.0) + len(x) * U32 * (excess + bound)).sum(0)
    assert bool(((sums.double() - excess.sum(0)).abs() <= limit).all())
    assert torch.equal(feature_penalty_fwd(x, W, b, alpha, group, config)[0], sums)

    grad = torch.linspace(0.5, 2.0, len(W), device=DEVICE)
    got = feature_penalty_bwd(active, grad, W, dtype, config)
    exact = (active.double() * grad.double()) @ W.double()
    error = (len(W) + 2) * U32 * ((active.double() * grad.double()) @ W.double().abs())
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0
    assert got.dtype == dtype and bool(
        ((got.double() - exact).abs() <= error + ROUND[dtype] * exact.abs() + tiny).all()
    )


def test_many_programs_are_added_and_32_features_fit():
    x, W, b, alpha, group = inputs(2100, 16, 32)
    cfg = PenaltyConfig(rows=2 if not INTERPRETED else 1024, features=4, block_d=128, num_warps=1, vec=4)
    raw, bound, counts = expect(x, W, b, alpha, group)
    sums, _ = feature_penalty_fwd(x, W, b, alpha, group, cfg)
    excess = torch.where(counts[:, None], raw.relu(), 0.0)
    assert bool(((sums.double() - excess.sum(0)).abs() <= (bound + len(x) * U32 * excess).sum(0)).all())


def test_the_sum_over_more_programs_than_a_block():
    from qscope_kernels.feature_penalty import _sum_programs_kernel

    part = torch.arange(2500 * 2, dtype=torch.float32, device=DEVICE).view(2500, 2)
    sums = torch.zeros(2, device=DEVICE)
    _sum_programs_kernel[(2,)](part, sums, 2500, 2, BLOCK=1024)
    assert sums.tolist() == part.double().sum(0).tolist()  # whole numbers below 2^24 per lane and in the sum


def test_nan_stays_and_tokens_that_do_not_count_are_not_read():
    x, W, b, alpha, _ = inputs(4, 40, 2)
    x[1], x[2, 3] = float("nan"), float("nan")
    group = torch.tensor([0, -1, -1, 1], device=DEVICE)
    assert feature_penalty_fwd(x, W, b, alpha, group)[0].isfinite().all()
    sums, active = feature_penalty_fwd(x, W, b, alpha, group.new_tensor([0, -1, 0, 1]))
    assert sums.isnan().all() and active[2].all()


def test_strided_tokens_nothing_and_refusals():
    x, W, b, alpha, group = inputs(6, 64, 3)
    want = feature_penalty_fwd(x[::2].contiguous(), W, b, alpha, group[::2])
    torch.testing.assert_close(feature_penalty_fwd(x[::2], W, b, alpha, group[::2]), want, rtol=0, atol=0)
    sums, active = feature_penalty_fwd(x[:0], W, b, alpha, group[:0])
    assert sums.tolist() == [0, 0, 0] and active.shape == (0, 3)
    assert feature_penalty_bwd(active, sums, W, torch.bfloat16).shape == (0, 64)
    with pytest.raises(ValueError, match="S <= 32"):
        feature_penalty_fwd(x, W, b, alpha[:, :2], group)
    with pytest.raises(ValueError, match="int32 or int64"):
        feature_penalty_fwd(x, W, b, alpha, group.float())
    with pytest.raises(ValueError, match="bool"):
        feature_penalty_bwd(active.float(), sums, W, torch.float32)
