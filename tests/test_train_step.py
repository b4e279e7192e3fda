"""The operators of one training step together, against dense autograd, the parallel component removed, and Adam."""

import pytest
import torch

from qscope.ops import decode_loss, row_adam_, sparse_grads, topk_encode

N, D, D_SAE, K = 96, 24, 48, 8
BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-2


class Sparse:
    """Float32 weights, updated a touched row at a time; no [N, F] tensor anywhere."""

    def __init__(self, W_enc, b_enc, W_dec, b_dec):
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (t.clone() for t in (W_enc, b_enc, W_dec, b_dec))
        self.moments = {
            name: (torch.zeros_like(t), torch.zeros_like(t), torch.zeros(D_SAE, dtype=torch.int32))
            for name, t in (("W_enc", W_enc), ("W_dec", W_dec), ("b_enc", b_enc.view(-1, 1)))
        }
        self.b_dec_adam = torch.optim.Adam([self.b_dec], lr=LR, betas=BETAS, eps=EPS)

    def step(self, x, number):
        acts, ids = topk_encode(x, self.W_enc, self.b_enc, K)
        out = decode_loss(acts, ids, self.W_dec, self.b_dec, x)
        scale = 1 / out.total_variance
        act_grads = (out.act_grads * scale).masked_fill(acts <= 0, 0)
        grads = sparse_grads(acts, act_grads, ids, 2 * scale * out.error, x, D_SAE)
        touched = torch.zeros(D_SAE, dtype=torch.bool).index_fill_(0, ids[acts > 0].long(), True)
        for name, W, grad in (
            ("W_dec", self.W_dec, grads.W_dec),
            ("W_enc", self.W_enc, grads.W_enc),
            ("b_enc", self.b_enc.view(-1, 1), grads.b_enc.view(-1, 1)),
        ):
            row_adam_(W, grad, *self.moments[name], touched, number, LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS,
                      unit_rows=name == "W_dec")  # fmt: skip
        self.b_dec.grad = grads.b_dec
        self.b_dec_adam.step()
        return out.sq_err.sum() * scale, touched


class Dense:
    """The same step with autograd and Adam on dense float64 tensors."""

    def __init__(self, *weights):
        self.weights = [t.double().clone().requires_grad_() for t in weights]
        self.adam = torch.optim.Adam(self.weights, lr=LR, betas=BETAS, eps=EPS)

    def step(self, x):
        W_enc, b_enc, W_dec, b_dec = self.weights
        x = x.double()
        values, ids = torch.topk(x @ W_enc.T + b_enc, K)
        codes = torch.zeros(N, D_SAE, dtype=torch.float64).scatter(1, ids, values.relu())
        loss = (codes @ W_dec + b_dec - x).square().sum() / (x - x.mean(0)).square().sum()
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
            self.adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        return loss.detach()


@pytest.fixture
def weights():
    gen = torch.Generator().manual_seed(3)
    W_dec = torch.randn(D_SAE, D, generator=gen)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec.clone(), torch.randn(D_SAE, generator=gen) * 0.1, W_dec, torch.randn(D, generator=gen) * 0.1


def test_steps_on_touched_rows_follow_dense_autograd_and_adam(weights):
    """Every feature fires in every step (asserted), so that skipping untouched rows makes no difference."""
    gen = torch.Generator().manual_seed(4)
    sparse, dense = Sparse(*weights), Dense(*weights)
    for number in range(1, 16):
        x = torch.randn(N, D, generator=gen)
        loss, touched = sparse.step(x, number)
        want = dense.step(x)
        assert bool(touched.all()), "the data must reach every feature for this comparison"
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for got, want in zip((sparse.W_enc, sparse.b_enc, sparse.W_dec, sparse.b_dec), dense.weights, strict=True):
        # Adam divides by the root of its second moment: an element whose gradients are near zero moves by up to lr per
        # step in a direction that rounding can decide, so the bound is a small part of lr, not of the element.
        torch.testing.assert_close(got.double(), want.detach(), rtol=1e-4, atol=LR * 1e-2)
    norms = sparse.W_dec.double().norm(dim=1)
    assert (norms - 1).abs().max() < 3e-7


def test_two_runs_are_equal_to_the_bit(weights):
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sparse = Sparse(*weights)
        gen = torch.Generator().manual_seed(5)
        for number in range(1, 6):
            sparse.step(torch.randn(N, D, generator=gen), number)
        runs.append(sparse)
    for name in ("W_enc", "b_enc", "W_dec"):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name
