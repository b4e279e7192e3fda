"""The training objectives in plain dense PyTorch, differentiable by autograd, in the dtype of their inputs.

Shapes: x [N, D_in], target [N, D_out], W_enc [F, D_in], b_enc [F], W_dec [F, D_out], b_dec [D_out]. Every loss is in
units of the targets' variance, sum_n ||target[n] - mean||^2, so that its main term is the fraction of variance
unexplained. They hold [N, F] tensors: for tests and as the meaning, not for training.
"""

from typing import Any

import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""W_enc, b_enc, W_dec, b_dec"""


def variance(y: Tensor) -> Tensor:
    return (y - y.mean(0)).square().sum()


def _fvu(codes: Tensor, weights: Weights, target: Tensor) -> Tensor:
    _, _, W_dec, b_dec = weights
    return (codes @ W_dec + b_dec - target).square().sum() / variance(target)


def _scores(x: Tensor, weights: Weights) -> Tensor:
    return x @ weights[0].T + weights[1]


def topk_codes(scores: Tensor, k: int) -> Tensor:
    """[N, F]: relu of the k largest of each row."""
    values, ids = scores.topk(k, dim=1)
    return torch.zeros_like(scores).scatter(1, ids, values.relu())


def topk_loss(x: Tensor, target: Tensor, weights: Weights, k: int) -> Tensor:
    """Gao et al. 2024, arXiv 2406.04093, section 2.3."""
    return _fvu(topk_codes(_scores(x, weights), k), weights, target)


def multi_topk_loss(x: Tensor, target: Tensor, weights: Weights, k: int) -> Tensor:
    """L(k) + L(4 k) / 8: Gao et al. 2024, section 4.3."""
    scores = _scores(x, weights)
    wide = min(4 * k, scores.shape[1])
    return _fvu(topk_codes(scores, k), weights, target) + _fvu(topk_codes(scores, wide), weights, target) / 8


def batch_topk_codes(scores: Tensor, k: int) -> Tensor:
    """[N, F]: the k N largest of relu(scores)."""
    values, ids = scores.relu().flatten().topk(k * scores.shape[0])
    return torch.zeros_like(scores).flatten().scatter(0, ids, values).view_as(scores)


def batch_topk_loss(x: Tensor, target: Tensor, weights: Weights, k: int) -> Tensor:
    """Bussmann et al. 2024, arXiv 2412.06410, equation 5."""
    return _fvu(batch_topk_codes(_scores(x, weights), k), weights, target)


def nested_loss(codes: Tensor, target: Tensor, weights: Weights, sizes: tuple[int, ...]) -> Tensor:
    """Mean over the sizes m of the loss with the first m features alone: Bussmann et al. 2025, arXiv 2503.17547."""
    feature = torch.arange(codes.shape[1], device=codes.device)
    losses = [_fvu(torch.where(feature < size, codes, 0), weights, target) for size in sizes]
    return torch.stack(losses).mean()


def aux_loss(x: Tensor, weights: Weights, dead: Tensor, error: Tensor, k: int, lift: float) -> Tensor:
    """AuxK before its weight: Gao et al. 2024, section 4.2, with the denominator of dictionary_learning.

    Where every token selects all of its positive dead features (fewer than k, or all that there are), those that are
    negative on all tokens add lift times the pre-activation loss of Conerly et al. 2025, the mean of relu(-score).

    dead [F] bool; error [N, D_out] = reconstruction - target, a constant.
    """
    missed = -error.detach()
    k = min(k, int(dead.sum()))
    scores = _scores(x, weights)
    codes = topk_codes(scores.masked_fill(~dead, -torch.inf), k)
    loss = ((codes @ weights[2] - missed).square().sum() / variance(missed)).nan_to_num(0.0)
    crowded = ((scores > 0) & dead).sum(1).max() >= k < int(dead.sum())
    buried = dead & (scores <= 0).all(0) & (not crowded)
    return loss + lift * (-scores[:, buried]).relu().sum(1).mean()


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        return grad * (z > threshold), (-threshold / ctx.bandwidth * kernel * grad).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype)
        return None, (-kernel / ctx.bandwidth * grad).sum(0), None


def jumprelu_loss(
    x: Tensor,
    target: Tensor,
    weights: Weights,
    log_threshold: Tensor,
    bandwidth: float,
    weight: float,
    l0_target: int | None,
) -> Tensor:
    """Rajamanoharan et al. 2024, arXiv 2407.14435: equation 9 with the pseudo-derivatives of equations 11 and 12, a
    rectangle kernel. The penalty is weight (L0 / l0_target - 1)^2, or weight L0 where l0_target is None."""
    scores, threshold = _scores(x, weights), log_threshold.exp()
    codes = _JumpReLU.apply(scores, threshold, bandwidth)
    l0 = _Step.apply(scores, threshold, bandwidth).sum(1).mean()
    penalty = weight * l0 if l0_target is None else weight * (l0 / l0_target - 1) ** 2
    return _fvu(codes, weights, target) + penalty
