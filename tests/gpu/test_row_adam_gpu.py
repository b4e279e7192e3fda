"""The row update on a GPU at real sizes: bfloat16 rounding, bits under real scheduling, graphs, memory, addresses."""

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

from qscope import ops, reference  # noqa: E402

# F, D: rows in registers, a width that is no power of two, rows in a loop, an odd width, a bias.
SHAPES = [(8192, 4096), (4096, 5120), (1024, 16384), (1003, 1531), (65536, 1)]
BETAS = (0.9, 0.999, 1e-8)


def state(F: int, D: int) -> list[Tensor]:
    """W, exp_avg, exp_avg_sq, last_step, shadow, grad, touched, step, lr, grad_scale."""
    gen = torch.Generator("cuda").manual_seed(F)
    W = torch.randn(F, D, generator=gen, device="cuda")
    m = torch.randn(F, D, generator=gen, device="cuda") * 0.1
    v = torch.rand(F, D, generator=gen, device="cuda") * 0.01 + 1e-4
    last = torch.randint(0, 7, (F,), generator=gen, device="cuda", dtype=torch.int32)
    grad = torch.randn(F, D, generator=gen, device="cuda")
    touched = torch.rand(F, generator=gen, device="cuda") < 0.5
    scalars = torch.tensor(7, device="cuda"), torch.tensor(1e-2, device="cuda"), torch.tensor(0.5, device="cuda")
    return [W, m, v, last, W.bfloat16(), grad, touched, *scalars]


def update(s: list[Tensor], unit_rows: bool, op=ops.row_adam_) -> None:
    W, m, v, last, shadow, grad, touched, step, lr, scale = s
    settings = dict(beta1=BETAS[0], beta2=BETAS[1], eps=BETAS[2], grad_scale=scale, unit_rows=unit_rows, shadow=shadow)
    op(W, grad, m, v, last, touched, step, lr, **settings)


@pytest.mark.parametrize("unit_rows", [False, True], ids=["free", "unit"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference_and_repeats_to_the_bit(shape: tuple[int, int], unit_rows: bool) -> None:
    unit_rows = unit_rows and shape[1] > 1  # a row of one number has no direction to keep
    runs = [state(*shape) for _ in range(3)]
    for s in runs:
        s[5][5] = float("nan")
        s[6][5] = True
    update(runs[0], unit_rows)
    update(runs[1], unit_rows)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:5], runs[1][:5], strict=True))
    update(runs[2], unit_rows, reference.row_adam_)
    (W, m, v, last, shadow), want = runs[0][:5], runs[2]
    # Sums over D in another order (2^-24 sqrt(D)), approximate division and root (2 ulp), a power by exp2.
    torch.testing.assert_close(m, want[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(v, want[2], rtol=2e-6, atol=2e-8)
    torch.testing.assert_close(W, want[0], rtol=2e-6, atol=2e-6)
    assert torch.equal(last, want[3])
    before = state(*shape)
    changed = before[6].clone()
    changed[5] = False
    assert torch.equal(shadow[changed], W[changed].bfloat16())
    assert all(torch.equal(now[~changed], then[~changed]) for now, then in zip(runs[0][:5], before[:5], strict=True))


def test_every_row_touched_follows_torch_adam() -> None:
    s = state(512, 2048)
    s[1].zero_(), s[2].zero_(), s[3].zero_(), s[6].fill_(True), s[9].fill_(1.0)
    dense = torch.nn.Parameter(s[0].clone())
    adam = torch.optim.Adam([dense], lr=1e-2, betas=BETAS[:2], eps=BETAS[2])
    gen = torch.Generator("cuda").manual_seed(1)
    for step in range(1, 201):
        dense.grad = torch.randn(512, 2048, generator=gen, device="cuda")
        adam.step()
        s[5].copy_(dense.grad)
        s[7].fill_(step)
        update(s, False)
    # Each of 200 updates of size lr is rounded a few times, and so is W, which is below 8.
    torch.testing.assert_close(s[0], dense.detach(), rtol=0, atol=200 * (1e-2 * 2**-21 + 2**-23))
    torch.testing.assert_close(s[2], adam.state[dense]["exp_avg_sq"], rtol=200**0.5 * 2**-22, atol=0)


def test_no_wait_no_memory_and_new_numbers_in_a_graph() -> None:
    s, other = state(1003, 1531), state(1003, 1531)
    update(s, True), update(other, True)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(s, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] == before
    update(other, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(s, True)  # only recorded
    for step in (9, 12):
        for t in (s, other):
            t[7].fill_(step), t[8].fill_(1.0 / step), t[6].logical_not_()
        graph.replay()
        update(other, True)
        assert all(torch.equal(a, b) for a, b in zip(s[:5], other[:5], strict=True))


def test_numbers_need_no_wait_either() -> None:
    s = state(64, 128)
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            ops.row_adam_(s[0], s[5], s[1], s[2], s[3], s[6], 8, 1e-3, grad_scale=0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool((s[3][s[6]] == 8).all())


def test_rows_beyond_two_to_the_31_elements_are_addressed() -> None:
    F, D = 530_000, 4096  # 2.17e9 elements
    if torch.cuda.mem_get_info()[0] < 42 << 30:
        pytest.skip("needs 42 GiB of free GPU memory")
    W, m, v, grad = (torch.zeros(F, D, device="cuda") for _ in range(4))
    last, touched = torch.zeros(F, dtype=torch.int32, device="cuda"), torch.zeros(F, dtype=torch.bool, device="cuda")
    touched[-1], grad[-1] = True, 1.0
    ops.row_adam_(W, grad, m, v, last, touched, 1, 0.5)
    torch.testing.assert_close(W[-1], torch.full_like(W[-1], -0.5), rtol=1e-6, atol=0)
    assert int(W.count_nonzero()) == D and int(last.sum()) == 1
