"""Losses of a spliced model against a model that was cut in two by hand, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qscope.errors import ModelError
from qscope.evaluation.splice import VARIANTS, SpliceSums, bypassed, next_token_losses, spliced
from qscope.model import capture


class Block(nn.Module):
    """x + tanh(W x); alone or first in a tuple."""

    def __init__(self, width, as_tuple):
        super().__init__()
        self.inner, self.as_tuple = nn.Linear(width, width), as_tuple

    def forward(self, hidden_states):
        out = hidden_states + torch.tanh(self.inner(hidden_states))
        return (out, "rest") if self.as_tuple else out


class Model(nn.Module):
    def __init__(self, as_tuple, blocks=4, width=6, vocabulary=11):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=blocks)
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, as_tuple) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(hidden_states=x)
            if layer.as_tuple:
                assert x[1:] in (("rest",), ())  # a block that is passed over has no rest
                x = x[0]
        return self.head(x)

    def after(self, layer, x):
        """What follows block `layer`, by hand."""
        for block in self.layers[layer + 1 :]:
            x = block(x)[0] if block.as_tuple else block(x)
        return self.head(x)


@pytest.fixture(params=[False, True], ids=["tensor", "tuple"])
def model(request):
    torch.manual_seed(0)
    return Model(request.param).requires_grad_(False)


IDS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(1))


def test_what_is_spliced_in_reaches_the_later_blocks(model):
    hidden = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(2))
    with spliced(model.layers[1], hidden):
        found = model(IDS)
    assert torch.equal(found, model.after(1, hidden))
    assert not torch.equal(found, model(IDS))  # and the hook is gone


def test_a_blocks_own_output_changes_nothing_even_behind_blocks_that_are_passed_over(model):
    clean = model(IDS)
    with capture(model, [2]) as residual:
        model(IDS)
    before = list(model.layers[:2])
    with bypassed(before, [block.as_tuple for block in before]), spliced(model.layers[2], residual[2]):
        assert torch.equal(model(IDS), clean)
    assert torch.equal(model(IDS), clean)
    assert "forward" not in vars(model.layers[0])


def test_bypass_keeps_a_forward_that_was_there(model):
    mine = model.layers[0].forward
    model.layers[0].forward = mine
    with bypassed([model.layers[0]], [False]):
        assert model.layers[0].forward is not mine
    assert vars(model.layers[0])["forward"] is mine


def test_splice_refuses_another_shape_and_a_block_that_never_ran(model):
    with pytest.raises(ModelError, match=r"puts out \[2, 7, 6\]"):
        with spliced(model.layers[0], torch.zeros(2, 6, 6)):
            model(IDS)
    with pytest.raises(ModelError, match="never ran"):
        with spliced(model.layers[0], torch.zeros(2, 7, 6)):
            pass
    assert model(IDS).isfinite().all()


def test_losses_against_torch_in_float64():
    gen = torch.Generator().manual_seed(3)
    clean, other = (4 * torch.randn(50, 300, generator=gen) for _ in range(2))
    targets = torch.randint(0, 300, (50,), generator=gen)
    ce, kl = next_token_losses(other, targets, clean)
    want = nn.functional.cross_entropy(other.double(), targets, reduction="none")
    torch.testing.assert_close(ce, want, rtol=1e-13, atol=0)
    p, q = clean.double().softmax(1), other.double().softmax(1)
    torch.testing.assert_close(kl, (p * (p / q).log()).sum(1), rtol=1e-11, atol=0)
    assert torch.equal(next_token_losses(clean, targets, clean.clone())[1], torch.zeros(50, dtype=torch.float64))


def test_losses_in_blocks_are_the_same(monkeypatch):
    gen = torch.Generator().manual_seed(4)
    clean, other = (torch.randn(40, 30, generator=gen) for _ in range(2))
    targets = torch.randint(0, 30, (40,), generator=gen)
    whole = next_token_losses(other, targets, clean)
    monkeypatch.setattr("qscope.evaluation.splice.reference.rows_per_block", lambda *_: 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, next_token_losses(other, targets, clean), strict=True))


def test_a_token_that_the_clean_model_excludes_adds_no_divergence():
    clean = torch.tensor([[0.0, 0.0, -torch.inf]])
    ce, kl = next_token_losses(torch.zeros(1, 3), torch.tensor([0]), clean)
    assert float(ce) == pytest.approx(math.log(3)) and float(kl) == pytest.approx(math.log(1.5))


def test_result_from_known_losses():
    """CE 2 clean, 3 SAE, 6 zero, 4 mean, 5 PCA: recovered (6-3)/(6-2), (4-3)/(4-2), (6-5)/(6-2)."""
    sums = SpliceSums()
    levels = {"sae": 3.0, "zero": 6.0, "mean": 4.0, "pca": 5.0}
    wobble = torch.tensor([-0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    clean = torch.full((4,), 2.0, dtype=torch.float64)
    losses = {
        name: (clean * 0 + level + (wobble if name == "sae" else 0), clean * 0 + level / 10)
        for name, level in levels.items()
    }
    for part in (slice(0, 3), slice(3, 4)):
        sums.add(clean[part], {name: (ce[part], kl[part]) for name, (ce, kl) in losses.items()}, replaced=2)
    found = sums.result()
    assert (found.tokens, found.replaced, found.left_out) == (4, 4, 0)
    assert (found.ce_clean, found.ce_sae, found.ce_increase) == (2, 3, 1)
    assert (found.loss_recovered, found.loss_recovered_mean, found.loss_recovered_pca) == (0.75, 0.5, 0.25)
    assert found.kl_recovered == pytest.approx(0.5)
    assert found.ce_increase_error == pytest.approx(float(wobble.std() / 2))


def test_a_loss_that_is_not_finite_is_left_out_of_every_variant():
    sums = SpliceSums()
    ones = torch.ones(3, dtype=torch.float64)
    losses = {name: (2 * ones, ones) for name in VARIANTS}
    losses["zero"] = (torch.tensor([5.0, torch.nan, 5.0], dtype=torch.float64), ones)
    sums.add(ones, losses, replaced=3)
    found = sums.result()
    assert (found.tokens, found.left_out, found.ce_zero, found.loss_recovered) == (2, 1, 5.0, 0.75)
    assert SpliceSums().result().loss_recovered is None  # nothing measured
