"""The gradients of a sparse autoencoder's four parameters from one pass over feature-major lists.

    W_dec[f] = sum of top_acts[n, k]  * g[n]     over the entries (n, k) with top_indices[n, k] == f
    W_enc[f] = sum of act_grads[n, k] * x[n]     over the same entries
    b_enc[f] = sum of act_grads[n, k]            over the same entries
    b_dec    = sum of g[n]

Both weight gradients belong to the same entries, so one sort and one walk along each list serve both: a program
(feature, slice of D) reads the piece of g[n] and the piece of x[n] side by side. The sums have the order, and the
bits, of sparse_outer over the entries that are not dead. N tokens, K active features per token, F dictionary size,
D residual width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels._arguments import check, check_gather, describe
from qscope_kernels.feature_lists import feature_lists, split_lists
from qscope_kernels.sparse_decode import (
    LaunchConfig,
    _sparse_outer_merge_kernel,
    _sum_slices_kernel,
    launch_config,
    sparse_outer_fwd,
)


@triton.jit
def _paired_row_sums(
    tokens_ptr,  # [count] rows of g and x
    acts_ptr,  # [count]
    grads_ptr,  # [count]
    count,
    g_ptr,  # [N, D]
    x_ptr,  # [N, D]
    D,
    d,  # [BLOCK_D] columns
    mask,  # [BLOCK_D]
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """sum of acts[p] * g[tokens[p], d], of grads[p] * x[tokens[p], d] and of grads[p], p ascending."""
    dec = tl.zeros([BLOCK_D], dtype=tl.float32)
    enc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = tl.full([], 0.0, dtype=tl.float32)
    whole = count // UNROLL * UNROLL
    for p in range(0, whole, UNROLL):
        # Unrolled without masks on p, and all loads first: the rows of UNROLL entries are in flight before the
        # first is needed.
        g_rows = ()
        x_rows = ()
        for u in tl.static_range(UNROLL):
            at = tl.load(tokens_ptr + p + u).to(tl.int64) * D + d
            g_row = tl.load(g_ptr + at, mask=mask, other=0.0)
            x_row = tl.load(x_ptr + at, mask=mask, other=0.0)
            g_rows = g_rows + (g_row,)  # noqa: RUF005 - Triton does not unpack
            x_rows = x_rows + (x_row,)  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            grad = tl.load(grads_ptr + p + u).to(tl.float32)
            dec += tl.load(acts_ptr + p + u).to(tl.float32) * g_rows[u].to(tl.float32)
            enc += grad * x_rows[u].to(tl.float32)
            total += grad
    for p in range(whole, count):
        at = tl.load(tokens_ptr + p).to(tl.int64) * D + d
        act = tl.load(acts_ptr + p).to(tl.float32)
        grad = tl.load(grads_ptr + p).to(tl.float32)
        dec += act * tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        enc += grad * tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += grad
    return dec, enc, total


@triton.jit
def _sparse_grads_kernel(
    tokens_ptr,  # [N * K] token of each entry, entries grouped by feature
    acts_ptr,  # [N * K] in the same order
    grads_ptr,  # [N * K] in the same order
    offsets_ptr,  # [F + 1] int64: feature f owns entries offsets[f] .. offsets[f + 1] - 1
    g_ptr,  # [N, D]
    x_ptr,  # [N, D]
    dec_ptr,  # [F, D] float32
    enc_ptr,  # [F, D] float32
    bias_ptr,  # [F] float32
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
        dec, enc, total = _paired_row_sums(
            tokens_ptr + start, acts_ptr + start, grads_ptr + start, count.to(tl.int32), g_ptr, x_ptr, D, d, mask,
            BLOCK_D=BLOCK_D, UNROLL=UNROLL,
        )  # fmt: skip
        tl.store(dec_ptr + f * D + d, dec, mask=mask)
        tl.store(enc_ptr + f * D + d, enc, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(bias_ptr + f, total)


@triton.jit
def _sparse_grads_split_kernel(
    tokens_ptr,  # [N * K]
    acts_ptr,  # [N * K]
    grads_ptr,  # [N * K]
    offsets_ptr,  # [F + 1] int64
    chunk_feature_ptr,  # [chunks] feature of each chunk, F for the unused tail
    first_chunk_ptr,  # [F] int64
    g_ptr,  # [N, D]
    x_ptr,  # [N, D]
    dec_ptr,  # [chunks, D] float32
    enc_ptr,  # [chunks, D] float32
    bias_ptr,  # [chunks] float32
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
        dec, enc, total = _paired_row_sums(
            tokens_ptr + start, acts_ptr + start, grads_ptr + start, count, g_ptr, x_ptr, D, d, mask,
            BLOCK_D=BLOCK_D, UNROLL=UNROLL,
        )  # fmt: skip
        tl.store(dec_ptr + c * D + d, dec, mask=mask)
        tl.store(enc_ptr + c * D + d, enc, mask=mask)
        if tl.program_id(1) == 0:
            tl.store(bias_ptr + c, total)


@triton.jit
def _column_sum_kernel(
    g_ptr,  # [N, D]
    part_ptr,  # [chunks, D] float32
    N,
    D,
    rows,  # tokens per chunk
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the columns over one chunk of tokens."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.program_id(1).to(tl.int64)
    in_row = d < D
    first = chunk * rows
    size = tl.minimum(N - first, rows).to(tl.int32)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for start in range(0, size, ROWS):
        t = start + tl.arange(0, ROWS)
        inside = (t < size)[:, None] & in_row[None, :]
        acc += tl.load(g_ptr + (first + t)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(part_ptr + chunk * D + d, tl.sum(acc, axis=0), mask=in_row)


class SparseGrads(NamedTuple):
    """Gradients, all float32."""

    W_dec: Tensor
    """[F, D]"""
    W_enc: Tensor
    """[F, D]"""
    b_enc: Tensor
    """[F]"""
    b_dec: Tensor
    """[D]"""


# Left alone, ptxas aims at 64 registers and orders the loads so that 2 of 8 rows are in flight. Allowed 80, it takes at
# most 72, has all 8 in flight, and leaves 28 one-warp programs on an SM.
REGISTERS = 80


def grads_config(N: int, D: int, itemsize: int) -> LaunchConfig:
    """Launch shape for gathering from two [N, D] matrices, the wider of `itemsize` bytes per element."""
    # One row of each matrix costs what two rows of one do, so half of sparse_outer's entries are in flight: 4 of
    # them hold 16 (bfloat16) or 32 (float32) registers per matrix beside two sums.
    cfg = launch_config(2 * N, D, itemsize)
    return LaunchConfig(block_d=cfg.block_d, num_warps=cfg.num_warps, unroll=cfg.unroll // 2, chunk=cfg.chunk)


def sparse_grads_fwd(
    top_acts: Tensor,
    act_grads: Tensor,
    top_indices: Tensor,
    g: Tensor,
    x: Tensor,
    d_sae: int,
    config: LaunchConfig | None = None,
) -> SparseGrads:
    """All parameter gradients of one batch, from one sort and one pass over the lists.

    top_acts, act_grads [N, K], g, x [N, D] float32, bfloat16 or float16; top_indices [N, K] int32 or int64 in
    [0, d_sae) (entries outside are left out). An entry whose act and act_grad are both 0 is left out, so that it
    reads no row: 0 times a NaN of x adds nothing. A feature without an entry is exactly 0. Order and chunks as
    sparse_outer_fwd, no atomics: the same inputs give the same bits. Beside the result it holds the lists (about
    60 bytes per entry) and float32 partial rows of at most 4 K / (chunk + 1) times N * D elements. Raises
    ValueError on shape, dtype or device.
    """
    floats = {"top_acts": top_acts, "act_grads": act_grads, "g": g, "x": x}
    check_gather(top_indices, floats)
    given = describe(top_indices=top_indices, **floats)
    check(
        top_acts.shape == top_indices.shape == act_grads.shape
        and g.ndim == 2
        and g.shape == x.shape
        and g.shape[0] == top_indices.shape[0]
        and d_sae >= 0,
        f"sparse_grads_fwd takes top_acts, act_grads, top_indices [N, K], g, x [N, D], d_sae >= 0; got {given}, "
        f"d_sae {d_sae}.",
    )
    (N, K), D = top_indices.shape, g.shape[1]
    g, x = g.contiguous(), x.contiguous()
    b_dec = column_sum_fwd(g)
    W_dec, W_enc = (g.new_empty(d_sae, D, dtype=torch.float32) for _ in range(2))
    b_enc = W_dec.new_empty(d_sae)
    if N * K == 0 or d_sae == 0:
        return SparseGrads(W_dec.zero_(), W_enc.zero_(), b_enc.zero_(), b_dec)
    if D == 0:  # no column, hence no program that would add up act_grads
        return SparseGrads(W_dec, W_enc, sparse_outer_fwd(act_grads, top_indices, g.new_zeros(N, 1), d_sae)[1], b_dec)
    order, offsets = feature_lists(top_indices, d_sae, live=(top_acts != 0) | (act_grads != 0))
    tokens = (order // K).to(torch.int32)
    lists = tokens, top_acts.reshape(-1)[order], act_grads.reshape(-1)[order], offsets
    cfg = config or grads_config(N, D, max(g.element_size(), x.element_size()))
    slices = triton.cdiv(D, cfg.block_d)
    shape = {"CHUNK": cfg.chunk, "BLOCK_D": cfg.block_d, **cfg.options()}
    pair = shape | {"UNROLL": cfg.unroll, "maxnreg": REGISTERS}
    with torch.cuda.device_of(g):
        _sparse_grads_kernel[d_sae, slices](*lists, g, x, W_dec, W_enc, b_enc, D, **pair)
        split = split_lists(offsets, N * K, cfg.chunk)
        if split is not None:
            tables = split.chunk_feature, split.first_chunk
            dec, enc = (W_dec.new_empty(split.chunks, D) for _ in range(2))
            bias = dec.new_empty(split.chunks)
            _sparse_grads_split_kernel[split.chunks, slices](*lists, *tables, g, x, dec, enc, bias, d_sae, D, **pair)
            for part, rows in ((dec, W_dec), (enc, W_enc)):  # b_enc is written twice, with the same sums
                _sparse_outer_merge_kernel[split.chunks, slices](
                    offsets, *tables, part, bias, rows, b_enc, d_sae, D, **shape
                )
    return SparseGrads(W_dec, W_enc, b_enc, b_dec)


def column_sum_fwd(g: Tensor, max_chunks: int = 64) -> Tensor:
    """Sum of g [N, D] over the tokens: [D] float32, in a fixed order.

    The tokens are cut into at most max_chunks pieces, whose sums are added in order.
    """
    (N, D), g = g.shape, g.contiguous()
    out = g.new_zeros(D, dtype=torch.float32)
    if g.numel() == 0:
        return out
    tile, block_d = 32, 256 // g.element_size()
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    rows = max(128, triton.cdiv(triton.cdiv(N, max_chunks), tile) * tile)
    chunks = triton.cdiv(N, rows)
    part = out if chunks == 1 else out.new_empty(chunks, D)
    with torch.cuda.device_of(g):
        _column_sum_kernel[triton.cdiv(D, block_d), chunks](g, part, N, D, rows, ROWS=tile, BLOCK_D=block_d, **options)
        if chunks > 1:
            _sum_slices_kernel[(triton.cdiv(D, 1024),)](part, out, chunks, D, BLOCK=1024, **options)
    return out
