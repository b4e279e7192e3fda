"""`qscope classify fit` on a tiny model: the rule against plain runs text by text, the split, the page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope.classification import FeatureRule, MulticlassRule, load_rule
from qscope.cli import to_json
from qscope.errors import InputError
from qscope.model import capture, load_model
from qscope.report import classify_fit_page, classify_fit_text
from qscope.sae import SAE
from qscope.workflows import classify_fit
from qscope.workflows.classify_fit import ClassifyFitConfig, run
from qscope.workflows.classify_inputs import text_hash
from qscope.workflows.classify_rules import LIMIT
from qscope.workflows.classify_split import read_parts, split_of, split_path

CONTEXT = 16


def pieces(texts, count):
    """So many different pieces of real text."""
    words = " ".join(texts).split()
    return [" ".join(words[20 * i : 20 * i + 8]) for i in range(count)]


@pytest.fixture(scope="session")
def labelled(texts, tmp_path_factory) -> Path:
    """120 texts, of which every other one speaks of a class, with three topics."""
    path = tmp_path_factory.mktemp("labelled") / "texts.jsonl"
    marks = [" class definition", " import statement", " while loop"]
    rows = []
    for i, piece in enumerate(pieces(texts, 120)):
        said = piece.split(" ", 4)
        middle = marks[0] if i % 2 else marks[1 + (i // 2) % 2]
        rows.append({"text": " ".join(said[:4]) + middle + " " + said[4], "label": i % 2, "topic": middle.split()[0]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tiny, labelled, tmp_path) -> ClassifyFitConfig:
    return ClassifyFitConfig(
        texts=(str(labelled),), model=tiny.model, sae=tuple(tiny.saes.values()), context_size=CONTEXT,
        dtype="float32", batch_tokens=64, rule=tmp_path / "rule.json",
    )  # fmt: skip


def plainly(tiny, texts, preact=False):
    """Layer -> [T, F] largest activation over the tokens behind the first, one text at a time."""
    model, tokenizer = load_model(tiny.model, device="cpu", dtype="float32")
    saes = {layer: SAE.from_pretrained(path) for layer, path in tiny.saes.items()}
    found = {layer: np.zeros((len(texts), sae.d_sae)) for layer, sae in saes.items()}
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :CONTEXT]
        with capture(model, saes) as residual:
            model(ids)
        for layer, sae in saes.items():
            x = residual[layer][0, 1:]
            if preact:
                acts = (x.double() @ sae.W_enc.double().T + sae.b_enc.double()).relu()
            else:
                values, indices = sae.encode_topk(x)
                acts = torch.zeros(len(x), sae.d_sae).scatter_(1, indices.long(), values)
            found[layer][i] = acts.max(0).values.numpy()
    return found


def read(labelled):
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    return [row["text"] for row in rows], np.array([row["label"] for row in rows])


def test_the_rule_is_what_a_plain_run_finds_and_test_texts_are_never_read(
    tiny, labelled, config, tmp_path, monkeypatch
):
    given = []
    plain_tokenize = classify_fit.tokenize_texts
    monkeypatch.setattr(
        classify_fit, "tokenize_texts", lambda t, texts, *rest: given.extend(texts) or plain_tokenize(t, texts, *rest)
    )
    result = run(config)
    rule = load_rule(config.rule)
    assert isinstance(rule, FeatureRule) and rule.classes == ("1", "0")
    texts, label = read(labelled)
    parts = read_parts(split_path(config.rule))
    split = split_of(texts, parts)
    assert [int(p.sum()) for p in (split.train, split.calibration, split.test)] == [72, 24, 24]
    assert not {text_hash(text) for text in given} & {key for key, part in parts.items() if part == "test"}
    assert len(given) == 96
    assert result.counts == {
        "train": {"0": 36, "1": 36}, "calibration": {"0": 12, "1": 12}, "test": {"0": 12, "1": 12}
    }  # fmt: skip

    acts = plainly(tiny, texts)
    difference = {
        layer: (a[split.train & (label == 1)] > 0).mean(0) - (a[split.train & (label == 0)] > 0).mean(0)
        for layer, a in acts.items()
    }
    top1 = {layer: d.max() for layer, d in difference.items()}
    best = max(top1, key=lambda layer: (top1[layer], -layer))
    assert rule.layers == (best,)
    assert rule.chosen.top1_difference == pytest.approx({str(layer): value for layer, value in top1.items()}, abs=1e-12)
    for clause in rule.clauses:
        own, other = ((acts[best][split.train & (label == y), clause.feature] > 0).mean() for y in (1, 0))
        assert (clause.rate_positive, clause.rate_negative) == (pytest.approx(own), pytest.approx(other))
        assert clause.score == pytest.approx(difference[best][clause.feature], abs=1e-12)
        assert clause.threshold == 0 and clause.meaning.startswith("strongest at")
    ids = [clause.feature for clause in rule.clauses]
    ranked = np.sort(difference[best])[::-1]
    assert [difference[best][i] for i in ids] == pytest.approx(ranked[: len(ids)], abs=1e-12)

    decided = (acts[best][:, ids] > 0).any(axis=1)
    held = split.calibration
    tp, fp = int((decided & held & (label == 1)).sum()), int((decided & held & (label == 0)).sum())
    assert rule.chosen.calibration["f1"] == pytest.approx(2 * tp / (tp + fp + 12), abs=1e-12)
    assert rule.chosen.calibration["false_positive_rate"] == pytest.approx(fp / 12, abs=1e-12)
    others = [line for line in result.sensitivity if line.layers == str(best) and line.threshold == "0"]
    at_any = [line for line in others if line.pooling == "any"]
    assert sorted(line.k for line in at_any) == [1, 2, 5, 10] and sum(line.chosen for line in result.sensitivity) == 1
    assert max(line.calibration["f1"] for line in at_any) == pytest.approx(rule.chosen.calibration["f1"])


def test_contexts_are_the_strongest_tokens_of_training_texts_of_the_class(tiny, labelled, config):
    result = run(replace(config, counts=(1,), sensitivity=False))
    texts, label = read(labelled)
    split, (clause,) = split_of(texts, read_parts(split_path(config.rule))), result.clauses
    values = plainly(tiny, texts)[clause.layer][:, clause.feature]
    expected = np.sort(values[split.train & (label == 1)])[::-1][:3]
    assert [context.activation for context in clause.contexts] == pytest.approx(expected, rel=1e-4)
    for context in clause.contexts:
        assert any(context.before + context.token in text for text in np.array(texts)[split.train & (label == 1)])
    assert len(clause.lens) == 10 and result.sensitivity == ()


@pytest.mark.parametrize("membership", ["topk", "preact"])
def test_thresholds_hold_the_rate_on_the_calibration_negatives(tiny, labelled, config, membership):
    run(replace(config, max_fpr=0.1, membership=membership, sensitivity=False, counts=(1, 5)))
    rule = load_rule(config.rule)
    assert rule.membership == membership
    texts, label = read(labelled)
    split = split_of(texts, read_parts(split_path(config.rule)))
    acts = plainly(tiny, texts, preact=membership == "preact")[rule.layers[0]]
    values = acts[:, [clause.feature for clause in rule.clauses]].astype(np.float32)
    negatives = values[split.calibration & (label == 0)]
    decided = (values > rule.thresholds * (1 + 1e-5)).any(axis=1)  # sums in another order move the last digits
    assert decided[split.calibration & (label == 0)].mean() <= 0.1
    assert rule.chosen.calibration["fpr"] <= 0.1
    assert any(np.isclose(negatives[:, i], t, rtol=1e-4).any() or t == 0 for i, t in enumerate(rule.thresholds))
    for clause, column in zip(rule.clauses, values.T, strict=True):
        assert clause.rate_positive == pytest.approx((column[split.train & (label == 1)] > 0).mean())


def test_a_second_run_finds_the_cache_and_gives_the_same_bytes(config, tmp_path):
    cached = replace(config, cache=tmp_path / "cache")
    run(cached)
    first = config.rule.read_bytes(), split_path(config.rule).read_bytes()
    assert list((tmp_path / "cache").glob("*.safetensors"))
    run(cached)
    assert (config.rule.read_bytes(), split_path(config.rule).read_bytes()) == first
    details = load_rule(config.rule).chosen.details
    assert float(details[f"{LIMIT}{load_rule(config.rule).layers[0]}"]) > 0 and "seed 0" in details["split"]


def test_several_classes_have_a_rule_each(labelled, config):
    result = run(replace(config, label_field="topic", multiclass=True, counts=(1, 2)))
    rule = load_rule(config.rule)
    assert isinstance(rule, MulticlassRule) and rule.classes == ("class", "import", "while") == result.classes
    assert [part.classes for part in rule.rules] == [(name, f"not {name}") for name in rule.classes]
    assert rule.majority == 0 and {clause.of for clause in result.clauses} == set(rule.classes)
    assert result.sensitivity[0].chosen and result.sensitivity[0].calibration["accuracy"] > 0.5
    assert "while" in classify_fit_text.render(result) and "while" in classify_fit_page.page(result)


def test_multi_layer_takes_one_feature_of_each(config):
    result = run(replace(config, multi_layer=2))
    assert load_rule(config.rule).layers == (0, 2) and [c.layer for c in result.clauses].count(0) == 1
    assert [line.layers for line in result.sensitivity if line.chosen] in (["0 2"], ["2 0"])


def test_the_page_and_the_json_hold_the_rule(config, tmp_path):
    config = replace(config, html=tmp_path / "fit.html", out=tmp_path / "fit.json")
    result = run(config)
    text = classify_fit_text.render(result)
    page = (tmp_path / "fit.html").read_text()
    assert "<script" not in page and "http" not in page.split("</style>")[1]
    for clause in result.clauses:
        assert f"{clause.layer}:{clause.feature}" in page and str(clause.feature) in text
    assert json.loads((tmp_path / "fit.json").read_text()) == to_json(result)
    assert "<b>" not in classify_fit_page.page(replace(result, notes=("<b>x",)))


def test_what_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="--max-fpr"):
        replace(config, membership="preact")
    with pytest.raises(InputError, match=r"--calibration is nan"):
        replace(config, calibration=float("nan"))
    with pytest.raises(InputError, match=r"--calibration is 0.5"):
        replace(config, calibration=0.5, test=0.5)
    with pytest.raises(InputError, match="--multi-layer"):
        replace(config, multi_layer=2, layer=0)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in range(4)))
    with pytest.raises(InputError, match="at least 2 are needed"):
        run(replace(config, texts=(str(few),)))
    with pytest.raises(InputError, match="K=500 was asked for"):
        run(replace(config, count=500, sensitivity=False))
    notes = run(replace(config, counts=(1, 500), sensitivity=False)).notes
    assert any(note.startswith("K=500 not tried: layer ") for note in notes)
