"""Figures against scikit-learn's, and bootstrap replicates against texts that are drawn one by one."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from qscope.classification import resampling
from qscope.classification.metrics import (
    BINARY,
    SEVERAL,
    Figure,
    Prediction,
    by_class,
    by_group,
    confusion,
    figures,
    measure,
    spread,
)
from qscope.classification.resampling import bootstrap, draws
from qscope.errors import InputError

EXACT = dict(rel=1e-12, abs=1e-12)  # sums of up to 100 numbers below 1 in another order


def number(figure):
    return np.nan if figure.value is None else figure.value


def binary(label, scores, decisions, probability=None):
    probability = None if probability is None else np.asarray(probability, float)
    found = Prediction(np.asarray(scores, float), np.asarray(decisions, np.int64), probability)
    return np.asarray(label, np.int64), found


@st.composite
def two_classes(draw):
    texts = draw(st.integers(2, 60))
    columns = [
        np.array(draw(st.lists(values, min_size=texts, max_size=texts)))
        for values in (st.integers(0, 1), st.integers(-3, 3), st.integers(0, 1))
    ]
    columns[0][:2] = 0, 1
    return binary(columns[0], columns[1] / 2, columns[2])


def expected(label, found):
    """scikit-learn's; scores must be probabilities too for brier."""
    decided = found.decisions
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        label, decided, average="binary", zero_division=np.nan
    )
    return {
        "accuracy": sk.accuracy_score(label, decided),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "false_positive_rate": 1 - sk.recall_score(label, decided, pos_label=0),
        "auroc": sk.roc_auc_score(label, found.scores),
        "auprc": sk.average_precision_score(label, found.scores),
    }


@settings(deadline=None)
@given(two_classes())
def test_two_classes_are_scikit_learns_with_ties(case):
    label, found = case
    mine = figures(label, 2, found)
    for name, value in expected(label, found).items():
        assert number(mine[name]) == pytest.approx(value, nan_ok=True, **EXACT), name


def test_probabilities_are_scikit_learns():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 100)
    probability = rng.permutation(100) / 100 + 0.003  # no two equal: the bins are ten texts each
    label, found = binary(label, probability, probability > 0.5, probability)
    mine = figures(label, 2, found)
    assert mine["brier"].value == pytest.approx(sk.brier_score_loss(label, probability), **EXACT)
    truth, said = calibration_curve(label, probability, n_bins=10, strategy="quantile")
    assert len(truth) == 10
    assert mine["ece"].value == pytest.approx(np.abs(truth - said).mean(), **EXACT)


def test_equal_probabilities_share_a_bin_whatever_their_order():
    label = np.array([0, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0])
    probability = np.array([0.2] * 6 + [0.7] * 6)
    # by hand: 6 texts at 0.2 of which 3 are positive, 6 at 0.7 of which 1 is
    by_hand = (6 * abs(0.2 - 3 / 6) + 6 * abs(0.7 - 1 / 6)) / 12
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(12)
        case = binary(label[order], probability[order], probability[order] > 0.5, probability[order])
        assert figures(case[0], 2, case[1])["ece"].value == pytest.approx(by_hand, **EXACT)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 5))
def test_several_classes_are_scikit_learns(seed, classes):
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), rng.integers(0, classes, 40)])
    scores = rng.integers(0, 4, (len(label), classes)) + np.eye(classes)[label]
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    found = Prediction(scores, scores.argmax(1), probability)
    mine = {name: figure.value for name, figure in figures(label, classes, found).items()}
    decided = found.decisions
    assert tuple(mine) == SEVERAL
    assert mine["accuracy"] == pytest.approx(sk.accuracy_score(label, decided), **EXACT)
    assert mine["macro_f1"] == pytest.approx(sk.f1_score(label, decided, average="macro"), **EXACT)
    assert mine["macro_recall"] == pytest.approx(sk.recall_score(label, decided, average="macro"), **EXACT)
    if len(set(decided)) == classes:
        assert mine["macro_precision"] == pytest.approx(sk.precision_score(label, decided, average="macro"), **EXACT)
    else:
        assert mine["macro_precision"] is None
    by_probability = figures(label, classes, Prediction(probability, decided))["macro_auroc"].value
    assert by_probability == pytest.approx(sk.roc_auc_score(label, probability, multi_class="ovr"), **EXACT)
    assert mine["brier"] == pytest.approx(((probability - np.eye(classes)[label]) ** 2).sum(1).mean(), **EXACT)
    top = probability.max(1)
    as_binary = binary(label == decided, top, np.ones(len(top)), top)
    assert mine["ece"] == pytest.approx(figures(as_binary[0], 2, as_binary[1])["ece"].value, **EXACT)
    assert (confusion(label, decided, classes) == sk.confusion_matrix(label, decided, labels=range(classes))).all()
    each = by_class(label, found, [f"c{i}" for i in range(classes)])
    per_class = sk.f1_score(label, decided, average=None, labels=range(classes))
    assert [each[f"c{i}"]["f1"].value for i in range(classes)] == pytest.approx(per_class.tolist(), **EXACT)


def test_macro_f1_is_over_the_classes_that_occur_like_scikit_learns():
    label, decided = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = figures(label, 4, Prediction(np.eye(4)[decided], decided))
    assert found["macro_f1"].value == pytest.approx(sk.f1_score(label, decided, average="macro"), **EXACT)
    assert found["macro_f1"].value == pytest.approx((2 / 3 + 4 / 5) / 2, **EXACT)
    assert found["macro_auroc"] == (None, "a class has no texts, or all of them")


def test_what_is_undefined_is_none_with_the_reason_and_no_warning():
    cases = {
        "negative only": (binary([0, 0, 0], [1, 2, 3], [0, 0, 0]), {"precision", "recall", "f1", "auroc", "auprc"}),
        "positive only": (binary([1, 1], [1, 2], [1, 0]), {"false_positive_rate", "auroc", "auprc"}),
        "none": (binary([], [], []), set(BINARY)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, ((label, found), undefined) in cases.items():
            mine = figures(label, 2, found)
            assert {n for n, f in mine.items() if f.value is None} == undefined | {"brier", "ece"}, name
            assert all((f.value is None) == (f.reason is not None) for f in mine.values())
    label, found = cases["positive only"][0]
    assert figures(label, 2, found)["auroc"].reason == "there is one class only"
    label, found = cases["none"][0]
    assert figures(label, 2, found)["f1"].reason == "there are no texts"


def test_f1_is_zero_when_it_is_defined_and_nothing_is_right():
    label, found = binary([1, 0], [0, 1], [0, 1])
    assert figures(label, 2, found)["f1"] == Figure(0.0)


def test_groups_are_figures_of_their_texts():
    label, found = binary([1, 0, 1, 0, 1, 1], [3, 1, 2, 2, 5, 4], [1, 0, 0, 1, 1, 1])
    group = np.array([0, 0, 1, 1, 2, 2])
    each = by_group(label, 2, found, group, ["en", "fr", "ja", "empty"])
    assert [each[name]["accuracy"].value for name in each] == [1.0, 0.0, 1.0, None]
    assert [each[name]["auroc"].value for name in each] == [1.0, 0.5, None, None]


def test_spread_leaves_out_what_has_no_value():
    found = spread([Figure(0.2), Figure(None, "x"), Figure(0.6)])
    assert found.mean == pytest.approx(0.4) and found.deviation == pytest.approx(0.08**0.5)
    assert (found.lowest, found.highest, found.values) == (0.2, 0.6, 2)
    assert spread([Figure(None, "x")]) == (None, None, None, None, 0)


@pytest.mark.parametrize(
    ("label", "classes", "prediction", "message"),
    [
        ([0, 2], 2, Prediction(np.zeros(2), np.zeros(2, int)), "run from 0 to 2"),
        ([0, 1], 2, Prediction(np.zeros(3), np.zeros(2, int)), r"scores \[2\]"),
        ([0, 1], 3, Prediction(np.zeros(2), np.zeros(2, int)), r"scores \[2, 3\]"),
        ([0, 1], 2, Prediction(np.array([0, np.nan]), np.zeros(2, int)), "1 scores are NaN"),
    ],
)
def test_what_does_not_fit_is_refused(label, classes, prediction, message):
    with pytest.raises(InputError, match=message):
        measure(np.array(label), classes, prediction)


# --- bootstrap ---------------------------------------------------------------------------------------------


def drawn_texts(counts):
    return np.repeat(np.arange(len(counts)), counts.astype(int))


@pytest.mark.parametrize("classes", [2, 3])
def test_replicates_are_figures_of_the_texts_drawn(classes):
    rng = np.random.default_rng(3)
    label = rng.integers(0, classes, 30)
    scores = rng.integers(0, 4, (30, classes)) + np.eye(classes)[label]
    probability = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    found = Prediction(scores, scores.argmax(1), probability)
    if classes == 2:
        found = Prediction(scores[:, 1] - scores[:, 0], found.decisions, probability[:, 1])
    result = bootstrap(label, classes, {"m": found}, replicates=40, seed=5)
    counts = np.concatenate(list(draws(30, 40, 5)))
    assert counts.shape == (40, 30) and (counts.sum(1) == 30).all()
    for row, times in enumerate(counts):
        texts = drawn_texts(times)
        for name, figure in figures(label[texts], classes, found.take(texts)).items():
            value = result.replicates["m"][name][row]
            assert number(figure) == pytest.approx(value, nan_ok=True, **EXACT), name


def test_replicates_do_not_hang_on_the_size_of_the_blocks(monkeypatch):
    label, found = binary([1, 0] * 20, np.arange(40) % 7, np.arange(40) % 3 == 0)
    whole = bootstrap(label, 2, {"m": found}, replicates=50).replicates["m"]
    monkeypatch.setattr(resampling, "_CELLS", 40 * 7)
    blocks = bootstrap(label, 2, {"m": found}, replicates=50).replicates["m"]
    for name in ("f1", "auroc", "auprc"):
        assert (whole[name] == blocks[name]).all() and len(set(whole[name].tolist())) > 10


def test_methods_see_the_same_replicates_so_differences_are_paired():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    scores = label + rng.normal(size=400)
    good = Prediction(scores, (scores > 0.5).astype(int))
    flipped = good.decisions.copy()
    flipped[:4] = 1 - label[:4]  # differs at most in four texts
    other = Prediction(scores, flipped)
    found = bootstrap(label, 2, {"good": good, "same": good, "other": other}, replicates=300)
    none = found.difference("good", "same", "f1")
    assert (none.value, none.low, none.high) == (0.0, 0.0, 0.0)
    paired, alone = found.difference("good", "other", "accuracy"), found.interval("good", "accuracy")
    assert paired.high - paired.low < 0.3 * (alone.high - alone.low)
    assert found.interval("good", "accuracy").value == pytest.approx((good.decisions == label).mean())
    again = bootstrap(label, 2, {"good": good}, replicates=300)
    assert (again.replicates["good"]["auroc"] == found.replicates["good"]["auroc"]).all()


def test_interval_of_a_share_is_the_binomials():
    """Accuracy 0.8 of 500 texts: replicates are Binomial(500, 0.8) / 500, whose quantiles are known."""
    from scipy.stats import binom

    label = np.ones(500, np.int64)
    label[::2] = 0
    right = np.arange(500) % 5 != 0
    found = Prediction(np.zeros(500), np.where(right, label, 1 - label))
    mine = bootstrap(label, 2, {"m": found}, replicates=4000, names=["accuracy"]).interval("m", "accuracy")
    # the quantile of 4000 draws is off by about sqrt(0.025 x 0.975 / 4000) = 0.0025 in probability: two steps of 1/500
    assert mine.low == pytest.approx(binom.ppf(0.025, 500, 0.8) / 500, abs=0.004)
    assert mine.high == pytest.approx(binom.ppf(0.975, 500, 0.8) / 500, abs=0.004)


def test_replicates_without_a_value_are_left_out_and_counted():
    label, found = binary([1, 0, 0, 0], [2, 1, 0, 0], [1, 0, 0, 0])
    mine = bootstrap(label, 2, {"m": found}, replicates=200)
    lacking = sum((np.concatenate(list(draws(4, 200, 0)))[:, 0] == k).sum() for k in (0, 4))
    assert mine.interval("m", "auroc").undefined == lacking > 0
    assert mine.interval("m", "auroc").low == 1.0
    assert mine.interval("m", "ece").value is None and "no probabilities" in mine.interval("m", "ece").reason


def test_no_replicates_give_values_without_intervals():
    label, found = binary([1, 0], [2, 1], [1, 0])
    mine = bootstrap(label, 2, {"m": found}, replicates=0).interval("m", "f1")
    assert (mine.value, mine.low, mine.high, mine.reason) == (1.0, None, None, None)
    with pytest.raises(InputError, match="-1 replicates"):
        bootstrap(label, 2, {"m": found}, replicates=-1)


def test_exact_distribution_of_a_tiny_bootstrap():
    """All 3^3 equally likely draws of three texts: the mean of many replicates tends to the mean of these."""
    label, found = binary([1, 0, 1], [3, 2, 1], [1, 1, 0])
    exact = []
    for texts in itertools.product(range(3), repeat=3):
        exact.append(figures(label[list(texts)], 2, found.take(np.array(texts)))["accuracy"].value)
    mine = bootstrap(label, 2, {"m": found}, replicates=20000, names=["accuracy"]).replicates["m"]["accuracy"]
    # deviation of a replicate 0.27, of the mean of 20000 0.002
    assert mine.mean() == pytest.approx(np.mean(exact), abs=0.008)
    assert mine.std() == pytest.approx(np.std(exact), abs=0.008)
