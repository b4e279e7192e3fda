"""The whole evaluation on a tiny model: what it writes, that it goes on, its figures against plain PyTorch."""

import contextlib
import json
import re
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

from qscope.detectors import parse
from qscope.errors import InputError, StoreError
from qscope.journal import Journal
from qscope.model import load_model
from qscope.report.steer_eval_page import page
from qscope.report.steer_eval_text import render
from qscope.sae import SAE
from qscope.steering import Edit, SAEReference, SteeringSpec
from qscope.workflows import steer_eval
from qscope.workflows.steer_eval import SteerEvalConfig
from qscope.workflows.steer_eval_arms import Point
from qscope.workflows.steer_eval_baselines import random_directions
from qscope.workflows.steer_eval_measures import Question
from qscope.workflows.steer_eval_runner import Runner

PROMPTS = ["The with statement", "An assignment", "Boolean operations <b>are</b>", "Names refer to"]
FEATURE = 7


@pytest.fixture(scope="module")
def folder(tiny, texts, tmp_path_factory):
    """Spec, prompts, training and neutral texts, questions."""
    root = tmp_path_factory.mktemp("steer-eval")
    spec = SteeringSpec(
        (Edit(layer=2, feature=FEATURE, strength=1.0, unit="residual", scale=0.1),), {2: SAEReference(tiny.saes[2])}
    )
    spec.save(root / "spec.json")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    lines = [line.strip() for text in texts for line in text.splitlines() if len(line) > 60]
    (root / "positive.txt").write_text("\n".join(lines[:6]))
    (root / "negative.txt").write_text("\n".join(lines[6:12]))
    (root / "neutral.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:12]))
    rows = [{"query": "It is", "choices": ["a name", "an object"], "answer": i % 2} for i in range(3)]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def config(tiny, folder):
    return SteerEvalConfig(
        spec=folder / "spec.json",
        prompts=str(folder / "prompts.txt"),
        detector="regex:[a-m]",
        out=folder / "out",
        strengths=(2.0, 0.5),
        positive=str(folder / "positive.txt"),
        negative=str(folder / "negative.txt"),
        instruction=("Write a name.",),
        random_features=1,
        random_directions=1,
        skip=("probe",),
        max_new_tokens=5,
        batch=3,
        text=str(folder / "neutral.jsonl"),
        neutral_texts=10,
        neutral_tokens=16,
        choices=str(folder / "questions.jsonl"),
        draws=50,
        samples=2,
        model=tiny.model,
        dtype="float32",
        device="cpu",
    )


@pytest.fixture(scope="module")
def result(config):
    return steer_eval.run(config)


def points(result, arm):
    return [point for point in result.points if point.arm == arm]


def test_every_arm_runs_on_its_own_grid(result):
    arms = list(dict.fromkeys(point.arm for point in result.points))
    assert arms[:3] == ["unsteered", "spec", "sign-flipped"] and arms[3:5] == ["difference of means", "PCA"]
    assert arms[5].startswith("random feature ") and arms[6:] == ["random direction 1", "prompt only"]
    assert [p.strength for p in points(result, "spec")] == [0.5, 2.0]
    assert [p.strength for p in points(result, "sign-flipped")] == [0.5, 2.0, 3.0]
    assert result.left_out == {"linear probe": "--skip"}
    base = result.points[0]
    assert (base.kl.value, base.ce_increase.value, base.fired) == (0.0, 0.0, 0.0)
    assert all(p.fired > 0 for p in points(result, "spec"))


def test_the_side_effects_of_baselines_meet_those_of_the_spec(result):
    """Found on the first 8 of 10 texts by interpolation, measured on all: within a third."""
    for arm in ("difference of means", "PCA", "random direction 1"):
        mine = points(result, arm)
        assert len(mine) == 3
        for spec, baseline in zip(points(result, "spec"), mine, strict=False):
            assert baseline.kl.value == pytest.approx(spec.kl.value, rel=1 / 3)
    reached = [item for item in result.matched if item.arm in ("difference of means", "PCA", "random direction 1")]
    assert all(item.rate is not None for item in reached)


@pytest.fixture(scope="module")
def neutral(folder, tiny):
    """(model, ids [10, 16] of the neutral texts)."""
    model, tokenizer = load_model(tiny.model, device="cpu", dtype="float32")
    rows = [json.loads(line)["text"] for line in (folder / "neutral.jsonl").read_text().splitlines()]
    ids = [r for text in rows if len(r := tokenizer(text)["input_ids"][:16]) == 16]
    return model, torch.tensor(ids[:10])


def hooked(model, ids, change):
    """Log-probabilities for the second half with `change` added to the output of layer 2."""
    handle = model.model.layers[2].register_forward_hook(lambda m, a, out: out + change)
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits.double().log_softmax(-1)[:, 7:-1]
    finally:
        handle.remove()


def divergences(base, changed):
    return (base.exp() * (base - changed)).sum(-1)


def test_side_effects_are_those_of_a_plain_hook(result, neutral, tiny):
    """The spec adds 0.1 * strength along the unit decoder row, at every token of layer 2; a baseline its size times the
    typical norm along its direction."""
    model, ids = neutral
    row = SAE.from_pretrained(tiny.saes[2]).W_dec[FEATURE].detach()
    base, changed = hooked(model, ids, 0.0), hooked(model, ids, 0.2 * row / row.norm())

    def loss(logp):
        return float(-logp.gather(-1, ids[:, 8:, None]).mean())

    kl = float(divergences(base, changed).mean())
    norm = float(result.about["typical residual norm"].split()[0])
    (drawn,) = random_directions(32, 1, 0)
    found = points(result, "random direction 1")[1]
    random = hooked(model, ids, found.size * norm * torch.tensor(drawn))
    assert found.kl.value == pytest.approx(float(divergences(base, random).mean()), rel=2e-3)  # 4 digits of the norm
    found = points(result, "spec")[1]
    assert found.size == pytest.approx(0.2 / norm, rel=1e-3)
    assert found.kl.value == pytest.approx(kl, rel=2e-4)  # log-softmax in float32 over 4096 words
    assert found.ce_increase.value == pytest.approx(loss(changed) - loss(base), abs=2e-5)
    assert result.points[0].perplexity == pytest.approx(float(torch.tensor(loss(base)).exp()), rel=1e-5)


def test_the_second_half_of_a_neutral_text_counts_as_generated(neutral, tmp_path):
    """Also: the choices of a question do, its query does not."""
    model, ids = neutral
    d = torch.linspace(-1, 1, 32)
    edit = Edit(layer=2, vector=tuple(d.tolist()), strength=0.2, tokens="generated")
    point = Point("planted", 1.0, None, SteeringSpec((edit,)))
    marked = []

    class Marking(Runner):
        @contextlib.contextmanager
        def steered(self, point):
            with super().steered(point) as steering:
                yield steering
                marked.append(steering.fired[..., 0])

    with Journal(tmp_path / "run", {}, "steering evaluation") as journal, tqdm(disable=True) as bar:
        _, tokenizer = load_model(model.name_or_path, device="cpu", dtype="float32")
        question = [Question("It is", ("a name", "an object"), 0)]
        runner = Marking(model, tokenizer, {}, journal, [], ids, question, parse("regex:a"), 1, 1, False, bar)
        _, kl = runner.divergences([point])["planted 1"]
        assert runner.run(point).right in ([True], [False])
    change = torch.cat([torch.zeros(8, 32), (0.2 * d).expand(8, 32)])
    expected = divergences(hooked(model, ids, 0.0), hooked(model, ids, change)).sum(-1)
    assert kl == pytest.approx(expected.tolist(), rel=2e-3, abs=1e-6)
    query = len(tokenizer("It is")["input_ids"])
    assert not marked[-1][:, :query].any() and marked[-1][:, query].all()


def test_target_rates_are_those_of_the_kept_texts(result, config):
    kept = {}
    for line in (config.out / "journal.jsonl").read_text().splitlines():
        piece = json.loads(line)
        if piece["key"][0] == "generation":
            kept.setdefault(piece["key"][1], []).extend(piece["value"]["texts"])
    assert len(kept) == len(result.points)
    for key, point in zip(kept, result.points, strict=True):
        assert len(kept[key]) == len(PROMPTS)
        hits = [bool(re.search("[a-m]", text)) for text in kept[key]]
        assert point.target.value == pytest.approx(sum(hits) / len(hits))


def test_a_run_that_was_stopped_goes_on_and_gives_the_same(result, config, tmp_path, monkeypatch):
    whole = (config.out / "journal.jsonl").read_bytes()
    stopped = replace(config, out=tmp_path / "stopped")
    puts = []
    keep = steer_eval.Journal.put

    def put(self, *key, value):
        if len(puts) == 30:
            raise KeyboardInterrupt
        puts.append(key)
        return keep(self, *key, value=value)

    monkeypatch.setattr(steer_eval.Journal, "put", put)
    with pytest.raises(KeyboardInterrupt):
        steer_eval.run(stopped)
    monkeypatch.undo()
    assert len((stopped.out / "journal.jsonl").read_bytes().splitlines()) == 30
    again = steer_eval.run(stopped)
    assert (stopped.out / "journal.jsonl").read_bytes() == whole
    assert replace(again, out=config.out, page=result.page, cost=result.cost) == result


def test_a_finished_run_is_not_run_again_and_another_detector_reads_the_same_texts(result, config, monkeypatch):
    monkeypatch.setattr("qscope.workflows.steer_eval_runner.generate", None)  # would fail if it were called
    found = steer_eval.run(replace(config, detector="keywords:zzzz"))
    assert all(point.target.value == 0 for point in found.points)
    assert [p.kl for p in found.points] == [p.kl for p in result.points]
    with pytest.raises(StoreError, match="max_new_tokens: 5 -> 6"):
        steer_eval.run(replace(config, max_new_tokens=6))


def test_the_page_is_whole_and_shows_what_was_found(result):
    text = page(result)
    assert text.count("<svg") == 4 and "<script" not in text and "style=" not in text
    assert result.verdict in text
    assert "Boolean operations &lt;b&gt;are&lt;/b&gt;" not in text  # the third prompt, and two samples are shown
    assert "difference of means, " in text and "Write a name." in text
    for tag in ("table", "section", "details", "figure", "svg", "p", "tr"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    shown = render(result)
    assert shown.startswith(result.verdict) and "not run: linear probe (--skip)" in shown
    assert result.page.read_text() == text
    figures = json.loads((result.out / "result.json").read_text())
    assert figures["points"][1]["kl"]["value"] == result.points[1].kl.value


def test_what_cannot_be_evaluated_is_refused(config, folder, tmp_path):
    with pytest.raises(InputError, match="--detector"):
        replace(config, detector=None)
    with pytest.raises(InputError, match="go together"):
        replace(config, negative=None)
    (tmp_path / "prompts.txt").write_text((folder / "positive.txt").read_text())
    with pytest.raises(InputError, match="6 of 6 prompts occur in the training texts"):
        steer_eval.run(replace(config, prompts=str(tmp_path / "prompts.txt"), out=tmp_path / "out"))
    spec = SteeringSpec((Edit(layer=2, feature=FEATURE, mode="ablate"),), SteeringSpec.load(config.spec).saes)
    with pytest.raises(InputError, match="Say --strengths 1"):
        steer_eval.run(replace(config, spec=spec.save(tmp_path / "spec.json"), out=tmp_path / "out"))


def test_a_spec_that_acts_nowhere_is_called_out(config, tmp_path):
    edit = Edit(layer=2, vector=(1.0,) * 32, strength=1.0, tokens="500")
    path = SteeringSpec((edit,)).save(tmp_path / "spec.json")
    arms = ("sign-flipped", "difference", "pca", "probe", "random-direction", "prompt")
    found = steer_eval.run(replace(config, spec=path, out=tmp_path / "out", strengths=(1.0,), skip=arms, questions=0))
    assert "The spec acted on no token of any prompt or answer: check its tokens and conditions." in found.notes
    assert [p.kl.value for p in found.points] == [0.0, 0.0] and found.points[0].accuracy is None
    assert found.left_out["random feature"] == "the spec names no SAE of layer 2"
    assert found.verdict == "There is no arm to compare the spec with." and page(found).count("<svg") == 3
