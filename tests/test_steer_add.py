"""steer_add_ against the formula in float64, and everything that must stay as it is: bits, neighbours, callers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qscope import native, reference
from qscope.ops import SteerSetting, settings_tensor, steer_add_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
U32 = 2.0**-24
SIZES = [(1, 1, 1), (5, 33, 3), (9, 64, 32), (1, 257, 4), (4, 70, 9)]  # N, D, S
MODES = {
    "add": SteerSetting.add(1.5),
    "clamp": SteerSetting.clamp(2.0, 0.25),
    "ablate": SteerSetting.ablate(-0.5),
    "scale": SteerSetting.scale(0.3, 0.1),
    "orthogonalise": SteerSetting.orthogonalise(),
    "gated": SteerSetting.add(-2.0).gated(0.2, 0.4),
    "off": SteerSetting(constant=9.0, enabled=False),
}


def inputs(N: int, D: int, S: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(N + 100 * D + S)
    h, directions, readers, gates = (torch.randn(rows, D, generator=gen) for rows in (N, S, S, S))
    readers, gates = readers / math.sqrt(D), gates / math.sqrt(D)
    return tuple(t.to(dtype) for t in (h, directions, readers, gates))


def rules(S: int) -> Tensor:
    modes = list(MODES.values())
    return settings_tensor([modes[s % len(modes)] for s in range(S)])


def meaning(
    h: Tensor, directions: Tensor, settings: Tensor, readers: Tensor, gates: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """h + sum_s c d in float64, how far a float32 computation may be from it, and |gate - threshold| over its error."""
    x, d, r, g = (t.double() for t in (h, directions, readers, gates))
    constant, slope, r_bias, rectify, gate_on, g_bias, threshold, enabled = settings.double().unbind(1)
    D, S = h.shape[1], directions.shape[0]
    read = x @ r.T + r_bias
    read_error = (D + 2) * U32 * (x.abs() @ r.abs().T + r_bias.abs())
    read = torch.where(rectify != 0, read.relu(), read)
    gate = x @ g.T + g_bias - threshold
    gate_error = (D + 2) * U32 * (x.abs() @ g.abs().T + g_bias.abs() + threshold.abs()) + 1e-300
    c = constant + slope * read
    c_error = slope.abs() * read_error + 2 * U32 * (constant.abs() + slope.abs() * (read.abs() + read_error))
    live = ((gate_on == 0) | (gate > 0)) & (enabled != 0)
    if mask is not None:
        live = live & (mask.reshape(len(h), -1) != 0)
    c, c_error = c * live, c_error * live
    size = (c.abs() + c_error) @ d.abs()
    want = x + c @ d
    error = c_error @ d.abs() + (S + 1) * U32 * (size + x.abs())
    margin = torch.where(gate_on != 0, gate.abs() / gate_error, torch.inf)
    return want, error, margin


def check(got: Tensor, want: Tensor, error: Tensor) -> None:
    half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    smallest = 2.0**-25 if got.dtype == torch.float16 else 0.0
    bound = error + (want.abs() + error) * half_ulp + smallest
    assert bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", ["none", "token", "pair"])
def test_matches_float64(size: tuple[int, int, int], dtype: torch.dtype, masked: str) -> None:
    N, _D, S = size
    h, directions, readers, gates = inputs(*size, dtype)
    gen = torch.Generator().manual_seed(1)
    mask = {"none": None, "token": torch.rand(N, generator=gen) > 0.3, "pair": torch.rand(N, S, generator=gen) > 0.3}
    settings = rules(S)
    want, error, margin = meaning(h, directions, settings, readers, gates, mask[masked])
    assert margin.min() > 1, "a gate of this input is too close to its threshold to be decided"
    fired = torch.full((N, S), 7, dtype=torch.uint8)
    before = h.clone()
    got = steer_add_(h, directions, settings, readers, gates, mask[masked], fired)
    assert got is h
    check(h, want, error)
    touched = fired.bool().any(1)
    assert torch.equal(h[~touched], before[~touched])
    assert bool((fired <= 1).all()) and not bool(fired[:, settings[:, 7] == 0].any())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_modes_mean_what_they_say(mode: str) -> None:
    """Each constructor against its own plain formula, not through the columns of settings."""
    h, directions, readers, gates = inputs(7, 40, 1)
    d, x, setting = directions[0].double(), h.double(), MODES[mode]
    if mode == "orthogonalise":
        readers = directions / directions.square().sum()
    z = (x @ readers[0].double() + setting.reader_bias).relu()[:, None]
    want = {
        "add": x + 1.5 * d,
        "clamp": x + (2.0 - z) * d,
        "ablate": x - z * d,
        "scale": x + (0.3 - 1) * z * d,
        "orthogonalise": x - (x @ d)[:, None] * d / d.square().sum(),
        "gated": x + torch.where(x @ gates[0].double() + 0.2 > 0.4, -2.0, 0.0)[:, None] * d,
        "off": x,
    }[mode]
    steer_add_(h, directions, settings_tensor([setting]), readers, gates)
    # 40 products of at most ~4 x 4 / sqrt(40) and directions of at most ~4: a few hundred u.
    torch.testing.assert_close(h.double(), want, rtol=0, atol=1e-5)
    if mode == "orthogonalise":
        assert float((h.double() @ d).abs().max()) < 1e-4


def test_low_precision_is_rounded_once() -> None:
    """32 steps of 2^-9 beside 1 vanish one by one in bfloat16; together they are 2^-4."""
    h, directions = torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(32, 8, dtype=torch.bfloat16)
    steer_add_(h, directions, settings_tensor([SteerSetting.add(2.0**-9)] * 32))
    assert bool((h == 1.0625).all())


def test_directions_read_h_as_it_came_in() -> None:
    h = torch.tensor([[1.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    steer_add_(h, directions, settings_tensor([SteerSetting.orthogonalise()] * 2), readers=directions)
    assert h.tolist() == [[-1.0, 0.0]]  # one after the other it would be 0


def test_a_gate_at_its_threshold_is_closed() -> None:
    h, directions = (
        torch.tensor([[1.0, 0.0], [math.nextafter(1.0, 2.0) + 1e-7, 0.0], [math.nan, 0.0]]),
        torch.eye(2)[1:],
    )
    fired = torch.empty(3, 1, dtype=torch.uint8)
    steer_add_(
        h, directions, settings_tensor([SteerSetting.add(1.0).gated(0.5, 1.5)]), None, torch.eye(2)[:1], None, fired
    )
    assert h[:, 1].tolist() == [0.0, 1.0, 0.0] and fired.flatten().tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_does_not_apply_changes_no_bit(dtype: torch.dtype) -> None:
    """Strength 0, masked tokens, disabled rules, silent features; NaN, infinity, -0 and NaN payloads included."""
    h, directions, readers, _gates = inputs(6, 9, 4, dtype)
    h[0, 0], h[1, 1], h[2, 2] = math.nan, math.inf, -0.0
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    h.view(integer)[0, 3] = -5  # a NaN with a payload
    directions[:, 4] = math.nan
    before = h.clone()
    off = [SteerSetting.add(0.0), SteerSetting(1.0, enabled=False), SteerSetting.add(1.0), SteerSetting.ablate(-1e4)]
    mask = torch.tensor([True, True, False, True]).repeat(6, 1)
    mask[:2, 3] = False  # reads of NaN and infinity are not silent
    fired = torch.ones(6, 4, dtype=torch.uint8)
    steer_add_(h, directions, settings_tensor(off), readers, None, mask, fired)
    assert torch.equal(h.view(integer), before.view(integer)) and not fired.any()
    # One more rule applies to one token: the others' NaN directions still add nothing to it.
    directions[2, 4] = 1.0
    mask[4, 2] = True
    steer_add_(h, directions, settings_tensor(off), readers, None, mask, fired)
    assert torch.equal(h[4], (before[4].float() + directions[2].float()).to(dtype)) and int(fired.sum()) == 1
    assert torch.equal(h[:4].view(integer), before[:4].view(integer))


def test_nan_that_is_read_is_passed_on_and_reported() -> None:
    h, directions, readers, _ = inputs(2, 5, 1)
    h[0, 0] = math.nan
    fired = torch.zeros(2, 1, dtype=torch.uint8)
    steer_add_(h, directions, settings_tensor([SteerSetting.clamp(1.0, 0.0)]), readers, None, None, fired)
    assert bool(h[0].isnan().all()) and not bool(h[1].isnan().any()) and fired.tolist() == [[1], [1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_dimensions_and_slices_leave_the_neighbours_alone(dtype: torch.dtype) -> None:
    big = inputs(24, 50, 1, dtype)[0].view(4, 6, 50)
    _, directions, readers, gates = inputs(1, 33, 5, dtype)
    settings, mask = rules(5), torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(2)) > 0.3
    part, before = big[..., 8:41], big.clone()
    want = part.reshape(24, 33).clone()
    fired = torch.zeros(4, 6, 5, dtype=torch.uint8)
    flat = torch.zeros(24, 5, dtype=torch.uint8)
    steer_add_(want, directions, settings, readers, gates, mask.view(24, 5), flat)
    assert steer_add_(part, directions, settings, readers, gates, mask, fired) is part
    assert torch.equal(part.reshape(24, 33), want) and torch.equal(fired.view(24, 5), flat) and bool(flat.any())
    assert torch.equal(big[..., :8], before[..., :8]) and torch.equal(big[..., 41:], before[..., 41:])
    row = part[2, 3]  # a single row, without leading dimensions
    steer_add_(row, directions, settings_tensor([SteerSetting.add(1.0)] * 5))
    assert not torch.equal(big[2, 3, 8:41], want[15])


def test_large_batches_are_done_in_blocks() -> None:
    """The reference's workspace holds 2^26 bytes: rows of the second block must be steered too."""
    h = torch.zeros(9, 1 << 20)
    fired = torch.zeros(9, 1, dtype=torch.uint8)
    mask = torch.arange(9) % 2 == 0
    steer_add_(h, torch.ones(1, 1 << 20), settings_tensor([SteerSetting.add(3.0)]), None, None, mask, fired)
    assert h[:, 0].tolist() == [3.0, 0.0] * 4 + [3.0] and fired.flatten().tolist() == mask.tolist()


@pytest.mark.parametrize(("shape", "S"), [((0, 8), 2), ((3, 8), 0), ((2, 0, 8), 2)])
def test_nothing_to_do(shape: tuple[int, ...], S: int) -> None:
    h = torch.ones(shape)
    fired = torch.zeros(*shape[:-1], S, dtype=torch.uint8)
    assert steer_add_(h, torch.ones(S, 8), torch.ones(S, 8), fired=fired) is h and bool((h == 1).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"h": torch.zeros(3, 7)}, "must be"),
        ({"h": torch.zeros(3, 8, dtype=torch.float64)}, "float64"),
        ({"h": torch.zeros(8, 3).T}, "rows must be contiguous"),
        ({"h": torch.zeros(1, 8).expand(3, 8)}, "overlap"),
        ({"h": torch.zeros(2, 3, 8)[:, :2]}, "common stride"),
        ({"h": torch.zeros(3, 8, requires_grad=True)}, "out of place for training"),
        ({"directions": torch.zeros(2, 8, requires_grad=True)}, "out of place for training"),
        ({"directions": torch.zeros(8, 2).T}, r"\.contiguous\(\)"),
        ({"directions": torch.zeros(33, 8), "settings": torch.zeros(33, 8)}, "at most 32"),
        ({"settings": torch.zeros(2, 7)}, "settings_tensor"),
        ({"settings": torch.zeros(2, 8).double()}, "settings_tensor"),
        ({"readers": torch.zeros(1, 8)}, r"readers \[1, 8\]"),
        ({"gates": torch.zeros(2, 8, dtype=torch.int8)}, "int8"),
        ({"mask": torch.ones(3)}, "bool or uint8"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask \[2\]"),
        ({"fired": torch.zeros(3, 2)}, "fired must be uint8"),
        ({"fired": torch.zeros(3, dtype=torch.uint8)}, "fired must be uint8"),
        ({"readers": torch.zeros(2, 8, device="meta")}, "one device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(change: dict[str, Tensor], words: str) -> None:
    arguments = {"h": torch.zeros(3, 8), "directions": torch.zeros(2, 8), "settings": torch.zeros(2, 8)} | change
    with pytest.raises(ValueError, match=words):
        steer_add_(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_settings_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="constant is"):
        SteerSetting.add(value)


def test_settings_tensor_has_the_documented_columns() -> None:
    setting = SteerSetting.clamp(2.0, 0.25).gated(0.5, 0.75)
    assert settings_tensor([setting]).tolist() == [[2.0, -1.0, 0.25, 1.0, 1.0, 0.5, 0.75, 1.0]]
    assert settings_tensor([]).shape == (0, 8)


@pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there is no native kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_gives_a_token_the_same_bits_in_any_company(dtype: torch.dtype, limit_isa: Callable[[str], str]) -> None:
    """Whatever the threads (the batch is large enough for four), the instruction set and the batch."""
    h, directions, readers, gates = inputs(200, 261, 32, dtype)
    directions, readers = directions.float(), readers.to(torch.float16)  # mixed dtypes are allowed
    mask = torch.rand(200, 32, generator=torch.Generator().manual_seed(3)) > 0.2
    mask[::7] = False
    h[5, 3], h[9, 4] = math.nan, math.inf

    def steered(rows: slice, threads: int, isa: str) -> tuple[Tensor, Tensor]:
        limit_isa(isa)
        torch.set_num_threads(threads)
        part, fired = h[rows].clone(), torch.full((len(h[rows]), 32), 9, dtype=torch.uint8)
        steer_add_(part, directions, rules(32), readers, gates, mask[rows], fired)
        return part.view(torch.int32 if dtype == torch.float32 else torch.int16), fired

    assert native.load("cpu") and native.implements("steer_add_", "cpu")
    before = torch.get_num_threads()
    try:
        want, fired = steered(slice(0, 200), 1, "avx512")
        assert 1000 < int(fired.sum()) < 4000
        for threads, isa in ((2, "avx512"), (4, "avx2"), (4, "portable")):
            got = steered(slice(0, 200), threads, isa)
            assert torch.equal(got[0], want) and torch.equal(got[1], fired), (threads, isa)
        for n in (0, 3, 5, 9, 101, 199):
            got = steered(slice(n, n + 1), 1, "avx512")
            assert torch.equal(got[0][0], want[n]) and torch.equal(got[1][0], fired[n]), n
    finally:
        torch.set_num_threads(before)


def test_in_place_change_is_known_to_autograd() -> None:
    """h saved for another tensor's gradient and then steered must be an error, not a wrong gradient."""
    h, W = torch.ones(2, 3), torch.ones(3, 3, requires_grad=True)
    loss = (h @ W).sum()
    steer_add_(h, torch.ones(1, 3), settings_tensor([SteerSetting.add(1.0)]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck() -> None:
    h, directions, readers, gates = inputs(5, 12, 3)
    op = torch.ops.qscope.steer_add_.default
    mask, fired = torch.ones(5, 3, dtype=torch.bool), torch.zeros(5, 3, dtype=torch.uint8)
    torch.library.opcheck(op, (h, directions, rules(3), readers, gates, mask, fired))
    torch.library.opcheck(op, (h, directions, rules(3), None, None, None, None))


def test_compiles_without_graph_break() -> None:
    h, directions, readers, gates = inputs(6, 12, 3)
    want = reference_result(h, directions, readers, gates)
    h, settings = h.view(2, 3, 12), rules(3)

    def step(h: Tensor) -> Tensor:
        return steer_add_(h * 1.0, directions, settings, readers, gates) * 2

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(h).view(6, 12), want * 2)


def reference_result(h: Tensor, directions: Tensor, readers: Tensor, gates: Tensor) -> Tensor:
    result = h.clone()
    reference.steer_add_(result, directions, rules(len(directions)), readers, gates, None, None)
    return result
