"""The k largest scores of every row, exactly: a CUDA kernel that reads the scores once, and a Triton fallback.

Order: value descending, then lowest index; -0 equals +0 and is returned as +0; a row with a NaN returns NaN values and
the indices 0..k-1. N rows, F columns, s bytes per score.

The CUDA kernel (csrc/cuda/topk_select.cuh) reads N F s bytes and writes the result: nothing else moves or is allocated.
The fallback serves machines without nvcc. It reads the scores twice and keeps a list of candidates per row:

1. Lane i of a block sees columns i, i + BLOCK, ...: k scores reach the k-th largest of the lanes' maxima, the level.
2. Scores above the level, and the k lowest columns at it, are appended in column order (a prefix sum, no atomics).
   If they do not fit, which takes many large scores in few lanes, further reads bisect for a higher level.
3. A second kernel places the candidates of each row: a candidate's place is the number of larger ones.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels import cuda_library

MAX_K = 256
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INT32_COLUMNS = 2**31

# Order key of nothing: below that of minus infinity.
_NOTHING = tl.constexpr(-(2**31))


@triton.jit
def _order_keys(row_ptr, chunk, F, BLOCK: tl.constexpr):
    """int32 keys of one chunk's scores that compare as the scores do, and whether a score is NaN. Zeros share a key;
    what is NaN or behind the row's end gets _NOTHING."""
    lane = tl.arange(0, BLOCK)
    inside = lane < F - chunk * BLOCK
    score = tl.load(row_ptr + chunk * BLOCK + lane, mask=inside, other=0.0).to(tl.float32)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    nan = inside & (score != score)
    return tl.where(inside & (score == score), bits ^ ((bits >> 31) & 0x7FFFFFFF), _NOTHING), nan


@triton.jit
def _packed(key, column):
    """One int64 per candidate: larger is earlier in the result."""
    return (key.to(tl.int64) << 32) | (0xFFFFFFFF - column.to(tl.int64))


@triton.jit
def _kth_largest(keys, k, low, high):
    """Largest t in low .. high that at least k keys reach, all int64; low if there is none above it."""
    while low < high:
        middle = (low + high + 1) >> 1
        if tl.sum((keys.to(tl.int64) >= middle).to(tl.int32), axis=0) >= k:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _topk_select_collect_kernel(
    scores_ptr,  # row n starts at n * row_stride
    values_ptr,  # [N, k] the result for earlier columns, read if MERGE
    indices_ptr,  # [N, k] likewise
    list_ptr,  # [N, CAPACITY + 1] int64: candidates, then how many, or -1 for a row with NaN
    row_stride,
    F,
    k,
    first_column,
    MERGE: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + n * row_stride
    list_ptr += n * (CAPACITY + 1)
    chunks = (F - 1) // BLOCK + 1

    best = tl.full([BLOCK], _NOTHING, dtype=tl.int32)
    any_nan = tl.zeros([BLOCK], dtype=tl.int32)
    for chunk in range(0, chunks):
        keys, nan = _order_keys(row_ptr, chunk, F, BLOCK=BLOCK)
        best = tl.maximum(best, keys)
        any_nan |= nan.to(tl.int32)
    broken = tl.sum(any_nan, axis=0)
    highest = tl.max(best, axis=0).to(tl.int64)
    level = _kth_largest(best, k, tl.full([], _NOTHING, dtype=tl.int64), highest)

    seeds = 0
    floor = tl.full([], _NOTHING, dtype=tl.int64)
    if MERGE:
        slot = tl.arange(0, MAX_K)
        used = slot < k
        value = tl.load(values_ptr + n * k + slot, mask=used, other=0.0).to(tl.float32)
        broken += tl.sum((used & (value != value)).to(tl.int32), axis=0)
        bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        index = tl.load(indices_ptr + n * k + slot, mask=used, other=0)
        tl.store(list_ptr + slot, _packed(key, index), mask=used)
        floor = tl.min(tl.where(used, key, 0x7FFFFFFF), axis=0).to(tl.int64)
        seeds = k
    # Scores that only reach the floor lose against k in earlier columns; the second kernel's order sees to that.
    level = tl.maximum(level, floor)

    if broken > 0:
        tl.store(list_ptr + CAPACITY, tl.full([], -1, dtype=tl.int64))
    else:
        room = CAPACITY - 2 * k  # beside earlier results and ties
        above = room + 1
        ties = tl.full([], 0, dtype=tl.int32)
        while above > room:
            above = 0
            ties = tl.full([], 0, dtype=tl.int32)
            for chunk in range(0, chunks):
                keys, _ = _order_keys(row_ptr, chunk, F, BLOCK=BLOCK)
                over = (keys > level).to(tl.int32)
                equal = (keys == level).to(tl.int32)
                if tl.sum(over + equal, axis=0) > 0:
                    # Both running counts in one prefix sum: neither exceeds BLOCK, which is below 2^16.
                    before = tl.cumsum(over + (equal << 16), axis=0) - over - (equal << 16)
                    rank = ties + (before >> 16)  # of ties, in column order
                    take = (over > 0) | ((equal > 0) & (rank < k))
                    place = seeds + above + (before & 0xFFFF) + tl.minimum(rank, k)
                    column = first_column + chunk * BLOCK + tl.arange(0, BLOCK)
                    tl.store(list_ptr + place, _packed(keys, column), mask=take & (place < CAPACITY))
                    ties += tl.sum(equal, axis=0)
                    above += tl.sum(over, axis=0)
            reached = above
            while reached > room:
                middle = (level + highest + 1) >> 1
                higher = tl.zeros([BLOCK], dtype=tl.int32)
                equal = tl.zeros([BLOCK], dtype=tl.int32)
                for chunk in range(0, chunks):
                    keys, _ = _order_keys(row_ptr, chunk, F, BLOCK=BLOCK)
                    higher += (keys > middle).to(tl.int32)
                    equal += (keys == middle).to(tl.int32)
                beyond = tl.sum(higher, axis=0)
                if beyond + tl.sum(equal, axis=0) >= k:
                    level = middle
                    reached = beyond
                else:
                    highest = middle - 1
        tl.store(list_ptr + CAPACITY, (seeds + above + tl.minimum(ties, k)).to(tl.int64))


@triton.jit
def _topk_select_order_kernel(
    list_ptr,  # [N, CAPACITY + 1] int64
    values_ptr,  # [N, k]
    indices_ptr,  # [N, k] int32
    k,
    RELU: tl.constexpr,
    CAPACITY: tl.constexpr,
    STEP: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    list_ptr += n * (CAPACITY + 1)
    slot = tl.arange(0, CAPACITY)
    count = tl.load(list_ptr + CAPACITY).to(tl.int32)
    items = tl.load(list_ptr + slot, mask=slot < count, other=0)
    # No two candidates are equal: the number of larger ones is a candidate's place.
    place = tl.zeros([CAPACITY], dtype=tl.int32)
    for start in range(0, count, STEP):
        at = start + tl.arange(0, STEP)
        rivals = tl.load(list_ptr + at, mask=at < count, other=-(2**63))
        place += tl.sum((rivals[None, :] > items[:, None]).to(tl.int32), axis=1)
    key = (items >> 32).to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    column = (0xFFFFFFFF - (items & 0xFFFFFFFF)).to(tl.int32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    broken = count < 0
    value = tl.where(broken, float("nan"), value)
    column = tl.where(broken, slot, column)
    place = tl.where(broken, slot, place)
    wanted = (place < k) & (slot < tl.where(broken, k, count))
    tl.store(values_ptr + n * k + place, value.to(values_ptr.dtype.element_ty), mask=wanted)
    tl.store(indices_ptr + n * k + place, column, mask=wanted)


@dataclass(frozen=True)
class LaunchConfig:
    """How the selection is cut up. `launch_config` chooses; a benchmark or a test passes its own.

    threads: of the CUDA kernel, per row; 256 or 1024. block, num_warps: columns per step and warps of the fallback's
    programs; block is a power of two from 256 to 32768. rows: of one launch of the fallback, which bounds its memory.
    """

    threads: int = 256
    block: int = 2048
    num_warps: int = 8
    rows: int = 2048


def launch_config(N: int, processors: int) -> LaunchConfig:
    """Launch shape for N rows on a GPU with that many multiprocessors. Derived, not timed.

    Four blocks of 256 threads fit a multiprocessor. With fewer rows than would fill half of these, a row gets the 1024
    threads that would stay idle otherwise. The fallback keeps 8 scores per thread in registers; 2048 rows of
    candidates are at most 16 MiB.
    """
    return LaunchConfig(threads=1024 if 2 * processors >= N else 256)


def topk_select_fwd(
    scores: Tensor,
    k: int,
    *,
    relu: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    first_column: int = 0,
    merge: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest scores of every row: values [N, k] in the dtype of scores and indices [N, k] int32.

    scores [N, F] float32, float16 or bfloat16; rows may be any distance apart, columns that are not contiguous are
    copied. k is 1 to 256 and at most F. Ordered by value descending, then index ascending; -0 is returned as +0. A row
    with a NaN gives NaN values and indices 0..k-1. relu replaces negative values by 0 after the selection.

    A matrix can be given as column blocks, in order: the first call selects among the first columns; every later one
    passes its result as `out` with merge=True and the number of its first column, and updates `out` in place. Later
    blocks may be narrower than k. relu belongs to the last call only. Without merge, `out` is where to write.

    Runs on the current stream and never waits. With the CUDA library nothing is allocated beyond the result. The Triton
    fallback, for machines where cuda_library.load() is None, allocates up to 8 KiB per row of `config.rows` rows.
    Raises ValueError on shape, dtype, device or range.
    """
    _check(scores, k, out, first_column, merge)
    N, F = scores.shape
    scores = scores if scores.stride(1) == 1 or F == 1 else scores.contiguous()
    values, indices = out or (scores.new_empty(N, k), scores.new_empty(N, k, dtype=torch.int32))
    if N == 0 or (merge and F == 0):
        if merge and relu:
            values.relu_()
        return values, indices
    with torch.cuda.device_of(scores):
        cfg = config or launch_config(N, _processors(scores))
        library = cuda_library.load() if scores.is_cuda else None
        if library is None:
            _select_with_triton(scores, k, relu, first_column, merge, values, indices, cfg)
        else:
            code = library.qscope_topk_select(
                *cuda_arguments(scores, k, relu, first_column, merge, values, indices, cfg.threads),
                cuda_library.stream(scores),
            )
            cuda_library.check(code, "topk_select_fwd")
    return values, indices


def cuda_arguments(
    scores: Tensor,
    k: int,
    relu: bool,
    first_column: int,
    merge: bool,
    values: Tensor,
    indices: Tensor,
    threads: int,
) -> tuple[Any, ...]:
    """What `qscope_topk_select` takes before the stream; scores' columns and the outputs are contiguous."""
    N, F = scores.shape
    return (
        ctypes.c_void_p(scores.data_ptr()), ctypes.c_int(_DTYPE_CODES[scores.dtype]), ctypes.c_int64(N),
        ctypes.c_int64(scores.stride(0)), ctypes.c_int64(F), ctypes.c_int(k), ctypes.c_int(relu), ctypes.c_int(merge),
        ctypes.c_int64(first_column), ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(indices.data_ptr()),
        ctypes.c_int(threads),
    )  # fmt: skip


def fallback_constants(k: int, block: int) -> dict[str, int]:
    """Sizes of the fallback's first kernel.

    A candidate list holds an earlier result, k ties and 2 k others: usually there are few more than k.
    """
    return {"CAPACITY": max(128, triton.next_power_of_2(4 * k)), "MAX_K": MAX_K, "BLOCK": block}


def order_options(capacity: int) -> dict[str, int | bool]:
    """Constants and compiler options of the fallback's second kernel: two candidates per thread."""
    return {"STEP": 8, "num_warps": capacity // 64, "num_stages": 1, "enable_fp_fusion": True}


def _select_with_triton(
    scores: Tensor,
    k: int,
    relu: bool,
    first_column: int,
    merge: bool,
    values: Tensor,
    indices: Tensor,
    cfg: LaunchConfig,
) -> None:
    N, F = scores.shape
    constants = fallback_constants(k, cfg.block)
    capacity = constants["CAPACITY"]
    options = {"num_warps": cfg.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    lists = scores.new_empty(min(N, cfg.rows), capacity + 1, dtype=torch.int64)
    for first in range(0, N, cfg.rows):
        rows = min(cfg.rows, N - first)
        _topk_select_collect_kernel[(rows,)](
            scores[first:], values[first:], indices[first:], lists, scores.stride(0), F, k, first_column,
            MERGE=merge, **constants, **options,
        )  # fmt: skip
        _topk_select_order_kernel[(rows,)](
            lists, values[first:], indices[first:], k,
            RELU=relu, CAPACITY=capacity, **order_options(capacity),
        )  # fmt: skip


def _processors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def _check(scores: Tensor, k: int, out: tuple[Tensor, Tensor] | None, first_column: int, merge: bool) -> None:
    given = f"scores {list(scores.shape)} {scores.dtype} on {scores.device}"
    if scores.ndim != 2 or scores.dtype not in _DTYPE_CODES:
        raise ValueError(f"topk_select_fwd takes scores [N, F] float32, float16 or bfloat16; got {given}.")
    N, F = scores.shape
    if not 1 <= k <= MAX_K:
        raise ValueError(f"topk_select_fwd takes k from 1 to {MAX_K}; got k={k}. Use torch.topk for a larger k.")
    if k > F and not merge:
        raise ValueError(f"topk_select_fwd selects k={k} of at least k columns; got {given}. Lower k or widen scores.")
    if first_column < 0 or first_column + F >= _INT32_COLUMNS:
        raise ValueError(
            f"topk_select_fwd returns int32 indices: columns must lie in 0 .. 2^31 - 2; got {given} from column "
            f"{first_column}."
        )
    if out is None:
        if merge:
            raise ValueError("topk_select_fwd with merge=True updates the result of an earlier call: pass it as out.")
        return
    expected = ((out[0], scores.dtype), (out[1], torch.int32))
    good = all(t.shape == (N, k) and t.dtype == d and t.device == scores.device for t, d in expected)
    if not good or not all(t.is_contiguous() for t in out):
        have = ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in out)
        raise ValueError(
            f"topk_select_fwd writes contiguous values [{N}, {k}] {scores.dtype} and indices [{N}, {k}] torch.int32 on "
            f"{scores.device}; got out = {have}."
        )
