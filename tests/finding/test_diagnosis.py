"""The bad case against a plain dense computation."""

import numpy as np
import pytest

from qscope.finding.diagnosis import diagnose
from qscope.finding.pooled import pool


def build(seed, texts=12, features=9):
    rng = np.random.default_rng(seed)
    text = np.repeat(np.arange(texts), 4)
    indices = np.argsort(rng.random((len(text), features)), axis=1)[:, :3].astype(np.int32)
    acts = rng.integers(0, 4, indices.shape).astype(np.float32)
    acts[np.isin(indices, (7, 8))] = 0  # only the response has these
    indices[1], acts[1] = (7, 8, 0), (2.0, 5.0, 1.0)
    dense = np.zeros((len(text), features))
    np.put_along_axis(dense, indices.astype(np.int64), acts.astype(float), axis=1)
    return acts, indices, text, dense.reshape(texts, 4, features)


@pytest.mark.parametrize("pooling", ["mean", "any"])
@pytest.mark.parametrize("out", [None, 3])
def test_against_the_dense_codes(pooling, out):
    acts, indices, text, dense = build(0)
    counts, keep = np.ones(12, bool), np.ones(len(text), bool)
    if out is not None:
        counts[out], keep[text == out] = False, False
    found = diagnose(pool(acts, indices, text, keep, 12), 0, pooling, counts)
    blocks = dense[counts]
    value = blocks.mean(1) if pooling == "mean" else blocks.max(1)
    deviation = value.std(0, ddof=1)
    for i, feature in enumerate(found.feature):
        mine, pool_values = value[0, feature], value[1:, feature]
        assert found.activation[i] == pytest.approx(mine, rel=1e-12) and mine > 0
        assert found.z[i] == pytest.approx((mine - value[:, feature].mean()) / deviation[feature], rel=1e-9)
        assert found.pool_mean[i] == pytest.approx(pool_values.mean(), rel=1e-12, abs=1e-15)
        assert found.pool_rate[i] == pytest.approx((blocks[1:, :, feature] > 0).mean(), rel=1e-12)
        assert found.firing[i] == (blocks[0, :, feature] > 0).mean()
        assert found.exceed[i] == pytest.approx((1 + (pool_values >= mine).sum()) / len(blocks), rel=1e-12)
    assert set(found.feature.tolist()) == set(np.flatnonzero(value[0] > 0).tolist())


def test_features_that_no_other_text_has_come_first_by_their_activation():
    acts, indices, text, _ = build(1)
    found = diagnose(pool(acts, indices, text, np.ones(len(text), bool), 12), 0, "mean")
    assert found.feature[:2].tolist() == [8, 7]
    assert found.z[:2] == pytest.approx([11 / np.sqrt(12)] * 2, rel=1e-12)  # the bound for a pool of 11
    assert found.exceed[:2].tolist() == [1 / 12] * 2 and found.pool_mean[:2].tolist() == [0.0, 0.0]
    assert (np.diff(np.round(found.z, 9)) <= 0).all()
