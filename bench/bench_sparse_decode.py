"""sparse_decode and its backward pass against F.embedding_bag, the dense decoder and eai-sparsify's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope import reference
from qscope.ops import sparse_decode

from . import _floors, _peers
from ._case import (
    OURS,
    Case,
    Provider,
    Sizes,
    activations,
    actives,
    compiled,
    dictionary,
    name_of,
    tokens,
    widths,
)
from ._checks import check_decode, close, decode_answer, matmul_precision

Inputs = tuple[Tensor, Tensor, Tensor]
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str, quick: bool = False) -> list[Case]:
    """The large batch at every shape and a single token; the backward pass once."""
    found = []
    for D, d_sae in widths(device, quick):
        for dtype in (torch.bfloat16, torch.float32):
            for k in actives(device, quick):
                found.append(_forward(device, Sizes(tokens(device, quick), D, d_sae, k), dtype))
            if not quick:
                found.append(_forward(device, Sizes(1, D, d_sae, 50), dtype))
        if (D, d_sae) == widths(device, quick)[0]:
            found.append(_backward(device, Sizes(tokens(device, quick), D, d_sae, 50)))
    return found


def embedding_bag(acts: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return F.embedding_bag(indices, W, mode="sum", per_sample_weights=acts)


def dense_decode(acts: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """What SAELens and dictionary_learning do: scatter into [N, F], then a matrix product."""
    dense = acts.new_zeros(acts.shape[0], W.shape[0]).scatter_(1, indices, acts)
    return dense @ W


def _inputs(device: str, sizes: Sizes, dtype: torch.dtype) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        acts, indices = activations(device, seed, sizes, dtype)
        # Distinct ids in a row, as a selection gives them: a dense scatter keeps only one of two equal ids.
        stride = sizes.F // sizes.K
        indices = indices % stride + stride * torch.arange(sizes.K, device=device, dtype=torch.int32)
        return acts, indices, dictionary(device, seed, sizes.D, sizes.F, dtype)

    return make


def _forward(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    N, D, d_sae, k = sizes
    precision = name_of(dtype)

    def peer(decoder: Decoder) -> Provider:
        def make(i: Inputs) -> Any:
            long = i[1].long()
            return lambda: decoder(i[0], long, i[2])

        return Provider(make, precision=precision)

    def ieee(i: Inputs) -> Any:
        long = i[1].long()

        def run() -> Tensor:
            with matmul_precision("ieee"):
                return dense_decode(i[0], long, i[2])

        return run

    def sparsify(i: Inputs) -> Any:
        acts, indices, W = i
        bias = torch.zeros(d_sae, device=device, dtype=dtype)
        coder = _peers.sparsify_coder(W, bias, W, None, k)
        long = indices.long()
        return _peers.no_grad(lambda: coder.decode(acts, long))

    def with_compile(i: Inputs) -> Any:
        call, long = compiled(dense_decode), i[1].long()
        return lambda: call(i[0], long, i[2])

    providers = {
        "qscope": Provider(lambda i: lambda: sparse_decode(*i), OURS, precision),
        "embedding_bag": peer(embedding_bag),
        "eai-sparsify decode": _peers.provider("eai-sparsify", sparsify, precision),
    }
    if N > 1:
        providers["torch dense decode"] = Provider(ieee, precision=precision)
        if (D, d_sae) == widths(device, False)[0] and dtype == torch.float32:
            providers["torch.compile dense decode"] = Provider(with_compile, precision="tf32")
    return Case(
        "sparse_decode",
        sizes,
        precision,
        _inputs(device, sizes, dtype),
        lambda i: decode_answer(*i, None),
        lambda result, want, held: check_decode(result, want, k, held),
        providers,
        _floors.decode(N, D, k, dtype.itemsize),
    )


def _backward(device: str, sizes: Sizes) -> Case:
    """Forward and backward in float32: embedding_bag has no bfloat16 gradient of its weights on a CPU."""
    N, D, d_sae, k = sizes

    def run(decoder: Decoder, indices: Tensor, i: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        acts, W = i[0].clone().requires_grad_(), i[2].clone().requires_grad_()

        def call() -> tuple[Tensor, ...]:
            y = decoder(acts, indices, W)
            return torch.autograd.grad(y, (acts, W), torch.ones_like(y))

        return call

    def want(i: Inputs) -> tuple[Tensor, Tensor]:
        ones = torch.ones(N, D, device=device)
        return reference.sparse_dot(ones, i[1], i[2]), reference.sparse_outer(i[0], i[1], ones, d_sae)[0]

    def check(result: tuple[Tensor, Tensor], answer: tuple[Tensor, Tensor], precision: str) -> None:
        # Sums of D terms of magnitude below 0.2, and of a feature's entries (some ten of at most 1), in another order.
        close("the gradient of top_acts", result[0], answer[0], D * 2.0**-24)
        close("the gradient of W_dec", result[1], answer[1], 1e-5 + 1e-5 * answer[1].abs())

    return Case(
        "sparse_decode+backward",
        sizes,
        "float32",
        _inputs(device, sizes, torch.float32),
        want,
        check,
        {
            "qscope": Provider(lambda i: run(sparse_decode, i[1], i), OURS),
            "embedding_bag": Provider(lambda i: run(embedding_bag, i[1].long(), i)),
        },
        _floors.Floor([_floors.Stage(bytes=3 * _floors.gather_bytes(N, D, k, 4) + d_sae * D * 4.0)]),
    )
