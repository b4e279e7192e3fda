"""Sparse decode and its two gradients: gathers of selected rows, float32 sums in a fixed order, no atomics.

    sparse_decode_fwd   y[n]      = b_dec + sum_k top_acts[n, k] * W_dec[top_indices[n, k]]
    sparse_dot_fwd      out[n, k] = <g[n], W[indices[n, k]]>               gradient of top_acts, g = dL/dy
    sparse_outer_fwd    rows[f]   = sum of values[n, k] * g[n] where indices[n, k] == f    gradient of W_dec

Every gather's grid is (rows of the output, slices of D). CUDA hands out blockIdx.x first, so all rows of
slice 0 run before slice 1 starts: the slice of the gathered matrix that is being read stays in L2, and HBM
sees that matrix once. N tokens, K active features per token, F dictionary size, D residual width. README.md
beside this package lists the memory traffic of each kernel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels._arguments import check, check_gather, describe
from qscope_kernels.feature_lists import feature_lists, split_lists


@triton.jit
def _is_row(row, R, BLOCK_D: tl.constexpr):
    """[BLOCK_D] times whether 0 <= row < R. As a block, because the interpreter cannot spread a boolean."""
    return (tl.zeros([BLOCK_D], dtype=tl.int64) + row).to(tl.uint64, bitcast=True) < R


@triton.jit
def _weighted_row_sum(
    rows_ptr,  # [count] ids of the rows of src
    weights_ptr,  # [count]
    count,
    src_ptr,  # [R, D]
    R,  # None: every row is known to be inside
    D,
    d,  # [BLOCK_D] columns
    mask,  # [BLOCK_D]
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """sum of weights[p] * src[rows[p], d] and sum of weights[p], over p = 0 .. count - 1 in ascending
    order. A row outside 0..R-1 counts as zeros: reading it would end the CUDA context."""
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    whole = count // UNROLL * UNROLL
    for p in range(0, whole, UNROLL):
        # Unrolled without masks on p: UNROLL independent row loads are in flight before the first is needed.
        for u in tl.static_range(UNROLL):
            row = tl.load(rows_ptr + p + u).to(tl.int64)
            weight = tl.load(weights_ptr + p + u).to(tl.float32)
            inside = mask if R is None else mask & _is_row(row, R, BLOCK_D)
            acc += weight * tl.load(src_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
            total += weight
    for p in range(whole, count):
        row = tl.load(rows_ptr + p).to(tl.int64)
        weight = tl.load(weights_ptr + p).to(tl.float32)
        inside = mask if R is None else mask & _is_row(row, R, BLOCK_D)
        acc += weight * tl.load(src_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        total += weight
    return acc, total


@triton.jit
def _sparse_decode_fwd_kernel(
    acts_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    W_ptr,  # [F, D]
    b_ptr,  # [D], not read unless HAS_BIAS
    y_ptr,  # [N, D]
    F,
    K,
    D,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    acc, _ = _weighted_row_sum(
        indices_ptr + n * K, acts_ptr + n * K, K, W_ptr, F, D, d, mask, BLOCK_D=BLOCK_D, UNROLL=UNROLL
    )
    if HAS_BIAS:
        acc += tl.load(b_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * D + d, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sparse_dot_fwd_kernel(
    g_ptr,  # [N, D]
    indices_ptr,  # [N, K]
    W_ptr,  # [F, D]
    part_ptr,  # [slices, N, K] float32
    N,
    F,
    K,
    D,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    slice_id = tl.program_id(1)
    d = slice_id * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    g = tl.load(g_ptr + n * D + d, mask=in_row, other=0.0).to(tl.float32)
    out_ptr = part_ptr + (slice_id.to(tl.int64) * N + n) * K
    for start in range(0, K, UNROLL):
        k = start + tl.arange(0, UNROLL)
        in_slots = k < K
        row = tl.load(indices_ptr + n * K + k, mask=in_slots, other=0).to(tl.int64)
        inside = (in_slots & (row >= 0) & (row < F))[:, None] & in_row[None, :]
        w = tl.load(W_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + k, tl.sum(w * g[None, :], axis=1), mask=in_slots)


@triton.jit
def _sum_slices_kernel(
    part_ptr,  # [slices, size] float32
    out_ptr,  # [size] float32
    slices,
    size,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(0, slices):
        acc += tl.load(part_ptr + i, mask=mask, other=0.0)
        part_ptr += size
    tl.store(out_ptr + i, acc, mask=mask)


@triton.jit
def _sparse_outer_fwd_kernel(
    tokens_ptr,  # [N * K] token of each entry, entries grouped by feature
    values_ptr,  # [N * K] in the same order
    offsets_ptr,  # [F + 1] int64: feature f owns entries offsets[f] .. offsets[f + 1] - 1
    g_ptr,  # [N, D]
    rows_ptr,  # [F, D] float32
    sums_ptr,  # [F] float32
    D,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    start = tl.load(offsets_ptr + f)
    count = tl.load(offsets_ptr + f + 1) - start
    # Longer lists belong to the split kernel. An empty list stores the zeros that an untouched row must hold.
    if count <= CHUNK:
        acc, total = _weighted_row_sum(
            tokens_ptr + start,
            values_ptr + start,
            count.to(tl.int32),
            g_ptr,
            None,
            D,
            d,
            mask,
            BLOCK_D=BLOCK_D,
            UNROLL=UNROLL,
        )
        tl.store(rows_ptr + f * D + d, acc, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(sums_ptr + f, total)


@triton.jit
def _sparse_outer_split_kernel(
    tokens_ptr,  # [N * K]
    values_ptr,  # [N * K]
    offsets_ptr,  # [F + 1] int64
    chunk_feature_ptr,  # [chunks] feature of each chunk, F for the unused tail
    first_chunk_ptr,  # [F] int64
    g_ptr,  # [N, D]
    part_ptr,  # [chunks, D] float32
    part_sums_ptr,  # [chunks] float32
    F,
    D,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    f = tl.load(chunk_feature_ptr + c).to(tl.int64)
    if f < F:
        start = tl.load(offsets_ptr + f) + (c - tl.load(first_chunk_ptr + f)) * CHUNK
        count = tl.minimum(tl.load(offsets_ptr + f + 1) - start, CHUNK).to(tl.int32)
        acc, total = _weighted_row_sum(
            tokens_ptr + start, values_ptr + start, count, g_ptr, None, D, d, mask, BLOCK_D=BLOCK_D, UNROLL=UNROLL
        )
        tl.store(part_ptr + c * D + d, acc, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(part_sums_ptr + c, total)


@triton.jit
def _sparse_outer_merge_kernel(
    offsets_ptr,  # [F + 1] int64
    chunk_feature_ptr,  # [chunks]
    first_chunk_ptr,  # [F] int64
    part_ptr,  # [chunks, D] float32
    part_sums_ptr,  # [chunks] float32
    rows_ptr,  # [F, D] float32
    sums_ptr,  # [F] float32
    F,
    D,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    c = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    f = tl.load(chunk_feature_ptr + c).to(tl.int64)
    if f < F:  # noqa: SIM102 - Triton evaluates both sides of `and`, and first_chunk has no element F
        # The program of a feature's first chunk adds up all of them, in order: no list of features is needed.
        if c == tl.load(first_chunk_ptr + f):
            entries = tl.load(offsets_ptr + f + 1) - tl.load(offsets_ptr + f)
            acc = tl.zeros([BLOCK_D], dtype=tl.float32)
            total = tl.full([], 0.0, dtype=tl.float32)
            for i in range(c, c + (entries + CHUNK - 1) // CHUNK):
                acc += tl.load(part_ptr + i * D + d, mask=mask, other=0.0)
                total += tl.load(part_sums_ptr + i)
            tl.store(rows_ptr + f * D + d, acc, mask=mask)
            if tl.program_id(1) == 0:
                tl.store(sums_ptr + f, total)


@dataclass(frozen=True)
class LaunchConfig:
    """How a gather kernel is cut up. `launch_config` chooses; a benchmark or a test passes its own.

    block_d: columns per program, a power of two. num_warps: warps per program. unroll: rows in flight per
    program, a power of two. chunk: entries of one feature above which sparse_outer splits it; the order of
    its additions, hence the last bits of its result, depends on it. max_partial_bytes: bound on sparse_dot's
    partial sums; more tokens are done in several launches.
    """

    block_d: int
    num_warps: int
    unroll: int = 8
    chunk: int = 512
    max_partial_bytes: int = 1 << 28

    def options(self) -> dict[str, int | bool]:
        """Compiler options of every launch.

        One stage: rows go straight to registers, not through shared memory. Fusion of multiply and add is
        stated because its default changes between Triton releases.
        """
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def launch_config(gathered_rows: int, D: int, itemsize: int, wide: bool = False) -> LaunchConfig:
    """Launch shape for gathering from a [gathered_rows, D] matrix of `itemsize` bytes per element.

    Derived from byte counts (L2 of 40 MB on A100, 50 MB on H100 and H200), not from timings. `wide` is for
    sparse_outer, whose programs are short (N * K / F entries each).
    """
    # One warp per program: with four, ptxas sinks the loads between the sums and keeps 2 in flight, not 8. 32
    # lanes x 16 bytes: a row's piece is one 128-bit load per lane, and a slice of a 64K dictionary is 32 MiB,
    # inside L2. With 8 loads in flight and 32 such blocks per SM, 128 KiB are under way, several times what
    # L2 latency x bandwidth asks for (about 13 KB per SM).
    piece, unroll = 512, 8
    # Two loads per lane halve the number of programs, so that launching them does not bound short ones; only
    # while the wider slice of the gathered matrix still stays in L2 (32 MiB leave room for what is streamed
    # past it).
    if wide and gathered_rows * piece * 2 <= 1 << 25:
        piece, unroll = piece * 2, unroll // 2
    block_d = piece // itemsize
    # A narrower D must not pay for lanes that are always masked; below one warp there is nothing to save.
    while block_d // 2 >= max(D, 32):
        block_d //= 2
    return LaunchConfig(block_d=block_d, num_warps=1, unroll=unroll)


def sparse_decode_fwd(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """y[n] = sum_k top_acts[n, k] * W_dec[top_indices[n, k]] + b_dec, as [N, D] in W_dec's dtype.

    top_acts [N, K], top_indices [N, K] int32 or int64 in [0, F) (an id outside counts as a row of zeros: refusing it
    would have to wait for the GPU), W_dec [F, D], b_dec [D] or None; floats are float32, bfloat16 or float16. Float32
    sum in ascending slot order, then b_dec, one rounding; the same inputs give the same bits. An id may occur twice
    in a row. Raises ValueError on shape, dtype or device.
    """
    floats = {"top_acts": top_acts, "W_dec": W_dec} | ({} if b_dec is None else {"b_dec": b_dec})
    check_gather(top_indices, floats)
    given = describe(top_indices=top_indices, **floats)
    check(
        top_acts.shape == top_indices.shape and W_dec.ndim == 2 and (b_dec is None or b_dec.shape == W_dec.shape[1:]),
        f"sparse_decode_fwd takes top_acts and top_indices [N, K], W_dec [F, D], b_dec [D]; got {given}.",
    )
    top_acts, top_indices, W_dec = top_acts.contiguous(), top_indices.contiguous(), W_dec.contiguous()
    (N, K), (F, D) = top_indices.shape, W_dec.shape
    y = torch.empty(N, D, dtype=W_dec.dtype, device=W_dec.device)
    if y.numel() == 0:
        return y
    cfg = config or launch_config(F, D, W_dec.element_size())
    with torch.cuda.device_of(W_dec):
        _sparse_decode_fwd_kernel[N, triton.cdiv(D, cfg.block_d)](
            top_acts, top_indices, W_dec, W_dec if b_dec is None else b_dec.contiguous(), y, F, K, D,
            HAS_BIAS=b_dec is not None, BLOCK_D=cfg.block_d, UNROLL=cfg.unroll, **cfg.options(),
        )  # fmt: skip
    return y


def sparse_dot_fwd(g: Tensor, indices: Tensor, W: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """out[n, k] = <g[n], W[indices[n, k]]>, as [N, K] float32.

    g [N, D] and W [F, D] float32, bfloat16 or float16, indices [N, K] int32 or int64 in [0, F) (an id outside gives 0).
    Each slice of D gives one partial per entry; partials are added in ascending slice order, so the same
    inputs give the same bits. Raises ValueError on shape, dtype or device.
    """
    check_gather(indices, {"g": g, "W": W})
    given = describe(g=g, indices=indices, W=W)
    check(
        g.ndim == 2 and W.ndim == 2 and g.shape[1] == W.shape[1] and g.shape[0] == indices.shape[0],
        f"sparse_dot_fwd takes g [N, D], indices [N, K], W [F, D]; got {given}.",
    )
    g, indices, W = g.contiguous(), indices.contiguous(), W.contiguous()
    (N, K), (F, D) = indices.shape, W.shape
    out = torch.zeros(N, K, dtype=torch.float32, device=W.device) if D == 0 else g.new_empty(N, K, dtype=torch.float32)
    if out.numel() == 0 or D == 0:
        return out
    cfg = config or launch_config(F, D, W.element_size())
    slices = triton.cdiv(D, cfg.block_d)
    step = N if slices == 1 else min(N, max(1, cfg.max_partial_bytes // (4 * slices * K)))
    part = out if slices == 1 else out.new_empty(slices * step * K)
    with torch.cuda.device_of(W):
        for first in range(0, N, step):
            tokens = min(step, N - first)
            _sparse_dot_fwd_kernel[tokens, slices](
                g[first:], indices[first:], W, part, tokens, F, K, D,
                BLOCK_D=cfg.block_d, UNROLL=cfg.unroll, **cfg.options(),
            )  # fmt: skip
            if slices > 1:
                size = tokens * K
                _sum_slices_kernel[(triton.cdiv(size, 1024),)](
                    part,
                    out[first:],
                    slices,
                    size,
                    BLOCK=1024,
                    num_warps=4,
                    num_stages=1,
                    enable_fp_fusion=True,
                )
    return out


def sparse_outer_fwd(
    values: Tensor, indices: Tensor, g: Tensor, d_sae: int, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """rows[f] = sum of values[n, k] * g[n] and sums[f] = sum of values[n, k], where indices[n, k] == f.

    values [N, K] and g [N, D] float32, bfloat16 or float16, indices [N, K] int32 or int64 in [0, d_sae)
    (entries outside are left out). Returns rows [d_sae, D] and sums [d_sae], both float32; a feature without
    an entry is exactly 0. Entries are added in ascending (n, k) order; a feature with more than
    `config.chunk` of them is cut into chunks whose sums are added in order. No atomics: the same inputs give
    the same bits. Beside the result it holds the sorted lists (about 40 bytes per entry) and float32 partial
    rows of at most 2 K / (chunk + 1) times N * D elements. Raises ValueError on shape, dtype or device.
    """
    check_gather(indices, {"values": values, "g": g})
    given = describe(values=values, indices=indices, g=g)
    check(
        values.shape == indices.shape and g.ndim == 2 and g.shape[0] == indices.shape[0] and d_sae >= 0,
        f"sparse_outer_fwd takes values, indices [N, K], g [N, D], d_sae >= 0; got {given}, d_sae {d_sae}.",
    )
    (N, K), D = indices.shape, g.shape[1]
    if N * K == 0 or d_sae == 0:
        return g.new_zeros(d_sae, D, dtype=torch.float32), g.new_zeros(d_sae, dtype=torch.float32)
    if D == 0:  # no column, hence no program that would add up the values
        ones = g.new_zeros(N, 1)
        return g.new_zeros(d_sae, 0, dtype=torch.float32), sparse_outer_fwd(values, indices, ones, d_sae, config)[1]
    g = g.contiguous()
    order, offsets = feature_lists(indices, d_sae)
    tokens, sorted_values = (order // K).to(torch.int32), values.reshape(-1)[order]
    rows, sums = g.new_empty(d_sae, D, dtype=torch.float32), g.new_empty(d_sae, dtype=torch.float32)
    cfg = config or launch_config(N, D, g.element_size(), wide=True)
    slices = triton.cdiv(D, cfg.block_d)
    shape = {"CHUNK": cfg.chunk, "BLOCK_D": cfg.block_d, **cfg.options()}
    with torch.cuda.device_of(g):
        _sparse_outer_fwd_kernel[d_sae, slices](
            tokens, sorted_values, offsets, g, rows, sums, D, UNROLL=cfg.unroll, **shape
        )
        split = split_lists(offsets, N * K, cfg.chunk)
        if split is not None:
            part, part_sums = rows.new_empty(split.chunks, D), rows.new_empty(split.chunks)
            _sparse_outer_split_kernel[split.chunks, slices](
                tokens, sorted_values, offsets, split.chunk_feature, split.first_chunk, g, part, part_sums,
                d_sae, D, UNROLL=cfg.unroll, **shape,
            )  # fmt: skip
            _sparse_outer_merge_kernel[split.chunks, slices](
                offsets, split.chunk_feature, split.first_chunk, part, part_sums, rows, sums, d_sae, D, **shape
            )
    return rows, sums
