"""Adam on the rows that a batch touched, in place."""

import math

import torch
from torch import Tensor

from qscope.reference._workspace import rows_per_block

# W, grad, exp_avg, exp_avg_sq and about as many intermediates of a block of rows exist at once.
_COPIES = 8


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
    grad_scale: Tensor | None,
    unit_rows: bool,
    shadow: Tensor | None,
) -> None:
    """Adam step number `step` (from 1) on the rows of W [F, D] where touched [F] is set, in float32.

    exp_avg, exp_avg_sq [F, D] decay by beta^(step - last_step[f]). unit_rows removes the part of the gradient that
    is parallel to the row, and divides the updated row by its norm. shadow [F, D] receives the updated rows. A row
    whose gradient has no finite squared norm is left as it is, its last_step too, and so is
    every row while step < 1.
    """
    now, scale = int(step), 1.0 if grad_scale is None else grad_scale.float()
    corrections = [-math.expm1(now * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2)]
    if now < 1 or not W.shape[1]:
        return
    for rows in touched.nonzero().view(-1).split(rows_per_block(W.shape[1] * _COPIES, 4)):
        w, g = W[rows], grad[rows].float() * scale
        usable = (g * g).sum(1).isfinite()
        if unit_rows:
            size = (w * w).sum(1)
            along = torch.where(size > 0, (g * w).sum(1) / size, 0)
            usable &= along.isfinite()
            g = g - along[:, None] * w
        if not usable.all():
            rows, w, g = rows[usable], w[usable], g[usable]
        elapsed = (now - last_step[rows].long()).clamp(min=0)[:, None]
        m = exp_avg[rows] * _power(beta1, elapsed) + (1 - beta1) * g
        v = exp_avg_sq[rows] * _power(beta2, elapsed) + (1 - beta2) * g * g
        w = w - lr.float() / corrections[0] * (m / (v.sqrt() / math.sqrt(corrections[1]) + eps))
        if unit_rows:
            size = (w * w).sum(1)
            w = w * torch.where((size > 0) & size.isfinite(), size.rsqrt(), 1)[:, None]
        W.index_copy_(0, rows, w)
        exp_avg.index_copy_(0, rows, m)
        exp_avg_sq.index_copy_(0, rows, v)
        last_step.index_fill_(0, rows, now)
        if shadow is not None:
            shadow.index_copy_(0, rows, w.to(shadow.dtype))


def _power(beta: float, elapsed: Tensor) -> Tensor:
    """beta^elapsed in float32, one rounding."""
    return torch.pow(torch.tensor(beta, dtype=torch.float64, device=elapsed.device), elapsed).float()
