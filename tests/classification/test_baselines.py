"""Baselines on planted texts: what they find is known, and what they must not look at is changed under their feet."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from qscope.classification.baselines import (
    STRENGTHS,
    feature_probe,
    majority,
    mean_difference,
    random_features,
    residual_probe,
    sparse_features,
    tfidf,
)
from qscope.classification.methods import Learned, Method, Problem, Threshold, choose_threshold, platt
from qscope.classification.metrics import figures
from qscope.errors import InputError
from qscope.finding.pooled import pool

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).parents[1] / "finding" / "planted.py")
sparse_codes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sparse_codes)

T, D, F = 160, 12, 30
TEST = np.arange(120, T)


def planted(classes=2, seed=0):
    """(label, residual [T, D], texts, features CSR [T, F]): direction c, word c and feature c stand for class c."""
    rng = np.random.default_rng(seed)
    label = np.arange(T) % classes
    residual = (rng.normal(size=(T, D)) + 3 * np.eye(classes, D)[label]) * np.geomspace(0.1, 100, D)
    common = ["the", "cat", "sat", "on", "mats", "all", "day"]
    texts = [" ".join([*rng.choice(common, 5), f"special{'abcdefgh'[c]}"]) for c in label]
    features = rng.random((T, F)) * (rng.random((T, F)) < 0.2)
    features[:, :classes] = 2 * np.eye(classes)[label] * (rng.random((T, 1)) < 0.95)
    return label, residual.astype(np.float32), texts, sp.csr_array(features)


def problem(label, classes=2, **more):
    return Problem(label, classes, train=np.arange(80), calibration=np.arange(80, 120), **more)


def methods(residual, texts, features):
    return [
        residual_probe(residual),
        mean_difference(residual),
        tfidf(texts),
        tfidf(texts, "char"),
        feature_probe(features),
        random_features(features, np.arange(F), 3, draw=1, decide="threshold"),
        majority(),
    ]


# --- decisions ---------------------------------------------------------------------------------------------


def f1(decided, positive):
    return 2 * (decided & positive).sum() / (decided.sum() + positive.sum())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=25))
def test_thresholds_are_the_best_of_all_cuts(pairs):
    scores, positive = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    cuts = [scores > t for t in [scores.min() - 1, *np.unique(scores)]]  # from all to none
    if positive.any():
        t = choose_threshold(scores, positive, Threshold("f1"))
        best = max(f1(cut, positive) for cut in cuts)
        assert f1(scores > t, positive) == best
        assert (scores > t).sum() == min(cut.sum() for cut in cuts if f1(cut, positive) == best)
    if not positive.all():
        for target in (0.0, 0.1, 0.29, 0.5, 1.0):
            t = choose_threshold(scores, positive, Threshold("fpr", target))
            negatives = int((~positive).sum())
            held = [cut for cut in cuts if (cut & ~positive).sum() <= target * negatives + 1e-9]
            assert (scores > t)[~positive].sum() == max((cut & ~positive).sum() for cut in held)


def test_threshold_lies_halfway_and_neighbours_in_floating_point_stay_apart():
    positive = np.array([True, False])
    assert choose_threshold(np.array([3.0, 1.0]), positive, Threshold()) == 2.0
    low = 1.0
    high = np.nextafter(low, 2)
    t = choose_threshold(np.array([high, low]), positive, Threshold())
    assert high > t and not low > t


def test_a_calibration_split_without_the_needed_side_is_refused():
    scores = np.zeros(3)
    with pytest.raises(InputError, match=r"3 texts\) has no positive text"):
        choose_threshold(scores, np.zeros(3, bool), Threshold("f1"))
    with pytest.raises(InputError, match="no negative text"):
        choose_threshold(scores, np.ones(3, bool), Threshold("fpr", 0.1))
    with pytest.raises(InputError, match="between 0 and 1"):
        choose_threshold(scores, np.ones(3, bool), Threshold("fpr", 1.5))


def test_platts_curve_is_where_its_loss_has_no_slope():
    rng = np.random.default_rng(1)
    positive = rng.random(200) < 0.3
    scores = positive + rng.normal(size=200)
    probability = platt(scores, positive, scores)
    n, m = positive.sum(), (~positive).sum()
    gap = probability - np.where(positive, (n + 1) / (n + 2), 1 / (m + 2))
    # lbfgs stops at slopes of 1e-8 per unit of weight (its tol), or where the loss no longer changes in float64
    assert abs(gap.mean()) < 1e-6 and abs((gap * scores).mean()) < 1e-6
    assert (np.diff(platt(scores, positive, np.sort(scores))) > 0).all()
    apart = platt(np.array([1.0, 2.0]), np.array([False, True]), np.array([1.0, 2.0]))
    assert apart == pytest.approx([1 / 3, 2 / 3], abs=1e-3)  # Platt's targets, where a plain fit would say 0 and 1


def test_scores_are_cut_on_calibration_and_own_decisions_are_kept():
    label = np.array([0, 1, 0, 1, 0, 1, 0])
    scores = np.array([9.0, -9, 1, 2, 3, 4, 3.6])
    task = Problem(label, 2, train=np.arange(2), calibration=np.arange(2, 6))
    found = Method("m", lambda _: Learned(scores)).fit(task)
    # F1 on texts 2 to 5 is 0.8 for a cut below 2 (3 of 3 decided, 2 right) and 2/3 above 3
    assert found.facts["threshold"] == 1.5
    assert found.decisions.tolist() == [1, 0, 0, 1, 1, 1, 1]
    rates = choose_threshold(np.arange(100.0), np.zeros(100, bool), Threshold("fpr", 0.29))
    assert rates == 70.0  # 29 of 100 lie above; 0.29 x 100 is 28.999... in floating point
    held = Method("m", lambda _: Learned(scores)).fit(
        Problem(label, 2, np.arange(2), np.arange(2, 6), Threshold("fpr", 0))
    )
    assert held.facts["threshold"] == 3.0 and held.decisions.tolist() == [1, 0, 0, 0, 0, 1, 1]
    own = Method("m", lambda _: Learned(scores, 1 - label)).fit(task)
    assert own.decisions.tolist() == (1 - label).tolist() and "threshold" not in own.facts


def test_splits_that_cannot_be_learned_are_refused():
    with pytest.raises(InputError, match="2 training texts are of one class"):
        Problem(np.array([1, 1, 0]), 2, np.arange(2), np.arange(2))
    with pytest.raises(InputError, match="calibration split names texts 0 to 3"):
        Problem(np.array([1, 0, 0]), 2, np.arange(2), np.arange(4))


# --- what the methods find ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_methods_find_what_is_planted(classes):
    label, residual, texts, features = planted(classes)
    task = problem(label, classes)
    name = "auroc" if classes == 2 else "macro_auroc"
    for method in methods(residual, texts, features)[:5]:
        found = figures(label[TEST], classes, method.fit(task).take(TEST))
        assert found[name].value > 0.94, method.name
        if "TF-IDF" in method.name:
            assert found["accuracy"].value == 1.0


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_and_rows_of_test_texts_are_not_looked_at(classes):
    label, residual, texts, features = planted(classes)
    other = label.copy()
    other[TEST] = (other[TEST] + 1) % classes
    strange = residual.copy()
    strange[TEST] *= 1000
    words = [*texts[:120], *["entirely unseen words"] * 40]
    loud = sp.csr_array(sp.vstack([features[:120], 50 * features[TEST]]))
    changed = methods(strange, words, loud)
    for method, twin in zip(methods(residual, texts, features), changed, strict=True):
        one, two, three = (
            method.fit(problem(label, classes)),
            method.fit(problem(other, classes)),
            twin.fit(problem(label, classes)),
        )
        assert (one.scores == two.scores).all() and (one.decisions == two.decisions).all(), method.name
        # products of matrices with other rows may be added up in another order
        assert one.scores[:120] == pytest.approx(three.scores[:120], rel=1e-9, abs=1e-9), method.name
        assert (one.decisions[:120] == three.decisions[:120]).all(), method.name


def test_the_probe_is_scikit_learns_on_standardised_rows_with_c_from_all_folds():
    rng = np.random.default_rng(5)
    label = rng.integers(0, 2, T)
    residual = (rng.normal(size=(T, D)) + 0.5 * label[:, None] * np.eye(D)[0]).astype(np.float32) * 7 + 100
    found = residual_probe(residual).fit(problem(label))
    rows, known = residual[:80].astype(np.float64), label[:80]
    scaled = StandardScaler().fit_transform(rows)
    losses = []
    for strength in STRENGTHS:
        loss = 0.0
        for fit, held in StratifiedKFold(5, shuffle=True, random_state=0).split(scaled, known):
            model = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(scaled[fit], known[fit])
            loss += log_loss(known[held], model.predict_proba(scaled[held]), labels=[0, 1]) * len(held)
        losses.append(loss)
    assert 0 < np.argmin(losses) < len(STRENGTHS) - 1  # else this would tell nothing about the walk
    assert found.facts["C"] == STRENGTHS[int(np.argmin(losses))] and found.facts["folds"] == 5
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=found.facts["C"], max_iter=1000)).fit(rows, known)
    expected = theirs.decision_function(residual.astype(np.float64))
    assert found.scores == pytest.approx(expected, rel=1e-9, abs=1e-9)  # the scale is folded into the weights
    assert found.probability == pytest.approx(theirs.predict_proba(residual.astype(np.float64))[:, 1], rel=1e-9)


def test_several_classes_give_scikit_learns_probabilities_and_absent_classes_none():
    label, residual, _, _ = planted(3)
    found = residual_probe(residual).fit(problem(label, 3))
    rows = residual.astype(np.float64)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=found.facts["C"], max_iter=1000))
    theirs.fit(rows[:80], label[:80])
    assert found.probability == pytest.approx(theirs.predict_proba(rows), rel=1e-8, abs=1e-12)
    without = np.flatnonzero(label[:80] != 1)
    part = Problem(label, 3, without, np.arange(80, 120))
    found = residual_probe(residual).fit(part)
    assert (found.probability[:, 1] == 0).all() and (found.decisions != 1).all()
    assert (found.decisions == label)[label != 1].mean() > 0.9
    assert (mean_difference(residual).fit(part).decisions != 1).all()


def test_difference_of_means_by_hand():
    residual = np.array([[0, 1], [2, 3], [4, 2], [10, 1], [10, 3], [8, 9]], np.float32)
    label = np.array([0, 0, 0, 1, 1, 0])
    task = Problem(label, 2, np.arange(5), np.arange(5))
    # class means (2, 2) and (10, 2): only the first direction counts, its scale cancels, and the middle is 6
    assert mean_difference(residual).fit(task).scores == pytest.approx((residual[:, 0] - 6) / 8, abs=1e-12)
    assert mean_difference(residual).fit(task).decisions.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]  # cut at 7, halfway between 4 and 10
    several = mean_difference(residual).fit(Problem(np.array([0, 0, 0, 1, 1, 2]), 3, np.arange(5), np.arange(5)))
    assert several.scores[:, 0] == pytest.approx((6 - residual[:, 0]) / 8, abs=1e-12)
    assert np.isneginf(several.scores[:, 2]).all()


def test_features_as_csr_are_the_pooled_activations():
    acts, indices, text, keep, _, _ = sparse_codes.codes(2)
    sparse = pool(acts, indices, text, keep, 24)
    for pooling in ("any", "mean", "last"):
        full = sparse_codes.pooled(sparse_codes.dense(acts, indices, text, keep), pooling)[0]
        found = sparse_features(sparse, pooling)
        assert found.toarray() == pytest.approx(full[:, sparse.features], rel=1e-12)
        assert (found.data > 0).all()


def test_feature_probe_divides_by_the_largest_training_value():
    label, _, _, features = planted()
    scales = np.geomspace(1e-3, 1e3, F)
    one = feature_probe(features).fit(problem(label))
    two = feature_probe(sp.csr_array(features * scales)).fit(problem(label))
    assert two.scores == pytest.approx(one.scores, rel=1e-6, abs=1e-6)  # of lbfgs, on rows that differ in the last bit
    assert one.facts["features"] == F


def test_random_features_are_an_or_rule_of_those_that_fire_often_enough():
    label, _, _, features = planted()
    full = features.toarray()
    often = set(np.flatnonzero((full[:80] > 0).sum(0) >= 16).tolist())
    assert 5 < len(often) < F - 5
    ids = np.arange(F) + 1000
    seen = set()
    for draw in range(40):
        found = random_features(features, ids, 4, draw, min_texts=16).fit(problem(label))
        chosen = np.array(found.facts["features"]) - 1000
        assert len(set(chosen.tolist())) == 4 and set(chosen.tolist()) <= often
        assert (found.decisions == (full[:, chosen] > 0).any(1)).all()
        scales = [np.quantile(c[c > 0], 0.99) for c in full[:80, chosen].T]
        assert found.scores == pytest.approx((full[:, chosen] / scales).max(1), rel=1e-12)
        smaller = random_features(features, ids, 2, draw, min_texts=16).fit(problem(label))
        assert smaller.facts["features"] == found.facts["features"][:2]
        seen |= set(chosen.tolist())
    assert seen == often
    with pytest.raises(InputError, match=f"{len(often) + 1} random features were asked for, and {len(often)} fire"):
        random_features(features, ids, len(often) + 1, min_texts=16).fit(problem(label))


def test_random_rule_of_several_classes_falls_back_to_the_most_frequent_class():
    label = np.array([0, 1, 2, 2, 2, 0])
    features = sp.csr_array(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [1, 0, 0]], float))
    task = Problem(label, 3, np.arange(6), np.arange(6))
    found = random_features(features, np.arange(3), 1, min_texts=1).fit(task)
    owner = [chosen[0] for chosen in found.facts["features"]]
    for text in range(6):
        active = features.toarray()[text]
        firing = [c for c in range(3) if active[owner[c]] > 0]
        assert found.decisions[text] == (firing[0] if firing else 2)


def test_majority():
    label = np.array([1, 0, 0, 1])
    tied = majority().fit(Problem(label, 2, np.arange(4), np.arange(4)))
    assert tied.decisions.tolist() == [0] * 4 and (tied.probability == 0.5).all()
    more = majority().fit(Problem(label, 2, np.array([0, 1, 3]), np.arange(4)))
    assert more.decisions.tolist() == [1] * 4
    assert more.probability == pytest.approx(np.full(4, 2 / 3), abs=1e-15)
    several = majority().fit(Problem(np.array([2, 1, 2]), 3, np.arange(3), np.arange(3)))
    assert several.decisions.tolist() == [2] * 3
    assert several.probability == pytest.approx(np.tile([0, 1 / 3, 2 / 3], (3, 1)), abs=1e-15)


def test_few_texts_of_a_class_leave_no_folds_and_c_is_1():
    label, residual, _, _ = planted()
    part = Problem(label, 2, np.array([0, 1, 2]), np.arange(80, 120))
    assert residual_probe(residual).fit(part).facts["folds"] == 0
    assert residual_probe(residual).fit(part).facts["C"] == 1.0


def test_results_are_the_same_to_the_bit():
    label, residual, texts, features = planted()
    for one, two in zip(methods(residual, texts, features), methods(residual, texts, features), strict=True):
        left, right = one.fit(problem(label, seed=3)), two.fit(problem(label, seed=3))
        assert left.scores.tobytes() == right.scores.tobytes() and left.facts == right.facts, one.name


def test_what_is_missing_is_said(monkeypatch):
    label, residual, _, _ = planted()
    with pytest.raises(InputError, match="no word n-gram"):
        tfidf(["!"] * T).fit(problem(label))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(InputError, match=r"qscope\[classify\]"):
        residual_probe(residual).fit(problem(label))
