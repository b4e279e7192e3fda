"""Steering-add: up to 32 directions added to the residual in place, each with its own rule, in one launch.

    c[n, s] = mask[n, s] * gate[n, s] * (constant[s] + slope[s] * read[n, s])
    h[n]   += sum_s c[n, s] * directions[s]

read and gate are dots with h as it comes in; `qscope.ops.steer_add_` documents them and the columns of
`settings`. N tokens, D residual width, S directions.

    _steer_shared_kernel   no readers, no gates, at most one mask bit per token: the sum over s is the same for
                           all tokens, so a program forms it once and streams its tokens past it
    _steer_rows_kernel     everything else: dots, coefficients and update of a block of whole tokens

The dots are fused multiply-adds, not tensor-core products. For N = 8192, D = 4096, S = 8 with readers and
gates they are 0.8 G multiply-adds, 27 us of an H200's float32 rate beside 31 us for reading and writing h in
bfloat16, and in exchange any mixture of dtypes gets float32 accuracy, and a token's bits depend neither on N
nor on its neighbours: D, dtypes and alignment alone decide how the lanes of a dot are cut up and added.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels._arguments import FLOATS, check, describe

MAX_DIRECTIONS = 32
SETTINGS = ("constant", "slope", "reader_bias", "rectify", "gate_on", "gate_bias", "gate_threshold", "enabled")
_FLAGS = (torch.bool, torch.uint8)


@triton.jit
def _report_shared(settings_ptr, mask_ptr, mask_stride, fired_ptr, first, last, S, SP: tl.constexpr, BT: tl.constexpr):
    """fired[n, s] for n = first .. last - 1."""
    s = tl.arange(0, SP)
    enabled = tl.load(settings_ptr + s * 8 + 7, mask=s < S, other=0.0) != 0
    fires = enabled & (tl.load(settings_ptr + s * 8, mask=s < S, other=0.0) != 0)
    for start in range(first, last, BT):
        n = start + tl.arange(0, BT)
        live = n < last
        if mask_ptr is not None:
            live &= tl.load(mask_ptr + n * mask_stride, mask=live, other=0) != 0
        bits = (live[:, None] & fires[None, :]).to(tl.uint8)
        inside = (n < last)[:, None] & (s < S)[None, :]
        tl.store(fired_ptr + n[:, None] * S + s[None, :], bits, mask=inside)


@triton.jit
def _steer_shared_kernel(
    h_ptr,  # [N, D]
    h_stride,
    directions_ptr,  # [S, D]
    settings_ptr,  # [S, 8] float32
    mask_ptr,  # [N] uint8, or None
    mask_stride,
    fired_ptr,  # [N, S] uint8, or None
    N,
    S,
    D,
    tokens,  # per program, a multiple of BT
    SP: tl.constexpr,
    UNROLL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * tokens
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    in_row = d < D
    delta = tl.zeros([BD], dtype=tl.float32)
    applies = False
    # Unrolled, and predicated rather than branched over: UNROLL rows of directions are requested at once.
    for block in range(0, S, UNROLL):
        for u in tl.static_range(UNROLL):
            s = block + u
            row = settings_ptr + s * 8
            constant = tl.load(row, mask=s < S, other=0.0)
            c = tl.where(tl.load(row + 7, mask=s < S, other=0.0) != 0, constant, 0.0)
            # The interpreter cannot combine a scalar condition with a block of them, but it can select a width.
            used = d < tl.where(c != 0, D, 0)
            direction = tl.load(directions_ptr + s * D + d, mask=used, other=0.0).to(tl.float32)
            delta += c * direction
            applies |= c != 0
    last = tl.minimum(first + tokens, N)
    if fired_ptr is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if tl.program_id(1) == 0:
            _report_shared(settings_ptr, mask_ptr, mask_stride, fired_ptr, first, last, S, SP, BT)
    if applies:
        for start in range(first, last, BT):
            n = start + tl.arange(0, BT)
            live = n < last
            if mask_ptr is not None:
                live &= tl.load(mask_ptr + n * mask_stride, mask=live, other=0) != 0
            at = h_ptr + n[:, None] * h_stride + d[None, :]
            inside = live[:, None] & in_row[None, :]
            h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, (h + delta[None, :]).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dots(
    at,  # [BT] pointers to the first element of each token's row
    live,  # [BT] tokens to read
    rows_ptr,  # [S, D], or None
    settings_ptr,  # [S, 8] float32
    column,  # of settings: where it is 0 the row is not needed
    first,
    S,
    D,
    BT: tl.constexpr,
    SB: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    """<h[n], rows[s]> for s = first .. first + SB - 1, as SB blocks [BT] of float32."""
    acc = ()
    widths = ()
    dots = ()
    if rows_ptr is None:
        for _ in tl.static_range(SB):
            dots = dots + (tl.zeros([BT], dtype=tl.float32),)  # noqa: RUF005 - Triton has no unpacking
    else:
        for u in tl.static_range(SB):
            s = first + u
            wanted = tl.load(settings_ptr + s * 8 + column, mask=s < S, other=0.0)
            enabled = tl.load(settings_ptr + s * 8 + 7, mask=s < S, other=0.0)
            widths = widths + (tl.where(wanted != 0, tl.where(enabled != 0, D, 0), 0),)  # noqa: RUF005 - Triton has no unpacking
            acc = acc + (tl.zeros([BT, BD // VEC], dtype=tl.float32),)  # noqa: RUF005 - Triton has no unpacking
        for start in range(0, D, BD):
            # Two-dimensional from the start, so that tokens and rows are loaded in one layout and neither has to
            # be exchanged through shared memory.
            d = start + tl.arange(0, BD)[None, :]
            h = tl.load(at[:, None] + d, mask=live[:, None] & (d < D), other=0.0).to(tl.float32)
            more = ()
            for u in tl.static_range(SB):
                row = tl.load(rows_ptr + (first + u) * D + d, mask=d < widths[u], other=0.0).to(tl.float32)
                # VEC neighbours lie in one lane: adding them at once leaves one accumulator where VEC would be.
                more = more + (acc[u] + tl.sum(tl.reshape(h * row, [BT, BD // VEC, VEC]), axis=2),)  # noqa: RUF005 - Triton has no unpacking
            acc = more
        for u in tl.static_range(SB):
            dots = dots + (tl.sum(acc[u], axis=1),)  # noqa: RUF005 - Triton has no unpacking
    return dots


@triton.jit
def _coefficient(
    live,  # [BT]
    read,  # [BT] dot with the reader, or anything if HAS_READERS is false
    gate,  # [BT]
    row_ptr,  # the direction's 8 settings
    known,  # whether there is such a direction
    HAS_READERS: tl.constexpr,
    HAS_GATES: tl.constexpr,
):
    """c[n] of one direction, [BT]."""
    c = tl.zeros_like(read) + tl.load(row_ptr, mask=known, other=0.0)
    if HAS_READERS:
        slope = tl.load(row_ptr + 1, mask=known, other=0.0)
        read += tl.load(row_ptr + 2, mask=known, other=0.0)
        floor = tl.where(tl.load(row_ptr + 3, mask=known, other=0.0) != 0, 0.0, float("-inf"))
        read = tl.where(read < floor, floor, read)  # a NaN stays
        c = tl.where(slope != 0, c + slope * read, c)
    if HAS_GATES:
        threshold = tl.load(row_ptr + 6, mask=known, other=0.0)
        above = (gate + tl.load(row_ptr + 5, mask=known, other=0.0) > threshold).to(tl.int32)
        live &= tl.where(tl.load(row_ptr + 4, mask=known, other=0.0) != 0, above, 1) != 0
    return tl.where(live, c, 0.0)


@triton.jit
def _steer_rows_kernel(
    h_ptr,  # [N, D]
    h_stride,
    directions_ptr,  # [S, D]
    settings_ptr,  # [S, 8] float32
    readers_ptr,  # [S, D], or None
    gates_ptr,  # [S, D], or None
    mask_ptr,  # [N, S] uint8, or None
    mask_stride,
    mask_stride_s,
    fired_ptr,  # [N, S] uint8, or None
    c_ptr,  # [N, S] float32, scratch
    N,
    S,
    D,
    BT: tl.constexpr,
    SB: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    at = h_ptr + n * h_stride
    applied = tl.zeros([BT], dtype=tl.int32)
    for first in range(0, S, SB):
        lives = ()
        reached = tl.zeros([BT], dtype=tl.int32)
        for u in tl.static_range(SB):
            s = first + u
            enabled = tl.load(settings_ptr + s * 8 + 7, mask=s < S, other=0.0) != 0
            live = n < tl.where(enabled, N, 0)
            if mask_ptr is not None:
                live &= tl.load(mask_ptr + n * mask_stride + s * mask_stride_s, mask=live, other=0) != 0
            lives = lives + (live,)  # noqa: RUF005 - Triton has no unpacking
            reached |= live.to(tl.int32)
        read = reached != 0
        reads = _dots(at, read, readers_ptr, settings_ptr, 1, first, S, D, BT, SB, BD, VEC)
        gates = _dots(at, read, gates_ptr, settings_ptr, 4, first, S, D, BT, SB, BD, VEC)
        for u in tl.static_range(SB):
            s = first + u
            row_ptr = settings_ptr + s * 8
            c = _coefficient(
                lives[u], reads[u], gates[u], row_ptr, s < S, readers_ptr is not None, gates_ptr is not None
            )
            inside = n < tl.where(s < S, N, 0)
            tl.store(c_ptr + n * S + s, c, mask=inside)
            fires = (c != 0).to(tl.int32)
            if fired_ptr is not None:
                tl.store(fired_ptr + n * S + s, fires.to(tl.uint8), mask=inside)
            applied |= fires

    # Up to 8 x 32 coefficients per lane would not fit in registers: the warps read them back.
    tl.debug_barrier()
    steered = (applied != 0)[:, None]
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)[None, :]
        delta = tl.zeros([BT, BD], dtype=tl.float32)
        for first in range(0, S, SB):
            for u in tl.static_range(SB):
                s = first + u
                used = steered & (n[:, None] < tl.where(s < S, N, 0))
                c = tl.load(c_ptr + n[:, None] * S + s, mask=used, other=0.0)
                row = tl.load(directions_ptr + s * D + d, mask=d < tl.where(s < S, D, 0), other=0.0).to(tl.float32)
                # A direction that does not apply adds nothing, even where it holds NaN: it may belong to
                # another request of the batch.
                delta += c * tl.where(c != 0, row, 0.0)
        inside = steered & (d < D)
        h = tl.load(at[:, None] + d, mask=inside, other=0.0).to(tl.float32)
        tl.store(at[:, None] + d, (h + delta).to(h_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class SteerConfig:
    """How a steering kernel is cut up. `shared_config` and `rows_config` choose; a test passes its own.

    tokens: per program. rows: tokens in flight, a power of two that divides `tokens`. directions: in flight.
    block_d: columns of a tile, num_warps x 32 x the elements a lane loads. vec: neighbouring elements of h in a
    lane's load. All powers of two but `tokens`. block_d, vec and
    num_warps decide the order in which a dot is added up; nothing else here reaches a bit of the result, except that
    without 128-bit loads (vec = 1) the number of directions and of rows can.
    """

    tokens: int
    rows: int
    directions: int
    block_d: int
    num_warps: int
    vec: int = 1

    def options(self) -> dict[str, int | bool]:
        """Compiler options of every launch; fusion is stated because its default changes between releases."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def _tile(D: int, itemsize: int, aligned: bool, most_warps: int) -> tuple[int, int, int]:
    """num_warps, columns and elements per load of a tile: every lane has one 128-bit load, or four scalars."""
    vec = 16 // itemsize if aligned else 1
    lane, num_warps = max(vec, 4), most_warps
    while num_warps > 1 and num_warps // 2 * 32 * lane >= D:
        num_warps //= 2
    return num_warps, num_warps * 32 * lane, vec


def _power_of_two_below(x: int, most: int) -> int:
    return min(most, 1 << (max(1, x).bit_length() - 1))


def shared_config(N: int, S: int, D: int, itemsize: int, aligned: bool = True) -> SteerConfig:
    """Launch shape of the kernel that streams tokens past one sum, from byte counts, not from timings."""
    num_warps, block_d, vec = _tile(D, itemsize, aligned, most_warps=4)
    # About 512 programs, 4 per SM: all resident at once, and 128 threads x 16 bytes x 8 rows x 4 are 64 KiB in
    # flight per SM, where HBM latency x bandwidth asks for some 25. More tokens per program read the
    # directions less often.
    share = triton.cdiv(N * triton.cdiv(D, block_d), 512)
    rows = _power_of_two_below(share, 8)
    directions = min(8, triton.next_power_of_2(S))
    return SteerConfig(triton.cdiv(share, rows) * rows, rows, directions, block_d, num_warps, vec)


def rows_config(N: int, S: int, D: int, itemsize: int, aligned: bool = True) -> SteerConfig:
    """Launch shape of the kernel that takes whole tokens, from byte counts, not from timings.

    itemsize: of the widest of h, readers and gates. aligned: all of them can be read with 128-bit loads.
    """
    num_warps, block_d, vec = _tile(D, itemsize, aligned, most_warps=8)
    # One program per SM first (the smallest GPU in question has 108), then more tokens per program: each
    # program reads all readers, gates and directions from L2.
    rows = _power_of_two_below(N // 108, 8)
    # Beside eight tokens, four rows of readers at once took 245 of a lane's 255 registers.
    directions = min(4 if rows < 8 else 2, triton.next_power_of_2(S))
    if not aligned:
        # Without 128-bit loads Triton spreads a tile over the lanes in a way that depends on how many tokens and
        # directions there are, and with it the order of a dot: one cut for all N and S.
        rows, directions = 1, 4
    return SteerConfig(rows, rows, directions, block_d, num_warps, vec)


def _aligned(h: Tensor, *rows: Tensor | None) -> bool:
    """Whether Triton will read the rows of h, and of the contiguous matrices `rows`, with 128-bit loads."""
    if h.shape[1] % 16 or h.stride(0) % 16 or h.data_ptr() % 16:
        return False
    return all(t is None or t.data_ptr() % 16 == 0 for t in rows)


def _check_arguments(floats: dict[str, Tensor], settings: Tensor, bytes_: dict[str, Tensor]) -> None:
    h, directions = floats["h"], floats["directions"]
    tensors = floats | {"settings": settings} | bytes_
    given = describe(**tensors)
    check(
        h.ndim == 2 and directions.ndim == 2 and h.shape[1] == directions.shape[1]
        and all(t.shape == directions.shape for name, t in floats.items() if name != "h")
        and settings.shape == (directions.shape[0], len(SETTINGS)),
        f"steer_add_ takes h [N, D], directions, readers and gates [S, D], settings [S, 8]; got {given}.",
    )  # fmt: skip
    N, S = h.shape[0], directions.shape[0]
    check(S <= MAX_DIRECTIONS, f"steer_add_ takes at most {MAX_DIRECTIONS} directions; got {given}.")
    check(
        all(t.dtype in FLOATS for t in floats.values()) and settings.dtype == torch.float32,
        f"steer_add_ takes float32, bfloat16 or float16, and float32 settings; got {given}.",
    )
    for name, t in bytes_.items():
        accepted = [(N, S)] if name == "fired" else [(N, S), (N,)]
        dtypes = _FLAGS[1:] if name == "fired" else _FLAGS
        check(
            t.shape in accepted and t.dtype in dtypes,
            f"steer_add_ takes {name} {accepted}, {dtypes}; got {given}.",
        )
    check(len({t.device for t in tensors.values()}) == 1, f"All tensors must be on one device; got {given}.")
    # A copy would steer nothing (h, fired), or be a second launch per call.
    check(
        (h.stride(1) == 1 or h.shape[1] <= 1) and (h.stride(0) >= h.shape[1] or N <= 1)
        and all(t.is_contiguous() for name, t in tensors.items() if name not in ("h", "mask")),
        "steer_add_ takes h with contiguous, separate rows and everything else but the mask contiguous.",
    )  # fmt: skip


def steer_add_(
    h: Tensor,
    directions: Tensor,
    settings: Tensor,
    readers: Tensor | None = None,
    gates: Tensor | None = None,
    mask: Tensor | None = None,
    fired: Tensor | None = None,
    config: SteerConfig | None = None,
) -> Tensor:
    """h[n] += sum_s c[n, s] * directions[s] in place, in one launch; returns h.

    h [N, D] with any row stride, directions, readers, gates [S, D] contiguous, each float32, bfloat16 or
    float16; settings [S, 8] float32, columns as in SETTINGS; mask [N] or [N, S] bool or uint8; fired [N, S]
    uint8, set to 1 where c is not 0. Without readers the slope columns are not read, without gates the gate
    columns. Sums in float32, one rounding; rows where every c is 0 are not written. S <= 32. With readers,
    gates or a mask per direction, N * S * 4 bytes of scratch are allocated. Raises ValueError on shapes,
    dtypes, devices and strides.
    """
    floats = {"h": h, "directions": directions, "readers": readers, "gates": gates}
    flags = {"mask": mask, "fired": fired}
    _check_arguments(
        {name: t for name, t in floats.items() if t is not None},
        settings,
        {name: t for name, t in flags.items() if t is not None},
    )
    (N, D), S = h.shape, directions.shape[0]
    if N == 0 or S == 0:
        return h
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    with torch.cuda.device_of(h):
        if readers is None and gates is None and (mask is None or mask.ndim == 1):
            cfg = config or shared_config(N, S, D, h.element_size(), _aligned(h))
            _steer_shared_kernel[triton.cdiv(N, cfg.tokens), max(1, triton.cdiv(D, cfg.block_d))](
                h, h.stride(0), directions, settings, mask, 0 if mask is None else mask.stride(0), fired,
                N, S, D, cfg.tokens, SP=triton.next_power_of_2(S), UNROLL=cfg.directions, BT=cfg.rows,
                BD=cfg.block_d, **cfg.options(),
            )  # fmt: skip
            return h
        # A lane must hold the same columns of h as of what h is multiplied with, however many tokens a tile has.
        widest = max(t.element_size() for t in (h, readers, gates) if t is not None)
        cfg = config or rows_config(N, S, D, widest, _aligned(h, readers, gates, directions))
        strides = (0, 0) if mask is None else (mask.stride(0), mask.stride(1) if mask.ndim == 2 else 0)
        _steer_rows_kernel[(triton.cdiv(N, cfg.rows),)](
            h, h.stride(0), directions, settings, readers, gates, mask, *strides, fired, settings.new_empty(N, S),
            N, S, D, BT=cfg.rows, SB=cfg.directions, BD=cfg.block_d, VEC=cfg.vec,
            **cfg.options(),
        )  # fmt: skip
    return h
