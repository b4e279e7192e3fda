"""How far pre-activations of a few features exceed their thresholds, summed per feature; and its gradient."""

import torch
from torch import Tensor

_BLOCK = 1 << 20  # bytes of a block of tokens in float32: it stays in the cache between its conversion and the product


def feature_penalty(x: Tensor, W: Tensor, b: Tensor, alpha: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """sums [S] = sum over n of ReLU(<x[n], W[s]> + b[s] - alpha[group[n], s]), and active [N, S] where it counts.

    Pre-activations in float32 (float64 for float64 weights), summed over the tokens in float64. Tokens of group -1
    do not count. `active` is everything that a gradient passes: true for NaN, as in torch.relu.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    rows, bias, thresholds = W.to(dtype).T, b.to(dtype), alpha.to(dtype)
    pre = torch.empty(x.shape[0], W.shape[0], dtype=dtype, device=x.device)
    for tokens in _blocks(x, dtype):
        pre[tokens] = x[tokens].to(dtype) @ rows
    counted = group >= 0
    of = torch.where(counted, group, 0).long()
    excess = (pre + bias - thresholds.index_select(0, of)).relu() if len(alpha) else torch.zeros_like(pre)
    excess = torch.where(counted[:, None], excess, 0.0)
    return excess.sum(0, dtype=torch.float64).to(dtype), ~(excess <= 0)


def feature_penalty_grad(active: Tensor, grad: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_x [N, D] = sum over s of active[n, s] * grad[s] * W[s], summed in float32, rounded once to `dtype`."""
    wide = torch.promote_types(W.dtype, torch.float32)
    rows, factor = W.to(wide), torch.where(active, grad.to(wide), 0.0)
    out = torch.empty(active.shape[0], W.shape[1], dtype=dtype, device=W.device)
    for tokens in _blocks(out, wide):
        out[tokens] = (factor[tokens] @ rows).to(dtype)
    return out


def _blocks(x: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of the tokens of x [N, D]: a few at a time where they have to be converted."""
    step = max(1, len(x)) if x.dtype == dtype else max(16, _BLOCK // (max(1, x.shape[1]) * dtype.itemsize))
    return [slice(first, first + step) for first in range(0, len(x), step)]
