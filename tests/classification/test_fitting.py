"""Fitting on planted features, where the right answer is known, and against the definitions on dense codes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qscope.classification.fitting import (
    METRICS,
    FitData,
    FitSettings,
    best_layers,
    feature_scores,
    fit,
    fit_multiclass,
    rank_features,
    refit,
    rule_figures,
    sensitivity,
    top1_differences,
)
from qscope.classification.log_odds import log_odds
from qscope.classification.rule import Clause, OrRule
from qscope.classification.split import Split, make_split
from qscope.errors import InputError
from qscope.finding.pooled import pool
from qscope.finding.scores import Sample

F, K, TOKENS = 200, 8, 5
PLANTED = (17, 90, 151)


def layer_codes(seed, texts, fires):
    """Codes of `texts` texts of 5 tokens; noise everywhere, and fires: {feature: [T] bool} at one token of the text."""
    rng = np.random.default_rng(seed)
    rows = texts * TOKENS
    noise = np.setdiff1d(np.arange(F), list(fires))
    indices = noise[np.argsort(rng.random((rows, len(noise))), axis=1)[:, :K]].astype(np.int32)
    acts = (rng.random((rows, K)) + 0.1).astype(np.float32)
    for slot, (feature, where) in enumerate(fires.items()):
        at = np.flatnonzero(where) * TOKENS + rng.integers(0, TOKENS, int(where.sum()))
        indices[at, slot], acts[at, slot] = feature, 2 + rng.random(len(at))
    text = np.repeat(np.arange(texts), TOKENS)
    return pool(acts, indices, text, np.ones(rows, bool), texts)


def planted_corpus(seed=0, texts=240):
    """(codes, positive, split): at layer 4 each positive text fires one of three features, no negative one does."""
    rng = np.random.default_rng(seed)
    positive = np.arange(texts) % 2 == 0
    which = rng.integers(0, 3, texts)
    fires = {feature: positive & (which == i) for i, feature in enumerate(PLANTED)}
    codes = {2: layer_codes(seed + 1, texts, {}), 4: layer_codes(seed + 2, texts, fires)}
    return codes, positive, make_split([f"text {i}" for i in range(texts)], positive.astype(np.int64), seed=seed)


# --- the right answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_planted_features_are_found_and_the_rule_is_perfect(metric, seed):
    codes, positive, split = planted_corpus(seed)
    data = FitData.of_split(codes, positive, split)
    found = fit(data, FitSettings(metric, counts=(1, 2, 3)))
    assert found.layer == 4 and found.chosen.count == 3
    assert {clause.feature for clause in found.chosen.rule.clauses} == set(PLANTED)
    assert found.chosen.calibration["f1"] == found.chosen.training["f1"] == 1
    assert found.chosen.calibration["auroc"] == 1 and found.chosen.calibration["fpr"] == 0
    np.testing.assert_array_equal(found.chosen.rule.decide(codes), positive)  # the test texts too
    assert (
        found.chosen.training["recall"]
        > found.candidates[-2].training["recall"]
        > found.candidates[-3].training["recall"]
    )


def test_thresholds_keep_noise_out():
    """The planted features also fire weakly in most negative texts: threshold 0 fails, a calibrated one does not."""
    texts = 400
    rng = np.random.default_rng(5)
    positive = np.arange(texts) % 2 == 0
    codes = layer_codes(6, texts, {9: positive})
    weak = layer_codes(6, texts, {9: rng.random(texts) < 0.9})
    entry = np.searchsorted(weak.features, 9) == weak.column
    strong = positive[weak.text[entry]]
    largest = weak.largest.copy()
    largest[entry] = np.where(strong, largest[entry] + 2, largest[entry] - 1)
    codes = replace(weak, largest=largest)
    split = make_split([f"{i}" for i in range(texts)], positive.astype(np.int64))
    data = FitData.of_split({0: codes}, positive, split)
    plain, held = (fit(data, FitSettings("mean", counts=(1,), target=target)).chosen for target in (None, 0.05))
    assert plain.rule.clauses[0].feature == held.rule.clauses[0].feature == 9
    assert plain.calibration["fpr"] > 0.7 and held.calibration["fpr"] <= 0.05
    assert held.calibration["recall"] == plain.calibration["recall"] and held.calibration["f1"] > 0.9
    negatives = np.sort(largest[entry & ~positive[weak.text] & split.calibration[weak.text]])[::-1]
    assert held.rule.clauses[0].threshold == negatives[int(0.05 * (split.calibration & ~positive).sum())]


def test_test_texts_are_never_looked_at():
    codes, positive, split = planted_corpus(1)
    for settings_of in (FitSettings(counts=(1, 3), target=0.1), FitSettings("auroc", counts=(2,), pooling="mean")):
        one = fit(FitData.of_split(codes, positive, split), settings_of, multi_layer=2)
        other = {}
        for layer, found in codes.items():  # other labels, and activations a hundred times as large
            factor = np.where(split.test[found.text], 100.0, 1.0)
            changed = {name: getattr(found, name) * factor for name in ("total", "largest", "last")}
            other[layer] = replace(found, **changed)
        assert fit(FitData.of_split(other, positive ^ split.test, split), settings_of, multi_layer=2) == one


@pytest.mark.parametrize("target", [None, 0.1])
def test_several_classes(target):
    texts = 300
    label = np.arange(texts) % 3
    split = make_split([str(i) for i in range(texts)], label)
    codes = {1: layer_codes(3, texts, {feature: label == i for i, feature in enumerate(PLANTED)})}
    weights = split.train.astype(np.int64), split.calibration.astype(np.int64)
    asked = FitSettings(counts=(1, 2), target=target)
    found = fit_multiclass(codes, label, ("de", "en", "fr"), *weights, asked)
    np.testing.assert_array_equal(found.rule.decide(codes), label)
    assert [part.chosen.rule.clauses[0].feature for part in found.fits] == list(PLANTED)
    assert all(part.chosen.count == 1 for part in found.fits)  # the smallest of equal F1
    with pytest.raises(InputError, match="class 'it' against all others: The training part has 0 positive"):
        fit_multiclass(codes, label, ("de", "en", "fr", "it"), *weights, asked)
    uneven = np.where(np.arange(texts) < 200, 1, label)
    assert fit_multiclass(codes, uneven, ("de", "en", "fr"), *weights, asked).majority == 1


# --- against the definitions -------------------------------------------------------------------------------


def dense(codes, pooling):
    """[T, F] pooled activations."""
    found = np.zeros((len(codes.tokens), F))
    found[codes.text, codes.features[codes.column]] = codes.values(pooling)[0]
    return found


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 50), metric=st.sampled_from(METRICS), pooling=st.sampled_from(["any", "last"]))
def test_the_ranking_is_the_definitions(seed, metric, pooling):
    texts = 60
    rng = np.random.default_rng(seed)
    positive = rng.random(texts) < 0.4
    codes = layer_codes(seed, texts, {5: positive & (rng.random(texts) < 0.8), 6: rng.random(texts) < 0.5})
    train = rng.integers(0, 3, texts)
    asked = FitSettings(metric, pooling=pooling, min_texts=3, fdr=0.9)
    ranked = rank_features(FitData({0: codes}, positive, train, np.ones(texts, np.int64)), 0, asked)
    values = np.repeat(dense(codes, pooling), train, axis=0)
    labels = np.repeat(positive, train)
    anywhere = dense(codes, "any")[train > 0] > 0
    mean = values[labels].mean(0) - values[~labels].mean(0)
    rate = (values[labels] > 0).mean(0) - (values[~labels] > 0).mean(0)
    enough = anywhere.sum(0) >= 3
    if metric == "rate":
        score, use = rate, rate > 0
    elif metric == "mean":
        score, use = mean, mean > 0
    elif metric == "auroc":
        pairs = (values[labels][:, None] > values[~labels]) + 0.5 * (values[labels][:, None] == values[~labels])
        score, use = pairs.mean((0, 1)), pairs.mean((0, 1)) > 0.5
    else:
        a, b = ((values[side] > 0).sum(0) for side in (labels, ~labels))
        c, d = labels.sum() - a, (~labels).sum() - b
        score = np.log((a + 0.5) * (d + 0.5) / ((b + 0.5) * (c + 0.5)))
        p = np.array([fisher(*counts) for counts in zip(a, b, c, d, strict=True)])
        q = np.ones(F)
        q[enough] = stats.false_discovery_control(p[enough])
        use = (score > 0) & (q <= 0.9)
    eligible = np.flatnonzero(enough & use)
    assert set(ranked.features) == set(eligible)
    np.testing.assert_allclose(ranked.scores, score[ranked.features], rtol=1e-9, atol=1e-12)
    assert (np.diff(ranked.scores) <= 0).all()
    np.testing.assert_allclose(ranked.rate_positive - ranked.rate_negative, rate[ranked.features], atol=1e-12)
    ties = np.flatnonzero(np.diff(ranked.scores) == 0)
    second = mean[ranked.features]
    for i in ties:  # larger difference of means first, up to the last bits of its sum
        assert second[i] >= second[i + 1] - 1e-12


def test_weights_count_like_repeated_texts():
    codes, positive, split = planted_corpus(2, texts=120)
    again = np.concatenate([np.arange(120), np.flatnonzero(split.train)[::2]])
    weight = np.bincount(again, minlength=120)
    data = FitData(codes, positive, weight * split.train, split.calibration.astype(np.int64))
    texts = 120 + len(again) - 120
    acts = {layer: dense(found, "any")[again] for layer, found in codes.items()}
    wide = {
        layer: pool(
            values.astype(np.float32),
            np.broadcast_to(np.arange(F, dtype=np.int32), values.shape),
            np.arange(texts),
            np.ones(texts, bool),
            texts,
        )
        for layer, values in acts.items()
    }
    first = np.arange(texts) < 120
    other = FitData(
        wide, positive[again], split.train[again].astype(int), (split.calibration[again] & first).astype(int)
    )
    asked = FitSettings("rate", counts=(1, 5), target=0.1, min_texts=1)
    one, two = fit(data, asked), fit(other, asked)
    for left, right in zip(one.candidates, two.candidates, strict=True):
        assert left.training == right.training and left.calibration == right.calibration
        assert [c.scale for c in left.rule.clauses] == [c.scale for c in right.rule.clauses]


def test_layers_by_top1_difference():
    codes, positive, split = planted_corpus(0)
    data = FitData.of_split({**codes, 9: codes[4]}, positive, split)
    top1 = top1_differences(data)
    for layer, found in data.codes.items():
        fires = dense(found, "any") > 0
        rates = [fires[split.train & side].mean(0) for side in (positive, ~positive)]
        assert top1[layer] == pytest.approx((rates[0] - rates[1]).max(), abs=1e-12)
    assert top1[9] == top1[4] > top1[2]
    assert best_layers(top1, 1) == [4] and best_layers(top1, 3) == [4, 9, 2]  # of equals the lowest
    found = fit(data, FitSettings(counts=(2,)), multi_layer=2)
    assert found.layer == 4 and found.multi_layer.rule.layers == (4, 9)
    best = rank_features(data, 4, FitSettings()).features[0]
    assert [(c.layer, c.feature) for c in found.multi_layer.rule.clauses] == [(4, best), (9, best)]
    assert fit(data, FitSettings(counts=(1, 2)), layer=2, count=2).chosen.rule.layers == (2,)
    silent = layer_codes(0, 240, {})
    silent = replace(silent, features=silent.features[:0], **{
        name: getattr(silent, name)[:0] for name in ("column", "text", "total", "firing", "largest", "last")
    })  # fmt: skip
    assert top1_differences(FitData.of_split({0: silent}, positive, split)) == {0: 0}


def test_smaller_rules_are_part_of_larger_ones():
    codes, positive, split = planted_corpus(3)
    found = fit(FitData.of_split(codes, positive, split), FitSettings(counts=(5, 1, 2)))
    assert [(c.rule.layers, c.count) for c in found.candidates] == [((l,), k) for l in (2, 4) for k in (1, 2, 5)]
    ids = [[clause.feature for clause in c.rule.clauses] for c in found.candidates if c.rule.layers == (4,)]
    assert ids[2][:2] == ids[1] and ids[1][:1] == ids[0]


def test_of_equal_rules_the_smallest_is_chosen():
    positive = np.arange(80) % 2 == 0
    codes = {0: layer_codes(0, 80, {7: positive, 8: positive})}
    found = fit(FitData.of_split(codes, positive, make_split([str(i) for i in range(80)], positive.astype(np.int64))))
    assert [c.calibration["f1"] for c in found.candidates[:2]] == [1, 1] and found.chosen.count == 1


def test_figures_are_those_of_the_decisions():
    codes, positive, split = planted_corpus(4)
    data = FitData.of_split(codes, positive, split)
    candidate = fit(data, FitSettings(counts=(2,), target=0.2)).candidates[0]  # the noise layer
    decided = candidate.rule.decide(codes)[split.calibration]
    truth = positive[split.calibration]
    hits = (decided & truth).sum()
    figures = candidate.calibration
    assert figures["precision"] == hits / decided.sum() and figures["recall"] == hits / truth.sum()
    assert figures["f1"] == pytest.approx(2 * hits / (decided.sum() + truth.sum()), abs=1e-15)
    assert figures["fpr"] == (decided & ~truth).sum() / (~truth).sum() <= 0.2
    never = OrRule((Clause(4, 17, 1e9),))
    assert rule_figures(never, never.values(codes), positive, data.train)["precision"] is None


def fisher(a, b, c, d):
    """scipy's one-sided exact tests, the smaller one doubled."""
    sides = (stats.fisher_exact([[a, b], [c, d]], alternative=side)[1] for side in ("greater", "less"))
    return min(1.0, 2 * min(sides))


def test_log_odds():
    codes, positive, split = planted_corpus(0)
    data = FitData.of_split(codes, positive, split)
    found = log_odds(Sample(codes[4], positive, np.zeros(240, np.int64), "any"), data.train)
    column = int(np.searchsorted(codes[4].features, PLANTED[0]))
    n, m = (int((split.train & side).sum()) for side in (positive, ~positive))
    a = int((split.train & (dense(codes[4], "any")[:, PLANTED[0]] > 0)).sum())
    expected = np.log((a + 0.5) * (m + 0.5) / (0.5 * (n - a + 0.5)))
    error = np.sqrt(1 / (a + 0.5) + 1 / 0.5 + 1 / (n - a + 0.5) + 1 / (m + 0.5))
    assert found.log_odds[column] == pytest.approx(expected, rel=1e-12)
    assert found.error[column] == pytest.approx(error, rel=1e-12)
    assert found.z[column] == pytest.approx(expected / error, rel=1e-12)
    assert found.p[column] == pytest.approx(fisher(a, 0, n - a, m), rel=1e-9)
    np.testing.assert_allclose(found.q, stats.false_discovery_control(found.p), rtol=1e-12)
    table = feature_scores(data, 4)
    assert {len(values) for values in table.values()} == {len(codes[4].features)}
    np.testing.assert_array_equal(table["z"], found.z)


def test_sensitivity_covers_every_setting():
    codes, positive, split = planted_corpus(0, texts=120)
    data = FitData.of_split(codes, positive, split)
    asked = FitSettings(counts=(1, 3))
    rows = sensitivity(data, asked, targets=(None, 0.05), poolings=("any", "last"), metrics=("rate", "auroc"))
    assert len({(r.layer, r.metric, r.pooling, r.target, r.count) for r in rows}) == len(rows) == 2 * 2 * 2 * 2 * 2
    for row in rows:
        assert row.candidate.rule.pooling == row.pooling and row.candidate.count == row.count
        assert row.candidate.settings.target == row.target
    same = next(r for r in rows if (r.layer, r.metric, r.pooling, r.target, r.count) == (4, "rate", "any", None, 3))
    assert same.candidate.rule == fit(data, asked, count=3).chosen.rule


def test_a_rule_for_the_other_membership():
    given = OrRule((Clause(1, 2, 0.3, 1.5), Clause(1, 4, 0.1)))
    values = np.array([[3.0, 0.0], [1.0, 2.0], [2.0, 1.0], [0.0, 0.0]])
    found = refit(given, "preact", values, values, 0.5)
    assert found.membership == "preact" and found.scales.tolist() == [3, 2]
    assert found.thresholds.tolist() == [2, 1]  # level 1: one text each, two in all
    assert refit(given, "preact", values, values[:0], None).thresholds.tolist() == [0, 0]


# --- what is refused ---------------------------------------------------------------------------------------


def test_what_cannot_be_fitted():
    codes, positive, split = planted_corpus(0, texts=120)
    data = FitData.of_split(codes, positive, split)
    for change, message in (
        ({"counts": ()}, "at least 1"),
        ({"counts": (0, 1)}, "at least 1"),
        ({"metric": "tau"}, "accepted are rate, auroc, log_odds, mean"),
        ({"target": 1.1}, "false-positive rate"),
    ):
        with pytest.raises(InputError, match=message):
            FitSettings(**change)
    with pytest.raises(InputError, match="K=150 was asked for, and layer 4 has"):
        fit(data, FitSettings(counts=(1, 150)), count=150)
    with pytest.raises(InputError, match="K=150 was asked for, and layer 4 has"):
        fit(data, FitSettings(counts=(150, 200)))
    # one of several to try is left out
    assert {c.count for c in fit(data, FitSettings(counts=(1, 150))).candidates} == {1}
    with pytest.raises(InputError, match="must add up to 1"):
        make_split(["a", "b"], np.array([0, 1]), shares=(float("nan"), 0.2, 0.2))
    with pytest.raises(InputError, match="Layer 7 was asked for"):
        fit(data, layer=7)
    with pytest.raises(InputError, match="K=3 was asked for"):
        fit(data, count=3)
    with pytest.raises(InputError, match="3 layers were asked for"):
        fit(data, multi_layer=3)
    with pytest.raises(InputError, match="training part has 0 positive and"):
        FitData.of_split(codes, np.zeros(120, bool), split)
    one = np.flatnonzero(positive & split.calibration)[1:]
    calibration = split.calibration.copy()
    calibration[one] = False
    with pytest.raises(InputError, match="calibration part has 1 positive and"):
        FitData(codes, positive, split.train.astype(int), calibration.astype(int))
    with pytest.raises(InputError, match="features of 120 texts; labels are given for 119"):
        FitData(codes, positive[1:], split.train.astype(int), split.calibration.astype(int))
    with pytest.raises(InputError, match="no layer to fit"):
        FitData({}, positive, split.train.astype(int), split.calibration.astype(int))
    assert isinstance(split, Split)
