"""Design E2 of the TopK encoder: a matrix product whose epilogue also stores the maximum of every group of scores.

    scores[n, f] = bfloat16(x[n] . W[f] + b[f])        bfloat16 inputs, float32 sum, one rounding
    maxima[n, g] = max of scores[n, f] over the features f of group g = f // GROUP, NaN if one of them is NaN

The maxima are those of the rounded scores, so that they rank groups as the stored scores rank features:
`group_select` (csrc/cuda/group_select.cuh) finds the exact top-k from them while reading k groups per row instead of
all F scores. N tokens, D residual width, F dictionary size.

The product is persistent: one program per SM walks over tiles of [BLOCK_N, BLOCK_F] scores, operands and scores
move by TMA, which zero-fills and clips at the edges. It is tuned and compiled for sm_90 only.
"""

import ctypes
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qscope_kernels import cuda_library

GROUP = 64  # scores per maximum: one 128-byte line, and 2 % more bytes for the maxima
MAX_GROUPS = 6144  # per row: what a block of group_select holds in registers


@triton.jit
def _max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_half(
    half,  # [BLOCK_N, HALF] float32, matrix product
    row,  # first row
    column,  # first column
    scores_desc,  # [N, F] bfloat16, block [BLOCK_N, HALF]
    b_ptr,  # [F]
    maxima_ptr,  # [N, groups] bfloat16
    N,
    F,
    groups,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
):
    f = column + tl.arange(0, HALF)
    if HAS_BIAS:
        half += tl.load(b_ptr + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    rounded = half.to(tl.bfloat16)
    scores_desc.store([row, column], rounded)
    # Columns beyond F hold 0 (TMA pads operands with zeros): they must not become a group's maximum.
    ranked = tl.where((f < F)[None, :], rounded.to(tl.float32), float("-inf"))
    tops = tl.reduce(tl.reshape(ranked, [BLOCK_N, HALF // GROUP, GROUP]), 2, _max_or_nan)
    n = row + tl.arange(0, BLOCK_N)
    g = column // GROUP + tl.arange(0, HALF // GROUP)
    inside = (n < N)[:, None] & (g < groups)[None, :]
    tl.store(maxima_ptr + n[:, None].to(tl.int64) * groups + g[None, :], tops.to(tl.bfloat16), mask=inside)


# That N or D is 1 or a multiple of 16 changes no instruction, but would cost another compilation, of seconds.
@triton.jit(do_not_specialize=["N", "D"])
def _group_encode_kernel(
    x_desc,  # [N, D] bfloat16, block [BLOCK_N, BLOCK_D]
    W_desc,  # [F, D] bfloat16, block [BLOCK_F, BLOCK_D]
    scores_desc,  # [N, F] bfloat16, block [BLOCK_N, BLOCK_F // 2]
    b_ptr,  # [F], not read unless HAS_BIAS
    maxima_ptr,  # [N, groups] bfloat16
    N,
    F,
    D,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tiles = tl.cdiv(N, BLOCK_N)
    column_tiles = tl.cdiv(F, BLOCK_F)
    groups = tl.cdiv(F, GROUP)
    band = ROW_TILES * column_tiles
    HALF: tl.constexpr = BLOCK_F // 2
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        # Tiles go down a band of ROW_TILES tiles, then to the next column: programs that run together share a few
        # columns of W and one band of x, which stay in L2.
        first = tile // band * ROW_TILES
        rows = tl.minimum(row_tiles - first, ROW_TILES)
        row = (first + tile % band % rows) * BLOCK_N
        column = tile % band // rows * BLOCK_F
        acc = tl.zeros([BLOCK_N, BLOCK_F], dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            x = x_desc.load([row, d])
            w = W_desc.load([column, d])
            if UPCAST:
                acc = tl.dot(x.to(tl.float32), w.to(tl.float32).T, acc, input_precision="ieee")
            else:
                acc = tl.dot(x, w.T, acc)
        # Halves: half the registers and half the shared memory of the store.
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N, 2, HALF]), [0, 2, 1]))
        _store_half(left, row, column, scores_desc, b_ptr, maxima_ptr, N, F, groups, HAS_BIAS, GROUP, BLOCK_N, HALF)
        _store_half(
            right, row, column + HALF, scores_desc, b_ptr, maxima_ptr, N, F, groups, HAS_BIAS, GROUP, BLOCK_N, HALF
        )


@dataclass(frozen=True)
class GroupConfig:
    """How the product is cut up. block_n x block_f scores per tile, block_d columns of x and W per step (powers of
    two, block_f at least 2 * GROUP), row_tiles: height of a band of tiles, programs: persistent programs."""

    block_n: int
    block_f: int
    block_d: int
    num_warps: int
    num_stages: int
    row_tiles: int
    programs: int
    group: int = GROUP

    def options(self) -> dict[str, int | bool]:
        """Compiler options; fusion of multiply and add is stated because its default changes between releases."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def group_config(N: int, multiprocessors: int) -> GroupConfig:
    """Tiles for N tokens on a GPU with that many SMs. Derived from sizes, not from timings."""
    # 128 x 256 x 64 in three stages: 144 KiB of operands and 32 KiB for the store of one half of the scores, of the
    # 227 KiB that an SM of Hopper has; two warpgroups of 64 x 256 scores each. Half as wide a tile moves a third more
    # bytes per product, but leaves no SM idle when there are few tokens.
    block_f, stages = (256, 3) if N > 128 else (128, 4)
    # 16 tiles of 128 tokens: with D = 4096, 16 MiB of x, and 132 programs share 9 columns of tiles, 18 MiB of W.
    return GroupConfig(128, block_f, 64, num_warps=8, num_stages=stages, row_tiles=16, programs=multiprocessors)


def group_problem(x: Tensor, W_enc: Tensor, k: int) -> str | None:
    """Why the group design cannot take these inputs, None if it can. The caller casts them to bfloat16 later."""
    D, F = x.shape[1], W_enc.shape[0]
    if not x.is_cuda:
        return f"it needs an NVIDIA GPU, x is on {x.device}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability[0] != 9:
        return f"it is made for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    if D % 8 or F % 8 or D == 0:
        return f"TMA needs rows of a multiple of 16 bytes: D={D} and F={F} must be multiples of 8"
    if F > MAX_GROUPS * GROUP:
        return f"its select takes F up to {MAX_GROUPS * GROUP}, F is {F}"
    for name, tensor in (("x", x), ("W_enc", W_enc)):
        if tensor.dtype == torch.bfloat16 and tensor.is_contiguous() and tensor.data_ptr() % 16:
            return f"TMA needs 16-byte aligned tensors, {name} is not"
    with torch.cuda.device_of(x):
        if cuda_library.load() is None:
            return f"its select is a CUDA kernel, and there is no library: {cuda_library.problem()}"
    return None


def group_encode_fwd(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    k: int,
    *,
    scores: Tensor,
    out: tuple[Tensor, Tensor],
    config: GroupConfig | None = None,
) -> None:
    """Write relu(topk(x W^T + b, k)) to out: values [N, k] bfloat16 and indices [N, k] int32, contiguous.

    x [N, D], W [F, D], b [F] or None: bfloat16, contiguous, 16-byte aligned, D and F multiples of 8. `scores` is
    workspace of at least N * F bfloat16, 16-byte aligned. Order and NaN as in `topk_select_fwd`; 1 <= k <= 256.
    """
    cfg = config or group_config(x.shape[0], _multiprocessors(x.device))
    table, maxima = group_scores(x, W, b, scores=scores, config=cfg)
    group_select_fwd(table, maxima, k, cfg.group, relu=True, out=out)


def group_scores(
    x: Tensor, W: Tensor, b: Tensor | None, *, scores: Tensor | None = None, config: GroupConfig | None = None
) -> tuple[Tensor, Tensor]:
    """scores [N, F] and maxima [N, ceil(F / group)] of x [N, D] W [F, D]^T + b [F], all bfloat16 (see the formulas
    at the top). Scores go into the workspace `scores` if given. Deterministic: every sum runs over D in order."""
    (N, D), F = x.shape, W.shape[0]
    if D % 8 or F % 8 or any(t.dtype != torch.bfloat16 or not t.is_contiguous() for t in (x, W)):
        raise ValueError(
            f"group_scores takes contiguous bfloat16 x [N, D] and W [F, D] with D and F multiples of 8 (TMA); got "
            f"x {list(x.shape)} {x.dtype}, W {list(W.shape)} {W.dtype}. Use topk_encode_fwd, which casts and chooses."
        )
    cfg = config or group_config(N, _multiprocessors(x.device))
    table = x.new_empty(N, F) if scores is None else scores[: N * F].view(N, F)
    maxima = x.new_empty(N, triton.cdiv(F, cfg.group))
    if table.numel() == 0:
        return table, maxima
    tiles = triton.cdiv(N, cfg.block_n) * triton.cdiv(F, cfg.block_f)
    with torch.cuda.device_of(x):
        _group_encode_kernel[(min(cfg.programs, tiles),)](
            TensorDescriptor.from_tensor(x, [cfg.block_n, cfg.block_d]),
            TensorDescriptor.from_tensor(W, [cfg.block_f, cfg.block_d]),
            TensorDescriptor.from_tensor(table, [cfg.block_n, cfg.block_f // 2]),
            W if b is None else b, maxima, N, F, D,
            HAS_BIAS=b is not None, GROUP=cfg.group, BLOCK_N=cfg.block_n, BLOCK_F=cfg.block_f, BLOCK_D=cfg.block_d,
            ROW_TILES=cfg.row_tiles, PROGRAMS=cfg.programs, UPCAST=not x.is_cuda, **cfg.options(),
        )  # fmt: skip
    return table, maxima


def group_select_fwd(
    scores: Tensor, maxima: Tensor, k: int, group: int, *, relu: bool, out: tuple[Tensor, Tensor]
) -> None:
    """Write the k best of each row of scores [N, F] to out, reading only the groups that can hold them.

    maxima [N, ceil(F / group)] as from `group_scores`; both bfloat16 and contiguous, F a multiple of 8. out: values
    [N, k] bfloat16, indices [N, k] int32, contiguous. Raises RuntimeError without the CUDA library.
    """
    (N, F), (values, indices) = scores.shape, out
    if N == 0:
        return
    with torch.cuda.device_of(scores):
        library = cuda_library.load()
        if library is None:
            raise RuntimeError(f"group_select_fwd is a CUDA kernel: {cuda_library.problem()}")
        arguments = [scores, maxima, values, indices]
        status = library.qscope_group_select(
            *(ctypes.c_void_p(t.data_ptr()) for t in arguments),
            ctypes.c_longlong(N), ctypes.c_longlong(F), ctypes.c_int(group), ctypes.c_int(k), ctypes.c_int(relu),
            cuda_library.stream(scores),
        )  # fmt: skip
        cuda_library.check(status, "qscope_group_select")


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
