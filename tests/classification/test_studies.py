"""Studies with stand-in methods whose figures are known, and with planted features."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp

from qscope.classification.baselines import feature_probe, majority
from qscope.classification.methods import Learned, Method, Problem
from qscope.classification.studies import (
    choice_stability,
    data_efficiency,
    nested_subsets,
    shared_features,
    transfer,
)
from qscope.errors import InputError
from qscope.finding.pooled import pool
from qscope.finding.scores import METRICS, Sample, ranking

# --- data efficiency ---------------------------------------------------------------------------------------


def test_subsets_are_nested_and_hold_their_share_of_every_class_and_group():
    rng = np.random.default_rng(0)
    label = (rng.random(2000) < 0.2).astype(np.int64)
    group = rng.integers(0, 4, 2000)
    texts = rng.permutation(2000)[:1500]
    shares = (0.01, 0.05, 0.1, 0.5, 1.0)
    found = nested_subsets(label, texts, shares, seed=1, group=group)
    for smaller, larger in itertools.pairwise(found):
        assert set(smaller) < set(larger)
    assert (found[-1] == np.sort(texts)).all()
    for share, part in zip(shares, found, strict=True):
        for number in (0, 1):
            own = (label[texts] == number).sum()
            assert (label[part] == number).sum() == round(share * own)
            for name in range(4):
                mine = ((label[texts] == number) & (group[texts] == name)).sum()
                here = ((label[part] == number) & (group[part] == name)).sum()
                # the first of each group stands at half a step, so a group is off by less than one text, and rounding
                assert abs(here - share * mine) <= 1.5
    again, other = (nested_subsets(label, texts, shares, seed, group)[1] for seed in (1, 2))
    assert (again == found[1]).all() and set(other) != set(found[1])


def test_small_shares_keep_two_texts_of_each_class_and_shares_are_checked():
    label = np.array([0] * 50 + [1] * 3 + [2])
    found = nested_subsets(label, np.arange(54), (0.01, 0.5), seed=0)
    assert np.bincount(label[found[0]]).tolist() == [2, 2, 1]
    assert np.bincount(label[found[1]]).tolist() == [25, 2, 1]
    for share in (0, 1.2):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            nested_subsets(label, np.arange(54), (share,), seed=0)


def test_efficiency_fits_on_subsets_and_tests_on_the_test_split():
    label = np.arange(300) % 2
    seen = []

    def learn(problem):
        seen.append((problem.train, problem.calibration))
        if len(problem.train) < 10:
            raise InputError("too few")
        right = np.arange(300) % 100 < len(problem.train)  # the more training texts, the more texts are right
        return Learned(label.astype(float), np.where(right, label, 1 - label))

    task = Problem(label, 2, np.arange(100), np.arange(100, 200))
    shares = (0.04, 0.2, 0.6, 1.0)
    found = data_efficiency([Method("m", learn), majority()], task, np.arange(200, 300), shares, seeds=(0, 1))
    assert [(p.method, p.share) for p in found] == [(m, s) for m in ("m", "majority") for s in shares]
    assert [p.train for p in found[:4]] == [4, 20, 60, 100]
    assert [p.figures["accuracy"].mean for p in found[1:4]] == [0.2, 0.6, 1.0]
    assert [p.figures["accuracy"].values for p in found[1:4]] == [2, 2, 1]
    assert found[0].figures == {} and found[0].failures == ("too few", "too few")
    assert found[1].failures == () and found[4].figures["accuracy"].mean == 0.5
    for train, calibration in seen:
        assert train.max() < 100 <= calibration.min() and calibration.max() < 200
        assert len(train) == len(calibration)


def test_more_labels_find_a_planted_feature():
    rng = np.random.default_rng(2)
    label = np.arange(900) % 2
    features = (rng.random((900, 200)) < 0.1) * rng.random((900, 200))
    features[:, 7] = label * (rng.random(900) < 0.9)
    task = Problem(label, 2, np.arange(400), np.arange(400, 600))
    found = data_efficiency([feature_probe(sp.csr_array(features))], task, np.arange(600, 900), (0.02, 1.0), (0, 1))
    few, all_labels = (point.figures["auroc"].mean for point in found)
    # with all labels AUROC tends to 0.95: 0.9 of the positives stand out, the rest are as the negatives
    assert few < 0.85 and all_labels == pytest.approx(0.95, abs=0.03)


# --- transfer ----------------------------------------------------------------------------------------------


def test_transfer_learns_on_one_group_and_tests_on_another():
    label, group = np.arange(240) % 2, np.arange(240) // 2 % 3
    group[(group == 2) & (label == 0) & (np.arange(240) < 168)] = 0  # group 2 has no negative text to learn from
    right = np.array([[1.0, 0.5], [0.25, 0.75]])  # share of texts of group j that one who learned on group i gets right
    seen = []

    def learn(problem):
        source = np.unique(group[problem.train])
        seen.append(source.tolist())
        assert np.unique(group[problem.calibration]).tolist() == source.tolist()
        decisions = label.copy()
        for j in (0, 1):
            mine = test[group[test] == j]
            if len(source) == 1:
                wrong = mine[round(right[source[0], j] * len(mine)) :]
                decisions[wrong] = 1 - label[wrong]
        return Learned(label.astype(float), decisions)

    test = np.arange(168, 240)  # 24 of each group
    task = Problem(label, 2, np.arange(96), np.arange(96, 168))
    found = transfer([Method("m", learn)], task, test, group, ["en", "fr", "ja"])[0]
    assert found.sources == ("en", "fr", "ja", "all") and seen == [[0], [1], [0, 1, 2]]
    matrix = found.matrix("accuracy")
    assert matrix[:2, :2] == pytest.approx(right, abs=1e-12)
    assert (matrix[:2, 2] == 1).all() and (matrix[3] == 1).all() and np.isnan(matrix[2]).all()
    assert list(found.failures) == ["ja"] and "one class only" in found.failures["ja"]
    assert transfer([majority()], task, test, group, ["en", "fr", "ja"], together=False)[0].matrix("f1").shape == (3, 3)


def test_a_feature_of_one_group_does_not_transfer():
    rng = np.random.default_rng(0)
    label, group = np.arange(1200) % 2, np.arange(1200) // 2 % 2
    features = (rng.random((1200, 20)) < 0.05).astype(float)
    features[:, 0] = (label == 1) & (group == 0)
    features[:, 1] = (label == 1) & (group == 1)
    task = Problem(label, 2, np.arange(600), np.arange(600, 900))
    found = transfer([feature_probe(sp.csr_array(features))], task, np.arange(900, 1200), group, ["a", "b"])[0]
    matrix = found.matrix("auroc")
    assert matrix[[0, 1], [0, 1]] == pytest.approx([1, 1]) and matrix[2] == pytest.approx([1, 1])
    # the feature is silent in the other group: what is left is noise, whose AUROC of 75 + 75 texts deviates by 0.05
    assert matrix[[0, 1], [1, 0]] == pytest.approx([0.5, 0.5], abs=0.2)


def test_shared_features_by_hand():
    found = shared_features({"en": [1, 2, 3], "fr": [2, 3, 4], "ja": [9, 8, 7]})
    assert found.jaccard.tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    assert found.mean == pytest.approx(1 / 6) and found.quartiles == (0.0, 0.25)
    assert shared_features({"en": [1]}).mean is None
    assert shared_features({"en": [], "fr": []}).mean == 1.0


# --- stability ---------------------------------------------------------------------------------------------


def test_stability_of_a_choice_that_hangs_on_one_text():
    """`only` is chosen where text 0 is there: in 1 - (1 - 1/n)^n of the bootstrap splits, and in one of two halves."""
    label, train = np.arange(60) % 2, np.arange(40)
    rows = []

    def choose(weight):
        rows.append(weight)
        return ["always", "only"] if weight[0] else ["always"]

    found = choice_stability(choose, label, train, splits=800, seed=1)
    assert found.chosen == ("always", "only") and list(found.inclusion) == ["always", "only"]
    share = 1 - (1 - 1 / 20) ** 20  # 20 training texts of its class
    # deviation sqrt(0.64 x 0.36 / 800) = 0.017
    assert found.inclusion == {"always": 1.0, "only": pytest.approx(share, abs=0.07)}
    p = found.inclusion["only"]
    assert found.with_all.value == pytest.approx(p + (1 - p) / 2)
    hits = round(800 * p)
    pairs = 800 * 799 / 2
    alike = (hits * (hits - 1) + (800 - hits) * (799 - hits)) / 2
    assert found.between.value == pytest.approx((alike + (pairs - alike) / 2) / pairs)
    assert (found.halves.value, found.halves.low, found.halves.high) == (0.5, 0.5, 0.5)
    assert all((row[40:] == 0).all() for row in rows)
    for row in rows[1::3]:
        assert [row[label == c].sum() for c in (0, 1)] == [20, 20]  # drawn within the class
    for first, second in zip(rows[2::3], rows[3::3], strict=True):
        assert (first + second == rows[0]).all()
    with pytest.raises(InputError, match="at least 2"):
        choice_stability(choose, label, train, splits=1)


def test_groups_are_drawn_within_themselves_and_halves_are_equal():
    label, group = np.zeros(30, np.int64), np.arange(30) % 3
    label[20:] = 1
    rows = []
    choice_stability(lambda weight: rows.append(weight) or [0], label, np.arange(30), 5, 0, group)
    for row in rows[1::3]:
        for c in (0, 1):
            for name in range(3):
                mine = (label == c) & (group == name)
                assert row[mine].sum() == mine.sum()
    assert {int(row.sum()) for row in rows[2::3]} | {int(row.sum()) for row in rows[3::3]} <= {14, 15, 16}


def test_planted_features_are_chosen_in_every_split_and_the_rest_by_chance():
    rng = np.random.default_rng(0)
    texts, features = 200, 60
    positive = np.arange(texts) % 2 == 0
    active = rng.random((texts, features)) < 0.2
    active[:, :2] = positive[:, None] & (rng.random((texts, 2)) < 0.8)
    acts = active.astype(np.float32)
    indices = np.tile(np.arange(features, dtype=np.int32), (texts, 1))
    codes = pool(acts, indices, np.arange(texts), np.ones(texts, bool), texts)
    sample = Sample(codes, positive, np.zeros(texts, np.int64), "any")

    def choose(weight):
        scores = METRICS["rate"](sample, weight)
        return codes.features[ranking(scores, scores, np.ones(features, bool))[:4]].tolist()

    found = choice_stability(choose, positive.astype(np.int64), np.arange(texts), splits=30)
    assert set(found.chosen[:2]) == {0, 1}
    assert found.inclusion[0] == found.inclusion[1] == 1.0
    assert sum(found.inclusion.values()) == pytest.approx(4)
    assert max(share for feature, share in found.inclusion.items() if feature > 1) < 1
    assert 2 / 6 <= found.halves.value < found.with_all.value < 1
