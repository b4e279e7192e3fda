"""The Triton steering kernels against the formula in float64, in Triton's interpreter or, if there is one, on the GPU.

Bounds are the rigorous ones of float32 sums (Higham 2002, section 3.1) carried through the formula, then one
rounding to the output's type: half a unit, but a whole one for bfloat16 because the interpreter truncates.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels import steer_add
from qscope_kernels.steer_add import SteerConfig, rows_config, shared_config, steer_add_

INTERPRETED = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
U32 = 2.0**-24
ROUND = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
# Several tiles per row, several tokens per program, directions in several steps, a last one of each that is ragged.
SMALL = SteerConfig(tokens=4, rows=2, directions=2, block_d=128, num_warps=1, vec=4)
# constant, slope, reader_bias, rectify, gate_on, gate_bias, gate_threshold, enabled
RULES = torch.tensor(
    [
        [1.5, 0.0, 0.0, 0, 0, 0.0, 0.0, 1],
        [2.0, -1.0, 0.25, 1, 0, 0.0, 0.0, 1],
        [0.0, -1.0, -0.5, 1, 1, 0.1, 0.3, 1],
        [0.0, 0.7, 0.1, 0, 1, -0.2, -0.1, 1],
        [9.0, 1.0, 0.0, 0, 0, 0.0, 0.0, 0],
    ]
)


def inputs(N: int, D: int, S: int, dtype: torch.dtype, rows_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """h, directions, settings, readers, gates, a mask per pair."""
    gen = torch.Generator().manual_seed(N + 10 * D + S)
    h, directions, readers, gates = (torch.randn(rows, D, generator=gen) for rows in (N, S, S, S))
    rows = [t.to(rows_dtype or dtype).to(DEVICE) for t in (directions, readers / math.sqrt(D), gates / math.sqrt(D))]
    mask = torch.rand(N, S, generator=gen) > 0.3
    settings = RULES.repeat(7, 1)[:S].contiguous()
    return h.to(dtype).to(DEVICE), rows[0], settings.to(DEVICE), rows[1], rows[2], mask.to(DEVICE)


def expect(
    h: Tensor, directions: Tensor, settings: Tensor, readers: Tensor | None, gates: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The result in float64, the bound on a float32 computation before rounding, and which pairs apply."""
    x, D = h.double(), h.shape[1]
    constant, slope, r_bias, rectify, gate_on, g_bias, threshold, enabled = settings.double().unbind(1)
    c, c_error = constant.expand(len(x), -1), torch.zeros(len(x), len(directions), device=h.device).double()
    live = (enabled != 0).expand_as(c)
    if readers is not None:
        r = readers.double()
        read = x @ r.T + r_bias
        error = (D + 2) * U32 * (x.abs() @ r.abs().T + r_bias.abs())
        read = torch.where(rectify != 0, read.relu(), read)
        c = torch.where(slope != 0, constant + slope * read, c)
        c_error = slope.abs() * error + 2 * U32 * (constant.abs() + slope.abs() * (read.abs() + error))
    if gates is not None:
        g = gates.double()
        gate = x @ g.T + g_bias - threshold
        error = (D + 2) * U32 * (x.abs() @ g.abs().T + g_bias.abs() + threshold.abs())
        assert bool(((gate.abs() > error) | (gate_on == 0)).all()), "this input has a gate that cannot be decided"
        live = live & ((gate_on == 0) | (gate > 0))
    if mask is not None:
        live = live & (mask.reshape(len(x), -1) != 0)
    c, c_error = c * live, c_error * live
    d = directions.double()
    want = x + c @ d
    return want, c_error @ d.abs() + (len(d) + 1) * U32 * ((c.abs() + c_error) @ d.abs() + x.abs()), c != 0


def check(h: Tensor, arguments: tuple[Tensor | None, ...], config: SteerConfig | None) -> None:
    want, error, applies = expect(h, *arguments)  # type: ignore[arg-type]
    bound = error + (want.abs() + error) * ROUND[h.dtype] + (2.0**-24 if h.dtype == torch.float16 else 0.0)
    runs = []
    for _ in range(1 if INTERPRETED else 2):
        got, fired = h.clone(), torch.full(applies.shape, 7, dtype=torch.uint8, device=h.device)
        assert steer_add_(got, *arguments, fired, config) is got  # type: ignore[arg-type]
        assert bool(((got.double() - want).abs() <= bound).all())
        assert torch.equal(fired, applies.to(torch.uint8))
        assert torch.equal(got[~applies.any(1)], h[~applies.any(1)])
        runs.append(got)
    assert torch.equal(runs[0], runs[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 300, 3), (1, 1, 1), (9, 33, 11)], ids=str)
def test_general(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, directions, settings, readers, gates, mask = inputs(*size, dtype)
    check(h, (directions, settings, readers, gates, mask), SMALL)


@pytest.mark.parametrize("part", ["readers", "gates", "mask"])
def test_general_with_one_part_only(part: str) -> None:
    h, directions, settings, readers, gates, mask = inputs(5, 140, 5, torch.float32)
    only = {"readers": (readers, None, None), "gates": (None, gates, mask[:, 0]), "mask": (None, None, mask)}[part]
    check(h, (directions, settings, *only), SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_shared(dtype: torch.dtype, masked: bool) -> None:
    for size in ((11, 300, 5), (1, 1, 1)):
        h, directions, settings, _, _, mask = inputs(*size, dtype)
        check(h, (directions, settings, None, None, mask[:, 0].contiguous() if masked else None), SMALL)


def test_default_configurations_and_the_limit_of_directions() -> None:
    """32 directions with the launcher's own cut, and directions of another dtype than h."""
    h, directions, settings, readers, gates, mask = inputs(2, 96, 32, torch.bfloat16, torch.float32)
    check(h, (directions, settings, readers, gates, mask), None)
    check(h, (directions, settings, None, None, mask[:, 0].to(torch.uint8)), None)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_tokens_dot_is_cut_up_alike_for_every_batch(itemsize: int, aligned: bool) -> None:
    for D in (1, 33, 256, 4096, 5120):
        cuts = {
            (c.block_d, c.num_warps, c.vec)
            for N in (1, 200, 8192)
            for S in (1, 8, 32)
            for c in [rows_config(N, S, D, itemsize, aligned)]
        }
        assert len(cuts) == 1
        for N in (1, 7, 8192, 100_000):
            shared = shared_config(N, 8, D, itemsize, aligned)
            assert shared.tokens % shared.rows == 0


def test_the_compiler_cuts_a_dot_up_alike_for_every_batch() -> None:
    """The interpreter adds with numpy; on a GPU the layout that Triton chooses decides the order."""
    script = Path(__file__).with_name("dot_layouts.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(script.parents[2] / "kernels"), env.get("PYTHONPATH")]))
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 6 and not [case for case in found if len(case["layouts"]) != 1]


def test_the_launch_is_cut_for_the_widest_of_what_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes that hold 8 columns of h but 4 of a reader would add across lanes, and differently from N to N."""
    asked = []
    monkeypatch.setattr(steer_add, "rows_config", lambda *shape: asked.append(shape) or rows_config(*shape))
    h, directions, settings, readers, gates, mask = inputs(2, 32, 3, torch.bfloat16)
    for reader, gate in ((readers, gates), (readers.float(), gates), (readers, gates.float()), (None, gates)):
        steer_add_(h, directions, settings, reader, gate, mask)
    shifted = torch.zeros(3 * 32 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(3, 32)
    steer_add_(h, directions, settings, shifted, None, mask)
    assert [(itemsize, aligned) for _, _, _, itemsize, aligned in asked] == [
        (2, True), (4, True), (4, True), (2, True), (2, False)
    ]  # fmt: skip


def test_a_tokens_bits_do_not_depend_on_its_neighbours() -> None:
    h, directions, settings, readers, gates, mask = inputs(9, 200, 5, torch.float32)
    whole = steer_add_(h.clone(), directions, settings, readers, gates, mask, None, SMALL)
    for n in (0, 3, 8):
        alone = steer_add_(h[n : n + 1].clone(), directions, settings, readers, gates, mask[n : n + 1], None, SMALL)
        assert torch.equal(alone[0], whole[n])


@pytest.mark.parametrize("pairs", [False, True])
def test_deltas_are_added_in_ascending_order(pairs: bool) -> None:
    """Powers of two make every product exact, fused or not: only the order of additions decides the bits."""
    h, directions, settings, _, _, _ = inputs(3, 140, 11, torch.float32)
    settings.zero_()
    settings[:, 0] = 2.0 ** torch.arange(-5, 6, device=DEVICE).float()
    settings[:, 7] = 1.0
    up, down = torch.zeros(140, device=DEVICE), torch.zeros(140, device=DEVICE)
    for s in range(11):
        up, down = up + settings[s, 0] * directions[s], down + settings[10 - s, 0] * directions[10 - s]
    assert not torch.equal(h + up, h + down)  # the input can tell the two apart
    mask = torch.ones(3, 11, dtype=torch.bool, device=DEVICE) if pairs else None
    assert torch.equal(steer_add_(h.clone(), directions, settings, None, None, mask, None, SMALL), h + up)


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_and_neighbours_that_nothing_applies_to_keep_their_bits(pairs: bool) -> None:
    """h is a slice of a wider tensor; NaN payloads, and NaN in a direction and a reader that are not used."""
    big = torch.randn(6, 60, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    big.view(torch.int32)[1, 20] = -5
    big[4, 15] = -0.0  # adding a zero to it would show
    big[0, 20] = math.nan  # a reader that is not consulted must not carry it to the rest of the row
    _, directions, _, readers, gates, _ = inputs(1, 33, 3, torch.float32)
    settings = RULES[[0, 1, 1]].to(DEVICE)
    settings[1, 7] = 0.0
    settings[2, :2] = 0.0
    directions[1:], readers[:2], gates[:] = math.nan, math.nan, math.nan
    mask = torch.tensor([True, False, True, True, False, True], device=DEVICE)
    before = big.clone()
    h = big[:, 9:42]
    parts = (readers, gates, mask[:, None].expand(6, 3)) if pairs else (None, None, mask)
    steer_add_(h, directions, settings, *parts, None, SMALL)
    want = before.clone()
    want[mask, 9:42] += 1.5 * directions[0]
    torch.testing.assert_close(h[mask], want[mask, 9:42], rtol=2 * U32, atol=1e-6, equal_nan=True)
    h.copy_(before[:, 9:42].where(mask[:, None], h))
    assert torch.equal(big.view(torch.int32), before.view(torch.int32))


def test_a_gate_at_its_threshold_is_closed_and_nan_is_read() -> None:
    h = torch.tensor([[1.0, 0.0], [1.0 + 2.0**-23, 0.0], [math.nan, 0.0]], device=DEVICE)
    eye, fired = torch.eye(2, device=DEVICE), torch.empty(3, 1, dtype=torch.uint8, device=DEVICE)
    gated = torch.tensor([[1.0, 0.0, 0.0, 0, 1, 0.0, 1.0, 1]], device=DEVICE)
    steer_add_(h, eye[1:], gated, None, eye[:1], None, fired, SMALL)
    assert h[:, 1].tolist() == [0.0, 1.0, 0.0] and fired.flatten().tolist() == [0, 1, 0]
    clamp = torch.tensor([[1.0, -1.0, 0.0, 1, 0, 0.0, 0.0, 1]], device=DEVICE)
    steer_add_(h, eye[1:], clamp, eye[:1], None, None, fired, SMALL)
    assert bool(h[2].isnan().all()) and not bool(h[:2].isnan().any()) and fired.flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize(("N", "S"), [(0, 2), (3, 0)])
def test_empty(N: int, S: int) -> None:
    h, rows = torch.ones(N, 8, device=DEVICE), torch.ones(S, 8, device=DEVICE)
    assert bool((steer_add_(h, rows, torch.ones(S, 8, device=DEVICE), rows) == 1).all())


def test_wrong_input_is_refused_with_what_was_given() -> None:
    h, directions, settings, readers, gates, mask = inputs(3, 8, 2, torch.float32)
    many = torch.zeros(33, 8, device=DEVICE)
    for arguments, words in (
        ((h[:, :-1], directions, settings), r"h \[3, 7\]"),
        ((h, many, many), "at most 32"),
        ((h.double(), directions, settings), "float64"),
        ((h, directions, settings.double()), "float32 settings"),
        ((h, directions, settings, readers[:1]), r"readers \[1, 8\]"),
        ((h, directions, settings, None, gates, mask.float()), "mask"),
        ((h, directions, settings, None, gates, mask[:2]), "mask"),
        ((h, directions, settings, None, None, None, mask), "fired"),
        ((h, directions.to("meta"), settings), "one device"),
        ((h[:1].expand(3, 8), directions, settings), "separate rows"),
        ((h, directions.T.contiguous().T, settings), "contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            steer_add_(*arguments)
