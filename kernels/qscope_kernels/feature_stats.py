"""Streaming feature statistics: counts, float64 sums, maxima and the M largest entries, in place, no atomics.

    feature_stats_  count[g, f] += 1;  total[g, f] += a;  total_sq[g, f] += a^2;  peak[g, f] = max(peak[g, f], a)
                    over the entries a = top_acts[n, k] > 0, finite, of feature f and of group g = groups[n]

One stable sort by cell f * G + g makes lists in ascending token order (feature_lists). The sums kernel gives each lane
one cell, whose list it adds to the table in that order: the same chain of additions however a stream is cut into
batches. The top kernel gives each feature a program, which leaves after a look at the list unless something in it
belongs in the table. N tokens, K active features per token, F dictionary size, G groups, M contexts per feature.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels._arguments import FLOATS, INTS, check, describe
from qscope_kernels.feature_lists import feature_lists

MAX_CONTEXTS = 64


@triton.jit
def _cells_kernel(
    acts_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    groups_ptr,  # [N] int32, not read unless HAS_GROUPS
    cells_ptr,  # [N, K]: f * G + g, or F * G for an entry that does not count
    entries,
    K,
    cells,
    F,
    G,
    HAS_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < entries
    a = tl.load(acts_ptr + at, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(indices_ptr + at, mask=mask, other=0).to(tl.int64)
    live = (a > 0.0) & (a < float("inf")) & (f >= 0) & (f < F)
    cell = f * G
    if HAS_GROUPS:
        g = tl.load(groups_ptr + at.to(tl.int32) // K, mask=mask, other=-1)
        live &= (g >= 0) & (g < G)
        cell += g
    tl.store(cells_ptr + at, tl.where(live, cell, cells).to(cells_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _feature_sums_kernel(
    values_ptr,  # [N * K] entries by cell
    offsets_ptr,  # [F * G + 1] int64
    count_ptr,  # [G, F] int64
    total_ptr,  # [G, F] float64
    total_sq_ptr,  # [G, F] float64
    peak_ptr,  # [G, F] float32
    cells,
    F,
    G,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets_ptr + cell, mask=cell < cells, other=0)
    size = (tl.load(offsets_ptr + cell + 1, mask=cell < cells, other=0) - start).to(tl.int32)
    longest = tl.max(size, axis=0)
    if longest > 0:
        hit = size > 0
        at = cell % G * F + cell // G
        count = tl.load(count_ptr + at, mask=hit, other=0)
        total = tl.load(total_ptr + at, mask=hit, other=0.0)
        total_sq = tl.load(total_sq_ptr + at, mask=hit, other=0.0)
        peak = tl.load(peak_ptr + at, mask=hit, other=0.0)
        for first in range(0, longest, UNROLL):
            # UNROLL independent loads are in flight before the first is needed.
            for u in tl.static_range(UNROLL):
                a = tl.load(values_ptr + start + first + u, mask=first + u < size, other=0.0).to(tl.float32)
                peak = tl.maximum(peak, a)
                # Past the end of a list a is 0, which changes no bit. The square of a float32 is exact in float64.
                wide = a.to(tl.float64)
                total += wide
                total_sq += wide * wide
        tl.store(count_ptr + at, count + size, mask=hit)
        tl.store(total_ptr + at, total, mask=hit)
        tl.store(total_sq_ptr + at, total_sq, mask=hit)
        tl.store(peak_ptr + at, peak, mask=hit)


@triton.jit
def _feature_top_kernel(
    values_ptr,  # [N * K] entries by cell
    order_ptr,  # [N * K] int64, their flat positions n * K + k
    offsets_ptr,  # [F * G + 1] int64
    first_token_ptr,  # [] int64
    top_values_ptr,  # [F, M] float32, descending, equal ones by token; -inf where empty
    top_tokens_ptr,  # [F, M] int64, -1 where empty
    K,
    G,
    M,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + f * G)
    size = (tl.load(offsets_ptr + f * G + G) - start).to(tl.int32)
    if size > 0:
        slot = tl.arange(0, BLOCK_M)
        lane = tl.arange(0, CHUNK)
        top_values_ptr += f * M
        top_tokens_ptr += f * M
        for first in range(0, size, CHUNK):
            live = first + lane < size
            new = tl.load(values_ptr + start + first + lane, mask=live, other=float("-inf")).to(tl.float32)
            if tl.max(new, axis=0) >= tl.load(top_values_ptr + M - 1):
                position = tl.load(order_ptr + start + first + lane, mask=live, other=0)
                token = tl.load(first_token_ptr) + position.to(tl.int32) // K
                old = tl.load(top_values_ptr + slot, mask=slot < M, other=float("-inf"))
                old_token = tl.load(top_tokens_ptr + slot, mask=slot < M, other=-1)
                # Places in the merged order, by counting who comes before: [BLOCK_M, CHUNK] and [CHUNK, CHUNK].
                equal = new[None, :] == old[:, None]
                newer_first = (new[None, :] > old[:, None]) | (equal & (token[None, :] < old_token[:, None]))
                newer_first = newer_first & live[None, :]
                old_place = slot + tl.sum(newer_first.to(tl.int32), axis=1)
                older_first = (newer_first == 0) & (slot < M)[:, None]
                # One token may hold a feature twice: then the slots, which are in list order, decide.
                same = new[:, None] == new[None, :]
                earlier = token[:, None] < token[None, :]
                earlier = earlier | ((token[:, None] == token[None, :]) & (lane[:, None] < lane[None, :]))
                before = (new[:, None] > new[None, :]) | (same & earlier)
                before = before & live[:, None]
                place = tl.sum(older_first.to(tl.int32), axis=0) + tl.sum(before.to(tl.int32), axis=0)
                tl.debug_barrier()  # the table is overwritten only when every thread has read it
                tl.store(top_values_ptr + old_place, old, mask=(slot < M) & (old_place < M))
                tl.store(top_tokens_ptr + old_place, old_token, mask=(slot < M) & (old_place < M))
                tl.store(top_values_ptr + place, new, mask=live & (place < M))
                tl.store(top_tokens_ptr + place, token, mask=live & (place < M))
                tl.debug_barrier()  # and read again when every thread has written it


@dataclass(frozen=True)
class LaunchConfig:
    """How the work is cut up; no result depends on it.

    cells: lists per program of the sums kernel. unroll: entries of a list in flight. chunk: entries that the top
    kernel merges at once. slots: of the top table per warp. All powers of two.
    """

    cells: int = 32  # one list per lane: a list of thousands of entries keeps only 31 other lanes waiting
    unroll: int = 8  # of 4 bytes: one 32-byte sector per lane, which is read from L2 once
    chunk: int = 32  # most lists are shorter (N K / F is 6 to 25 at 8192 tokens); one entry per lane
    slots: int = 32  # comparing 64 slots with 32 entries in one warp takes more registers than there are

    def options(self, num_warps: int = 1) -> dict[str, int | bool]:
        """Compiler options of every launch."""
        return {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}


def _check_arguments(
    codes: dict[str, Tensor], tables: dict[str, Tensor], groups: Tensor | None, tops: dict[str, Tensor], first: Tensor
) -> None:
    everything = codes | tables | tops | {"first_token": first} | ({} if groups is None else {"groups": groups})
    given = describe(**everything)
    acts, indices = codes.values()
    count = tables["count"]
    check(
        acts.ndim == 2 and acts.shape == indices.shape and acts.dtype in FLOATS and indices.dtype in INTS,
        f"feature_stats_ takes top_acts [N, K] float32, bfloat16 or float16, top_indices [N, K] int32 or int64; "
        f"got {given}.",
    )
    check(acts.numel() < 2**31, f"feature_stats_ takes fewer than 2^31 entries; got {given}. Cut the batch.")
    check(
        count.ndim == 2
        and all(t.shape == count.shape for t in tables.values())
        and [t.dtype for t in tables.values()] == [torch.int64, torch.float64, torch.float64, torch.float32],
        f"feature_stats_ takes count int64, total and total_sq float64, peak float32, all [G, F]; got {given}.",
    )
    check(
        count.shape[0] == 1 if groups is None else groups.shape == acts.shape[:1] and groups.dtype == torch.int32,
        f"feature_stats_ takes groups [N] int32, or None with tables [1, F]; got {given}.",
    )
    values, tokens = (*tops.values(), None, None)[:2]
    fits = values is None and tokens is None
    if values is not None and tokens is not None:
        fits = values.shape == tokens.shape and values.ndim == 2 and values.shape[0] == count.shape[1]
        fits = fits and values.shape[1] <= MAX_CONTEXTS
        fits = fits and values.dtype == torch.float32 and tokens.dtype == torch.int64
    check(
        fits,
        f"feature_stats_ takes top_values float32 and top_tokens int64, both [F, M] with M <= {MAX_CONTEXTS}, or "
        f"neither; got {given}.",
    )
    check(
        first.numel() == 1 and first.dtype == torch.int64,
        f"feature_stats_ takes one int64 as first_token; got {given}.",
    )
    check(all(t.device == acts.device for t in everything.values()), f"All tensors must be on one device; got {given}.")
    strided = [name for name, t in (tables | tops).items() if not t.is_contiguous()]
    check(not strided, f"feature_stats_ writes to contiguous tables; {', '.join(strided)} is not. Got {given}.")


def feature_stats_(
    top_acts: Tensor,
    top_indices: Tensor,
    count: Tensor,
    total: Tensor,
    total_sq: Tensor,
    peak: Tensor,
    groups: Tensor | None,
    top_values: Tensor | None,
    top_tokens: Tensor | None,
    first_token: Tensor,
    config: LaunchConfig | None = None,
) -> None:
    """Add a batch to the tables, in place.

    top_acts [N, K] float32, bfloat16 or float16, top_indices [N, K] int32 or int64, count [G, F] int64, total and
    total_sq [G, F] float64, peak [G, F] float32, groups [N] int32 or None (then G = 1), top_values [F, M] float32 and
    top_tokens [F, M] int64 or both None, M <= 64, first_token [] int64. An entry counts if its value is finite and
    above 0, its feature in 0..F-1 and its token's group in 0..G-1. top_values and top_tokens keep each feature's M
    largest entries, equal ones by lowest token (token n has id first_token + n); -inf and -1 mark empty slots.
    Workspace: at most 64 bytes per entry and 16 per cell of [G, F], most of it the sort's. No host synchronisation;
    the same inputs give the same bits. Raises ValueError on shape, dtype, stride or device.
    """
    tables = {"count": count, "total": total, "total_sq": total_sq, "peak": peak}
    tops = {name: t for name, t in (("top_values", top_values), ("top_tokens", top_tokens)) if t is not None}
    _check_arguments({"top_acts": top_acts, "top_indices": top_indices}, tables, groups, tops, first_token)
    (N, K), (G, F) = top_acts.shape, count.shape
    entries, cells = N * K, G * F
    if entries == 0 or cells == 0:
        return
    cfg = config or LaunchConfig()
    top_acts, top_indices = top_acts.contiguous(), top_indices.contiguous()
    cell = torch.empty(N, K, dtype=torch.int32 if cells < 2**31 else torch.int64, device=top_acts.device)
    with torch.cuda.device_of(top_acts):
        _cells_kernel[(triton.cdiv(entries, 1024),)](
            top_acts, top_indices, top_acts if groups is None else groups.contiguous(), cell, entries, K, cells, F, G,
            HAS_GROUPS=groups is not None, BLOCK=1024, **cfg.options(4),
        )  # fmt: skip
        order, offsets = feature_lists(cell, cells)
        values = top_acts.view(-1)[order]
        _feature_sums_kernel[(triton.cdiv(cells, cfg.cells),)](
            values, offsets, count, total, total_sq, peak, cells, F, G,
            BLOCK=cfg.cells, UNROLL=cfg.unroll, **cfg.options(),
        )  # fmt: skip
        if top_values is not None and top_values.numel():
            M = top_values.shape[1]
            block = triton.next_power_of_2(M)
            _feature_top_kernel[(F,)](
                values, order, offsets, first_token, top_values, top_tokens, K, G, M,
                BLOCK_M=block, CHUNK=cfg.chunk, **cfg.options(max(1, block // cfg.slots)),
            )  # fmt: skip
