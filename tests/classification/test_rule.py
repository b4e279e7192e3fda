"""Rules on sparse codes against their definition on dense ones; as files; what they refuse."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope.classification.rule import (
    Choice,
    Clause,
    FeatureRule,
    MulticlassRule,
    OrRule,
    RuleSAE,
    Source,
    largest_firing,
    pooled_values,
)
from qscope.classification.rule_file import from_json, load_rule, save_rule, to_json
from qscope.errors import InputError
from qscope.finding.pooled import pool

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).parents[1] / "finding" / "planted.py")
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

SOURCE = Source(
    model="tiny",
    model_sha256="a" * 64,
    tokenizer_sha256="b" * 64,
    saes=(RuleSAE(3, "c" * 64, planted.F, planted.K), RuleSAE(5, "d" * 64, planted.F, planted.K, "folder")),
    context_size=64,
)


def rule(*clauses, **options):
    return FeatureRule(clauses=clauses, classes=("yes", "no"), source=SOURCE, **options)


def two_layers(seed):
    """(layer -> codes, layer -> dense blocks per text, raw)."""
    acts, indices, text, keep, *_ = planted.codes(seed, texts=12)
    other = planted.codes(seed + 100, texts=12)[:2]
    rows = len(text)
    again = np.resize(other[0], (rows, planted.K)), np.resize(other[1], (rows, planted.K))
    raw = {3: (acts, indices), 5: again}
    codes = {layer: pool(*found, text, keep, 12) for layer, found in raw.items()}
    blocks = {layer: planted.dense(*found, text, keep) for layer, found in raw.items()}
    return codes, blocks, raw, text, keep


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_decisions_are_those_of_the_definition(data):
    codes, blocks, *_ = two_layers(data.draw(st.integers(0, 20)))
    pooling = data.draw(st.sampled_from(["any", "mean", "last"]))
    places = data.draw(
        st.lists(st.tuples(st.sampled_from([3, 5]), st.integers(0, planted.F - 1)), min_size=1, max_size=5, unique=True)
    )
    levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # on the grid of the activations, so ties with them occur
    clauses = [Clause(l, f, data.draw(levels), data.draw(st.sampled_from([0.5, 1.0, 3.0]))) for l, f in places]
    found = rule(*clauses, pooling=pooling)
    how = {"any": lambda b: b.max(), "mean": lambda b: b.mean(), "last": lambda b: b[-1]}[pooling]
    expected, scores = [], []
    for text in range(12):
        values = [how(blocks[c.layer][text][:, c.feature]) for c in clauses]
        expected.append(any(v > c.threshold for v, c in zip(values, clauses, strict=True)))
        scores.append(max(v / c.scale for v, c in zip(values, clauses, strict=True)))
    if pooling != "mean":  # elsewhere the two sums may differ in the last bit, just at a threshold
        np.testing.assert_array_equal(found.decide(codes), expected)
    np.testing.assert_allclose(found.scores(codes), scores, rtol=1e-12)


def test_texts_without_tokens_are_negative():
    codes = pool(np.ones((2, 1), np.float32), np.zeros((2, 1), np.int32), np.array([1, 1]), np.array([True, True]), 3)
    found = rule(Clause(3, 0), Clause(3, 7))
    np.testing.assert_array_equal(found.decide({3: codes}), [False, True, False])
    np.testing.assert_array_equal(found.scores({3: codes}), [0, 1, 0])
    np.testing.assert_array_equal(pooled_values({3: codes}, [(3, 0)], "mean"), [[0], [1], [0]])


@pytest.mark.parametrize("pooling", ["any", "mean", "last"])
def test_evidence_names_the_token(pooling):
    codes, _, raw, text, keep = two_layers(4)
    found = rule(Clause(3, 4, 0.25, 2.0), Clause(5, 9, 0.1, 0.5), Clause(3, 11), pooling=pooling)
    decided, values = found.decide(codes), found.values(codes)
    seen = 0
    for number in range(12):
        rows = np.flatnonzero(text == number)
        acts = found.token_activations({layer: tuple(a[rows] for a in pair) for layer, pair in raw.items()})
        evidence = found.evidence(acts, keep[rows])
        assert bool(evidence) == decided[number]
        order = [item.activation / found.scales[item.clause] for item in evidence]
        assert order == sorted(order, reverse=True)
        for item in evidence:
            seen += 1
            assert item.activation == pytest.approx(values[number, item.clause], rel=1e-12)
            assert item.activation > item.threshold and keep[rows][item.token]
            if pooling == "last":
                assert item.token == np.flatnonzero(keep[rows])[-1]
            else:
                column = np.where(keep[rows], acts[:, item.clause], -1)
                assert item.token == column.argmax()
    assert seen > 5
    assert found.evidence(np.ones((4, 3), np.float32), np.zeros(4, bool)) == []


def test_the_largest_firing_rule_gives_the_class():
    scores = np.array([[5.0, 2.0, 2.0], [5.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0, 3.0, 4.0]])
    fires = np.array([[True, True, True], [False, True, True], [False] * 3, [True, True, False]])
    np.testing.assert_array_equal(largest_firing(scores, fires, 2), [0, 1, 2, 1])


def several():
    rules = tuple(
        FeatureRule(clauses=(Clause(3, f, 0.1, 0.7), Clause(5, f + 1)), classes=(name, "others"), source=SOURCE)
        for f, name in enumerate(("de", "en", "fr"))
    )
    return MulticlassRule(classes=("de", "en", "fr"), rules=rules, majority=1)


def test_a_multiclass_rule_on_codes():
    codes, *_ = two_layers(2)
    found = several()
    scores = np.stack([part.scores(codes) for part in found.rules], axis=1)
    fires = np.stack([part.decide(codes) for part in found.rules], axis=1)
    np.testing.assert_array_equal(found.decide(codes), largest_firing(scores, fires, 1))
    np.testing.assert_array_equal(found.scores(codes), scores)
    assert found.layers == (3, 5) and len(set(found.decide(codes).tolist())) > 1


@settings(max_examples=40, deadline=None)
@given(
    thresholds=st.lists(st.floats(0, 1e6), min_size=1, max_size=4),
    pooling=st.sampled_from(["any", "mean", "last"]),
    membership=st.sampled_from(["topk", "preact"]),
    meaning=st.none() | st.text(max_size=9).filter(lambda t: t.isprintable()),
)
def test_a_file_gives_an_equal_rule(thresholds, pooling, membership, meaning):
    clauses = [Clause(3, i, t, 1 / 3, 0.1 * i, 0.5, None, meaning) for i, t in enumerate(thresholds)]
    chosen = Choice("rate", "top1-diff", "0", {"3": 0.1}, {"f1": 0.3, "auroc": None}, {"fpr": 0.0}, {"K": "2"})
    kept = rule(*clauses, pooling=pooling, membership=membership, chosen=chosen)
    assert from_json(to_json(kept)) == kept


def test_files(tmp_path):
    for kept in (rule(Clause(3, 4, 0.5, meaning="insults — ü")), several()):
        path = save_rule(kept, tmp_path / "rule.json")
        assert load_rule(path) == kept
        assert save_rule(kept, tmp_path / "again.json").read_bytes() == path.read_bytes()
    with pytest.raises(InputError, match="could not be read"):
        load_rule(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "no classification rule"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(kind="tree"), "kind 'tree'"),
        (lambda c: c.pop("rule"), "not whole"),
        (lambda c: c["rule"].pop("source"), "source: Field required"),
        (lambda c: c["rule"].update(extra=1), "extra"),
        (lambda c: c["rule"]["clauses"][0].update(threshold="0.5"), r"clauses.0.threshold"),
        (lambda c: c["rule"]["clauses"][0].update(feature=planted.F), "features 0 to 39"),
        (lambda c: c["rule"]["clauses"][0].update(layer=4), "layer 4"),
        (lambda c: c["rule"]["clauses"][0].update(threshold=-1), "threshold -1"),
        (lambda c: c["rule"]["clauses"][0].update(scale=0), "scale"),
        (lambda c: c["rule"].update(clauses=[]), "at least one feature"),
        (lambda c: c["rule"]["clauses"].append(c["rule"]["clauses"][0]), "every feature once"),
        (lambda c: c["rule"].update(pooling="max"), "pooling"),
    ],
)
def test_damaged_files_are_refused(change, message):
    content = json.loads(to_json(rule(Clause(3, 4, 0.5))))
    change(content)
    with pytest.raises(InputError, match=message):
        from_json(json.dumps(content))
    for text in ("", "[1]", "{", '{"format": "qscope-rule", "version": 1, "kind": [], "rule": {}}', "[" * 100_000):
        with pytest.raises(InputError):
            from_json(text)


def test_infinite_numbers_are_refused():
    text = to_json(rule(Clause(3, 4, 0.5)))
    for bad in ("NaN", "Infinity", "1e999"):
        with pytest.raises(InputError):
            from_json(text.replace("0.5", bad))


def test_another_model_sae_or_membership_is_refused():
    found = rule(Clause(3, 4))
    found.source.check_model("tiny", "a" * 64, "b" * 64)
    found.source.check_sae(5, "d" * 64)
    with pytest.raises(InputError, match=r"the model of tiny \(sha256 aaaaaaaaaaaa\), and big has another"):
        found.source.check_model("big", "f" * 64, "b" * 64)
    with pytest.raises(InputError, match="the tokenizer of tiny"):
        found.source.check_model("big", "a" * 64, "f" * 64)
    with pytest.raises(InputError, match="the SAE folder for layer 5"):
        found.source.check_sae(5, "f" * 64)
    codes, *_ = two_layers(0)
    with pytest.raises(InputError, match="thresholds hold for the membership 'topk'"):
        found.decide(codes, "preact")
    with pytest.raises(InputError, match="thresholds hold for the membership 'preact'"):
        replace(found, membership="preact").decide(codes)
    with pytest.raises(InputError, match="needs layer 3"):
        found.decide({5: codes[5]})
    with pytest.raises(InputError, match="different memberships"):
        several_of = several()
        replace(several_of, rules=(replace(several_of.rules[0], membership="preact"), *several_of.rules[1:]))


def test_thresholds_and_meanings_are_replaced():
    plain = OrRule((Clause(3, 4), Clause(5, 1)))
    found = plain.with_thresholds([0.5, 0.25], [2.0, 4.0]).with_meanings({(5, 1): "law"})
    assert found.clauses == (Clause(3, 4, 0.5, 2.0), Clause(5, 1, 0.25, 4.0, meaning="law"))
    assert type(rule(Clause(3, 4)).with_meanings({})) is FeatureRule
