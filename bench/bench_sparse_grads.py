"""sparse_grads (both weight gradients and both biases in one pass) against index_add_ and dense matrix products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qscope import reference
from qscope.ops import sparse_grads

from . import _floors
from ._case import OURS, Case, Provider, Sizes, activations, actives, generator, name_of, tokens, widths
from ._checks import ROUNDING, close

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def cases(device: str, quick: bool = False) -> list[Case]:
    """Uniform ids at every shape; once a skewed choice, where a few features get thousands of entries."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    N = tokens(device, quick)
    found = [_case(device, Sizes(N, D, f, k), dtype) for D, f in widths(device, quick) for k in actives(device, quick)]
    D, d_sae = widths(device, quick)[-1]
    return [*found, _case(device, Sizes(N, D, d_sae, actives(device, quick)[-1]), dtype, skewed=True)]


def _case(device: str, sizes: Sizes, dtype: torch.dtype, skewed: bool = False) -> Case:
    N, D, d_sae, k = sizes

    def inputs(seed: int) -> Inputs:
        gen = generator(device, seed)
        acts, indices = activations(device, seed, sizes, dtype)
        if skewed:
            indices = (torch.rand(N, k, generator=gen, device=device) ** 3 * d_sae).int().clamp_(max=d_sae - 1)
            indices[:, 0] = d_sae // 2  # active on every token
        act_grads = torch.randn(N, k, generator=gen, device=device).masked_fill(acts == 0, 0)
        g, x = (torch.randn(N, D, generator=gen, device=device).to(dtype) for _ in range(2))
        return acts, act_grads, indices, g, x

    def want(i: Inputs) -> tuple[Grads, Grads]:
        acts, act_grads, indices, g, x = i
        return _gradients(acts, act_grads, indices, g, x), _gradients(acts, act_grads.abs(), indices, g.abs(), x.abs())

    def _gradients(acts: Tensor, act_grads: Tensor, indices: Tensor, g: Tensor, x: Tensor) -> Grads:
        grad_W_dec, _ = reference.sparse_outer(acts, indices, g, d_sae)
        grad_W_enc, grad_b_enc = reference.sparse_outer(act_grads, indices, x, d_sae)
        return grad_W_dec, grad_W_enc, grad_b_enc, g.float().sum(0)

    def check(result: Grads, answer: tuple[Grads, Grads], precision: str) -> None:
        # Sums of at most N terms in another order; errors are a fraction of the sum of their magnitudes.
        unit = N * 2.0**-24 if precision == "float32" else 4 * ROUNDING[precision]
        names = ("grad_W_dec", "grad_W_enc", "grad_b_enc", "grad_b_dec")
        for name, got, exact, size in zip(names, result, *answer, strict=True):
            close(name, got.float(), exact, unit * size + 1e-6)

    op = "sparse_grads skewed" if skewed else "sparse_grads"
    providers = {
        "qscope": Provider(lambda i: lambda: sparse_grads(*i, d_sae), OURS),
        "torch index_add_ by slot": Provider(lambda i: _index_add(i, d_sae)),
        "torch dense products": Provider(lambda i: _dense(i, d_sae), precision=name_of(dtype)),
    }
    return Case(op, sizes, name_of(dtype), inputs, want, check, providers,
                _floors.sparse_grads(N, D, d_sae, k, dtype.itemsize))  # fmt: skip


def _index_add(i: Inputs, d_sae: int) -> Callable[[], Grads]:
    """One index_add_ per slot, with float atomics on a GPU, but without the [N * K, D] contributions."""
    acts, act_grads, indices, g, x = i
    long = indices.long()

    def add(values: Tensor, rows: Tensor) -> Tensor:
        total = torch.zeros(d_sae, rows.shape[1], device=rows.device)
        for slot in range(long.shape[1]):
            total.index_add_(0, long[:, slot], values[:, slot, None].float() * rows.float())
        return total

    def call() -> Grads:
        grad_b = torch.zeros(d_sae, device=g.device).index_add_(0, long.flatten(), act_grads.flatten())
        return add(acts, g), add(act_grads, x), grad_b, g.float().sum(0)

    return call


def _dense(i: Inputs, d_sae: int) -> Callable[[], Any]:
    """What autograd of a dense SAE does: scatter into [N, F], then two matrix products."""
    acts, act_grads, indices, g, x = i
    long = indices.long()

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(values.shape[0], d_sae).scatter_add_(1, long, values)

    def call() -> Any:
        dense = spread(act_grads.to(x.dtype))
        return spread(acts).T @ g, dense.T @ x, dense.sum(0, dtype=torch.float32), g.float().sum(0)

    return call
