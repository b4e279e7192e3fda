"""The SASFT penalty of a few features (S <= 32): excess over a threshold per group, and its gradient.

    pre[n, s]    = <x[n], W[s]> + b[s]
    excess[n, s] = max(0, pre[n, s] - alpha[group[n], s])        for tokens with 0 <= group[n] < G
    sums[s]      = sum_n excess[n, s],  active[n, s] = excess is not 0
    grad_x[n]    = sum_s grad[s] active[n, s] W[s]

    _feature_penalty_kernel     a program reads BT tokens once per SB features and writes the sums of its tokens
    _sum_programs_kernel        adds the sums of the programs in a fixed order
    _feature_penalty_grad_kernel  writes grad_x; reads N S bytes and the few rows

Dots are fused multiply-adds in float32, not tensor-core products: for N = 8192, D = 2048, S = 8 they are 0.13 G, far
below the time that reading x takes. Tokens that do not count are not read. N tokens, D residual width, S features.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels._arguments import FLOATS, INTS, check, describe

MAX_FEATURES = 32


@triton.jit
def _feature_penalty_kernel(
    x_ptr,  # [N, D]
    x_stride,
    W_ptr,  # [S, D]
    b_ptr,  # [S]
    alpha_ptr,  # [G, S]
    group_ptr,  # [N]
    part_ptr,  # [programs, S] float32
    active_ptr,  # [N, S] uint8
    N,
    S,
    D,
    G,
    BT: tl.constexpr,
    SB: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    inside = n < N
    group = tl.load(group_ptr + n, mask=inside, other=-1).to(tl.int64)
    counts = (group >= 0) & (group < G)
    at = x_ptr + n * x_stride
    for first in range(0, S, SB):
        acc = ()
        for _ in tl.static_range(SB):
            acc = acc + (tl.zeros([BT, BD // VEC], dtype=tl.float32),)  # noqa: RUF005 - Triton has no unpacking
        for start in range(0, D, BD):
            # Two-dimensional from the start, so that tokens and rows are loaded in one layout.
            d = start + tl.arange(0, BD)[None, :]
            x = tl.load(at[:, None] + d, mask=counts[:, None] & (d < D), other=0.0).to(tl.float32)
            more = ()
            for u in tl.static_range(SB):
                width = tl.where(first + u < S, D, 0)
                row = tl.load(W_ptr + (first + u) * D + d, mask=d < width, other=0.0).to(tl.float32)
                # VEC neighbours lie in one lane: adding them at once leaves one accumulator where VEC would be.
                more = more + (acc[u] + tl.sum(tl.reshape(x * row, [BT, BD // VEC, VEC]), axis=2),)  # noqa: RUF005 - Triton has no unpacking
            acc = more
        for u in tl.static_range(SB):
            s = first + u
            known = s < S
            bias = tl.load(b_ptr + s, mask=known, other=0.0).to(tl.float32)
            read = n < tl.where(known, N, 0)
            alpha = tl.load(alpha_ptr + group * S + s, mask=read & counts, other=0.0).to(tl.float32)
            excess = tl.sum(acc[u], axis=1) + bias - alpha
            excess = tl.where(counts, tl.where(excess <= 0, 0.0, excess), 0.0)  # a NaN stays
            tl.store(active_ptr + n * S + s, tl.where(excess == 0, 0, 1).to(tl.uint8), mask=read)
            tl.store(part_ptr + tl.program_id(0) * S + s, tl.sum(excess), mask=known)


@triton.jit
def _sum_programs_kernel(part_ptr, sums_ptr, programs, S, BLOCK: tl.constexpr):
    """sums[s] = sum of part[p, s] over the programs p, s = this program's number."""
    s = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, programs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + p.to(tl.int64) * S + s, mask=p < programs, other=0.0)
    tl.store(sums_ptr + s, tl.sum(total))


@triton.jit
def _feature_penalty_grad_kernel(
    active_ptr,  # [N, S] uint8
    grad_ptr,  # [S] float32
    W_ptr,  # [S, D]
    out_ptr,  # [N, D]
    N,
    S,
    D,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    total = tl.zeros([BT, BD], dtype=tl.float32)
    for s in range(S):
        active = tl.load(active_ptr + n * S + s, mask=n < N, other=0) != 0
        factor = tl.where(active, tl.load(grad_ptr + s), 0.0)
        row = tl.load(W_ptr + s * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += factor[:, None] * row
    inside = (n < N)[:, None] & (d < D)
    tl.store(out_ptr + n[:, None] * D + d, total.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class PenaltyConfig:
    """How the kernels are cut up; all powers of two. `penalty_config` chooses; a test passes its own.

    rows: tokens of a program. features: in flight at once; x is read once for each such group. block_d: columns of a
    tile. vec: neighbouring elements of x in a lane's load. The last bits of `sums` depend on all of them.
    """

    rows: int
    features: int
    block_d: int
    num_warps: int
    vec: int = 1

    def options(self) -> dict[str, int | bool]:
        """Compiler options of every launch; fusion is stated because its default changes between releases."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def penalty_config(S: int, D: int, itemsize: int, aligned: bool = True) -> PenaltyConfig:
    """Launch shape for rows of D elements of `itemsize` bytes, from register and byte counts, not timed."""
    vec = 16 // itemsize if aligned else 1
    lane, num_warps = max(vec, 4), 4
    while num_warps > 1 and num_warps // 2 * 32 * lane >= D:
        num_warps //= 2
    # 4 tokens and 4 rows in flight: 16 accumulators and at most 64 widened elements in a lane.
    return PenaltyConfig(4, min(4, triton.next_power_of_2(S)), num_warps * 32 * lane, num_warps, vec)


def feature_penalty_fwd(
    x: Tensor, W: Tensor, b: Tensor, alpha: Tensor, group: Tensor, config: PenaltyConfig | None = None
) -> tuple[Tensor, Tensor]:
    """(sums [S] float32, active [N, S] bool), as at the top of this file.

    x [N, D], W [S, D], b [S], alpha [G, S], each float32, bfloat16 or float16; group [N] int32 or int64, where a number
    outside 0..G-1 means that the token does not count. S <= 32. Sums are float32 in a fixed order. Beside its result it
    holds N S bytes of partial sums. Raises ValueError on shape, dtype or device.
    """
    floats = {"x": x, "W": W, "b": b, "alpha": alpha}
    given = describe(**floats, group=group)
    check(
        x.ndim == W.ndim == alpha.ndim == 2 and b.ndim == group.ndim == 1
        and x.shape[1] == W.shape[1] and x.shape[0] == group.shape[0] and W.shape[0] == b.shape[0] == alpha.shape[1]
        and 1 <= W.shape[0] <= MAX_FEATURES,
        f"feature_penalty_fwd takes x [N, D], W [S, D], b [S], alpha [G, S], group [N], S <= 32; got {given}.",
    )  # fmt: skip
    check(
        all(t.dtype in FLOATS for t in floats.values()) and group.dtype in INTS,
        f"feature_penalty_fwd takes float32, bfloat16 or float16, and int32 or int64 groups; got {given}.",
    )
    check(all(t.device == x.device for t in (W, b, alpha, group)), f"All tensors must be on one device; got {given}.")
    x = x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
    W, b, alpha, group = W.contiguous(), b.contiguous(), alpha.contiguous(), group.contiguous()
    (N, D), (G, S) = x.shape, alpha.shape
    sums = x.new_zeros(S, dtype=torch.float32)
    active = torch.empty(N, S, dtype=torch.bool, device=x.device)
    if N == 0:
        return sums, active
    aligned = not (D % 16 or x.stride(0) % 16 or x.data_ptr() % 16 or W.data_ptr() % 16)
    cfg = config or penalty_config(S, D, max(x.element_size(), W.element_size()), aligned)
    programs = triton.cdiv(N, cfg.rows)
    part = sums.new_empty(programs, S)
    with torch.cuda.device_of(x):
        _feature_penalty_kernel[(programs,)](
            x, x.stride(0), W, b, alpha, group, part, active.view(torch.uint8), N, S, D, G,
            BT=cfg.rows, SB=cfg.features, BD=cfg.block_d, VEC=cfg.vec, **cfg.options(),
        )  # fmt: skip
        _sum_programs_kernel[(S,)](part, sums, programs, S, BLOCK=1024, **_SUM_OPTIONS)
    return sums, active


_SUM_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def feature_penalty_bwd(
    active: Tensor, grad: Tensor, W: Tensor, dtype: torch.dtype, config: PenaltyConfig | None = None
) -> Tensor:
    """grad_x [N, D] of `dtype` = sum_s grad[s] active[n, s] W[s], in float32, rounded once.

    active [N, S] bool, grad [S] float32, W [S, D] float32, bfloat16 or float16. Raises ValueError on what does not fit.
    """
    given = describe(active=active, grad=grad, W=W)
    check(
        active.ndim == W.ndim == 2 and active.dtype == torch.bool and grad.dtype == torch.float32
        and grad.shape == W.shape[:1] == active.shape[1:] and W.dtype in FLOATS and dtype in FLOATS,
        f"feature_penalty_bwd takes active [N, S] bool, grad [S] float32, W [S, D]; got {given}.",
    )  # fmt: skip
    check(active.device == grad.device == W.device, f"All tensors must be on one device; got {given}.")
    active, grad, W = active.contiguous(), grad.contiguous(), W.contiguous()
    (N, S), D = active.shape, W.shape[1]
    out = W.new_empty(N, D, dtype=dtype)
    if out.numel() == 0:
        return out
    cfg = config or penalty_config(S, D, W.element_size(), not D % 16)
    with torch.cuda.device_of(W):
        _feature_penalty_grad_kernel[triton.cdiv(N, cfg.rows), triton.cdiv(D, cfg.block_d)](
            active.view(torch.uint8), grad, W, out, N, S, D, BT=cfg.rows, BD=cfg.block_d, **cfg.options()
        )
    return out
