"""`qscope classify predict`, `stream` and `serve-check` on a tiny model, against plain runs text by text."""

import io
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope.classification import FeatureRule, MulticlassRule, RuleModule, load_rule, save_rule
from qscope.classification.rule import Choice, Clause, RuleSAE, Source
from qscope.errors import InputError, StoreError
from qscope.model import capture, load_model, model_hash, tokenizer_hash
from qscope.report import classify_predict_text
from qscope.sae import SAE
from qscope.workflows import classify_output, classify_predict, classify_read
from qscope.workflows.classify_predict import ClassifyPredictConfig, run
from qscope.workflows.classify_rules import LIMIT
from qscope.workflows.classify_serve_check import ClassifyServeCheckConfig
from qscope.workflows.classify_serve_check import run as serve_check
from qscope.workflows.classify_stream import ClassifyStreamConfig
from qscope.workflows.classify_stream import run as stream

CONTEXT = 12


@pytest.fixture(scope="session")
def world(tiny, texts):
    """The model run plainly: ids and, by membership and layer, the activations [S, F] of every text."""
    model, tokenizer = load_model(tiny.model, device="cpu", dtype="float32")
    saes = {layer: SAE.from_pretrained(path) for layer, path in tiny.saes.items()}
    words = " ".join(texts).split()
    given = [" ".join(words[9 * i : 9 * i + 3 + i % 9]) for i in range(40)] + ["", "a", words[5]]
    acts = {name: [] for name in ("topk", "preact")}
    ids = []
    for text in given:
        found = tokenizer(text, add_special_tokens=False).input_ids
        ids.append(found)
        row = {name: {layer: np.zeros((0, 512)) for layer in saes} for name in acts}
        if found:
            with capture(model, saes) as residual:
                model(torch.tensor([found[:CONTEXT]]))
            for layer, sae in saes.items():
                x = residual[layer][0]
                values, indices = sae.encode_topk(x)
                row["topk"][layer] = torch.zeros(len(x), 512).scatter_(1, indices.long(), values).numpy()
                row["preact"][layer] = (x.double() @ sae.W_enc.double().T + sae.b_enc.double()).relu().float().numpy()
        for name in acts:
            acts[name].append(row[name])
    source = Source(
        model=tiny.model, model_sha256=model_hash(tiny.model), tokenizer_sha256=tokenizer_hash(tokenizer),
        saes=tuple(RuleSAE(layer, sae.weight_hash(), 512, 8, tiny.saes[layer]) for layer, sae in saes.items()),
        context_size=CONTEXT,
    )  # fmt: skip
    return given, ids, acts, source, tokenizer


def make_rule(world, membership, share=0.4, classes=("yes", "no"), first=0, layers=(0, 2), **changes):
    """Features that fire in some texts only, thresholds between the texts' activations."""
    _, _, acts, source, _ = world
    clauses = []
    for layer in layers:
        largest = np.stack([row[layer][1:].max(0, initial=0.0) for row in acts[membership]])
        frequent = np.argsort(-(largest > 0).sum(0), kind="stable")[first : first + 2]
        for feature in frequent.tolist():
            ordered = np.unique(largest[:, feature])
            place = int(share * (len(ordered) - 1))
            clauses.append(Clause(layer, feature, float(ordered[place : place + 2].mean()), scale=float(ordered[-1])))
    chosen = Choice("rate", "given", "given", details={f"{LIMIT}{layer}": "1e6" for layer in layers})
    return FeatureRule(tuple(clauses), membership=membership, classes=classes, source=source, chosen=chosen, **changes)


@pytest.fixture
def setting(world, tmp_path):
    given = world[0]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": f"t{i}"}) + "\n" for i, text in enumerate(given)))

    def make(rule, **changes):
        save_rule(rule, tmp_path / "rule.json")
        options = dict(rule=tmp_path / "rule.json", texts=(str(file),), out=tmp_path / "out.jsonl", batch_tokens=48)
        return ClassifyPredictConfig(**options | changes)

    return make


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("membership", ["topk", "preact"])
def test_decisions_scores_and_evidence_are_those_of_a_plain_run(world, setting, membership):
    given, ids, acts, _, tokenizer = world
    rule = make_rule(world, membership)
    result = run(setting(rule, copy=("id",), evidence="all"))
    rows = lines(result.out)
    assert [row["id"] for row in rows] == [f"t{i}" for i in range(len(given))]
    yes = 0
    for i, row in enumerate(rows):
        tokens = acts[membership][i]
        values = np.array([tokens[c.layer][1:, c.feature].max(initial=0.0) for c in rule.clauses])
        yes += bool((values > rule.thresholds).any())
        assert row["positive"] == bool((values > rule.thresholds).any())
        assert row["class"] == ("yes" if row["positive"] else "no")
        assert row["score"] == pytest.approx((values / rule.scales).max(), rel=1e-4)
        assert row["tokens"] == max(0, min(len(ids[i]), CONTEXT) - 1)
        assert row["truncated"] == (len(ids[i]) > CONTEXT)
        order = np.argsort(-values / rule.scales, kind="stable")
        assert [e["activation"] for e in row["evidence"]] == pytest.approx(values[order], rel=1e-4, abs=1e-6)
        for shown, place in zip(row["evidence"], order, strict=True):
            clause = rule.clauses[place]
            assert (shown["layer"], shown["feature"]) == (clause.layer, clause.feature)
            assert shown["fires"] == (values[place] > clause.threshold)
            if values[place] > 0:
                at = shown["position"]
                assert tokens[clause.layer][at, clause.feature] == pytest.approx(values[place], rel=1e-4)
                assert at > 0 and shown["token"] == tokenizer.decode([ids[i][at]])
            else:
                assert "position" not in shown
    assert 0 < yes < len(given) and result.decided == {"no": len(given) - yes, "yes": yes}
    assert result.empty == sum(len(i) <= 1 for i in ids) and result.truncated == sum(len(i) > CONTEXT for i in ids)
    assert ("not TopK membership" in " ".join(result.notes)) == (membership == "preact")
    assert f"{len(given)} texts" in classify_predict_text.render(result)


def test_only_the_features_that_fire_are_evidence_unless_asked(world, setting):
    rule = make_rule(world, "topk")
    rows = lines(run(setting(rule)).out)
    assert all(bool(row["evidence"]) == row["positive"] and all(e["fires"] for e in row["evidence"]) for row in rows)
    assert "evidence" not in lines(run(setting(rule, evidence="none", out=Path("none.jsonl"))).out)[0]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_other_poolings(world, setting, pooling):
    _, ids, acts, _, _ = world
    rule = make_rule(world, "preact", share=0.3, pooling=pooling)
    for i, row in enumerate(lines(run(setting(rule, evidence="all")).out)):
        kept = [acts["preact"][i][c.layer][1:, c.feature] for c in rule.clauses]
        values = np.array([(x.mean() if pooling == "mean" else x[-1]) if len(x) else 0.0 for x in kept])
        assert row["score"] == pytest.approx((values / rule.scales).max(), rel=1e-4, abs=1e-6)
        assert row["positive"] == bool((values > rule.thresholds).any())
        if pooling == "last" and row["evidence"] and len(ids[i]) > 1:
            assert row["evidence"][0]["position"] == min(len(ids[i]), CONTEXT) - 1


def test_several_classes_take_the_largest_score_of_those_that_fire(world, setting):
    _, _, acts, _, _ = world
    parts = tuple(make_rule(world, "topk", classes=(n, f"not {n}"), first=2 * i) for i, n in enumerate("abc"))
    rule = MulticlassRule(rules=parts, majority=1, classes=("a", "b", "c"))
    result = run(setting(rule))
    for i, row in enumerate(lines(result.out)):
        values = [
            np.array([acts["topk"][i][c.layer][1:, c.feature].max(initial=0.0) for c in part.clauses]) for part in parts
        ]
        scores = [(v / part.scales).max() for v, part in zip(values, parts, strict=True)]
        fired = [n for n, (v, part) in enumerate(zip(values, parts, strict=True)) if (v > part.thresholds).any()]
        best = max(fired, key=lambda n: (scores[n], -n)) if fired else 1
        assert row["class"] == "abc"[best] and list(row["scores"].values()) == pytest.approx(scores, rel=1e-4)
    assert len([name for name, count in result.decided.items() if count]) > 1


def test_texts_cut_on_the_left_keep_the_positions_of_the_whole_text(world, setting):
    given, ids, _, source, tokenizer = world
    rule = replace(make_rule(world, "topk"), source=replace(source, context_size=5, truncate="left"))
    seen = 0
    for i, row in enumerate(lines(run(setting(rule, evidence="all")).out)):
        for shown in row["evidence"]:
            if "position" in shown:
                assert shown["token"] == tokenizer.decode([ids[i][shown["position"]]])
                assert shown["position"] > len(ids[i]) - 5
                seen += 1
    assert seen and given


def test_a_killed_run_goes_on_and_gives_the_same_bytes(world, setting, monkeypatch, tmp_path):
    monkeypatch.setattr(classify_read, "BLOCK_TOKENS", 60)
    whole = setting(make_rule(world, "topk"), out=tmp_path / "whole.jsonl")
    run(whole)
    killed = replace(whole, out=tmp_path / "killed.jsonl")
    put, done = classify_output.BlockFile.put, []

    def twice(self, rows):
        if len(done) == 2:
            with open(self.part, "ab") as file:
                file.write(b"".join(classify_output.line(row) for row in rows[:-1]) + b'{"row": 99, "cla')
            raise KeyboardInterrupt
        done.append(len(rows))
        put(self, rows)

    monkeypatch.setattr(classify_output.BlockFile, "put", twice)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    assert not killed.out.exists() and (tmp_path / "killed.jsonl.part").exists()
    monkeypatch.setattr(classify_output.BlockFile, "put", put)
    with pytest.raises(StoreError, match="evidence"):
        run(replace(killed, evidence="none"))
    result = run(killed)
    assert result.resumed == sum(done) and killed.out.read_bytes() == whole.out.read_bytes()
    assert not list(tmp_path.glob("killed.jsonl.*"))
    assert result.decided == {"no": result.texts - result.decided["yes"], "yes": result.decided["yes"]}
    with pytest.raises(InputError, match="exists already"):
        run(killed)


def test_a_rule_refuses_other_memberships_models_and_saes(world, setting, tiny, tmp_path):
    rule = make_rule(world, "topk")
    with pytest.raises(InputError, match="'topk', and 'preact' was asked for"):
        run(setting(rule, membership="preact"))
    with pytest.raises(InputError, match="fit a rule for this one"):
        run(setting(rule, sae=(tiny.saes[2], tiny.saes[2])))
    other = replace(rule, source=replace(rule.source, model_sha256="0" * 64))
    with pytest.raises(InputError, match=r"fitted with the model .* Give that model with --model"):
        run(setting(other))
    with pytest.raises(InputError, match=r"no field 'name'. Its fields: text, id"):
        run(setting(rule, copy=("name",)))
    with pytest.raises(InputError, match="no classification rule"):
        run(replace(setting(rule), rule=Path(tiny.model) / "config.json"))
    assert not (tmp_path / "out.jsonl").exists()


def test_attention_sinks_beyond_the_rule_s_limit_do_not_count(world, setting):
    rule = make_rule(world, "topk")
    small = replace(rule, chosen=replace(rule.chosen, details={f"{LIMIT}0": "1e-6"}))
    rows = lines(run(setting(small)).out)
    assert all(row["tokens"] == 0 and row["score"] == 0 and not row["positive"] for row in rows)


# --- stream ----------------------------------------------------------------------------------------------


def test_stream_says_what_predict_says_and_marks_broken_lines(world, setting, tmp_path, capsys):
    given = world[0]
    config = setting(make_rule(world, "preact"))
    run(config)
    expected = lines(config.out)
    raw = [json.dumps({"text": text, "id": i}).encode() for i, text in enumerate(given)]
    broken = [b"{no", b"[1]", b'{"body": "x"}']
    out = io.BytesIO()
    found = stream(
        ClassifyStreamConfig(rule=config.rule, format="jsonl", copy=("id",), batch_lines=5),
        io.BytesIO(b"\n".join([*broken, *raw]) + b"\n"),
        out,
    )
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(given) + 4))
    assert "not JSON" in rows[0]["error"] and "object" in rows[1]["error"] and "its fields: body" in rows[2]["error"]
    for row, other in zip(rows[3:], expected, strict=True):
        assert row["class"] == other["class"] and row["score"] == pytest.approx(other["score"], rel=1e-4)
    assert (found.failed, found.exit_status, found.texts) == (3, 2, len(given))
    assert capsys.readouterr().err.count("not TopK membership") == 1


def test_stream_answers_each_line_before_the_next_comes(world, setting):
    config = setting(make_rule(world, "topk"))
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    with os.fdopen(read_in, "rb") as source, os.fdopen(write_out, "wb") as target:
        options = ClassifyStreamConfig(rule=config.rule)
        worker = threading.Thread(target=stream, args=(options, source, target), daemon=True)
        worker.start()
        answers = os.fdopen(read_out, "rb")
        for number in (1, 2):
            os.write(write_in, b"while the loop runs\n")
            assert json.loads(answers.readline())["line"] == number  # would wait for ever if nothing were flushed
        os.close(write_in)
        worker.join(30)
        assert not worker.is_alive()
    answers.close()


# --- serving ---------------------------------------------------------------------------------------------


def test_serve_check_exports_a_rule_that_decides_as_predict_does(world, setting, tmp_path):
    config = setting(make_rule(world, "preact"))
    check = ClassifyServeCheckConfig(
        rule=config.rule, texts=config.texts, rounds=2, export=tmp_path / "rule.safetensors", batch_tokens=48
    )
    result = serve_check(check)
    assert result.texts == sum(len(i) > 0 for i in world[1]) == result.agreeing and result.deepest == 2
    assert result.model_tokens_per_second > 0 and result.exported_bytes < 4000
    module = RuleModule.load(tmp_path / "rule.safetensors")
    assert module.weight.shape == (4, 32) and module.rule == load_rule(config.rule)
    assert f"agree on {result.texts}" in classify_predict_text.render_check(result)
    assert replace(result, cost=0.2).exit_status == 1 and replace(result, cost=0.0).exit_status == 0


def test_serve_check_refuses_topk_membership(world, setting):
    config = setting(make_rule(world, "topk"))
    with pytest.raises(InputError, match="'topk', and 'preact' was asked for"):
        serve_check(ClassifyServeCheckConfig(rule=config.rule, texts=config.texts))


def test_copied_fields_are_plain_json():
    assert classify_predict.plain({"a": float("nan"), "b": Path("x")}) == {"a": None, "b": "x"}


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({f"{LIMIT}0": "many"}, "a layer and a number above 0"),
        ({f"{LIMIT}0": "nan"}, "a layer and a number above 0"),
        ({f"{LIMIT}x": "3.0"}, "a layer and a number above 0"),
    ],
)
def test_a_rule_with_a_damaged_norm_limit_is_refused(world, setting, details, message):
    rule = make_rule(world, "topk")
    with pytest.raises(InputError, match=message):
        run(setting(replace(rule, chosen=replace(rule.chosen, details=details))))


def test_a_rule_for_a_larger_sae_than_its_hash_is_refused(world, setting):
    rule = make_rule(world, "topk")
    source = replace(rule.source, saes=tuple(replace(sae, d_sae=1000) for sae in rule.source.saes))
    clauses = (replace(rule.clauses[0], feature=600), *rule.clauses[1:])
    with pytest.raises(InputError, match="has 1000 features of which 8 are active, and it has 512 and 8"):
        run(setting(replace(rule, clauses=clauses, source=source)))


def test_layers_may_differ_in_k(world, setting, tmp_path):
    """Each SAE's card says its own; one number for all was refused."""
    rule = make_rule(world, "topk")
    few = SAE.from_pretrained(rule.source.sae(0).source)
    few.k = 4
    few.save(tmp_path / "k4")
    changed = RuleSAE(0, few.weight_hash(), 512, 4, str(tmp_path / "k4"))
    rule = replace(rule, source=replace(rule.source, saes=(changed, rule.source.sae(2))))
    assert run(setting(rule)).texts == len(world[0])


def test_classes_of_one_name_are_refused(world):
    with pytest.raises(InputError, match="each needs a name of its own"):
        make_rule(world, "topk", classes=("a", "a"))


def test_fields_of_the_output_are_not_overwritten_by_copies(tmp_path):
    for name in ("line", "class", "error"):
        with pytest.raises(InputError, match=f"--copy {name} has the name of a field"):
            ClassifyStreamConfig(tmp_path / "rule.json", format="jsonl", copy=(name,))
