"""Each objective on the sparse operators: value and gradients against dense float64 autograd."""

import pytest
import torch

from qscope.ops.sparse_grads import SparseGrads
from qscope.reference import train_losses as dense
from qscope.reference.decode_loss import total_variance
from qscope.training import losses
from qscope.training.losses import Penalty, Weights
from qscope.training.parallel import Alone

N, D, D_OUT, F, K = 48, 20, 28, 96, 6
# Float32 sums of at most a few hundred terms of either sign, each product rounded once: 1e-5 of the largest entry
# leaves a factor of ten; a missing or wrong term is of the order of the entries themselves.
NEAR = 1e-5


@pytest.fixture(params=[D, D_OUT], ids=["autoencoder", "transcoder"])
def problem(request):
    """x, target, float32 weights; half of the features have a negative bias, so that ReLU cuts some entries off."""
    torch.manual_seed(0)
    x = torch.randn(N, D)
    target = x if request.param == D else torch.randn(N, D_OUT)
    W_dec = torch.nn.functional.normalize(torch.randn(F, request.param))
    b_enc = torch.randn(F) * 0.1 - 1.5 * (torch.arange(F) % 2)
    weights = Weights(torch.randn(F, D) / D**0.5, b_enc, W_dec, torch.randn(request.param) * 0.1)
    return x, target, weights


def scale_of(target):
    return 1 / total_variance(target).float()


def doubled(weights):
    return [t.double().requires_grad_() for t in weights]


def compare(loss, grads, want, leaves):
    """grads: W_enc, b_enc, W_dec, b_dec."""
    torch.testing.assert_close(loss.double(), want.detach(), rtol=NEAR, atol=0)
    for name, got, right in zip(Weights._fields, grads, torch.autograd.grad(want, leaves), strict=True):
        assert float(right.abs().max()) > 1e-4, f"{name}: nothing to compare"
        assert float((got.double() - right).abs().max()) <= NEAR * float(right.abs().max()), name


def in_order(grads):
    return grads.W_enc, grads.b_enc, grads.W_dec, grads.b_dec


def test_topk(problem):
    x, target, w = problem
    got = losses.reconstruction_loss(losses.select_topk(x, w, K, "exact"), w, x, target, scale_of(target))
    leaves = doubled(w)
    want = dense.topk_loss(x.double(), target.double(), leaves, K)
    compare(got.loss, in_order(got.grads), want, leaves)
    assert torch.equal(got.touched, got.grads.W_dec.abs().sum(1) > 0)
    torch.testing.assert_close(got.fvu, got.loss, rtol=0, atol=0)


def test_relu_cuts_entries_off_and_they_get_no_gradient(problem):
    x, target, w = problem
    w = w._replace(b_enc=w.b_enc - 2.0)
    codes = losses.select_topk(x, w, K, "exact")
    assert 0.1 < float((codes.acts == 0).float().mean()) < 0.9
    got = losses.reconstruction_loss(codes, w, x, target, scale_of(target))
    leaves = doubled(w)
    compare(got.loss, in_order(got.grads), dense.topk_loss(x.double(), target.double(), leaves, K), leaves)


def test_multi_topk(problem):
    x, target, w = problem
    codes = losses.select_topk(x, w, 4 * K, "exact")
    got = losses.multi_topk_loss(codes, w, x, target, scale_of(target), K)
    leaves = doubled(w)
    compare(got.loss, in_order(got.grads), dense.multi_topk_loss(x.double(), target.double(), leaves, K), leaves)
    narrow = dense.topk_loss(x.double(), target.double(), leaves, K)
    torch.testing.assert_close(got.fvu.double(), narrow.detach(), rtol=NEAR, atol=0)


def test_batch_topk(problem):
    x, target, w = problem
    x = x * torch.linspace(0.2, 2, N)[:, None]  # tokens of very different numbers of active features
    codes, threshold = losses.select_batch_topk(x, w, K, 4 * K, "exact")
    assert int(codes.overflow) == 0
    per_token = (codes.acts > 0).sum(1)
    assert int(per_token.sum()) == N * K and int(per_token.min()) < K < int(per_token.max())
    got = losses.reconstruction_loss(codes, w, x, target, scale_of(target))
    leaves = doubled(w)
    want = dense.batch_topk_loss(x.double(), target.double(), leaves, K)
    compare(got.loss, in_order(got.grads), want, leaves)
    all_codes = dense.batch_topk_codes(x.double() @ w.W_enc.T.double() + w.b_enc.double(), K)
    torch.testing.assert_close(threshold.double(), all_codes[all_codes > 0].min(), rtol=1e-6, atol=0)


def test_batch_topk_counts_tokens_that_the_limit_cuts_and_never_invents_entries():
    """With a limit that is too low the result differs from the true selection, and the count says so."""
    torch.manual_seed(1)
    x, W = torch.randn(N, D), torch.randn(F, D)
    x[0] *= 50  # all of its positive features belong to the batch's largest
    w = Weights(W, torch.zeros(F), W, torch.zeros(D))
    right = dense.batch_topk_codes(x.double() @ W.T.double(), 2) > 0
    codes, _ = losses.select_batch_topk(x, w, 2, 8, "exact")
    assert 1 <= int(codes.overflow) < N and int(right[0].sum()) > 8
    kept = torch.zeros(N, F, dtype=torch.bool).scatter(1, codes.ids.long(), codes.acts > 0)
    assert int(kept[0].sum()) == 8 and int(kept.sum()) == 2 * N
    codes, _ = losses.select_batch_topk(x, w, 2, F, "exact")
    kept = torch.zeros(N, F, dtype=torch.bool).scatter(1, codes.ids.long(), codes.acts > 0)
    assert int(codes.overflow) == 0 and torch.equal(kept, right)


def test_batch_topk_ties_go_to_the_lowest_token():
    """Four equal tokens and a larger one: 10 places, of which the larger token takes 6 and the first equal one 4."""
    x = torch.ones(5, 2)
    x[3] = 2
    w = Weights(torch.ones(6, 2), torch.zeros(6), torch.ones(6, 2), torch.zeros(2))
    codes, threshold = losses.select_batch_topk(x, w, 2, 6, "exact")
    assert (codes.acts > 0).sum(1).tolist() == [4, 0, 0, 6, 0] and float(threshold) == 2
    assert codes.ids[0, :4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batch", [False, True], ids=["topk", "batch_topk"])
def test_nested(problem, batch):
    x, target, w = problem
    sizes = (8, 9, 40, F)
    if batch:
        codes, _ = losses.select_batch_topk(x, w, K, 4 * K, "exact")
        assert int(codes.overflow) == 0
    else:
        codes = losses.select_topk(x, w, K, "exact")
    got = losses.nested_loss(codes, w, x, target, scale_of(target), sizes)
    leaves = doubled(w)
    scores = x.double() @ leaves[0].T + leaves[1]
    all_codes = dense.batch_topk_codes(scores, K) if batch else dense.topk_codes(scores, K)
    compare(got.loss, in_order(got.grads), dense.nested_loss(all_codes, target.double(), leaves, sizes), leaves)
    plain = losses.reconstruction_loss(codes, w, x, target, scale_of(target))
    torch.testing.assert_close(got.fvu, plain.fvu, rtol=0, atol=0)
    assert torch.equal(got.touched, plain.touched)


@pytest.mark.parametrize("l0_target", [None, 4], ids=["linear", "target"])
def test_jumprelu(problem, l0_target):
    x, target, w = problem
    log_threshold = torch.linspace(-1.5, 0.2, F)
    bandwidth, weight = 0.3, 0.05
    got = losses.jumprelu_loss(
        x, w, log_threshold, target, scale_of(target), bandwidth=bandwidth, penalty=Penalty(weight, l0_target),
        limit=F, precision="exact",
    )  # fmt: skip
    leaves, log_leaf = doubled(w), log_threshold.double().requires_grad_()
    want = dense.jumprelu_loss(x.double(), target.double(), leaves, log_leaf, bandwidth, weight, l0_target)
    (right,) = torch.autograd.grad(want, log_leaf, retain_graph=True)
    compare(got.loss + got.penalty, in_order(got.grads), want, leaves)
    assert float((got.log_threshold.double() - right).abs().max()) <= NEAR * float(right.abs().max())
    assert int((right != 0).sum()) > F // 2
    scores = x.double() @ w.W_enc.T.double() + w.b_enc.double()
    above = scores > log_threshold.double().exp()
    near = (scores - log_threshold.double().exp()).abs() < bandwidth / 2
    assert int(near.sum()) > 20 and int((got.codes.acts > 0).sum()) == int(above.sum())
    assert torch.equal(got.touched, (above | near).any(0)), "features at the edge have a gradient though none fired"
    assert int(got.codes.overflow) == 0


def test_jumprelu_counts_tokens_that_the_limit_cuts(problem):
    x, target, w = problem
    arguments = {"bandwidth": 0.1, "penalty": Penalty(1.0, 4), "precision": "exact"}
    low = torch.full((F,), -4.0)
    got = losses.jumprelu_loss(x, w, low, target, scale_of(target), limit=8, **arguments)
    scores = x @ w.W_enc.T + w.b_enc
    over = ((scores > low.exp() - 0.05).sum(1) >= 8).sum()
    assert int(got.codes.overflow) == int(over) > N // 2
    assert int((got.codes.acts > 0).sum(1).max()) <= 8


def aux_compared(problem, w, dead, k):
    """Value and gradients against autograd. How many features are negative on all tokens, and how many of them are
    lifted."""
    x, target, _ = problem
    main = losses.reconstruction_loss(losses.select_topk(x, w, K, "exact"), w, x, target, scale_of(target))
    ids, weight = dead.nonzero()[:, 0], 1 / 32
    loss, grads, reached = losses.aux_loss(x, w, ids, main.error, k, weight, "exact")
    leaves = doubled(w)
    want = weight * dense.aux_loss(x.double(), leaves, dead, main.error.double(), k, losses.LIFT)
    torch.testing.assert_close(loss.double(), want.detach(), rtol=NEAR, atol=0)
    right = torch.autograd.grad(want, leaves[:3])
    for name, got, full in zip(Weights._fields, (grads.W_enc, grads.b_enc, grads.W_dec), right, strict=False):
        assert float(full[~dead].abs().max()) == 0 and float(full[dead].abs().max()) > 1e-5
        assert float((got.double() - full[dead]).abs().max()) <= NEAR * float(full.abs().max()), name
    assert torch.equal(reached, right[1][dead] != 0)
    buried = (x @ w.W_enc.T + w.b_enc <= 0).all(0) & dead
    return int(buried.sum()), int((reached & buried[dead]).sum())


def test_aux_reaches_encoder_rows_biases_and_decoder_rows_of_dead_features(problem):
    dead = torch.zeros(F, dtype=torch.bool)
    dead[5:60:2] = True
    dead[:30:3] = True  # of those with a higher bias
    buried, lifted = aux_compared(problem, problem[2], dead, 6)
    assert buried > 1 and lifted == 0, "tokens with 6 positive dead features: this is Gao's loss alone"


@pytest.mark.parametrize("k", [12, 40], ids=["some of them", "all of them"])
def test_aux_lifts_dead_features_that_are_negative_on_all_tokens(problem, k):
    w, dead = problem[2], torch.arange(F) % 4 == 1
    b_enc = w.b_enc.clone()
    b_enc[dead & (torch.arange(F) > 60)] = -9.0
    buried, lifted = aux_compared(problem, w._replace(b_enc=b_enc), dead, k)
    assert 9 <= buried < int(dead.sum()) and lifted == buried


def test_aux_of_a_perfect_reconstruction_is_zero_not_nan(problem):
    x, target, w = problem
    loss, grads, _ = losses.aux_loss(x, w, torch.arange(9), torch.zeros_like(target), 4, 1 / 32, "exact")
    want = dense.aux_loss(x, w, torch.arange(F) < 9, torch.zeros_like(target), 4, losses.LIFT)
    # 0 / 0 is 0; where the dead features are not silent the reference is infinite, ours has no weight.
    assert not bool(loss.isnan()) and not bool(want.isnan())
    assert all(float(g.abs().max()) == 0 for g in grads)


def test_fewer_dead_features_than_k_aux(problem):
    x, target, w = problem
    loss, grads, _ = losses.aux_loss(x, w, torch.tensor([3, 4]), torch.randn_like(target), 9, 1 / 32, "exact")
    assert grads.W_dec.shape == (2, target.shape[1]) and bool(loss.isfinite())


def test_fired_ignores_what_relu_cut_off_and_nan():
    acts = torch.tensor([[1.0, 0.0], [float("nan"), float("nan")]])
    ids = torch.tensor([[3, 0], [0, 1]], dtype=torch.int32)
    assert losses.fired(acts, ids, 5).tolist() == [False, False, False, True, False]


def test_parts_of_a_batch_add_up(problem):
    """What data parallelism rests on: with one scale, gradients of the halves sum to those of the batch."""
    x, target, w = problem
    scale = scale_of(target)

    def grads(rows):
        codes = losses.select_topk(x[rows], w, K, "exact")
        return losses.reconstruction_loss(codes, w, x[rows], target[rows], scale).grads

    for name, whole, first, second in zip(
        SparseGrads._fields, grads(slice(None)), grads(slice(0, 20)), grads(slice(20, None)), strict=True
    ):
        assert float((whole - first - second).abs().max()) <= NEAR * float(whole.abs().max()), name


class Half(Alone):
    """One of two processes with half of the tokens each, that have exchanged `flags` and the variance already."""

    flags: list[torch.Tensor]
    whole: torch.Tensor

    def tokens(self, here):
        return 2 * here

    def variance(self, y):
        return total_variance(self.whole)

    def any_token(self, flags):
        self.flags.append(flags)
        return torch.stack(self.flags).any(0)


def test_aux_of_parts_of_a_batch_adds_up(problem):
    """A feature that is positive for the tokens of one process alone is lifted by neither."""
    x, target, w = problem
    dead = torch.arange(0, F, 4)
    b_enc = w.b_enc.clone()
    b_enc[:20] = -9.0
    b_enc[20:60] -= 0.95 * (x @ w.W_enc.T + b_enc).amax(0)[20:60]
    w = w._replace(b_enc=b_enc)
    error = torch.randn_like(target)
    loss, grads, reached = losses.aux_loss(x, w, dead, error, 24, 1 / 32, "exact")
    across = Half()
    across.whole, parts = -error, []
    halves = [slice(0, N // 2), slice(N // 2, N)]
    positive = [(x[rows] @ w.W_enc[dead].T + w.b_enc[dead] > 0).any(0) for rows in halves]
    assert int((positive[0] ^ positive[1]).sum()) > 0 < int((~positive[0] & ~positive[1]).sum())
    for rows, other in zip(halves, reversed(positive), strict=True):
        across.flags = [torch.cat([torch.zeros(1, dtype=torch.bool), other])]
        parts.append(losses.aux_loss(x[rows], w, dead, error[rows], 24, 1 / 32, "exact", across))
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss, rtol=NEAR, atol=0)
    for name, whole, first, second in zip(SparseGrads._fields, grads, parts[0][1], parts[1][1], strict=True):
        assert float((whole - first - second).abs().max()) <= NEAR * float(whole.abs().max()), name
    assert torch.equal(parts[0][2] | parts[1][2], reached)
