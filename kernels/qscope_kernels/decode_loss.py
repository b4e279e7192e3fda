"""Sparse decode, its squared error and the gradient of that error with respect to the values, in one gather.

    r[n]         = b_dec + sum_k top_acts[n, k] * W_dec[top_indices[n, k]]
    e[n]         = r[n] - x[n]
    sq_err[n]    = ||e[n]||^2
    act_grads    = d sq_err[n] / d top_acts[n, k] = 2 <e[n], W_dec[top_indices[n, k]]>

Decoding and then taking the dot products would gather the K rows of every token twice, and that gather is nearly all
of the traffic. Here a program (token, slice of D) loads its [K, slice] piece of W_dec once and keeps it in registers:
it sums the piece over the slots, subtracts x, and multiplies the same registers by the error. One gather, and no
tensor of size N x K x D anywhere.

The K slots are cut into tiles of `rows` slots. Slot u of every tile is added up in ascending order, then the `rows`
sums as a fixed tree: the threads of a program share the rows. sparse_decode adds all slots one after the other;
here that would need all K rows of a column in the registers of one thread (more than there are, with loads of 128
bits and K = 100), or a second read of the rows. So the two reconstructions agree to rounding, each within (K + 2)
2^-24 times the sum of absolute terms of the exact value, and not to the bit; each repeats to the bit.

The total variance of x, against which the squared error is judged, is one more read of x. N tokens, K active
features per token, F dictionary size, D residual width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels._arguments import check, check_gather, describe
from qscope_kernels.sparse_decode import (
    _sparse_decode_fwd_kernel,
    _sum_slices_kernel,
    launch_config,
    sparse_dot_fwd,
)

MAX_SLOTS = 256


@triton.jit
def _decode_loss_kernel(
    acts_ptr,  # [N, K]
    indices_ptr,  # [N, K]
    W_ptr,  # [F, D]
    b_ptr,  # [D], not read unless HAS_BIAS
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    error_ptr,  # [N, D] float32
    sq_ptr,  # [slices, N] float32
    dot_ptr,  # [slices, N, K] float32
    N,
    F,
    K,  # at most TILES * ROWS
    D,
    HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr,
    COLS: tl.constexpr,  # TILES, as a power of two
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    slice_id = tl.program_id(1)
    d = slice_id * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    u = tl.arange(0, ROWS)
    tiles = ()
    for t in tl.static_range(TILES):
        k = t * ROWS + u
        row = tl.load(indices_ptr + n * K + k, mask=k < K, other=-1).to(tl.int64)
        # An id outside 0..F-1 counts as a row of zeros: reading it would end the CUDA context.
        inside = ((row >= 0) & (row < F))[:, None] & in_row[None, :]
        tile = tl.load(W_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        tiles = tiles + (tile,)  # noqa: RUF005 - Triton does not unpack
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for t in tl.static_range(TILES):
        k = t * ROWS + u
        act = tl.load(acts_ptr + n * K + k, mask=k < K, other=0.0).to(tl.float32)
        acc += tiles[t].to(tl.float32) * act[:, None]
    r = tl.sum(acc, axis=0)
    if HAS_BIAS:
        r += tl.load(b_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + n * D + d, r.to(y_ptr.dtype.element_ty), mask=in_row)
    x = tl.load(x_ptr + n * D + d, mask=in_row, other=0.0).to(tl.float32)
    # Columns past D hold 0 * act, which is NaN where act is infinite.
    e = tl.where(in_row, r - x, 0.0)
    tl.store(error_ptr + n * D + d, e, mask=in_row)
    out = slice_id.to(tl.int64) * N + n
    tl.store(sq_ptr + out, tl.sum(e * e))
    # Collected in registers and stored together: a store for every tile would move each through shared memory.
    t_of_col = tl.arange(0, COLS)
    dots = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for t in tl.static_range(TILES):
        dot = tl.sum(tiles[t].to(tl.float32) * e[None, :], axis=1)
        dots = tl.where((t_of_col == t)[None, :], dot[:, None], dots)
    k = t_of_col[None, :] * ROWS + u[:, None]
    tl.store(dot_ptr + out * K + k, 2.0 * dots, mask=k < K)


@triton.jit
def _variance_chunks_kernel(
    x_ptr,  # [N, D]
    mean_ptr,  # [chunks, D] float32
    m2_ptr,  # [chunks, D] float32
    N,
    D,
    rows,  # tokens per chunk
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of x - x[0] and sum of squared deviations from the mean, per column of one chunk of tokens."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = tl.program_id(1).to(tl.int64)
    in_row = d < D
    # Shifted by a token, values far from zero lose no digits; if that token is an outlier, its own deviation
    # outweighs what rounding takes from the others.
    shift = tl.load(x_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_D], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = chunk * rows
    size = tl.minimum(N - first, rows).to(tl.int32)
    for start in range(0, size, ROWS):
        t = start + tl.arange(0, ROWS)
        inside = (t < size)[:, None] & in_row[None, :]
        x = tl.load(x_ptr + (first + t)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.where(inside, x - shift[None, :], 0.0)
        count = tl.minimum(size - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(y, axis=0) / count
        deviation = tl.where(inside, y - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = count / (start + count)
        mean += delta * share
        m2 += tl.sum(deviation * deviation, axis=0) + delta * delta * (start * share)
    tl.store(mean_ptr + chunk * D + d, mean, mask=in_row)
    tl.store(m2_ptr + chunk * D + d, m2, mask=in_row)


@triton.jit
def _variance_merge_kernel(
    mean_ptr,  # [chunks, D] float32
    m2_ptr,  # [chunks, D] float32
    part_ptr,  # [ceil(D / BLOCK_D)] float32
    N,
    D,
    rows,
    chunks,
    BLOCK_D: tl.constexpr,
):
    """Chunks merged in order (Chan, Golub and LeVeque 1983), then summed over the columns of a slice."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    mean = tl.zeros([BLOCK_D], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    before = tl.full([], 0.0, dtype=tl.float32)
    for chunk in range(0, chunks):
        at = tl.cast(chunk, tl.int64) * D + d
        count = tl.minimum(N - tl.cast(chunk, tl.int64) * rows, rows).to(tl.float32)
        delta = tl.load(mean_ptr + at, mask=in_row, other=0.0) - mean
        share = count / (before + count)
        mean += delta * share
        m2 += tl.load(m2_ptr + at, mask=in_row, other=0.0) + delta * delta * (before * share)
        before += count
    tl.store(part_ptr + tl.program_id(0), tl.sum(m2))


class DecodeLossResult(NamedTuple):
    """What one pass of decode_loss_fwd leaves behind."""

    x_hat: Tensor
    """[N, D] in the dtype of W_dec: the reconstruction, rounded once."""
    sq_err: Tensor
    """[N] float32: squared error of each token, from the reconstruction before it was rounded."""
    total_variance: Tensor
    """[] float32: sum over the tokens of the squared distance of x from its mean."""
    error: Tensor
    """[N, D] float32: reconstruction before rounding, minus x."""
    act_grads: Tensor
    """[N, K] float32: gradient of sq_err.sum() with respect to top_acts."""


@dataclass(frozen=True)
class LossConfig:
    """How decode_loss is cut up. `loss_config` chooses; a benchmark or a test passes its own.

    block_d: columns per program, a power of two. rows: slots per tile, a power of two; the last bits of x_hat depend
    on it. num_warps: warps per program. max_partial_bytes: bound on the partial sums of sq_err and act_grads; more
    tokens are done in several launches. variance_chunks: most pieces that the tokens are cut into for the total
    variance, whose last bits depend on it.
    """

    block_d: int
    rows: int
    num_warps: int
    max_partial_bytes: int = 1 << 28
    variance_chunks: int = 64

    def options(self) -> dict[str, int | bool]:
        """Compiler options of every launch; one stage, because the tiles go straight to registers."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}

    def tiles(self, K: int) -> dict[str, int]:
        """Shape of the tiles that hold K slots, as constants of the kernel."""
        tiles = max(1, triton.cdiv(K, self.rows))
        return {
            "TILES": tiles,
            "COLS": triton.next_power_of_2(tiles),
            "ROWS": self.rows,
            "BLOCK_D": self.block_d,
        }


def loss_config(K: int, D: int, itemsize: int) -> LossConfig:
    """Launch shape for K rows of D elements of `itemsize` bytes, from machine code and byte counts, not timed."""
    # 256 bytes of each row: two whole 128-byte lines; a slice of a 128K dictionary (32 MiB) stays in L2. Half of it
    # would double the partial sums, which are 3 % of the gather's bytes.
    block_d = 256 // itemsize
    # A narrower D must not pay for columns that are always masked.
    while block_d // 2 >= max(D, 16):
        block_d //= 2
    # A tile is one 128-bit load per thread. The fewer threads share the K rows, the fewer instructions a row costs
    # (sums across threads are paid once per program), until registers run out: a thread holds up to 128 elements,
    # which take a register each once they are widened.
    rows = 4
    while triton.cdiv(K, rows) * (16 // itemsize) > 128:
        rows *= 2
    return LossConfig(block_d=block_d, rows=rows, num_warps=max(1, rows * block_d * itemsize // 512))


def decode_loss_fwd(
    top_acts: Tensor,
    top_indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    config: LossConfig | None = None,
) -> DecodeLossResult:
    """Decode, measure against x, and differentiate the squared error by the values, with one gather of W_dec.

    top_acts, top_indices [N, K] (int32 or int64 in [0, F); an id outside counts as a row of zeros), W_dec
    [F, D], b_dec [D] or None, x [N, D]; floats are float32, bfloat16 or float16. All sums are float32 in a fixed
    order: the same inputs give the same bits. Up to MAX_SLOTS = 256 slots are one gather; for more, W_dec is
    gathered twice, by sparse_decode's kernel (x_hat then has sparse_decode's bits) and by sparse_dot's. Beside
    its result it holds partial sums of at most config.max_partial_bytes, and 512 D bytes for the variance.
    Raises ValueError on shape, dtype or device.
    """
    floats = {"top_acts": top_acts, "W_dec": W_dec, "x": x} | ({} if b_dec is None else {"b_dec": b_dec})
    check_gather(top_indices, floats)
    given = describe(top_indices=top_indices, **floats)
    check(
        top_acts.shape == top_indices.shape
        and W_dec.ndim == 2
        and x.shape == (top_acts.shape[0], W_dec.shape[1])
        and (b_dec is None or b_dec.shape == W_dec.shape[1:]),
        f"decode_loss_fwd takes top_acts, top_indices [N, K], W_dec [F, D], b_dec [D], x [N, D]; got {given}.",
    )
    tensors = top_acts.contiguous(), top_indices.contiguous(), W_dec.contiguous()
    bias = None if b_dec is None else b_dec.contiguous()
    x = x.contiguous()
    K, D = top_acts.shape[1], W_dec.shape[1]
    config = config or loss_config(K, D, W_dec.element_size())
    with torch.cuda.device_of(W_dec):
        variance = total_variance_fwd(x, config.variance_chunks)
        if K > MAX_SLOTS:
            x_hat, sq_err, error, act_grads = _two_gathers(*tensors, bias, x)
        else:
            x_hat, sq_err, error, act_grads = _one_gather(*tensors, bias, x, config)
    return DecodeLossResult(x_hat, sq_err, variance, error, act_grads)


def _one_gather(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor, cfg: LossConfig
) -> tuple[Tensor, ...]:
    (N, K), (F, D) = top_acts.shape, W_dec.shape
    x_hat, error = W_dec.new_empty(N, D), x.new_empty(N, D, dtype=torch.float32)
    sq_err, act_grads = error.new_empty(N), error.new_empty(N, K)
    if D == 0:
        return x_hat, sq_err.zero_(), error, act_grads.zero_()
    slices = triton.cdiv(D, cfg.block_d)
    step = N if slices == 1 else min(N, max(1, cfg.max_partial_bytes // (4 * slices * (K + 1))))
    sq_part = sq_err if slices == 1 else error.new_empty(slices * step)
    dot_part = act_grads if slices == 1 else error.new_empty(slices * step * K)
    for first in range(0, N, max(1, step)):
        tokens = min(step, N - first)
        _decode_loss_kernel[tokens, slices](
            top_acts[first:], top_indices[first:], W_dec, W_dec if b_dec is None else b_dec, x[first:],
            x_hat[first:], error[first:], sq_part, dot_part, tokens, F, K, D,
            HAS_BIAS=b_dec is not None, **cfg.tiles(K), **cfg.options(),
        )  # fmt: skip
        if slices > 1:
            _sum_slices(sq_part, sq_err[first:], slices, tokens)
            _sum_slices(dot_part, act_grads[first:], slices, tokens * K)
    return x_hat, sq_err, error, act_grads


def _two_gathers(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, x: Tensor
) -> tuple[Tensor, ...]:
    (N, K), (F, D) = top_acts.shape, W_dec.shape
    error = x.new_empty(N, D, dtype=torch.float32)
    if error.numel():
        cfg = launch_config(F, D, W_dec.element_size())
        # Into float32, where sparse_decode_fwd would round the sums to the dtype of W_dec.
        _sparse_decode_fwd_kernel[N, triton.cdiv(D, cfg.block_d)](
            top_acts, top_indices, W_dec, W_dec if b_dec is None else b_dec, error, F, K, D,
            HAS_BIAS=b_dec is not None, BLOCK_D=cfg.block_d, UNROLL=cfg.unroll, **cfg.options(),
        )  # fmt: skip
    x_hat = error.to(W_dec.dtype, copy=True)
    error -= x
    return x_hat, error.square().sum(1), error, sparse_dot_fwd(error, top_indices, W_dec).mul_(2)


def total_variance_fwd(x: Tensor, max_chunks: int = 64) -> Tensor:
    """sum_n ||x[n] - mean(x)||^2 of x [N, D], a float32 scalar, with one read of x.

    The tokens are cut into at most max_chunks pieces, which are merged in order: the same bits every time. Beside the
    result it holds 8 max_chunks D bytes.
    """
    (N, D), x = x.shape, x.contiguous()
    total = x.new_zeros(1, dtype=torch.float32)
    if x.numel() == 0:
        return total[0]
    tile, block_d = 32, 256 // x.element_size()
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    rows = max(128, triton.cdiv(triton.cdiv(N, max_chunks), tile) * tile)
    chunks, slices = triton.cdiv(N, rows), triton.cdiv(D, block_d)
    mean, m2 = total.new_empty(chunks, D), total.new_empty(chunks, D)
    part = total.new_empty(slices)
    with torch.cuda.device_of(x):
        _variance_chunks_kernel[slices, chunks](x, mean, m2, N, D, rows, ROWS=tile, BLOCK_D=block_d, **options)
        _variance_merge_kernel[slices,](mean, m2, part, N, D, rows, chunks, BLOCK_D=block_d, **options)
        _sum_slices(part, total, slices, 1)
    return total[0]


def _sum_slices(part: Tensor, out: Tensor, slices: int, size: int) -> None:
    """out[i] = sum of part[s, i] over the slices s, ascending."""
    if size:
        _sum_slices_kernel[(triton.cdiv(size, 1024),)](
            part, out, slices, size, BLOCK=1024, num_warps=4, num_stages=1, enable_fp_fusion=True
        )
