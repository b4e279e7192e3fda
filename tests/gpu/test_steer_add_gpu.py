"""The steering kernels on a GPU at real sizes: what the interpreter cannot show.

That is bfloat16 rounding, run-to-run bits, bits that do not depend on the batch, one launch that never waits, and
CUDA graphs that are replayed with other settings.
"""

import math
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

from qscope.ops import SteerSetting, settings_tensor, steer_add_  # noqa: E402

U32 = 2.0**-24
ROUND = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# N, D, S: one token, the 8B width, the limit of directions, and a shape where nothing divides.
SHAPES = [(1, 4096, 1), (1, 5120, 32), (8192, 4096, 8), (700, 2048, 32), (333, 1531, 5)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """h, directions, settings (add, clamp, gated scale, ... in turn), readers, gates, mask [N, S]."""
    N, D, S = shape
    gen = torch.Generator("cuda").manual_seed(N + S)
    h, directions, readers, gates = (torch.randn(r, D, generator=gen, device="cuda") for r in (N, S, S, S))
    rules = [
        SteerSetting.add(1.5),
        SteerSetting.clamp(2.0, 0.25),
        SteerSetting.scale(0.5, 0.1).gated(0.2, 0.3),
        SteerSetting.orthogonalise(),
        SteerSetting(7.0, enabled=False),
    ]
    settings = settings_tensor([rules[s % 5] for s in range(S)], "cuda")
    mask = torch.rand(N, S, generator=gen, device="cuda") > 0.3
    rows = [t.to(dtype) for t in (directions, readers / math.sqrt(D), gates / math.sqrt(D))]
    return h.to(dtype), rows[0], settings, rows[1], rows[2], mask


def meaning(
    h: Tensor, directions: Tensor, settings: Tensor, readers: Tensor, gates: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The result in float64, the bound on a float32 one before rounding, tokens with a gate too close to call."""
    x, D = h.double(), h.shape[1]
    constant, slope, r_bias, rectify, gate_on, g_bias, threshold, enabled = settings.double().unbind(1)
    r, g, d = readers.double(), gates.double(), directions.double()
    read = x @ r.T + r_bias
    error = (D + 2) * U32 * (x.abs() @ r.abs().T + r_bias.abs())
    read = torch.where(rectify != 0, read.relu(), read)
    gate = x @ g.T + g_bias - threshold
    # The D terms of a bound for any order would leave 2 % of the tokens undecided: a lane of the kernel adds far fewer
    # one after the other (ceil(D / 1024) blocks of at most 8 neighbours, then a tree over 256 lanes).
    doubt = (gate.abs() <= (D // 256 + 32) * U32 * (x.abs() @ g.abs().T + 1.0)) & (gate_on != 0)
    live = ((gate_on == 0) | (gate > 0)) & (enabled != 0) & mask
    c = (constant + slope * read) * live
    c_error = (slope.abs() * error + 2 * U32 * (constant.abs() + slope.abs() * (read.abs() + error))) * live
    bound = c_error @ d.abs() + (len(d) + 1) * U32 * ((c.abs() + c_error) @ d.abs() + x.abs())
    return x + c @ d, bound, doubt.any(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64_and_repeats_to_the_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    h, *arguments = inputs(shape, dtype)
    got = steer_add_(h.clone(), *arguments)
    want, error, doubt = meaning(h, *arguments)
    bound = error + (want.abs() + error) * ROUND[dtype] + 2.0**-25 * (dtype == torch.float16)
    ratio = (got.double() - want).abs() / bound
    assert float(ratio[~doubt].max()) <= 1 and float(doubt.double().mean()) < 0.02
    for _ in range(3):
        assert torch.equal(got, steer_add_(h.clone(), *arguments))
    if shape[0] > 1:
        for n in (0, shape[0] // 2, shape[0] - 1):
            alone = steer_add_(h[n : n + 1].clone(), *arguments[:-1], arguments[-1][n : n + 1])
            assert torch.equal(alone[0], got[n]), "a token's bits depend on the size of the batch"


@pytest.mark.parametrize(
    ("shape", "rows_dtype"), [((4000, 4096, 8), torch.float32), ((4000, 1531, 2), torch.bfloat16)], ids=str
)
def test_a_tokens_bits_do_not_depend_on_the_size_of_the_batch(
    shape: tuple[int, int, int], rows_dtype: torch.dtype
) -> None:
    """Beside a reader of another dtype, and at a width without 128-bit loads."""
    h, directions, settings, readers, gates, mask = inputs(shape, torch.bfloat16)
    parts = directions.to(rows_dtype), settings, readers.to(rows_dtype), gates.to(rows_dtype)
    whole = steer_add_(h.clone(), *parts, mask)
    for N in (1, 300):
        assert torch.equal(steer_add_(h[-N:].clone(), *parts, mask[-N:]), whole[-N:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pure_addition_is_exact_to_the_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Powers of two make every product exact: float32 sums in ascending s, one rounding, is then one answer."""
    h, directions, settings, _, _, mask = inputs(shape, dtype)
    settings.zero_()
    settings[:, 0] = 2.0 ** (torch.arange(shape[2], device="cuda") % 7 - 3).float()
    settings[:, 7] = 1.0
    delta = torch.zeros(shape[1], device="cuda")
    for s in range(shape[2]):
        delta = delta + settings[s, 0] * directions[s].float()
    want = torch.where(mask[:, :1], (h.float() + delta).to(dtype), h)
    assert torch.equal(steer_add_(h.clone(), directions, settings, mask=mask[:, 0].contiguous()), want)
    pairs = mask[:, :1].expand(-1, shape[2])
    assert torch.equal(steer_add_(h.clone(), directions, settings, mask=pairs), want)


def captured(h: Tensor, *arguments: Tensor | None) -> torch.cuda.CUDAGraph:
    steer_add_(h.clone(), *arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steer_add_(h, *arguments)
    return graph


@pytest.mark.parametrize("general", [False, True])
def test_a_graph_is_replayed_with_other_settings_and_masks(general: bool) -> None:
    h, directions, settings, readers, gates, mask = inputs((40, 4096, 5), torch.bfloat16)
    mask = mask if general else mask[:, 0].contiguous()
    parts = (readers, gates, mask) if general else (None, None, mask)
    fired = torch.zeros(40, 5, dtype=torch.uint8, device="cuda")
    source = h.clone()
    graph = captured(h, directions, settings, *parts, fired)
    for change in (
        lambda: None,
        lambda: settings[:, 0].add_(0.5),
        lambda: mask.logical_not_(),
        lambda: settings.zero_(),
    ):
        change()
        h.copy_(source)
        graph.replay()
        want_fired = torch.zeros_like(fired)
        want = steer_add_(source.clone(), directions, settings, *parts, want_fired)
        assert torch.equal(h, want) and torch.equal(fired, want_fired)
    assert torch.equal(h, source)  # the last settings enable nothing


@pytest.mark.parametrize("general", [False, True])
def test_one_launch_that_does_not_wait(general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # conftest.py asks for deterministic algorithms, which fill the scratch with NaN: a launch that is not ours.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    h, directions, settings, readers, gates, mask = inputs((8, 4096, 32), torch.bfloat16)
    arguments = (directions, settings, *((readers, gates, mask) if general else (None, None, mask[:, 0].contiguous())))
    steer_add_(h, *arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            steer_add_(h, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # Without the profiler's library (CUPTI) there is no event at all: then nothing is shown, and the test must fail.
    assert len(kernels) == 1 and "steer" in kernels[0], kernels


def test_memory_is_the_scratch_that_is_documented() -> None:
    h, directions, settings, readers, gates, mask = inputs((8192, 4096, 8), torch.bfloat16)
    token_mask = mask[:, 0].contiguous()
    for arguments, extra in (((None, None, token_mask), 0), ((readers, gates, mask), 8192 * 8 * 4)):
        steer_add_(h, directions, settings, *arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        steer_add_(h, directions, settings, *arguments)
        assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before <= extra


def test_rows_beyond_two_to_the_31_elements_are_addressed() -> None:
    N, D = 1_100_000, 2048
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    h = torch.zeros(N, D, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, D, dtype=torch.bfloat16, device="cuda")
    mask = torch.zeros(N, dtype=torch.bool, device="cuda")
    mask[-1] = True
    steer_add_(h, one, settings_tensor([SteerSetting.add(2.0)], "cuda"), mask=mask)
    steer_add_(h, one, settings_tensor([SteerSetting.scale(2.0, 0.0)], "cuda"), readers=one, mask=mask)
    # 2 + 4096: bfloat16 is spaced by 32 there.
    assert h[-1].tolist() == [4096.0] * D and int(h[:-1].count_nonzero()) == 0
