"""Streaming mean, scatter and PCA against dense float64."""

import pytest
import torch

from qscope.evaluation.moments import Moments


def rows(count=200, width=12, mean=50.0):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=gen) * torch.linspace(3, 0.1, width) + mean


def filled(parts, shift):
    moments = Moments(shift)
    for part in parts:
        moments.add(part)
    return moments


def test_mean_and_scatter_are_those_of_all_rows():
    x = rows()
    dense = x.double()
    found = filled(x.split(33), x[:5].mean(0))
    assert found.count == 200
    torch.testing.assert_close(found.mean, dense.mean(0), rtol=1e-14, atol=0)
    centred = dense - dense.mean(0)
    torch.testing.assert_close(found.scatter(), centred.T @ centred, rtol=1e-11, atol=1e-9)


def test_sets_add_up_and_need_one_shift():
    x = rows()
    shift = x[0]
    both = filled([x[:50]], shift) + filled([x[50:]], shift)
    torch.testing.assert_close(both.scatter(), filled([x], shift).scatter(), rtol=1e-12, atol=1e-9)
    with pytest.raises(ValueError, match="different shifts"):
        Moments(shift) + Moments(x[1])


@pytest.mark.parametrize("k", [1, 4, 12, 20])
def test_principal_is_the_svd(k):
    x = rows()
    dense = x.double()
    basis = filled(x.split(64), x[0]).principal(k)
    assert basis.directions.shape == (min(k, 12), 12)
    U, S, V = torch.linalg.svd(dense - dense.mean(0), full_matrices=False)
    want = (U[:, :k] * S[:k]) @ V[:k] + dense.mean(0)
    torch.testing.assert_close(basis.reconstruct(x), want, rtol=1e-9, atol=1e-9)
    error = (basis.reconstruct(x) - dense).square().sum()
    torch.testing.assert_close(error, S[k:].square().sum(), rtol=1e-8, atol=1e-9)


def test_nothing_added_gives_the_shift():
    shift = torch.arange(3.0)
    assert Moments(shift).mean.tolist() == [0, 1, 2]
