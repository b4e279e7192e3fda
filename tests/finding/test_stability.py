"""Bootstrap, halves and layer choice: against plain loops, and deterministic."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qscope.finding import scores
from qscope.finding.pooled import pool
from qscope.finding.scores import METRICS, Sample, ranking
from qscope.finding.stability import (
    bootstrap,
    halves,
    rank_correlation,
    replicates,
    split_agreement,
    top1_differences,
)

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).with_name("planted.py"))
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)


def build(seed, pooling="mean", shares=(0.7, 0.1), texts=40):
    acts, indices, text, keep, positive, group = planted.codes(seed, texts=texts, planted={0: shares})
    sample = Sample(pool(acts, indices, text, keep, texts), positive, group, pooling)
    weight = np.ones(texts, np.int64)
    weight[-4:] = 0  # held out
    return sample, weight, scores.texts_firing(sample, weight) >= 3


def test_replicates_draw_within_sides_and_groups_and_never_what_is_held_out():
    sample, weight, _ = build(0)
    drawn = list(replicates(sample, weight, 20, seed=3))
    for replicate in drawn:
        assert replicate[weight == 0].sum() == 0
        for side in (sample.positive, ~sample.positive & (sample.group == 0), ~sample.positive & (sample.group == 1)):
            assert replicate[side].sum() == weight[side].sum()
    assert len({tuple(r) for r in drawn}) == 20
    assert all((a == b).all() for a, b in zip(drawn, replicates(sample, weight, 20, seed=3), strict=True))
    assert any((a != b).any() for a, b in zip(drawn, replicates(sample, weight, 20, seed=4), strict=True))


def test_halves_share_no_text_and_hold_all_of_them():
    sample, weight, _ = build(1)
    for left, right in halves(sample, weight, 10, seed=0):
        assert ((left + right) == weight).all() and left.max() == right.max() == 1
        assert abs(int(left[sample.positive].sum() - right[sample.positive].sum())) <= 1


@pytest.mark.parametrize("metric", ["mean", "auroc"])
def test_bootstrap_is_the_plain_loop_and_deterministic(metric):
    sample, weight, eligible = build(2)
    found = bootstrap(sample, weight, eligible, metric, top=5, count=30, seed=7)
    again = bootstrap(sample, weight, eligible, metric, top=5, count=30, seed=7)
    assert found.agreement == again.agreement and (found.low == again.low).all() and (found.high == again.high).all()

    def best(w):
        return set(ranking(METRICS[metric](sample, w), scores.mean_difference(sample, w), eligible)[:5].tolist())

    full, drawn = best(weight), list(replicates(sample, weight, 30, 7))
    overlaps = [len(full & best(w)) / len(full | best(w)) for w in drawn]
    assert found.agreement.jaccard.value == pytest.approx(np.mean(overlaps), rel=1e-12)
    assert found.agreement.jaccard.low == pytest.approx(np.quantile(overlaps, 0.025), rel=1e-12)
    every = METRICS[metric](sample, weight)[eligible]
    spearman = [stats.spearmanr(every, METRICS[metric](sample, w)[eligible]).statistic for w in drawn]
    assert found.agreement.rank_correlation.value == pytest.approx(np.mean(spearman), rel=1e-9)
    included = np.mean([[c in best(w) for c in range(len(eligible))] for w in drawn], axis=0)
    np.testing.assert_allclose(found.inclusion, included, rtol=1e-12)
    planted_column = int(np.flatnonzero(sample.codes.features == 0)[0])
    assert found.inclusion[planted_column] == 1.0
    assert (
        found.low[planted_column] < METRICS[metric](sample, weight)[planted_column] < found.high[planted_column] + 1e-9
    )


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Texts with one token of Gaussian activation 3 or 2: the true difference is 1. Percentile intervals of 30 texts a
    side cover it in about 93.5 % of the draws; of 200 draws, three standard deviations are 5 %."""
    inside = 0
    for seed in range(200):
        rng = np.random.default_rng([9, seed])
        positive = np.arange(60) < 30
        acts = (rng.normal(size=60) / 4 + np.where(positive, 3, 2))[:, None].astype(np.float32)
        codes = pool(acts, np.zeros((60, 1), np.int32), np.arange(60), np.ones(60, bool), 60)
        sample = Sample(codes, positive, np.zeros(60, np.int64))
        found = bootstrap(sample, np.ones(60, np.int64), np.array([True]), "mean", 1, 100, seed)
        inside += bool(found.low[0] <= 1 <= found.high[0])
    assert 0.885 < inside / 200 < 0.985


def test_rankings_of_planted_halves_agree_and_those_of_noise_do_not():
    sample, weight, eligible = build(4, texts=80)
    real = split_agreement(sample, list(halves(sample, weight, 10, 0)), eligible, "mean", 1)
    assert real.jaccard.value == 1.0 and real.pairs == 10
    sample, weight, eligible = build(4, shares=(0.2, 0.2), texts=80)
    noise = split_agreement(sample, list(halves(sample, weight, 40, 0)), eligible, "mean", 1)
    assert noise.jaccard.value < 0.5 and abs(noise.rank_correlation.value) < 0.3


def test_rank_correlation_is_spearmans_and_0_without_an_order():
    a, b = np.array([1.0, 2, 2, 5, 0]), np.array([3.0, 1, 4, 4, 2])
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, rel=1e-12)
    assert rank_correlation(a, np.ones(5)) == 0.0 and rank_correlation(a[:1], b[:1]) == 0.0


def test_the_layer_with_the_planted_feature_has_the_largest_top1_difference():
    layers = {}
    for layer, shares in ((3, (0.3, 0.2)), (8, (0.8, 0.02)), (9, (0.4, 0.2))):
        sample, weight, eligible = build(5, "any", shares, texts=60)
        layers[layer] = (sample, eligible)
    tops = top1_differences(layers, weight, 40, seed=1)
    assert tops == top1_differences(layers, weight, 40, seed=1)
    for layer, (sample, eligible) in layers.items():
        assert tops[layer].difference.value == METRICS["rate"](sample, weight)[eligible].max()
    assert max(tops, key=lambda layer: tops[layer].difference.value) == 8
    assert tops[8].chosen > 0.9 and sum(t.chosen for t in tops.values()) == pytest.approx(1)
    alone = top1_differences(layers, weight, 0, seed=1)[3]
    assert alone.difference.low == alone.difference.value == alone.difference.high and alone.chosen == 0
