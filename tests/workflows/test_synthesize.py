"""`qscope synthesize` on a tiny model: planted fakes are rejected, runs go on, figures are those of a recount."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope.cli import to_json
from qscope.data import Piece, tokenize
from qscope.errors import InputError, StoreError
from qscope.model import load_model, residuals
from qscope.report import synthesize_page, synthesize_text
from qscope.sae import SAE
from qscope.workflows import synthesize
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import load_encoder
from qscope.workflows.synthesize import SynthesizeConfig
from qscope.workflows.synthesize_downstream import SEED, Labels, downstream

CONTEXT = 24
WRITER = '''
"""Sources for the tests: what they write depends on the prompt and the target alone."""
import os, signal

calls = 0

def honest(prompt, target):
    """A passage of the target that goes on; of every third call nothing, of every fifth the passage as it is."""
    global calls
    calls += 1
    if target is None:
        return "Ordinary words number %d of nobody" % calls
    if os.environ.get("PLANTED_KILL") == str(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    if len(prompt) % 11 == 0:
        return ""
    passage = prompt.split("- ")[1].split("\\n")[0]
    if len(prompt) % 7 == 0:
        return passage + " " + prompt[-1]
    return passage + " and then " + " ".join(reversed(prompt.split()[-6:])) + str(len(prompt))

def fake(prompt, target):
    return FAKE

def asked(prompt, target):
    """What each role wants: a refusal, a rewritten text, an example."""
    if prompt.startswith("Somebody wrote"):
        return "No, and here is why."
    if prompt.startswith("Rewrite"):
        tale = " ".join("tale%d%s" % (len(prompt), c) for c in "abcdefghijklmn")
        return prompt.split("Text: ")[1].split("\\n")[0] + " " + tale
    return honest(prompt, target)

def stop(prompt, target):
    raise KeyboardInterrupt
'''


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def strongest(model, tokenizer, sae, layer, text):
    """[F] largest activation over the tokens but the first, one text alone: by the plain pieces."""
    ids = tokenize(tokenizer, [Piece(0, text)], 1 << 40, (-1, 0)).token[:CONTEXT].astype(np.int64)
    if len(ids) < 2:
        return torch.zeros(sae.d_sae)
    x = residuals(model, torch.from_numpy(ids)[None], (layer,))[layer][0, 1:]
    acts, indices = sae.encode_topk(x)
    found = torch.zeros(len(x), sae.d_sae).scatter_(1, indices.long(), acts.float().clamp_min(0))
    return found.max(0).values


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny, texts):
    """Seed and pool of documentation; targets that some of the pool fires: 6 that no seed text does, and 2 that do."""
    root = tmp_path_factory.mktemp("synthesize")
    pieces = [" ".join(text.split())[40 * (i % 3) :][:60].strip() for i, text in enumerate(texts[:60])]
    seed, pool = pieces[:6], pieces[6:46]
    model, tokenizer = load_model(tiny.model, device="cpu", dtype="float32")
    sae = SAE.from_pretrained(tiny.saes[2])
    values = {
        name: torch.stack([strongest(model, tokenizer, sae, 2, text) for text in part])
        for name, part in (("seed", seed), ("pool", pool))
    }
    here, there = ((values[name] > 0).sum(0) for name in ("seed", "pool"))
    lacking = ((here == 0) & (there >= 3)).nonzero().flatten().tolist()[:6]
    known = (here >= 2).nonzero().flatten().tolist()[:2]
    assert len(lacking) == 6 and len(known) == 2
    words = (word for text in texts[60:] for word in text.split() if len(word) > 6)
    fake = next(w for w in words if not strongest(model, tokenizer, sae, 2, f"plain {w} text")[lacking + known].any())
    (root / "planted_writer.py").write_text(f"{WRITER}\nFAKE = 'plain {fake} text'\n")
    config = SynthesizeConfig(
        (lines(root / "seed.jsonl", seed),), out=root / "out", features=tuple(f"2:{f}" for f in lacking + known),
        pool=(lines(root / "pool.jsonl", pool),),
        sources=("python:planted_writer:honest", "python:planted_writer:fake"),
        model=tiny.model, sae=(tiny.saes[2],), context_size=CONTEXT, dtype="float32", device="cpu", budget=12,
        batch=5, support=3, retries=6, label="odd", same_features=0.95,
    )  # fmt: skip
    sys.path.insert(0, str(root))
    yield root, config, (model, tokenizer, sae), values
    sys.path.remove(str(root))


def fresh(config, folder):
    """A run from the start: the writer counts its calls."""
    sys.modules.pop("planted_writer", None)
    return synthesize.run(replace(config, out=folder))


@pytest.fixture(scope="module")
def found(world):
    root, config, *_ = world
    return fresh(config, root / "out")


def journal(folder, arm):
    rows = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [row for batch in rows if batch["key"][0] == arm for row in batch["value"]]


def test_what_is_kept_fires_its_target_and_fakes_are_rejected(world, found):
    root, _config, (model, tokenizer, sae), _ = world
    rows = journal(root / "out", "feature-driven")
    fakes = [row for row in rows if row["source"].endswith("fake")]
    assert fakes and {row["verdict"] for row in fakes} == {"silent"}
    records = [json.loads(line) for line in (root / "out" / "examples.jsonl").read_text().splitlines()]
    assert len(records) == found.kept > 3
    for record in records:
        origin = record["provenance"]
        alone = strongest(model, tokenizer, sae, 2, record["text"])[origin["feature"]]
        # Padding changes the sums of a matrix product in its last digits: float32, six digits kept.
        assert float(alone) == pytest.approx(origin["activation"], rel=1e-4) and origin["activation"] > 0
        assert record["messages"] == [{"role": "user", "content": record["text"]}] and record["label"] == "odd"
        assert origin["sae_sha256"] == sae.weight_hash() and origin["source"].endswith("honest")


def test_figures_are_those_of_a_recount(world, found):
    root, config, (model, tokenizer, sae), values = world
    ids = [int(name.split(":")[1]) for name in config.features]
    rows = journal(root / "out", "feature-driven")
    seed = (values["seed"][:, ids] > 0).numpy()
    assert [t.seed_support for t in found.targets] == seed.sum(0).tolist()
    assert found.coverage_seed == seed.any(0).mean() == 2 / 8
    kept = [row for row in rows if row["verdict"] == "kept"]
    fires = np.array([(strongest(model, tokenizer, sae, 2, row["text"])[ids] > 0).numpy() for row in kept])
    assert found.coverage["feature-driven"] == (seed.any(0) | fires.any(0)).mean()
    assert [t.support for t in found.targets] == (seed.sum(0) + fires.sum(0)).tolist()
    assert found.attempts == len(rows) == sum(y.attempts for y in found.yields if y.arm == "feature-driven")
    written = [row for row in rows if row["text"]]
    assert found.unverified_fire == sum(row["target"] in row["fires"] for row in written) / len(written)
    assert {c.name for c in found.curves} >= {"feature-driven", "random", "natural", "feature-driven, unverified"}
    natural = next(c for c in found.curves if c.name == "natural")
    assert natural.texts == found.pool_texts == 40 and natural.points[0] == (0, 2 / 8)
    assert len(journal(root / "out", "random")) == found.attempts  # equal budget


def test_targets_leave_when_supported_or_given_up(found):
    for target in found.targets:
        assert target.support >= 3 or target.given_up or found.kept >= found.budget
        if target.seed_support >= 3:
            assert target.attempts == 0


def test_seed_and_passages_are_not_repeated(world, found):
    root, config, *_ = world
    known = {
        json.loads(line)["text"] for f in (*config.texts, *config.pool) for line in Path(f).read_text().splitlines()
    }
    kept = [json.loads(line)["text"] for line in (root / "out" / "examples.jsonl").read_text().splitlines()]
    assert not known & set(kept) and len(set(kept)) == len(kept)


def test_killed_at_any_moment_the_same_run_goes_on(world, found):
    """A kill loses the batch in flight at most, and the finished run equals one that was never killed."""
    root, config, *_ = world
    folder = root / "killed"
    code = (
        "import sys; sys.path.insert(0, {root!r})\n"
        "from pathlib import Path\n"
        "from qscope.workflows.synthesize import SynthesizeConfig, run\n"
        "run(SynthesizeConfig(**{fields!r}, out=Path({folder!r})))\n"
    )
    fields = {k: v for k, v in vars(config).items() if k != "out"}
    script = code.format(root=str(root), fields=fields, folder=str(folder))
    environment = {**os.environ, "PLANTED_KILL": "6", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert 0 < len(journal(folder, "feature-driven")) < found.attempts
    sys.modules.pop("planted_writer", None)
    again = synthesize.run(replace(config, out=folder))
    assert to_json(again.targets) == to_json(found.targets) and again.coverage["natural"] == found.coverage["natural"]
    assert (folder / "examples.jsonl").read_bytes() == (root / "out" / "examples.jsonl").read_bytes()
    with pytest.raises(StoreError, match="other options: budget"):
        synthesize.run(replace(config, out=folder, budget=99))


def test_an_interrupted_source_leaves_finished_batches(world, monkeypatch):
    root, config, *_ = world
    stopped = replace(config, out=root / "stopped", sources=("python:planted_writer:stop",))
    with pytest.raises(KeyboardInterrupt):
        synthesize.run(stopped)
    with pytest.raises(KeyboardInterrupt):  # the lock was given back
        synthesize.run(stopped)


def test_examples_are_rewritten_in_a_style_and_answered_by_their_label(world):
    root, config, *_ = world
    sys.modules.pop("planted_writer", None)
    asked = replace(config, sources=("python:planted_writer:asked",), adversarial=("story",), responses=True)
    asked = replace(asked, refuse=("odd",), compare=False, context_size=96, budget=8)  # room for what is added
    result = synthesize.run(replace(asked, out=root / "asked"))
    records = [json.loads(line) for line in (root / "asked" / "examples.jsonl").read_text().splitlines()]
    assert {tuple(m["role"] for m in r["messages"]) for r in records} == {("user", "assistant")}
    assert {(r["messages"][1]["content"], r["provenance"]["answer"]) for r in records} == {
        ("No, and here is why.", "refusal")
    }
    texts = {r["text"] for r in records}
    rewritten = [r for r in records if r["provenance"]["role"] == "adversarial"]
    assert rewritten and result.kept == len(records)
    for record in rewritten:
        origin = record["provenance"]
        assert origin["style"] == "story" and origin["rewritten_from"] in texts and "tale" in record["text"]


def test_the_local_model_continues_and_is_steered(world):
    root, config, *_ = world
    local = replace(config, sources=("continue", "steered"), max_new_tokens=4, budget=3, retries=1, batch=8, shots=2)
    first = synthesize.run(replace(local, out=root / "local1", compare=False))
    second = synthesize.run(replace(local, out=root / "local2", compare=False))
    assert first.attempts and first.yields == second.yields
    assert (root / "local1" / "journal.jsonl").read_bytes() == (root / "local2" / "journal.jsonl").read_bytes()
    assert not any(c.name == "random" for c in first.curves)


def test_report_and_page_escape_what_models_write(world, found):
    said = synthesize_text.render(found)
    assert "6 of 8 targets are fired by none of 6 seed texts" in said and "examples.jsonl" in said
    nasty = replace(found, notes=("<script>alert(1)</script>",), about={"<b>": "<i>"})
    text = synthesize_page.page(nasty)
    assert "<script>" not in text and "<i>" not in text.replace('<i class="mark">', "") and "coverage by budget" in text
    json.dumps(to_json(found), allow_nan=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"features": ()}, "No target was given"),
        ({"features": ("2:9999",)}, "target 2:9999 was given"),
        ({"sources": ("oracle",)}, "source 'oracle'"),
        ({"sources": ("chat",)}, "no chat template"),
        ({"sources": ("endpoint",)}, "none is configured"),
        ({"sources": ("continue",), "responses": True}, "need a source that can be asked"),
        ({"adversarial": ("rhyme",)}, "style 'rhyme'"),
        ({"text_field": "body"}, "has no field 'body'"),
        ({"relevance": "keywords:a"}, "none were given"),
        ({"budget": 0}, "--budget is 0"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"same_text": 0.0}, "--same-text is 0"),
    ],
)
def test_bad_input(world, tmp_path, monkeypatch, changes, message):
    monkeypatch.delenv("QSCOPE_JUDGE_URL", raising=False)
    _, config, *_ = world
    with pytest.raises(InputError, match=message):
        synthesize.run(replace(config, out=tmp_path / "bad", **changes))


def test_downstream_gain_of_texts_that_say_the_class(world):
    """The seed's labels mean nothing to TF-IDF; the added texts say what all positive held-out texts say."""
    _, config, *_ = world
    encoder = load_encoder(
        EncodeConfig(text=(), model=config.model, sae=config.sae, context_size=CONTEXT, dtype="float32", device="cpu")
    )
    words = ["module", "value", "string", "object", "class", "name"]
    seed = Labels(tuple(f"the {w} of it" for w in words * 2), (0,) * 6 + (1,) * 6)
    good = Labels(tuple(f"wicked {w} indeed" for w in words), (1,) * 6)
    bland = Labels(tuple(f"the {w} of it {i}" for i, w in enumerate(words * 2)), (1,) * 12)
    held = Labels(("wicked fun", "so wicked", "a wicked one", "the fun", "of it", "one of those"), (1, 1, 1, 0, 0, 0))
    gains = downstream(encoder, 2, seed, {"good": good, "bland": bland}, held, CONTEXT, draws=2, replicates=50)
    by = {(gain.method, gain.added): gain for gain in gains}
    alone, better, other = (by["TF-IDF (word)", name] for name in (SEED, "good", "bland"))
    assert alone.auroc == 0.5 and alone.gain == 0 and alone.texts == 0  # every word stands in both classes alike
    assert better.auroc == 1.0 and better.gain == 0.5 and better.texts == 6 and better.draws == 1
    assert other.texts == 6 and other.draws == 2  # as many as the smallest kind has
    assert len(gains) == 9
    with pytest.raises(InputError, match="of one class"):
        downstream(encoder, 2, seed, {"good": good}, Labels(("a b", "c d"), (1, 1)), CONTEXT)
