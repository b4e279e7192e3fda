"""A whole training step of a TopK SAE: encode, loss, gradients, Adam with unit decoder rows.

Ours keeps no [N, F] tensor and no dense gradient of a matrix product. All providers subtract the part of the decoder's
gradient that is parallel to its rows and renormalise the rows, as eai-sparsify's trainer does, and hold float32
weights; on a GPU matrix products are bfloat16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope.ops import row_adam_, sparse_grads, topk_encode

from . import _floors, _peers
from ._case import OURS, YARDSTICK, Case, Provider, Sizes, dictionary, generator
from .bench_topk_encode import GEMM, gemm_call

LR, EPS = 1e-3, 1e-8
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Weights = tuple[Tensor, Tensor, Tensor, Tensor]
Step = tuple[Tensor, Callable[[], Weights]]
"""The loss before the step, and how to read the weights after it."""


def cases(device: str, quick: bool = False) -> list[Case]:
    """B with K = 100 carries the bar; A is the small one."""
    if not device.startswith("cuda"):
        return [_case(device, Sizes(64, 256, 4096, 32) if quick else Sizes(256, 768, 8192, 32))]
    small = Sizes(8192, 2048, 32768, 50)
    return [_case(device, small)] if quick else [_case(device, Sizes(8192, 4096, 65536, 100)), _case(device, small)]


def _case(device: str, sizes: Sizes) -> Case:
    N, D, d_sae, k = sizes
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32

    def inputs(seed: int) -> Inputs:
        W = F.normalize(dictionary(device, seed, D, d_sae, torch.float32))
        x = torch.randn(N, D, generator=generator(device, seed), device=device).to(dtype)
        return x, W, torch.zeros(d_sae, device=device), W.clone(), torch.zeros(D, device=device)

    def want(i: Inputs) -> tuple[float, float]:
        loss, weights = _Torch(i, k, autocast=False)()
        return float(loss), _fvu(i[0], weights(), k)

    def check(result: tuple[float, float], answer: tuple[float, float], precision: str) -> None:
        """The loss before the step, and what the step gains in float32: a wrong gradient gains something else."""
        before, after = result
        near = 1e-4 if precision == "float32" else 2e-2
        assert abs(before - answer[0]) <= near * answer[0], f"loss {before:.6g}, not {answer[0]:.6g}"
        gain, right = answer[0] - after, answer[0] - answer[1]
        assert abs(gain - right) <= 0.2 * abs(right), f"the step changes the loss by {gain:.4g}, not by {right:.4g}"

    def measured(make: Callable[[Inputs], Callable[[], Step]], role: str = "peer") -> Provider:
        def with_x(i: Inputs) -> Callable[[], Any]:
            step = make(i)
            return lambda: (step(), i[0])

        def adapt(result: tuple[Step, Tensor]) -> tuple[float, float]:
            (loss, weights), x = result
            return float(loss), _fvu(x, weights(), k)

        return Provider(with_x, role, "bfloat16" if gpu else "float32", adapt)

    sparsify = measured(lambda i: _Sparsify(i, k))
    return Case(
        "train_step",
        sizes,
        "bfloat16" if gpu else "float32",
        inputs,
        want,
        check,
        {
            "qscope": measured(lambda i: _Ours(i, k), OURS),
            "torch dense": measured(lambda i: _Torch(i, k, autocast=gpu)),
            "eai-sparsify": Provider(sparsify.make, precision=sparsify.precision, adapt=sparsify.adapt,
                                     missing=_peers.problem("eai-sparsify")),
            GEMM: Provider(lambda i: gemm_call(i[0], i[1].to(dtype)), YARDSTICK, check=_check_gemm),
        },
        _floors.train_step(N, D, d_sae, k, dtype.itemsize),
        gemm=GEMM,
        in_place=True,
    )  # fmt: skip


def _check_gemm(result: Tensor, answer: Any, precision: str) -> None:
    """Its values are checked in the encode benchmark, which calls the same function."""
    assert bool(result.isfinite().all())


def _fvu(x: Tensor, weights: Weights, k: int) -> float:
    """Fraction of variance unexplained in float32, 512 tokens at a time."""
    W_enc, b_enc, W_dec, b_dec = (w.detach().float() for w in weights)
    error = 0.0
    for rows in x.float().split(512):
        acts, ids = F.linear(rows, W_enc, b_enc).topk(k)
        y = F.embedding_bag(ids, W_dec, mode="sum", per_sample_weights=acts.relu()) + b_dec
        error += float((y - rows).square().sum())
    return error / float((x.float() - x.float().mean(0)).square().sum())


@dataclass
class _State:
    """A parameter as row_adam_ takes it: rows, moments, step of the last update, and the bfloat16 copy."""

    W: Tensor
    first: Tensor
    second: Tensor
    last: Tensor
    shadow: Tensor | None

    @classmethod
    def of(cls, W: Tensor, shadow: bool) -> "_State":
        W = W.clone()
        last = torch.zeros(W.shape[0], dtype=torch.int32, device=W.device)
        return cls(W, torch.zeros_like(W), torch.zeros_like(W), last, W.bfloat16() if shadow else None)

    @property
    def used(self) -> Tensor:
        """What the forward pass reads."""
        return self.W if self.shadow is None else self.shadow


class _Ours:
    """topk_encode -> decode_loss -> sparse_grads -> row_adam_, everything read on the device."""

    def __init__(self, i: Inputs, k: int):
        self.x, W_enc, b_enc, W_dec, b_dec = i
        gpu = self.x.is_cuda
        self.k, self.precision = k, "bf16" if gpu else "exact"
        self.enc, self.dec = _State.of(W_enc, gpu), _State.of(W_dec, gpu)
        self.b_enc, self.b_dec = _State.of(b_enc[:, None], False), _State.of(b_dec[:, None], False)
        self.all = torch.ones(len(b_dec), dtype=torch.bool, device=b_dec.device)
        self.step = torch.zeros((), dtype=torch.int32, device=b_dec.device)
        self.lr = torch.full((), LR, device=b_dec.device)

    def __call__(self) -> Step:
        d_sae = len(self.enc.W)
        acts, ids = topk_encode(self.x, self.enc.used, self.b_enc.W[:, 0], self.k, self.precision)
        _, sq_err, variance, error, act_grads = torch.ops.qscope.decode_loss(
            acts, ids, self.dec.used, self.b_dec.W[:, 0], self.x
        )
        # The loss is sq_err.sum() / variance: error and act_grads / 2 are its gradients up to the factor below.
        half = torch.where(acts > 0, act_grads / 2, 0)  # what the ReLU has cut off gets no gradient
        W_dec, W_enc, b_enc, b_dec = sparse_grads(acts, half, ids, error, self.x, d_sae)
        touched = torch.zeros(d_sae, dtype=torch.bool, device=acts.device).index_fill_(0, ids.flatten().long(), True)
        self.step += 1
        scale = 2 / variance
        for state, grad, rows, unit in (
            (self.dec, W_dec, touched, True),
            (self.enc, W_enc, touched, False),
            (self.b_enc, b_enc[:, None], touched, False),
            (self.b_dec, b_dec[:, None], self.all, False),
        ):
            row_adam_(
                state.W, grad, state.first, state.second, state.last, rows, self.step, self.lr,
                eps=EPS, grad_scale=scale, unit_rows=unit, shadow=state.shadow,
            )  # fmt: skip
        return sq_err.sum() / variance, lambda: (self.enc.W, self.b_enc.W[:, 0], self.dec.W, self.b_dec.W[:, 0])


def _parallel_free(grad: Tensor, W: Tensor) -> Tensor:
    return grad - (grad * W).sum(1, keepdim=True) * W


def _adam_options(x: Tensor) -> dict[str, bool]:
    """On a GPU the fused update, in the form that a CUDA graph can hold."""
    return {"fused": True, "capturable": True} if x.is_cuda else {}


class _Torch:
    """Dense autograd: linear, topk, scatter into [N, F], matrix product, Adam on all weights."""

    def __init__(self, i: Inputs, k: int, autocast: bool):
        self.x, self.k, self.autocast = i[0], k, autocast
        self.weights = tuple(w.clone().requires_grad_() for w in i[1:])
        self.adam = torch.optim.Adam(self.weights, lr=LR, eps=EPS, **_adam_options(self.x))

    def __call__(self) -> Step:
        W_enc, b_enc, W_dec, b_dec = self.weights
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            x = self.x if self.autocast else self.x.float()
            acts, ids = F.linear(x, W_enc, b_enc).topk(self.k)
            dense = acts.new_zeros(len(x), len(W_enc)).scatter(1, ids, acts.relu())
            y = dense @ W_dec + b_dec
        target = self.x.float()
        loss = (y.float() - target).square().sum() / (target - target.mean(0)).square().sum()
        loss.backward()
        with torch.no_grad():
            W_dec.grad = _parallel_free(W_dec.grad, W_dec)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.detach(), lambda: (W_enc, b_enc, W_dec, b_dec)


class _Sparsify:
    """SparseCoder's own forward, backward, gradient projection and normalisation, with Adam."""

    def __init__(self, i: Inputs, k: int):
        self.x = i[0].float()
        self.coder = _peers.sparsify_coder(*i[1:], k)
        self.adam = torch.optim.Adam(self.coder.parameters(), lr=LR, eps=EPS, **_adam_options(self.x))

    def __call__(self) -> Step:
        loss = self.coder(self.x).fvu
        loss.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.adam.step()
        self.adam.zero_grad()
        self.coder.set_decoder_norm_to_unit_norm()
        return loss.detach(), self._weights

    def _weights(self) -> Weights:
        """It subtracts b_dec before it encodes; here that is part of the bias."""
        encoder, b_dec = self.coder.encoder, self.coder.b_dec
        return encoder.weight, encoder.bias - encoder.weight @ b_dec, self.coder.W_dec, b_dec
