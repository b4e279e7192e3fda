"""Adam on the rows of a weight matrix that a batch touched: one launch, in place, no atomics.

    row_adam_       for every f with touched[f]:
        g = grad[f] * grad_scale;   if unit_rows: g -= <g, w> / <w, w> * w
        m = beta1^(step - last_step[f]) * m + (1 - beta1) * g
        v = beta2^(step - last_step[f]) * v + (1 - beta2) * g^2
        w -= lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps);   if unit_rows: w /= ||w||
        last_step[f] = step;   shadow[f] = w, rounded

Adam and its bias corrections: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1. Grid: one program per row (per
several, where D is small), which leaves at once if the row is not touched. A row of up to 8192 columns is held in
registers between its sums and the update: 24 bytes of traffic per parameter with a float32 gradient, 26 with the
shadow. Longer rows are read again from L2. F rows, D columns.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qscope_kernels._arguments import FLOATS, INTS, check, describe


@triton.jit
def _one_minus_power(log2_beta, step):
    """1 - beta^step without the cancellation that float32 would suffer where beta^step is close to 1."""
    x = step * (log2_beta * 0.6931471805599453)
    # Taylor series of exp(x) - 1; the first term left out is below 2^-26 of the sum for -1/2 <= x <= 0.
    series = 1.0 + x / 8.0
    for i in tl.static_range(6):
        series = 1.0 + x / (7.0 - i) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp2(step * log2_beta))


@triton.jit
def _decay(beta, log2_beta, elapsed):
    """beta^elapsed, exact where a row is touched every step: a rounding there would add up over the steps."""
    return tl.where(elapsed == 1, beta, tl.exp2(elapsed.to(tl.float32) * log2_beta))


@triton.jit
def _schedule(step_ptr, lr_ptr, log2_beta1, log2_beta2):
    """step, lr / (1 - beta1^step) and 1 / sqrt(1 - beta2^step)."""
    step = tl.load(step_ptr).to(tl.int64)
    rate = tl.load(lr_ptr) / _one_minus_power(log2_beta1, step.to(tl.float32))
    return step, rate, 1.0 / tl.sqrt(_one_minus_power(log2_beta2, step.to(tl.float32)))


@triton.jit
def _parallel_part(gw, ww):
    """<g, w> / <w, w>; 0 for a row of zeros."""
    return tl.where(ww > 0.0, gw / tl.where(ww > 0.0, ww, 1.0), 0.0)


@triton.jit
def _usable(gg, along, step):
    """False where a gradient is NaN, infinite or so large that its square would fill exp_avg_sq for ever, and before
    step 1, where the bias corrections are 0."""
    infinity = float("inf")
    return (gg + tl.where(step > 0, 0.0, infinity) < infinity) & (tl.abs(along) < infinity)


@triton.jit
def _inverse_norm(ww):
    """1 / ||w||; 1 where the row has no direction."""
    normal = (ww > 0.0) & (ww < float("inf"))
    return tl.where(normal, 1.0 / tl.sqrt(tl.where(normal, ww, 1.0)), 1.0)


@triton.jit
def _row_adam_kernel(
    W_ptr,  # [F, D] float32
    grad_ptr,  # [F, D]
    m_ptr,  # [F, D] float32, exp_avg
    v_ptr,  # [F, D] float32, exp_avg_sq
    last_step_ptr,  # [F] int32
    touched_ptr,  # [F] uint8
    step_ptr,  # [] int32 or int64
    lr_ptr,  # [] float32
    scale_ptr,  # [] float32, not read unless HAS_SCALE
    shadow_ptr,  # [F, D] bfloat16, not written unless HAS_SHADOW
    beta1,
    beta2,
    rest1,  # 1 - beta1, rounded once
    rest2,
    log2_beta1,
    log2_beta2,
    eps,
    F,
    D,
    HAS_SCALE: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    touched = tl.load(touched_ptr + f, mask=f < F, other=0).to(tl.int32)
    if tl.max(touched, axis=0) > 0:
        d = tl.arange(0, BLOCK_D)
        at = f[:, None] * D + d[None, :]
        mask = (touched > 0)[:, None] & (d < D)[None, :]
        w = tl.load(W_ptr + at, mask=mask, other=0.0)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=mask, other=0.0)  # before the sums, so that a row waits for memory once
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        if HAS_SCALE:
            g *= tl.load(scale_ptr)
        along = tl.zeros([ROWS], dtype=tl.float32)
        gg = tl.sum(g * g, axis=1)
        if UNIT_ROWS:
            along = _parallel_part(tl.sum(g * w, axis=1), tl.sum(w * w, axis=1))
            g -= along[:, None] * w
        step, rate, inverse_root = _schedule(step_ptr, lr_ptr, log2_beta1, log2_beta2)
        usable = (touched > 0) & _usable(gg, along, step)
        mask &= usable[:, None]
        elapsed = tl.maximum(step - tl.load(last_step_ptr + f, mask=usable, other=0), 0)
        m = m * _decay(beta1, log2_beta1, elapsed)[:, None] + rest1 * g
        tl.store(m_ptr + at, m, mask=mask)
        v = v * _decay(beta2, log2_beta2, elapsed)[:, None] + rest2 * g * g
        tl.store(v_ptr + at, v, mask=mask)
        w -= rate * (m / (tl.sqrt(v) * inverse_root + eps))
        if UNIT_ROWS:
            # A masked lane of w holds 0 - rate * 0 / eps, which is 0 unless eps is: the sum leaves it out.
            w *= _inverse_norm(tl.sum(tl.where(mask, w * w, 0.0), axis=1))[:, None]
        tl.store(W_ptr + at, w, mask=mask)
        if HAS_SHADOW:
            tl.store(shadow_ptr + at, w.to(shadow_ptr.dtype.element_ty), mask=mask)
        tl.store(last_step_ptr + f, tl.zeros([ROWS], dtype=tl.int32) + step.to(tl.int32), mask=usable)


@triton.jit
def _row_adam_long_kernel(
    W_ptr,  # the arguments of _row_adam_kernel
    grad_ptr,
    m_ptr,
    v_ptr,
    last_step_ptr,
    touched_ptr,
    step_ptr,
    lr_ptr,
    scale_ptr,
    shadow_ptr,
    beta1,
    beta2,
    rest1,
    rest2,
    log2_beta1,
    log2_beta2,
    eps,
    F,
    D,
    HAS_SCALE: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    if tl.load(touched_ptr + f) > 0:
        scale = 1.0
        if HAS_SCALE:
            scale = tl.load(scale_ptr)
        gg = tl.zeros([BLOCK_D], dtype=tl.float32)
        gw = tl.zeros([BLOCK_D], dtype=tl.float32)
        ww = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = d < D
            g = tl.load(grad_ptr + f * D + d, mask=mask, other=0.0).to(tl.float32) * scale
            gg += g * g
            if UNIT_ROWS:
                w = tl.load(W_ptr + f * D + d, mask=mask, other=0.0)
                gw += g * w
                ww += w * w
        along = tl.full([], 0.0, dtype=tl.float32)
        if UNIT_ROWS:
            along = _parallel_part(tl.sum(gw, axis=0), tl.sum(ww, axis=0))
        step, rate, inverse_root = _schedule(step_ptr, lr_ptr, log2_beta1, log2_beta2)
        if _usable(tl.sum(gg, axis=0), along, step):
            elapsed = tl.maximum(step - tl.load(last_step_ptr + f), 0)
            decay1, decay2 = _decay(beta1, log2_beta1, elapsed), _decay(beta2, log2_beta2, elapsed)
            ww = tl.zeros([BLOCK_D], dtype=tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                mask = d < D
                at = f * D + d
                g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
                w = tl.load(W_ptr + at, mask=mask, other=0.0)
                if UNIT_ROWS:
                    g -= along * w
                m = tl.load(m_ptr + at, mask=mask, other=0.0) * decay1 + rest1 * g
                tl.store(m_ptr + at, m, mask=mask)
                v = tl.load(v_ptr + at, mask=mask, other=0.0) * decay2 + rest2 * g * g
                tl.store(v_ptr + at, v, mask=mask)
                w -= rate * (m / (tl.sqrt(v) * inverse_root + eps))
                tl.store(W_ptr + at, w, mask=mask)
                ww += tl.where(mask, w * w, 0.0)
                if HAS_SHADOW and not UNIT_ROWS:
                    tl.store(shadow_ptr + at, w.to(shadow_ptr.dtype.element_ty), mask=mask)
            if UNIT_ROWS:
                inverse_norm = _inverse_norm(tl.sum(ww, axis=0))
                tl.debug_barrier()  # a thread may read back what another one of the block has stored
                for start in range(0, D, BLOCK_D):
                    d = start + tl.arange(0, BLOCK_D)
                    mask = d < D
                    w = tl.load(W_ptr + f * D + d, mask=mask, other=0.0) * inverse_norm
                    tl.store(W_ptr + f * D + d, w, mask=mask)
                    if HAS_SHADOW:
                        tl.store(shadow_ptr + f * D + d, w.to(shadow_ptr.dtype.element_ty), mask=mask)
            tl.store(last_step_ptr + f, step.to(tl.int32))


@dataclass(frozen=True)
class LaunchConfig:
    """rows: rows per program. block_d: columns held at once, a power of two. num_warps: warps per program.

    A block_d below D takes the kernel for long rows, with one row per program.
    """

    rows: int
    block_d: int
    num_warps: int

    def options(self) -> dict[str, int | bool]:
        """Compiler options of every launch; one stage, because rows go straight to registers."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def launch_config(D: int) -> LaunchConfig:
    """Launch shape for rows of D columns; derived from register counts, not from timings."""
    # Four arrays of a row are in registers at once: 16 elements per thread of each take 64 of them, and 8192 columns
    # take 512 threads, whose limit is 128 registers. Longer rows would spill.
    block_d = min(8192, triton.next_power_of_2(max(D, 1)))
    if block_d < D:
        # The loop holds one block at a time, so it can be narrow enough for several programs per SM.
        return LaunchConfig(rows=1, block_d=2048, num_warps=4)
    # Below 512 columns (a bias has one) a warp takes several rows, so that its lanes are not idle.
    return LaunchConfig(rows=max(1, 512 // block_d), block_d=block_d, num_warps=max(1, block_d // 512))


def row_adam_(
    W: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor,
    touched: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: Tensor | None = None,
    unit_rows: bool = False,
    shadow: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> None:
    """The update above, in place on W, exp_avg, exp_avg_sq, last_step and shadow, for rows with touched[f].

    W, exp_avg, exp_avg_sq [F, D] float32, grad [F, D] float32, bfloat16 or float16, shadow [F, D] bfloat16 or None,
    last_step [F] int32, touched [F] bool, all contiguous; step [] int32 or int64 (counts from 1), lr and grad_scale
    [] float32, read on the device: a CUDA graph replays with what they hold then. No allocation. A touched row is
    left as it is, last_step included, if its scaled gradient is not finite or its squared norm overflows float32,
    and so are all rows while step < 1. Same inputs, same bits. Raises ValueError on shape, dtype, stride or device.
    """
    tensors = {"W": W, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "last_step": last_step}
    tensors |= {"touched": touched, "step": step, "lr": lr}
    tensors |= {name: t for name, t in (("grad_scale", grad_scale), ("shadow", shadow)) if t is not None}
    given = describe(**tensors)
    check(
        W.ndim == 2
        and all(t.shape == W.shape for t in (grad, exp_avg, exp_avg_sq, *(() if shadow is None else (shadow,))))
        and last_step.shape == touched.shape == W.shape[:1]
        and all(t.numel() == 1 for t in (step, lr, *(() if grad_scale is None else (grad_scale,)))),
        f"row_adam_ takes W, grad, exp_avg, exp_avg_sq, shadow [F, D], last_step, touched [F], and one number in step, "
        f"lr, grad_scale; got {given}.",
    )
    float32 = (W, exp_avg, exp_avg_sq, lr, *(() if grad_scale is None else (grad_scale,)))
    check(
        all(t.dtype == torch.float32 for t in float32)
        and grad.dtype in FLOATS
        and (shadow is None or shadow.dtype == torch.bfloat16)
        and last_step.dtype == torch.int32 and touched.dtype == torch.bool and step.dtype in INTS,
        f"row_adam_ takes float32 (grad also bfloat16, float16), shadow bfloat16, last_step int32, touched bool, step "
        f"int32 or int64; got {given}.",
    )  # fmt: skip
    check(all(t.device == W.device for t in tensors.values()), f"All tensors must be on one device; got {given}.")
    check(
        0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0,
        f"row_adam_ takes beta1 and beta2 in [0, 1) and eps above 0; got {beta1}, {beta2} and {eps}.",
    )
    strided = [name for name, t in tensors.items() if not t.is_contiguous()]
    check(
        not strided,
        f"row_adam_ takes contiguous tensors (it writes in place, and copies none); {', '.join(strided)} is not.",
    )
    F, D = W.shape
    if W.numel() == 0:
        return
    cfg = config or launch_config(D)
    logs = [max(math.log2(beta), -1000.0) if beta > 0 else -1000.0 for beta in (beta1, beta2)]  # 2^-1000 is 0
    arguments = (
        W, grad, exp_avg, exp_avg_sq, last_step, touched.view(torch.uint8), step, lr,
        lr if grad_scale is None else grad_scale, W if shadow is None else shadow,
        float(beta1), float(beta2), 1.0 - beta1, 1.0 - beta2, *logs, float(eps), F, D,
    )  # fmt: skip
    flags = {"HAS_SCALE": grad_scale is not None, "HAS_SHADOW": shadow is not None, "UNIT_ROWS": unit_rows}
    with torch.cuda.device_of(W):
        if cfg.block_d < D:
            _row_adam_long_kernel[(F,)](*arguments, **flags, BLOCK_D=cfg.block_d, **cfg.options())
        else:
            _row_adam_kernel[(triton.cdiv(F, cfg.rows),)](
                *arguments, **flags, ROWS=cfg.rows, BLOCK_D=cfg.block_d, **cfg.options()
            )
