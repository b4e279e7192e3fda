"""The whole comparison on a tiny model: its figures against scikit-learn's, a rule by its file, and what is said."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from qscope.classification import load_rule
from qscope.classification.fitting import FitSettings
from qscope.classification.methods import Problem
from qscope.classification.metrics import Prediction
from qscope.errors import InputError, StoreError
from qscope.finding.pooled import pool
from qscope.report.classify_evaluate_page import page
from qscope.report.classify_evaluate_text import render
from qscope.workflows import classify_evaluate, classify_predict
from qscope.workflows.classify_evaluate import ClassifyEvaluateConfig, as_fitted
from qscope.workflows.classify_evaluate_methods import CHARACTERS, Data, Entry, RandomRules, reliability
from qscope.workflows.classify_evaluate_result import plain
from qscope.workflows.classify_evaluate_rule import Rules
from qscope.workflows.classify_evaluate_table import layer_lines, losses, table, verdict
from qscope.workflows.classify_inputs import LabelFacts, Labelled, text_hash
from qscope.workflows.classify_predict import ClassifyPredictConfig
from qscope.workflows.classify_rules import limits
from qscope.workflows.classify_split import read_parts
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import load_encoder
from qscope.workflows.text_features import read_features, tokenize_texts

CONTEXT = 20


@pytest.fixture(scope="module")
def rows(texts):
    """Pieces of documentation; the positive ones name a class <b>, some of them twice."""
    found = []
    pieces = [text[i * 120 : i * 120 + 60] for text in texts[:26] for i in range(4)]
    for number, piece in enumerate(piece for piece in pieces if piece.strip()):
        positive = number % 3 == 0
        words = piece.split()
        if positive:
            words[len(words) // 2 : len(words) // 2] = ["class", "class"] if number % 2 else ["class"]
        kind = "yes" if positive else "no"
        found.append({"text": " ".join(words), "label": kind, "group": "<one>" if number % 4 < 2 else "two"})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    root = tmp_path_factory.mktemp("classify-evaluate")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    several = [row | {"label": ("a", "b", "c")[i % 3]} for i, row in enumerate(rows)]
    (root / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    return root


@pytest.fixture(scope="module")
def config(tiny, folder):
    return ClassifyEvaluateConfig(
        texts=(str(folder / "rows.jsonl"),), group_field="group", out=folder / "out", calibration=0.25, test=0.25,
        counts=(1, 2, 4), multi_layer=2, replicates=60, train_shares=(0.3, 1.0), train_draws=2, choice_replicates=3,
        draws=2, preact=True, skip=(CHARACTERS,), model=tiny.model, sae=tuple(tiny.saes.values()), layers=(0, 2),
        context_size=CONTEXT, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(config):
    return classify_evaluate.run(config)


@pytest.fixture(scope="module")
def held_out(config, rows, result):
    """(texts of the test part, whether each is positive), by the list of parts that was written."""
    parts = read_parts(config.out / "rule.split.jsonl")
    mine = [row for row in rows if parts[text_hash(row["text"])] == "test"]
    return [row["text"] for row in mine], np.array([row["label"] == "yes" for row in mine])


def row_of(result, name):
    return next(row for row in result.rows if row.method == name)


def test_the_headline_rule_is_the_one_in_the_file_and_its_figures_are_those_of_scikit_learn(
    tiny, config, result, held_out
):
    texts, positive = held_out
    encoder = load_encoder(
        EncodeConfig(
            text=(), model=tiny.model, sae=tuple(tiny.saes.values()), layers=(0, 2), context_size=CONTEXT,
            dtype="float32", device="cpu",
        )
    )  # fmt: skip
    features = read_features(encoder, tokenize_texts(encoder.tokenizer, texts, CONTEXT), None)
    codes = {layer: features.codes(layer) for layer in (0, 2)}
    rule, row = load_rule(config.out / "rule.json"), result.rows[0]
    assert row.headline and row.method == result.headline == f"rule, K={len(rule.clauses)}"
    decided, scores = rule.decide(codes), rule.scores(codes)
    assert row.figures["f1"].value == pytest.approx(f1_score(positive, decided), abs=1e-12)
    # batches of another make-up round a few activations otherwise, and with them at most the order of near equals
    assert row.figures["auroc"].value == pytest.approx(roc_auc_score(positive, scores), abs=0.01)
    assert row.confusion == confusion_matrix(positive, decided).tolist()
    assert row.figures["f1"].low <= row.figures["f1"].value <= row.figures["f1"].high


def test_every_method_is_there_and_is_compared_with_the_rule(result):
    names = [row.method for row in result.rows]
    assert set(names) >= {
        "rule, K=1", "rule, K=2", "rule, K=4", "rule, 2 layers", f"{result.headline}, pre-activations", "linear probe",
        "difference of means", "TF-IDF (words)", "all SAE features", "random features",
        "majority",
    }  # fmt: skip
    own = result.rows[0].figures["f1"].value
    for row in result.rows[1:]:
        assert row.ahead["f1"].value == pytest.approx(own - row.figures["f1"].value, abs=1e-12)
        want = "rule wins" if row.ahead["f1"].low > 0 else "rule loses" if row.ahead["f1"].high < 0 else ""
        assert row.judgement == want
    constant = row_of(result, "majority").figures
    share = result.counts["test"]["no"] / sum(result.counts["test"].values())
    assert (constant["accuracy"].value, constant["f1"].value, constant["auroc"].value) == (share, 0.0, 0.5)
    # the word stands in every positive text and in hardly another
    assert row_of(result, "TF-IDF (words)").figures["auroc"].value > 0.8


def test_the_layer_of_the_rule_is_that_of_the_largest_difference_on_training_texts(result):
    lines = {line.layer: line for line in result.layers if line.method == result.headline}
    best = max(lines, key=lambda layer: lines[layer].top1_difference)
    assert set(lines) == {0, 2} and [layer for layer, line in lines.items() if line.chosen] == [best]
    assert result.rows[0].layer == str(best)
    assert lines[best].f1 == result.rows[0].figures["f1"]
    assert all(line.top1_difference is None for line in result.layers if line.method != result.headline)


def test_groups_studies_and_settings(result):
    rule = result.rows[0]
    assert list(rule.groups) == ["<one>", "two"]
    assert sum(group["texts"] for group in rule.groups.values()) == sum(result.counts["test"].values())
    probe = row_of(result, "linear probe")
    ends = {point.share: point for point in result.curve if point.method == "linear probe"}
    assert ends[1.0].f1.value == pytest.approx(probe.figures["f1"].value, abs=1e-12)
    assert ends[1.0].texts == sum(result.counts["train"].values()) > 3 * ends[0.3].texts - 4
    matrix = next(found for found in result.transfers if found.method == result.headline)
    assert matrix.sources == ["<one>", "two", "all"]
    # the row of all groups is the rule of the table, group by group
    assert matrix.f1[2] == [rule.groups[name]["f1"] for name in ("<one>", "two")]
    assert [line[i] for i, line in enumerate(result.feature_overlap)] == [1.0, 1.0]
    chosen = [row for row in result.sensitivity if row.chosen]
    assert len(chosen) == 1 and chosen[0].test_f1 == rule.figures["f1"].value
    inside = [feature for feature in result.features if feature.in_rule]
    assert len(inside) == int(result.headline.partition("=")[2]) and result.stability[0].replicates == 3
    assert all(0 <= feature.inclusion <= 1 for feature in result.features)


def test_files_and_page(config, result):
    written = json.loads((config.out / "evaluate.json").read_text())
    assert written == json.loads(json.dumps(plain(result)))
    with open(config.out / "evaluate.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["method"] for line in lines] == [row.method for row in result.rows]
    assert [float(line["f1"]) for line in lines] == [row.figures["f1"].value for row in result.rows]
    assert lines[0]["headline"] == "true" and lines[0]["rule_minus_this_f1"] == ""
    html = page(result)
    assert "<script" not in html and "style=" not in html and "<one>" not in html and "&lt;one&gt;" in html
    assert all(row.method in html for row in result.rows)
    text = render(result)
    assert (config.out / "evaluate.html").read_text() == html
    assert result.verdict in text and all(line in text for line in result.loses)


def test_a_rule_by_its_file_gives_the_same_and_keeps_its_split(config, result, folder):
    given = replace(
        config, rule=config.out / "rule.json", out=folder / "given", preact=False, layers=(0, 2),
        skip=(CHARACTERS, "all SAE features", "efficiency", "transfer"),
    )  # fmt: skip
    found = classify_evaluate.run(given)
    assert found.rows[0].method == "rule (from the file)"
    assert found.rows[0].figures == result.rows[0].figures
    assert row_of(found, "linear probe").figures == row_of(result, "linear probe").figures
    assert "The split is that of rule.split.jsonl." in found.notes
    assert not (given.out / "rule.json").exists()
    layer = int(result.rows[0].layer)
    with pytest.raises(InputError, match=f"has features of layer {layer}, which --layers leaves out"):
        classify_evaluate.run(replace(given, layers=(2 - layer,), sae=(given.sae[layer == 0],)))


def test_several_classes(config, folder):
    several = replace(
        config, texts=(str(folder / "several.jsonl"),), multiclass=True, group_field=None, out=folder / "several",
        preact=False, skip=("efficiency", "all SAE features", CHARACTERS), counts=(1, 2), choice_replicates=2,
    )  # fmt: skip
    found = classify_evaluate.run(several)
    assert found.multiclass and found.classes == ["a", "b", "c"] and found.transfers == []
    for row in found.rows:
        table = np.array(row.confusion)
        assert table.sum() == sum(found.counts["test"].values())
        label = np.repeat(np.repeat(np.arange(3), 3), table.ravel())
        decided = np.repeat(np.tile(np.arange(3), 3), table.ravel())
        if row.method != "random features":  # a mean of draws, of which the first is in the table
            want = f1_score(label, decided, average="macro")
            assert row.figures["macro_f1"].value == pytest.approx(want, abs=1e-12)
    headline = found.per_class[found.headline]
    assert np.mean([headline[name]["f1"] for name in "abc"]) == pytest.approx(found.rows[0].figures["macro_f1"].value)
    assert load_rule(several.out / "rule.json").classes == ("a", "b", "c")
    assert "Confusion" in page(found)


def test_the_rule_that_was_written_is_one_that_predict_takes_as_it_is(config, result, held_out, tmp_path):
    """Model, SAEs and attention sinks are in it; its figures on the test texts are those of the table."""
    texts, positive = held_out
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rule = load_rule(config.out / "rule.json")
    assert set(limits(rule)) == set(rule.layers)
    predicted = ClassifyPredictConfig(config.out / "rule.json", (str(file),), out=tmp_path / "out.jsonl", device="cpu")
    classify_predict.run(predicted)
    said = np.array([json.loads(line)["positive"] for line in (tmp_path / "out.jsonl").read_text().splitlines()])
    assert (said == positive).mean() == pytest.approx(result.rows[0].figures["accuracy"].value, abs=1e-12)


def test_a_rule_is_read_with_its_own_bos_and_precision_whatever_the_options_say(config, result):
    rule = load_rule(config.out / "rule.json")
    rule = replace(rule, source=replace(rule.source, bos=True, precision="bf16", dtype="bfloat16"))
    asked = as_fitted(replace(config, bos=False, precision="exact", dtype="auto"), rule)
    assert (asked.bos, asked.precision, asked.dtype) == (True, "bf16", "bfloat16")
    assert as_fitted(replace(config, dtype="float32"), rule).dtype == "float32"


def test_the_same_run_gives_the_same(config, folder):
    """The second reads nothing anew: its chunks are there."""
    quick = replace(
        config,
        skip=("efficiency", "transfer", "all SAE features", "linear probe", "TF-IDF (words)", CHARACTERS),
        preact=False,
        out=folder / "again",
    )
    first, second = (plain(classify_evaluate.run(quick)) for _ in range(2))
    assert first | {"seconds": 0} == second | {"seconds": 0}


def test_what_is_refused(config, folder, tmp_path):
    with pytest.raises(InputError, match=r"probe.*accepted are efficiency"):
        replace(config, skip=("probe",))
    with pytest.raises(InputError, match="both must be above 0"):
        replace(config, test=0.0)
    with pytest.raises(InputError, match=r"--max-fpr is 1\.5"):
        replace(config, max_fpr=1.5)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="not a classifier evaluation"):
        classify_evaluate.run(replace(config, out=tmp_path))
    with pytest.raises(InputError, match="--multiclass makes every label a class"):
        several = (str(folder / "several.jsonl"),)
        binary = folder / "out" / "rule.json"
        classify_evaluate.run(replace(config, texts=several, group_field=None, multiclass=True, rule=binary))


# --- what is said, for known predictions -------------------------------------------------------------------


def made(rule, probe, label, group=None):
    """Data and entries of two methods that decide as given."""
    size = len(label)
    facts = LabelFacts((), size, 0, 0, 0, 0, 0, 0, 0, None)
    names = ("",) if group is None else ("g", "h")
    of = np.zeros(size, np.int64) if group is None else group
    labelled = Labelled(("",) * size, label, ("no", "yes"), of, names, facts)
    problem = Problem(label, 2, np.arange(size), np.arange(size))
    data = Data(labelled, SimpleNamespace(layers=(1,)), problem, np.arange(size))
    entries = [
        Entry(name, family, (1,), None, Prediction(decided.astype(float), decided, 0.1 + 0.8 * decided), "")
        for name, family, decided in (("rule, K=1", "rule", rule), ("linear probe", "residual", probe))
    ]
    return data, entries


def test_where_the_rule_loses_is_said():
    label = np.arange(200) % 2
    group = np.repeat([0, 1], 100)
    wrong = label.copy()
    wrong[100::4] = 1 - wrong[100::4]  # 25 false positives, all in group h
    data, entries = made(wrong, label, label, group)
    rows, _ = table(data, "rule, K=1", entries, None, 200, 0)
    assert [row.judgement for row in rows] == ["", "rule loses"]
    f1 = 2 * 100 / (2 * 100 + 25)
    assert rows[1].ahead["f1"].value == pytest.approx(f1 - 1, abs=1e-12)
    said = verdict(data, rows)
    assert "the rule loses to it" in said and f"reaches F1 {f1:.3f}" in said
    worse = losses(data, rows)
    assert worse[0].startswith(f"F1: the rule's {f1:.3f} loses to linear probe 1.000")
    assert any("1 of 2" in line and "h 0.800 to 1.000" in line for line in worse)
    data, entries = made(label, wrong, label, group)
    rows, _ = table(data, "rule, K=1", entries, None, 200, 0)
    assert rows[1].judgement == "rule wins" and "the rule beats it" in verdict(data, rows)
    assert losses(data, rows) == ["No baseline is ahead of the rule in F1 or AUROC beyond the 95 % interval"]


def test_draws_of_random_features_are_averaged():
    label = np.arange(40) % 2
    data, entries = made(label, label, label)
    half = np.where(np.arange(40) < 20, label, 1 - label)
    randoms = RandomRules(1, "drawn", tuple(Prediction(d.astype(float), d) for d in (label, 1 - label, half)))
    rows, _ = table(data, "rule, K=1", entries, randoms, 100, 0)
    row = next(row for row in rows if row.method == "random features")
    assert row.figures["f1"].value == pytest.approx((1 + 0 + 0.5) / 3, abs=1e-12)
    assert row.ahead["f1"].value == pytest.approx(0.5, abs=1e-12)
    assert row.layer == "1" and row.detail == "drawn; mean of 3 draws, which lie between 0.000 and 1.000"


def test_a_method_at_one_layer_has_no_line():
    label = np.arange(40) % 2
    data, entries = made(label, label, label)
    assert layer_lines(data, entries, {}, 10, 0) == []


def test_reliability_bins_have_equal_mass_and_equal_probabilities_share_one():
    probability = np.array([0.1, 0.1, 0.1, 0.1, 0.6, 0.7, 0.8, 0.9])
    label = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    found = reliability(Prediction(probability, label, probability), label, np.arange(8), bins=4)
    # four equal ones in the first bin, none in the second
    assert found == [(pytest.approx(0.1), 0.25, 4), (pytest.approx(0.65), 0.5, 2), (pytest.approx(0.85), 1.0, 2)]
    assert reliability(Prediction(probability, label), label, np.arange(8)) == []


@pytest.mark.parametrize(("telling", "other"), [(1, 4), (4, 1)])
def test_the_rule_is_of_the_layer_and_the_feature_that_tell_the_classes_apart(telling, other):
    """Feature 7 of one layer fires in the positive texts alone; test texts, where all is the other way round, do not
    count."""
    label = np.arange(60) % 2
    test = np.arange(48, 60)
    fires = label.copy()
    fires[test] = 1 - label[test]

    def codes(seven):
        acts = np.stack([seven, np.ones(60)], axis=1).astype(np.float32)  # feature 9 fires everywhere
        ids = np.tile(np.array([7, 9], np.int32), (60, 1))
        return pool(acts, ids, np.arange(60), np.ones(60, bool), 60)

    layers = {telling: codes(fires), other: codes(label * (np.arange(60) % 8 < 4))}
    data, _ = made(label, label, label)
    problem = replace(data.problem, train=np.arange(36), calibration=np.arange(36, 48))
    features = SimpleNamespace(layers=(1, 4), codes=lambda layer: layers[layer])
    data = replace(data, features=features, problem=problem, test=test)
    rules = Rules.fit(data, FitSettings(counts=(1, 5)), several=1)
    headline, entries = rules.entries()
    assert headline == "rule, K=1" and rules.left_out == (5,) and rules.top1[telling] == 1.0
    (entry,) = entries
    assert entry.layers == (telling,) and [c.feature for c in entry.rule.clauses] == [7]
    assert set(entry.at_layer) == {1, 4}
    np.testing.assert_array_equal(entry.prediction.decisions, fires)
