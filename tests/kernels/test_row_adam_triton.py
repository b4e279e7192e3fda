"""The row update against float64, in Triton's interpreter or, if there is one, on the GPU."""

import math
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels.row_adam import LaunchConfig, launch_config, row_adam_

# The interpreter computes with numpy, which warns where NaN and infinity are meant.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

INTERPRETED = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# One row per program, several, and the kernel for rows that do not fit.
CONFIGS = {
    "default": None,
    "rows": LaunchConfig(rows=4, block_d=128, num_warps=1),
    "long": LaunchConfig(rows=1, block_d=32, num_warps=1),
}
SHAPES = [(9, 70), (5, 128), (6, 33)]  # F, D: all above 32, so that "long" takes several blocks


def state(F: int, D: int) -> list[Tensor]:
    """W, exp_avg, exp_avg_sq, last_step, shadow."""
    W = torch.randn(F, D, generator=torch.Generator().manual_seed(F)).to(DEVICE)
    moments = torch.zeros(2, F, D, device=DEVICE)
    return [W, moments[0], moments[1], torch.zeros(F, dtype=torch.int32, device=DEVICE), W.bfloat16()]


def tensor(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def update(s: list[Tensor], grad: Tensor, touched: Tensor, step: int, config: LaunchConfig | None = None, **kw) -> None:
    W, m, v, last, shadow = s
    kw = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "shadow": shadow} | kw
    row_adam_(W, grad, m, v, last, touched, tensor(step, torch.int64), tensor(1e-2, torch.float32), config=config, **kw)


def meaning(s: list[Tensor], grad: Tensor, touched: Tensor, step: int, scale: float, unit_rows: bool) -> None:
    """The kernel's formulas in float64 on all touched rows; s is a list of float64 tensors."""
    W, m, v, last = s
    rows = touched.nonzero().view(-1)
    g, w = grad[rows].double() * scale, W[rows]
    if unit_rows:
        g = g - ((g * w).sum(1) / (w * w).sum(1))[:, None] * w
    dt = (step - last[rows])[:, None]
    m[rows] = 0.9**dt * m[rows] + 0.1 * g
    v[rows] = 0.999**dt * v[rows] + 0.001 * g**2
    w = w - 1e-2 * (m[rows] / (1 - 0.9**step)) / ((v[rows] / (1 - 0.999**step)).sqrt() + 1e-8)
    W[rows] = w / w.norm(dim=1, keepdim=True) if unit_rows else w
    last[rows] = step


@pytest.mark.parametrize("unit_rows", [False, True], ids=["free", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_matches_float64(config: str, shape: tuple[int, int], dtype: torch.dtype, unit_rows: bool) -> None:
    s = state(*shape)
    want = [t.double() for t in s[:4]]
    gen = torch.Generator().manual_seed(1)
    for step in (1, 2, 5, 300):
        grad = torch.randn(*shape, generator=gen).to(dtype).to(DEVICE)
        touched = (torch.rand(shape[0], generator=gen) < 0.7).to(DEVICE)
        before = [t.clone() for t in s]
        update(s, grad, touched, step, CONFIGS[config], unit_rows=unit_rows, grad_scale=tensor(0.5, torch.float32))
        meaning(want, grad, touched, step, 0.5, unit_rows)
        assert all(torch.equal(now[~touched], then[~touched]) for now, then in zip(s, before, strict=True))
    # The constants beta and 1 - beta are rounded to float32 (2^-26 of them), sums and exp2 to a few 2^-24.
    torch.testing.assert_close(s[1].double(), want[1], rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(s[2].double(), want[2], rtol=4e-6, atol=1e-10)
    torch.testing.assert_close(s[0].double(), want[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(s[3].double(), want[3])
    # To nearest even on a GPU; the interpreter truncates to the next bfloat16.
    error = (s[4].float() - s[0]).abs() / s[0].abs()
    assert error.max() < (2.0**-7 if INTERPRETED else 2.0**-8 * (1 + 1e-6))


@pytest.mark.parametrize("D", [1, 2, 40])
def test_narrow_rows_share_a_program(D: int) -> None:
    F = 2 * launch_config(D).rows + 100
    s = state(F, D)
    want = [t.double() for t in s[:4]]
    gen = torch.Generator().manual_seed(2)
    for step in (1, 3):
        grad = torch.randn(F, D, generator=gen).to(DEVICE)
        touched = (torch.rand(F, generator=gen) < 0.3).to(DEVICE)
        touched[: launch_config(D).rows] = False  # programs with nothing to do leave
        update(s, grad, touched, step, grad_scale=None, unit_rows=False, shadow=None)
        meaning(want, grad, touched, step, 1.0, False)
    torch.testing.assert_close(s[0].double(), want[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(s[3].double(), want[3]) and int((s[3] > 0).sum()) > 0


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free", "unit"])
def test_unusable_rows_and_rows_of_zeros(config: str, unit_rows: bool) -> None:
    s = state(6, 70)
    s[0][4:] = 0
    grad = torch.ones(6, 70, device=DEVICE)
    grad[0, 69], grad[1, 3], grad[2, 40], grad[4] = math.nan, math.inf, 1e30, 0
    touched = torch.ones(6, dtype=torch.bool, device=DEVICE)
    before = [t.clone() for t in s]
    update(s, grad, touched, 2, CONFIGS[config], unit_rows=unit_rows)
    for now, then in zip(s, before, strict=True):
        assert torch.equal(now[:3], then[:3]) and bool(now.isfinite().all())
    assert s[3].tolist() == [0, 0, 0, 2, 2, 2]
    assert bool((s[0][4] == 0).all())
    size = 1.0 if unit_rows else s[0][5].double().norm().item()
    torch.testing.assert_close(s[0][5], torch.full((70,), -size / 70**0.5, device=DEVICE), rtol=1e-6, atol=0)
    before = [t.clone() for t in s]
    update(s, torch.ones(6, 70, device=DEVICE), touched, 0, CONFIGS[config], unit_rows=unit_rows)
    assert all(torch.equal(now, then) for now, then in zip(s, before, strict=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_row_whose_projection_overflows_is_left_as_it_is(config: str) -> None:
    s = state(2, 70)
    s[0][1] = 1e20
    before = [t.clone() for t in s]
    update(s, torch.full((2, 70), 1e17, device=DEVICE), s[3] == 0, 1, CONFIGS[config], unit_rows=True)
    assert all(torch.equal(now[1], then[1]) for now, then in zip(s, before, strict=True))
    assert s[3].tolist() == [1, 0] and bool(s[0].isfinite().all())


@pytest.mark.parametrize("config", CONFIGS)
def test_catch_up_from_the_distant_past_and_the_future(config: str) -> None:
    s = state(3, 70)
    s[1].fill_(1.0), s[2].fill_(1.0)
    s[3][:] = torch.tensor([0, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    update(s, torch.full((3, 70), 0.5, device=DEVICE), s[3] >= 0, 2**31 - 1, CONFIGS[config])
    want_m = torch.tensor([0.05, 0.95, 1.05], device=DEVICE)[:, None].expand(3, 70)
    torch.testing.assert_close(s[1], want_m, rtol=1e-6, atol=0)
    want_v = torch.tensor([0.25e-3, 0.99925, 1.00025], device=DEVICE)[:, None].expand(3, 70)
    torch.testing.assert_close(s[2], want_v, rtol=1e-6, atol=0)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.999, 0.99999)])
def test_bias_corrections_do_not_cancel(betas: tuple[float, float]) -> None:
    """1 - beta^step in float32 would be wrong by 0.6 % at step 1 of beta2 = 0.99999; the first step is lr exactly."""
    for step in (1, 3):
        s = state(2, 70)
        before = s[0].clone()
        grad = torch.ones(2, 70, device=DEVICE)
        update(s, grad, s[3] == 0, step, beta1=betas[0], beta2=betas[1], unit_rows=False)
        factor = (1 - betas[0]) / (1 - betas[0] ** step) / math.sqrt((1 - betas[1]) / (1 - betas[1] ** step))
        # W itself is rounded at 2^-24 of up to 4; relative to the step of 0.01 that is 2.4e-5.
        torch.testing.assert_close(before - s[0], torch.full_like(s[0], 1e-2 * factor), rtol=5e-6, atol=2.4e-7)


def test_same_bits_twice_and_int32_steps() -> None:
    a, b = state(6, 70), state(6, 70)
    grad, touched = torch.randn(6, 70, device=DEVICE), torch.tensor([1, 0, 1, 1, 0, 1], device=DEVICE).bool()
    update(a, grad, touched, 5, unit_rows=True)
    W, m, v, last, shadow = b
    step, lr = tensor(5, torch.int32), tensor(1e-2, torch.float32)
    row_adam_(W, grad, m, v, last, touched, step, lr, 0.9, 0.999, 1e-8, unit_rows=True, shadow=shadow)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_empty() -> None:
    for shape in ((0, 8), (3, 0)):
        update(state(*shape), torch.zeros(shape, device=DEVICE), state(*shape)[3] == 0, 1, unit_rows=True)


def test_wrong_input_is_refused_with_what_was_given() -> None:
    s = state(4, 8)
    grad, touched = torch.ones(4, 8, device=DEVICE), torch.ones(4, dtype=torch.bool, device=DEVICE)
    for wrong, word in (
        (dict(grad=grad[:, :7]), r"grad \[4, 7\]"),
        (dict(grad=grad.double()), "float64"),
        (dict(touched=touched.int()), "touched bool"),
        (dict(grad=grad.T.contiguous().T), r"contiguous tensors .*; grad is not"),
        (dict(grad=grad.to("meta")), "one device"),
        (dict(grad=grad, beta1=1.0), "beta1"),
        (dict(grad=grad, eps=0.0), "eps above 0"),
        (dict(grad=grad, shadow=grad), "shadow bfloat16"),
    ):
        with pytest.raises(ValueError, match=word):
            update(s, **({"grad": grad, "touched": touched} | wrong), step=1)
