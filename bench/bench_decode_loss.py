"""decode_loss (reconstruction, loss and gradient of the values in one gather) against decode, torch loss, autograd."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope import reference
from qscope.ops import decode_loss, sparse_decode

from . import _floors
from ._case import (
    OURS,
    YARDSTICK,
    Case,
    Provider,
    Sizes,
    activations,
    actives,
    dictionary,
    generator,
    name_of,
    tokens,
    widths,
)
from ._checks import ROUNDING, close

ALONE = "our sparse_decode alone"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Result = tuple[Tensor, Tensor, Tensor, Tensor]
Decoder = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def cases(device: str, quick: bool = False) -> list[Case]:
    """bfloat16 on a GPU, float32 on a CPU: the dtypes in which each trains."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    N = tokens(device, quick)
    return [_case(device, Sizes(N, D, f, k), dtype) for D, f in widths(device, quick) for k in actives(device, quick)]


def _case(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    N, D, d_sae, k = sizes
    held = name_of(dtype)

    def inputs(seed: int) -> Inputs:
        gen = generator(device, seed)
        x, b = (torch.randn(*shape, generator=gen, device=device).to(dtype) for shape in ((N, D), (D,)))
        return *activations(device, seed, sizes, dtype), dictionary(device, seed, D, d_sae, dtype), b, x

    def want(i: Inputs) -> Result:
        acts, indices, W, b, x = i
        x_hat, sq_err, variance, _, act_grads = reference.decode_loss(
            acts.float(), indices, W.float(), b.float(), x.float()
        )
        return x_hat, sq_err, variance, act_grads

    def check(result: Result, answer: Result, precision: str) -> None:
        # A peer that rounds its reconstruction carries that rounding into the loss and the gradient.
        unit = ROUNDING[precision]
        x_hat, sq_err, variance, act_grads = answer
        close("x_hat", result[0].float(), x_hat, 4 * (ROUNDING[held] + k * 2.0**-24) * (1 + x_hat.abs()))
        close("sq_err", result[1], sq_err, (2 * unit + D * 2.0**-24) * sq_err)
        close("total_variance", result[2].float(), variance.float(), 1e-4 * variance.float())
        scale = float(act_grads.abs().max())
        close("act_grads", result[3].float(), act_grads, (4 * unit + D * 2.0**-24) * scale)

    def ours(i: Inputs) -> Callable[[], Result]:
        def call() -> Result:
            x_hat, sq_err, variance, _, act_grads = torch.ops.qscope.decode_loss(*i)
            return x_hat, sq_err, variance, act_grads

        decode_loss(*i)  # loads what torch.ops alone would not
        return call

    return Case(
        "decode_loss",
        sizes,
        held,
        inputs,
        want,
        check,
        {
            "qscope": Provider(ours, OURS),
            "sparse_decode, torch loss, autograd": Provider(lambda i: _autograd(sparse_decode, i), precision=held),
            "embedding_bag, torch loss, autograd": Provider(lambda i: _autograd(_embedding_bag, i), precision=held),
            ALONE: Provider(lambda i: lambda: sparse_decode(*i[:4]), YARDSTICK, held, check=_check_alone),
        },
        _floors.decode_loss(N, D, k, dtype.itemsize),
    )


def _check_alone(result: Tensor, answer: Result, precision: str) -> None:
    close("the reconstruction", result.float(), answer[0], 4 * (ROUNDING[precision] + 2.0**-17) * (1 + answer[0].abs()))


def _embedding_bag(acts: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.embedding_bag(indices, W, mode="sum", per_sample_weights=acts) + b


def _autograd(decode: Decoder, i: Inputs) -> Callable[[], Result]:
    acts, indices, W, b, x = i
    leaf, ids = acts.clone().requires_grad_(), indices if decode is sparse_decode else indices.long()

    def call() -> Any:
        y = decode(leaf, ids, W, b)
        sq_err = (y.float() - x.float()).square().sum(1)
        variance = (x.float() - x.float().mean(0)).square().sum()
        return y.detach(), sq_err.detach(), variance, torch.autograd.grad(sq_err.sum(), leaf)[0]

    return call
