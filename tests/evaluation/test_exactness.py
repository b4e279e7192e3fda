"""Recall on a small SAE with known answers."""

import pytest
import torch

from qscope.evaluation import exactness as module
from qscope.evaluation.exactness import exactness, float64_scores
from qscope.sae import SAE


@pytest.fixture
def sae():
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(300, 24, generator=gen)
    return SAE(W, W.clone(), torch.randn(300, generator=gen), torch.zeros(24), k=7)


def residuals(count=40):
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(1))


def test_exact_has_every_feature_and_bf16_has_not(sae):
    found = exactness(sae, residuals())
    assert (found.tokens, found.nan_rows, found.recall_exact, found.wrong_values) == (40, 0, 1.0, 0)
    assert 0.9 < found.recall_bf16 < 1.0  # bfloat16 scores of 300 features tie near the boundary
    assert 7 <= found.candidates_mean <= found.candidates_max <= 300


def test_recall_counts_what_is_missing(sae, monkeypatch):
    """One of seven features replaced by the worst one, in every row: recall 6/7, and its value is wrong."""
    x = residuals()
    honest = module.ops.topk_encode_certified
    worst = float64_scores(x, sae.W_enc, sae.b_enc).argmin(1, keepdim=True).int()

    def swapped(*args):
        acts, indices, *rest = honest(*args)
        indices[:, 3:4] = worst
        return acts, indices, *rest

    monkeypatch.setattr(module.ops, "topk_encode_certified", swapped)
    found = exactness(sae, x)
    assert found.recall_exact == pytest.approx(6 / 7) and found.wrong_values == 40


def test_float32_ties_count_as_right(sae):
    """All scores are equal: whichever features are kept, none is missing."""
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1.0)
    found = exactness(sae, residuals(5))
    assert found.recall_exact == found.recall_bf16 == 1.0


def test_rows_with_nan_are_left_out_and_counted(sae):
    x = residuals()
    x[[3, 8]] = torch.nan
    found = exactness(sae, x)
    assert (found.nan_rows, found.recall_exact, found.wrong_values) == (2, 1.0, 0)
    assert exactness(sae, x[[3, 8]]).recall_exact == 0.0  # nothing to compare
