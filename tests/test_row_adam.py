import math

import pytest
import torch

from qscope import native, reference
from qscope.ops import row_adam_

needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there are no native kernels")
BETAS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def state(F=13, D=24, seed=0, shadow=False):
    """W, exp_avg, exp_avg_sq, last_step, shadow."""
    gen = torch.Generator().manual_seed(seed)
    W = torch.randn(F, D, generator=gen)
    return [
        W,
        torch.zeros(F, D),
        torch.zeros(F, D),
        torch.zeros(F, dtype=torch.int32),
        W.bfloat16() if shadow else None,
    ]


def update(s, grad, touched, step, lr=1e-2, op=row_adam_, **kwargs):
    W, m, v, last, shadow = s
    kwargs = BETAS | {"grad_scale": None, "unit_rows": False, "shadow": shadow} | kwargs
    if op is row_adam_:
        op(W, grad, m, v, last, touched, step, lr, **kwargs)
    else:
        scale = kwargs.pop("grad_scale")
        op(W, grad, m, v, last, touched, torch.tensor(step), torch.tensor(lr),
           grad_scale=None if scale is None else torch.tensor(float(scale)), **kwargs)  # fmt: skip


def meaning(s, grad, touched, step, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, scale=1.0, unit_rows=False):
    """The docstring's formulas in float64, one row at a time; s is a list of float64 tensors."""
    W, m, v, last = s
    for f in touched.nonzero().view(-1).tolist():
        g, w = grad[f].double() * scale, W[f]
        if unit_rows and w.norm() > 0:
            g = g - (g @ w) / (w @ w) * w
        dt = step - int(last[f])
        m[f] = beta1**dt * m[f] + (1 - beta1) * g
        v[f] = beta2**dt * v[f] + (1 - beta2) * g**2
        w = w - lr * (m[f] / (1 - beta1**step)) / ((v[f] / (1 - beta2**step)).sqrt() + eps)
        W[f] = w / w.norm() if unit_rows and w.norm() > 0 else w
        last[f] = step


def exact(s):
    return [s[0].double(), s[1].double(), s[2].double(), s[3].clone()]


@pytest.mark.parametrize("op", [row_adam_, reference.row_adam_], ids=["op", "reference"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free", "unit"])
@pytest.mark.parametrize("shape", [(13, 24), (1, 1), (7, 1), (5, 301)], ids=str)
def test_matches_float64(op, grad_dtype, unit_rows, shape):
    """Random rows touched at uneven steps; each step's error is some roundings of an update of size lr."""
    s = state(*shape, shadow=True)
    want = exact(s)
    gen = torch.Generator().manual_seed(1)
    for step in (1, 2, 5, 6, 40, 1000):
        grad = torch.randn(*shape, generator=gen).to(grad_dtype)
        touched = torch.rand(shape[0], generator=gen) < 0.6
        update(s, grad, touched, step, op=op, grad_scale=0.5, unit_rows=unit_rows)
        meaning(want, grad, touched, step, scale=0.5, unit_rows=unit_rows)
    # float32(0.9) and float32(0.999) differ from the numbers by 2^-26; the sums over D round at 2^-24 sqrt(D).
    torch.testing.assert_close(s[1].double(), want[1], rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(s[2].double(), want[2], rtol=1e-5, atol=1e-9)
    # 1 x 1 rows at norm 1 have no direction left but rounding, on which Adam takes whole steps: their W is +-1.
    torch.testing.assert_close(s[0].double(), want[0], rtol=3e-6, atol=3e-6)
    assert torch.equal(s[3], want[3])
    updated = s[3] > 0
    assert torch.equal(s[4][updated], s[0][updated].bfloat16())


def test_is_torch_adam_when_every_row_is_touched():
    s = state(6, 40)
    ours = s[0]
    theirs = torch.nn.Parameter(ours.clone())
    adam = torch.optim.Adam([theirs], lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    gen = torch.Generator().manual_seed(2)
    scale = torch.logspace(-6, 2, 40)  # columns whose moments differ by sixteen orders of magnitude
    for step in range(1, 401):
        theirs.grad = torch.randn(6, 40, generator=gen) * scale
        adam.step()
        update(s, theirs.grad, torch.ones(6, dtype=torch.bool), step, lr=3e-3)
    moments = adam.state[theirs]
    # Same operations on the same float32 constants: only roundings differ, of which exp_avg remembers about 10 steps
    # and exp_avg_sq all 400.
    torch.testing.assert_close(s[1] / scale, moments["exp_avg"] / scale, rtol=0, atol=10 * 2**-24)
    torch.testing.assert_close(s[2], moments["exp_avg_sq"], rtol=400**0.5 * 2**-23, atol=0)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=400 * 3e-3 * 2**-22 + 400 * 2**-24)


def test_moments_of_a_skipped_row_are_those_of_dense_adam_with_zero_gradients():
    """Row 1 is touched at steps 1, 4 and 9: dense Adam sees zeros between, moves the row, and ends with the same
    moments."""
    s, gen = state(2, 16), torch.Generator().manual_seed(3)
    dense = torch.nn.Parameter(s[0].clone())
    adam = torch.optim.Adam([dense], lr=1e-2)
    for step in range(1, 10):
        grad = torch.randn(2, 16, generator=gen)
        touched = torch.tensor([True, step in (1, 4, 9)])
        dense.grad = torch.where(touched[:, None], grad, 0)
        adam.step()
        before = s[0][1].clone()
        update(s, grad, touched, step)
        assert touched[1] or torch.equal(s[0][1], before)
    torch.testing.assert_close(s[1], adam.state[dense]["exp_avg"], rtol=0, atol=10 * 2**-24)
    torch.testing.assert_close(s[2], adam.state[dense]["exp_avg_sq"], rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(s[0][0], dense.detach()[0], rtol=0, atol=1e-6)
    assert (s[0][1] - dense.detach()[1]).abs().max() > 1e-3


def test_untouched_rows_keep_every_bit_and_may_hold_anything():
    s = state(8, 16, shadow=True)
    s[1].normal_(), s[2].uniform_()
    s[0][2], s[1][2] = math.nan, math.inf
    before = [t.clone() for t in s]
    grad = torch.full((8, 16), math.nan)
    touched = torch.zeros(8, dtype=torch.bool)
    touched[5], grad[5] = True, 1.0
    update(s, grad, touched, 7, unit_rows=True)
    rest = ~touched
    for now, then in zip(s, before, strict=True):
        assert torch.equal(now[rest].nan_to_num(-1), then[rest].nan_to_num(-1))
        assert not torch.equal(now[touched], then[touched])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free", "unit"])
def test_a_row_with_a_gradient_out_of_range_is_left_as_it_is(bad, unit_rows):
    s = state(4, 16, shadow=True)
    grad, touched = torch.ones(4, 16), torch.ones(4, dtype=torch.bool)
    grad[2, 3] = bad
    before = [t.clone() for t in s]
    update(s, grad, touched, 3, unit_rows=unit_rows)
    for now, then in zip(s, before, strict=True):
        assert torch.equal(now[2], then[2]) and now.isfinite().all()
    assert s[3].tolist() == [3, 3, 0, 3]
    update(s, grad, touched, 4, grad_scale=math.nan)
    assert s[3].tolist() == [3, 3, 0, 3]


def test_a_row_whose_projection_overflows_is_left_as_it_is():
    s = state(2, 16)
    s[0][1] = 1e20
    update(s, torch.full((2, 16), 1e18), torch.ones(2, dtype=torch.bool), 1, unit_rows=True)
    assert s[3].tolist() == [1, 0] and (s[0][1] == 1e20).all() and (s[1][1] == 0).all()
    assert s[0].isfinite().all()


def test_rows_of_zeros_stay_finite():
    s = state(3, 16, shadow=True)
    s[0][:2] = 0
    grad = torch.zeros(3, 16)
    grad[1] = torch.arange(1.0, 17.0)
    update(s, grad, torch.ones(3, dtype=torch.bool), 1, unit_rows=True)
    assert (s[0][0] == 0).all()
    torch.testing.assert_close(s[0][1], torch.full((16,), -0.25), rtol=1e-6, atol=0)  # every entry moved by lr
    torch.testing.assert_close(s[0].norm(dim=1), torch.tensor([0.0, 1.0, 1.0]), rtol=1e-6, atol=0)


def test_unit_rows_take_nothing_from_a_parallel_gradient():
    """g = 2 w leaves rounding only, on which a large eps lets no step be taken: w keeps its direction."""
    s = state(3, 64)
    s[0] /= s[0].norm(dim=1, keepdim=True)
    before = s[0].clone()
    update(s, 2 * before, torch.ones(3, dtype=torch.bool), 1, unit_rows=True, eps=1.0)
    torch.testing.assert_close(s[0], before, rtol=0, atol=3e-7)
    assert s[1].abs().max() < 1e-7


def test_a_step_that_is_not_later_counts_as_no_time():
    s, again = state(2, 8), state(2, 8)
    grad, touched = torch.ones(2, 8), torch.ones(2, dtype=torch.bool)
    s[3][:], again[3][:] = 9, 5  # last_step 9 is after step 5
    update(s, grad, touched, 5), update(again, grad, touched, 5)
    for a, b in zip(s[:4], again[:4], strict=True):
        assert torch.equal(a, b)
    before = s[0].clone()
    update(s, grad, touched, torch.tensor(0))
    assert torch.equal(s[0], before)


def test_late_steps_and_long_pauses():
    s, last = state(2, 8), 2**31 - 1
    s[1].fill_(1.0), s[2].fill_(1.0)
    grad, touched = torch.full((2, 8), 0.5), torch.ones(2, dtype=torch.bool)
    before = s[0].clone()
    update(s, grad, touched, last)
    assert s[3].tolist() == [last, last]
    torch.testing.assert_close(s[1], torch.full((2, 8), 0.05), rtol=1e-6, atol=0)  # the old moments are gone
    torch.testing.assert_close(s[0], before - 1e-2 * 0.05 / math.sqrt(0.25e-3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.999), (0.5, 0.9)])
def test_other_betas(betas):
    s = state(4, 8)
    want = exact(s)
    gen = torch.Generator().manual_seed(5)
    for step in (1, 2, 7):
        grad, touched = torch.randn(4, 8, generator=gen), torch.tensor([True, step != 2, True, step == 7])
        update(s, grad, touched, step, beta1=betas[0], beta2=betas[1])
        meaning(want, grad, touched, step, beta1=betas[0], beta2=betas[1])
    torch.testing.assert_close(s[0].double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s[1].double(), want[1], rtol=1e-6, atol=1e-7)


def test_tensors_and_numbers_mean_the_same_and_empty_is_nothing():
    a, b = state(5, 9), state(5, 9)
    grad, touched = torch.randn(5, 9), torch.tensor([1, 0, 1, 1, 0]).bool()
    update(a, grad, touched, 3, lr=0.1, grad_scale=2.0)
    for step in (torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        b = state(5, 9)
        update(b, grad, touched, step, lr=torch.tensor(0.1), grad_scale=torch.tensor(2.0))
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    for shape in ((0, 4), (3, 0)):
        update(state(*shape), torch.zeros(shape), torch.ones(shape[0], dtype=torch.bool), 1, unit_rows=True)


def test_a_parameter_may_be_updated_and_same_bits_for_any_thread_count():
    results = []
    before = torch.get_num_threads()
    grad, touched = torch.randn(300, 700), torch.rand(300) < 0.5
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            s = state(300, 700, shadow=True)
            s[0] = torch.nn.Parameter(s[0])
            for step in (1, 2):
                update(s, grad, touched, step, unit_rows=True)
            results.append([t.detach() for t in s])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def trained(shape, grad_dtype, op=row_adam_, unit_rows=False, shadow=True):
    """State after steps that touch two rows in three; some gradients are not finite, row 0 starts as zeros."""
    s, gen = state(*shape, shadow=shadow), torch.Generator().manual_seed(6)
    s[0][0] = 0
    for step in (1, 2, 3, 50, 51, 2000):
        grad = torch.randn(shape, generator=gen).to(grad_dtype)
        for f, bad in enumerate((math.nan, math.inf, -math.inf), step):
            grad[f % shape[0], -1] = bad
        touched = torch.rand(shape[0], generator=gen) < 0.7
        update(s, grad, touched, step, op=op, grad_scale=0.25, unit_rows=unit_rows)
    return s


@needs_native
@pytest.mark.parametrize("unit_rows", [False, True], ids=["free", "unit"])
@pytest.mark.parametrize("shape", [(11, 1), (9, 16), (9, 37), (7, 301)], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_equals_the_reference(shape, grad_dtype, unit_rows):
    """Moments of free rows to the bit: the same float32 operations in the same order. torch's square root is not always
    the nearest float32, so each of the six steps may round an entry of W (below 4) to the neighbour. With unit rows the
    dots with the row are added in another order as well."""
    if unit_rows and shape[1] == 1:
        pytest.skip("of the gradient of a unit row of one entry only rounding is left, on which Adam takes whole steps")
    W, m, v, last, shadow = trained(shape, grad_dtype, unit_rows=unit_rows)
    want = trained(shape, grad_dtype, reference.row_adam_, unit_rows)
    torch.testing.assert_close(W, want[0], rtol=0, atol=6 * 2**-22)
    torch.testing.assert_close(m, want[1], rtol=0, atol=1e-7 if unit_rows else 0)
    torch.testing.assert_close(v, want[2], rtol=0, atol=1e-8 if unit_rows else 0)
    assert torch.equal(last, want[3]) and (last == 2000).any() and (last < 2000).any()
    assert torch.equal(shadow[last > 0], W[last > 0].bfloat16())


@needs_native
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(700, 1), (200, 301)], ids=str)
def test_same_bits_for_every_instruction_set_thread_count_and_run(shape, grad_dtype, limit_isa):
    results, before = [], torch.get_num_threads()
    try:
        for isa in native.ISA_NAMES:
            limit_isa(isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                results.append(trained(shape, grad_dtype, unit_rows=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"W": torch.zeros(4, 8, dtype=torch.bfloat16)}, "W is torch.bfloat16"),
        ({"grad": torch.zeros(4, 7)}, "share a letter"),
        ({"grad": torch.zeros(8, 4).T}, "contiguous"),
        ({"exp_avg": torch.zeros(4, 16)[:, ::2]}, "contiguous"),
        ({"exp_avg_sq": torch.zeros(4)}, "exp_avg_sq has shape"),
        ({"last_step": torch.zeros(4, dtype=torch.int64)}, "last_step is"),
        ({"touched": torch.zeros(4)}, "touched is"),
        ({"touched": torch.zeros(3, dtype=torch.bool)}, "touched is"),
        ({"step": 0}, "count from 1"),
        ({"step": torch.tensor(1.0)}, "step is"),
        ({"step": torch.ones(1, dtype=torch.int64)}, "step is"),
        ({"lr": torch.tensor(1.0, dtype=torch.float64)}, "lr is"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": -0.1}, "beta2=-0.1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"shadow": torch.zeros(4, 8)}, "shadow is torch.float32"),
        ({"grad": torch.zeros(4, 8, device="meta")}, "move them to one device"),
    ],
)
def test_refuses(change, word):
    W, m, v, last, _ = state(4, 8)
    args = dict(W=W, grad=torch.zeros(4, 8), exp_avg=m, exp_avg_sq=v, last_step=last, step=1, lr=1e-3)
    with pytest.raises(ValueError, match=word):
        row_adam_(**(args | {"touched": torch.ones(4, dtype=torch.bool)} | change))


@pytest.mark.parametrize("full", [False, True])
def test_opcheck_and_compile(full):
    W, m, v, last, shadow = state(6, 10, shadow=full)
    grad, touched = torch.randn(6, 10), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    scale = torch.tensor(0.5) if full else None
    args = (W, grad, m, v, last, touched, torch.tensor(2), torch.tensor(1e-2), 0.9, 0.999, 1e-8, scale, full, shadow)
    torch.library.opcheck(torch.ops.qscope.row_adam_.default, args)
    a, b = state(6, 10, shadow=full), state(6, 10, shadow=full)

    def step_and_read(s):
        update(s, grad, touched, torch.tensor(2), lr=torch.tensor(1e-2), grad_scale=scale, unit_rows=full)
        return s[0] + 1

    got = torch.compile(step_and_read, fullgraph=True, backend="aot_eager")(a)
    assert torch.equal(got, step_and_read(b))
    assert all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], state(6, 10)[0])
