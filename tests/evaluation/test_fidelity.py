"""Every figure of a fit against its formula, computed densely in float64 on all tokens at once."""

import math

import pytest
import torch

from qscope.evaluation.fidelity import LEFT_OUT, ORDINARY, SET_ASIDE, Fidelity, densities
from qscope.evaluation.moments import Moments
from qscope.sae import SAE

D, F, K, N = 16, 60, 5, 230


@pytest.fixture(scope="module")
def data():
    """Residuals with a large mean and 30 tokens of extreme norm, an imperfect SAE, and its codes."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=gen) + 4.0
    group = torch.full((N,), ORDINARY, dtype=torch.int32)
    group[::8] = SET_ASIDE
    x[::8] *= 100
    W = torch.randn(F, D, generator=gen)
    sae = SAE(W, 0.1 * W, torch.randn(F, generator=gen), torch.full((D,), 3.0), k=K)
    other = torch.randn(300, D, generator=gen) + 4.0
    moments = Moments(other[0])
    moments.add(other)
    acts, indices = sae.encode_topk(x)
    return x, group, sae, acts, indices, (moments.principal(2), moments.principal(3))


def measured(data, batch=37, group=None):
    x, own, sae, acts, indices, pca = data
    group = own if group is None else group
    found = Fidelity(F, pca)
    for part in torch.arange(N).split(batch):
        found.add(x[part], sae.decode(acts[part], indices[part]), acts[part], indices[part], group[part])
    return found


@pytest.mark.parametrize("ordinary_only", [True, False])
def test_every_figure_against_its_formula(data, ordinary_only):
    x, group, sae, acts, indices, pca = data
    fit = measured(data).fit(ordinary_only)
    mine = group == ORDINARY if ordinary_only else torch.ones(N, dtype=torch.bool)
    x_hat = sae.decode(acts, indices)[mine].detach().double()
    x, acts, indices = x[mine].double(), acts[mine], indices[mine]
    e, centred = x - x_hat, x - x.mean(0)
    variance, hat = centred.square().sum(), x_hat - x.mean(0)
    want = {
        "tokens": len(x),
        "fvu": e.square().sum() / variance,
        "explained_variance": 1 - e.square().sum() / variance,
        "frac_variance_explained": 1 - e.var(0).sum() / x.var(0).sum(),
        "mse": e.square().mean(),
        "cosine": torch.nn.functional.cosine_similarity(x, x_hat, dim=1).mean(),
        "l0": (acts > 0).double().sum(1).mean(),
        "norm_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.square().sum() / (x * x_hat).sum(),
        "scale": torch.linalg.lstsq(x_hat.reshape(-1, 1), x.reshape(-1, 1)).solution,
        "scale_about_mean": torch.linalg.lstsq(hat.reshape(-1, 1), centred.reshape(-1, 1)).solution,
        "pca_fvu": (pca[not ordinary_only].reconstruct(x) - x).square().sum() / variance,
    }
    for name, value in want.items():
        # float64 sums in another order; the mean is 4 deviations away, which costs a digit or two
        assert getattr(fit, name) == pytest.approx(float(value), rel=1e-10), name
    dense = torch.zeros(len(x), F).scatter_(1, indices.long(), acts)
    density = (dense > 0).double().mean(0)
    assert fit.densities.alive == int((density > 0).sum()) < F
    assert fit.densities.dead_share == pytest.approx(float((density == 0).double().mean()), abs=1e-15)
    assert fit.densities.dense_share == float((density > 0.1).double().mean()) > 0
    assert fit.densities.median == float(density[density > 0].median())
    counts, _ = torch.histogram(density[density > 0].log10(), bins=28, range=(-7.0, 0.0))
    assert fit.densities.histogram == counts.int().tolist()


def test_batches_and_left_out_rows_change_nothing(data):
    """Rows that are left out may hold anything, and the figures are those of the rest."""
    x, group, sae, acts, indices, pca = data
    whole = measured(data, batch=N).fit(False)
    assert measured(data, batch=1).fit(False).fvu == pytest.approx(whole.fvu, rel=1e-12)
    bad = group.clone()
    bad[100:110] = LEFT_OUT
    broken = x.clone()
    broken[100:110] = torch.nan
    found = measured((broken, bad, sae, acts, indices, pca))
    keep = torch.ones(N, dtype=torch.bool)
    keep[100:110] = False
    clean = Fidelity(F, pca)
    clean.add(x[keep], sae.decode(acts[keep], indices[keep]), acts[keep], indices[keep], group[keep])
    assert found.left_out == 10
    assert found.fit(False).fvu == pytest.approx(clean.fit(False).fvu, rel=1e-12)
    assert found.fit(True).densities == clean.fit(True).densities


def test_the_same_batches_give_the_same_bits(data):
    assert measured(data).fit(False) == measured(data).fit(False)


def test_variance_of_what_is_set_aside(data):
    x, group, *_ = data
    own, every = x[group == ORDINARY].double(), x.double()
    want = 1 - (own - own.mean(0)).square().sum() / (every - every.mean(0)).square().sum()
    assert measured(data).set_aside_variance() == pytest.approx(float(want), rel=1e-10)


def test_a_perfect_reconstruction(data):
    x, group, _, acts, indices, pca = data
    found = Fidelity(F, pca)
    found.add(x, x.clone(), acts, indices, group)
    fit = found.fit(True)
    assert (fit.fvu, fit.explained_variance, fit.mse) == (0.0, 1.0, 0.0)
    for value in (fit.cosine, fit.norm_ratio, fit.scale, fit.scale_about_mean, fit.relative_reconstruction_bias):
        assert value == pytest.approx(1.0, abs=1e-14)


def test_a_shrunken_reconstruction_shows(data):
    """x_hat = 0.8 x: norm ratio 0.8, best scale 1.25, FVU = 0.04 sum x^2 / variance."""
    x, group, _, acts, indices, pca = data
    found = Fidelity(F, pca)
    found.add(x.double(), 0.8 * x.double(), acts, indices, group)
    fit, own = found.fit(True), x[group == ORDINARY].double()
    assert (fit.norm_ratio, fit.scale, fit.relative_reconstruction_bias) == pytest.approx((0.8, 1.25, 0.8), rel=1e-12)
    assert fit.fvu == pytest.approx(0.04 * float(own.square().sum() / (own - own.mean(0)).square().sum()), rel=1e-10)


def test_no_token_and_one_token_have_no_variance(data):
    x, group, sae, acts, indices, pca = data
    empty = Fidelity(F, pca).fit(True)
    assert (empty.tokens, empty.fvu, empty.cosine, empty.densities.median) == (0, None, None, None)
    one = Fidelity(F, pca)
    one.add(x[1:2], sae.decode(acts[1:2], indices[1:2]), acts[1:2], indices[1:2], group[1:2])
    assert one.fit(True).fvu is None and one.fit(True).pca_fvu is None
    assert math.isfinite(one.fit(True).mse)


def test_histogram_edges():
    """Density 1 falls in the last bin, 1e-9 in the first, 0.1 in the bin that starts at -1."""
    found = densities(torch.tensor([0, 1, 10**8, 10**9]), 10**9)
    assert (found.histogram[0], found.histogram[24], found.histogram[27], sum(found.histogram)) == (1, 1, 1, 3)
    assert (found.dead_share, found.dense_share) == (0.25, 0.25)
