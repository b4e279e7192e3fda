"""`qscope train` on a tiny model and real text: what it writes, resumes, refuses and shows."""

import base64
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import types
from collections import namedtuple
from dataclasses import replace
from os import environ
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qscope.activation_store import ActivationStore
from qscope.cli import dispatch, to_json
from qscope.errors import CheckpointError, InputError, ModelError, StorageError, StoreError
from qscope.files import acquire_lock
from qscope.model import load_model, residuals
from qscope.report import train_page, train_text
from qscope.sae import SAE
from qscope.training import checkpoint
from qscope.workflows import encode, evaluate, train_job, train_log
from qscope.workflows.train import TrainConfig, run

ROOT = Path(__file__).parents[2]
BATCH, STEPS = 256, 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:40]))
    return str(path)


@pytest.fixture(scope="module")
def base(tiny, corpus, tmp_path_factory):
    return TrainConfig(
        text=(corpus,), out=tmp_path_factory.mktemp("runs") / "base", model=tiny.model, layers=(0, 2), k=(4,),
        d_sae=(64,), tokens=STEPS * BATCH + 7, batch_tokens=BATCH, buffer_tokens=2048, context_size=64,
        model_tokens=512, device="cpu", dtype="float32", log_every=1, checkpoint_steps=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(base):
    return run(base)


def weights(folder):
    """sha256 of every SAE below a run's folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("sae.safetensors"))
    }


def lines(folder):
    """The log without what depends on the clock."""
    timing = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timing} for line in train_log.read(Path(folder))]


def refused(config, error=InputError):
    with pytest.raises(error) as caught:
        run(config)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- what comes out --------------------------------------------------------------------------------------


def test_a_run_writes_saes_that_reconstruct_their_layer(base, done, corpus):
    assert done.complete and done.steps == STEPS and done.tokens == STEPS * BATCH
    model, tokenizer = load_model(base.model, device="cpu", dtype="float32")
    text = json.loads(Path(corpus).read_text().splitlines()[2])["text"]
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:448]]).reshape(-1, 64)
    found = residuals(model, ids, [0, 2])
    for layer in (0, 2):
        sae = SAE.from_pretrained(base.out, layer=layer)
        assert (sae.d_sae, sae.k, sae.card.hook_point) == (64, 4, f"model.layers.{layer}")
        x = found[layer][:, 1:].reshape(-1, 32)
        fvu = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        trained = done.saes[f"layer{layer}"].figures["fvu"]
        assert abs(float(fvu) - trained) < 0.1 and trained < 0.85 * lines(base.out)[layer // 2]["fvu"]


def test_the_card_says_how_it_was_made(base, done):
    training = SAE.from_pretrained(base.out, layer=2).card.training
    assert training["complete"] and (training["steps"], training["tokens"]) == (STEPS, STEPS * BATCH)
    assert training["recipe"]["k"] == 4 and training["recipe"]["lr"] == 2e-4 / (64 / 2**14) ** 0.5
    assert training["figures"] == done.saes["layer2"].figures
    assert re.fullmatch("[0-9a-f]{64}", training["activations_sha256"]) and training["versions"]["torch"]
    assert training["counts"] == done.counts and done.counts["dropped_first"] > 0


def test_the_log_has_every_step_once(base, done):
    found = lines(base.out)
    assert [(line["step"], line["sae"]) for line in found] == [
        (step, name) for step in range(1, STEPS + 1) for name in ("layer0", "layer2")
    ]
    assert all(line["tokens"] == line["step"] * BATCH and line["l0"] == 4 for line in found)
    assert found[0]["lr"] < found[20]["lr"] > found[-1]["lr"]
    late = [line["fvu"] for line in found if line["sae"] == "layer0" and line["step"] >= STEPS - STEPS // 10]
    assert done.saes["layer0"].figures["fvu"] == pytest.approx(sum(late) / len(late), rel=1e-12)
    assert late[-1] < found[0]["fvu"]


class Interrupt(train_log.Window):
    """Sends this process a signal at a step."""

    at = 0

    def add(self, stats):
        super().add(stats)
        if stats.step == self.at:
            signal.raise_signal(signal.SIGINT)


def test_lines_are_means_over_their_steps(base, done, tmp_path, monkeypatch):
    """Also of those before and after an interruption."""
    config = replace(base, out=tmp_path / "run", log_every=7, layers=(0,))
    monkeypatch.setattr(Interrupt, "at", 17)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_job, "Window", Interrupt)
        run(config)
    shutil.copytree(config.out, tmp_path / "early")
    early = train_page.page(run(replace(config, out=tmp_path / "early", finish=True)))
    stands = list(train_log.read(tmp_path / "early"))[-1]
    assert stands["step"] == 14 and f"<dd>{14 * BATCH / stands['seconds']:,.0f}</dd>" in early
    assert run(config).resumed_step == 17
    each = {line["step"]: line["loss"] for line in lines(base.out) if line["sae"] == "layer0"}
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [7, 14, 21, 28, 35, 40]
    begin = 0
    for line in found:
        mean = sum(each[s] for s in range(begin + 1, line["step"] + 1)) / (line["step"] - begin)
        assert line["loss"] == pytest.approx(mean, rel=1e-12)
        begin = line["step"]


def test_sweeps_share_the_stream_and_each_equals_its_own_run(base, done, tmp_path):
    result = run(replace(base, out=tmp_path / "sweep", k=(4, 6), seed=(0, 1)))
    found = weights(tmp_path / "sweep")
    assert len(found) == len(set(found.values())) == 8 == len(result.saes)
    alone = weights(base.out)
    for layer in (0, 2):
        name = f"layer{layer}/sae.safetensors"
        assert found[f"f64-k4-seed0/{name}"] == alone[name]


def test_evaluate_and_encode_take_what_was_trained(base, done, corpus, tmp_path):
    common = dict(text=(corpus,), model=base.model, sae=(str(base.out),), layers=(0, 2), context_size=64)
    common |= dict(device="cpu", dtype="float32")
    codes = encode.run(encode.EncodeConfig(**common, out=tmp_path / "codes", max_tokens=600))
    assert all(codes.layers[layer]["fvu"] < 1 for layer in ("0", "2"))
    found = evaluate.run(evaluate.EvaluateConfig(**common, tokens=400, fit_tokens=200, loss_tokens=0, recall_tokens=0))
    assert [found.layers[layer].k for layer in ("0", "2")] == [4, 4]


def test_stored_activations_train_as_well(base, corpus, tmp_path):
    stored = tmp_path / "acts"
    encode.run(
        encode.EncodeConfig(
            text=(corpus,), features=False, activations=stored, model=base.model, layers=(0, 2), context_size=64,
            device="cpu", dtype="float32",
        )
    )  # fmt: skip
    config = TrainConfig(
        activations=stored, out=tmp_path / "run", k=(4,), d_sae=(64,), tokens=10 * BATCH, batch_tokens=BATCH,
        buffer_tokens=16384, device="cpu",
    )  # fmt: skip
    result = run(config)
    assert set(result.saes) == {"layer0", "layer2"} and result.model == "model"
    card = SAE.from_pretrained(tmp_path / "run", layer=2).card
    assert card.training["model_sha256"] == ActivationStore(stored).settings["model"]["sha256"]
    assert card.context_size == 64
    assert "layers 0, 2" in refused(replace(config, out=tmp_path / "other", layers=(1,))).replace("holds", "layers")
    with pytest.raises(InputError, match="for which no model is run"):
        replace(config, model="x")


@pytest.mark.parametrize("objective", ["batch_topk", "matryoshka"])
def test_other_objectives_become_saes(base, tmp_path, objective):
    run(replace(base, out=tmp_path / "run", objective=objective, layers=(0,), tokens=8 * BATCH))
    sae = SAE.from_pretrained(tmp_path / "run", layer=0)
    assert sae.card.training["recipe"]["objective"] == objective
    assert ("threshold" in sae.card.training) == (objective == "batch_topk")


def test_jumprelu_and_transcoders_become_weights(base, tmp_path):
    run(replace(base, out=tmp_path / "jump", objective="jumprelu", layers=(0,), tokens=8 * BATCH))
    found = load_file(tmp_path / "jump" / "layer0" / "weights.safetensors")
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "W_enc": (64, 32), "W_dec": (64, 32), "b_enc": (64,), "b_dec": (32,), "threshold": (64,),
    }  # fmt: skip
    points = dict(layers=(), transcoder_in=("mlp_in.1",), transcoder_out=("2",))
    result = run(replace(base, out=tmp_path / "trans", tokens=8 * BATCH, **points))
    folder = tmp_path / "trans" / "transcoder-mlp_in.1-2"
    card = json.loads((folder / "card.json").read_text())
    assert (card["reads"], card["predicts"], card["k"]) == ("mlp_in.1", "2", 4)
    assert card["sha256"] == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert result.saes["transcoder-mlp_in.1-2"].target == "2" and "next:" not in train_text.render(result)


# --- interruptions ---------------------------------------------------------------------------------------


def arguments(config):
    options = {
        "--text": config.text[0], "--out": config.out, "--model": config.model, "--layers": "0 2", "--k": "4",
        "--d-sae": "64", "--tokens": config.tokens, "--batch-tokens": BATCH, "--buffer-tokens": 2048,
        "--context-size": 64, "--model-tokens": 512, "--device": "cpu", "--dtype": "float32", "--log-every": 1,
        "--checkpoint-steps": 6,
    }  # fmt: skip
    return ["train", *(part for name, value in options.items() for part in (name, *str(value).split(" ")))]


# Forks runs and sends them signals, each a random moment after the log has grown to a random length. One process for
# all, because importing torch and transformers takes longer than the runs; it starts no thread of its own.
HARNESS = """
import json, os, random, signal, sys, time
from pathlib import Path
import transformers.models.llama.modeling_llama
from qscope.cli import dispatch
from qscope.workflows import train_job, train_supply

args, log, turn, begin, outcomes = json.loads(sys.argv[1]), Path(sys.argv[2]), random.Random(5), 0, []
for name in ("SIGKILL", "SIGTERM", "SIGKILL"):
    begin += turn.randrange(12, 26)
    child = os.fork()
    if child == 0:
        os._exit(dispatch(args))
    while (log.read_bytes().count(b"\\n") if log.exists() else 0) < begin and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    os.kill(child, getattr(signal, name))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = sorted(path.name for path in (log.parent / "checkpoints").glob("step-*"))
    outcomes.append([name, status, steps, log.read_text().count(chr(10))])
print(json.dumps(outcomes))
"""


def test_killed_and_resumed_runs_end_with_the_same_bits(base, done, tmp_path):
    config = replace(base, out=tmp_path / "base")
    command = [sys.executable, "-c", HARNESS, json.dumps([str(a) for a in arguments(config)])]
    env = {**environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run(
        [*command, str(config.out / "log.jsonl")], env=env, cwd=ROOT, capture_output=True, timeout=90
    )
    killed, terminated, again = json.loads(found.stdout.splitlines()[-1])
    assert killed[1] == again[1] == -signal.SIGKILL and terminated[1] == 130
    assert b"stopping with a checkpoint" in found.stderr and b"qscope: interrupted" in found.stderr
    assert terminated[2][-1] == f"step-{terminated[3] // 2:08}"  # two lines a step: it saved where it stopped
    result = run(config)
    assert terminated[3] // 2 <= result.resumed_step < STEPS
    assert weights(config.out) == weights(base.out)
    assert lines(config.out) == lines(base.out)
    cards = [SAE.from_pretrained(folder, layer=2).card for folder in (config.out, base.out)]
    assert cards[0] == cards[1]


def test_an_interrupt_writes_a_checkpoint_and_finish_makes_saes_of_it(base, done, tmp_path, monkeypatch, capsys):
    config = replace(base, out=tmp_path / "base", layers=(0,), checkpoint_steps=1000)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Interrupt, "at", 33)
    monkeypatch.setattr(train_job, "Window", Interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    newest = checkpoint.latest(config.out)
    assert newest.name == "step-00000033" and checkpoint.load(newest).metric == lines(config.out)[-1]["fvu"]
    early = run(replace(config, finish=True))
    assert (early.complete, early.steps, early.run_tokens) == (False, 33, 0)
    training = SAE.from_pretrained(config.out, layer=0).card.training
    assert not training["complete"] and training["steps"] == 33
    assert "stopped early" in train_text.render(early) and "Stopped early" in Path(early.report).read_text()
    run(config)
    assert weights(config.out)["layer0/sae.safetensors"] == weights(base.out)["layer0/sae.safetensors"]
    assert "going on from step 33 of 40" in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once(base, tmp_path, monkeypatch):
    class Twice(Interrupt):
        def add(self, stats):
            super().add(stats)
            if stats.step == self.at:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Twice, "at", 38)
    monkeypatch.setattr(train_job, "Window", Twice)
    with pytest.raises(KeyboardInterrupt):
        run(replace(base, out=tmp_path / "base", checkpoint_steps=1000))
    assert checkpoint.latest(tmp_path / "base") is None


def test_a_finished_run_started_again_does_nothing_anew(base, done):
    before = weights(base.out)
    again = run(base)
    assert (again.resumed_step, again.run_tokens, again.complete) == (STEPS, 0, True)
    assert again.counts == done.counts and weights(base.out) == before
    assert again.saes == done.saes


def test_another_config_is_refused_by_name(base, done):
    assert "k[0]: 4 -> 5" in refused(replace(base, k=(5,)), CheckpointError)
    text = refused(replace(base, lr=0.1, context_size=32), CheckpointError)
    assert "lr: null -> 0.1" in text and "activations.context_size: 64 -> 32" in text
    run(replace(base, keep_last=1, checkpoint_steps=None, keep_best=True))  # these may change


def test_other_text_is_refused(base, done, texts, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:41]))
    assert "activations.text[0][1]" in refused(replace(base, text=(str(path),)), CheckpointError)


def test_a_result_without_checkpoints_is_not_overwritten_by_another_run(base, done, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(base.out, copy)
    shutil.rmtree(copy / "checkpoints")
    assert "lr: null -> 0.1" in refused(replace(base, out=copy, lr=0.1), CheckpointError)
    assert weights(copy) == weights(base.out)


# --- what is refused -------------------------------------------------------------------------------------


def test_layers_and_points_that_do_not_exist(base, tmp_path):
    assert "has the layers 0 to 2" in refused(replace(base, out=tmp_path / "a", layers=(3,)), ModelError)
    points = dict(layers=(), transcoder_in=("attn.1",), transcoder_out=("2",))
    assert "Activations at 'attn.1' were asked for" in refused(replace(base, out=tmp_path / "b", **points))
    assert "Activations at -1 were asked for" in refused(replace(base, out=tmp_path / "b", layers=(-1,)))
    assert not (tmp_path / "a" / "train.json").exists()


def test_text_shorter_than_the_budget_is_refused_unless_cycled(base, tmp_path):
    config = replace(base, out=tmp_path / "run", tokens=200 * BATCH, layers=(0,), log_every=None)
    assert "51,200 tokens are to be trained on, and the text holds only" in refused(config)
    assert lines(config.out) == [] and checkpoint.latest(config.out) is None
    result = run(replace(config, cycle=True))
    assert result.complete and result.counts["epoch"] >= 1


def test_text_that_runs_dry_leaves_a_checkpoint_to_finish(base, tmp_path, monkeypatch):
    from qscope.training.activations import ModelActivations

    monkeypatch.setattr(ModelActivations, "check", lambda self, n: None)  # as for a dataset, which nobody counts
    config = replace(base, out=tmp_path / "run", tokens=200 * BATCH, layers=(0,), checkpoint_steps=1000)
    text = refused(config)
    step = int(re.search(r"checkpoint is of step (\d+) of 200; --finish", text)[1])
    assert 20 < step < 200 and checkpoint.latest(config.out).name == f"step-{step:08}"
    assert run(replace(config, finish=True)).steps == step


def test_text_that_fails_on_the_way_says_so_and_names_the_checkpoint(base, tmp_path, corpus):
    path = tmp_path / "docs.jsonl"
    rows = [json.loads(line)["text"][:200] for line in Path(corpus).read_text().splitlines()] * 8
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*rows, 3]))
    options = dict(text=(str(path),), layers=(0,), strict=True, cycle=True, tokens=400 * BATCH)
    options |= dict(checkpoint_steps=40, log_every=None)
    text = refused(replace(base, out=tmp_path / "run", **options))
    assert "docs.jsonl, line 321 has no text in field 'text'" in text
    step = int(checkpoint.latest(tmp_path / "run").name[-8:])
    assert f"The newest checkpoint is of step {step} of 400; --finish" in text


def test_a_diverging_run_stops_and_keeps_what_was_before(base, tmp_path, monkeypatch):
    real = train_log.Window.add

    def add(self, stats):
        real(self, stats if stats.step < 20 else replace(stats, loss=stats.loss * (float("nan"), 100)[stats.step % 2]))

    monkeypatch.setattr(train_log.Window, "add", add)
    config = replace(base, out=tmp_path / "run", layers=(0,), checkpoint_steps=5, divergence_steps=6)
    text = refused(config)
    assert "for 6 steps in a row" in text and "smaller --lr (the peak was 0.0032)" in text
    newest = checkpoint.latest(config.out)
    assert newest.name == "step-00000015" and f"{newest} is from before; --finish writes its SAEs" in text
    assert run(replace(config, finish=True)).steps == 15


def test_a_rate_that_is_far_too_large_is_noticed(base, tmp_path):
    """For real: the loss of a TopK SAE whose weights leap at every step."""
    text = refused(replace(base, out=tmp_path / "run", layers=(0,), lr=300.0, grad_clip=None))
    assert "has diverged" in text and "No checkpoint had been written yet" in text


def test_two_runs_in_one_folder(base, tmp_path):
    (tmp_path / "run").mkdir()
    lock = acquire_lock(tmp_path / "run")
    try:
        assert "another process" in refused(replace(base, out=tmp_path / "run"), StoreError)
    finally:
        lock.release()


def test_a_folder_of_something_else(base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    assert "is not empty and not a training run: it holds thesis.tex" in refused(
        replace(base, out=tmp_path / "run"), StoreError
    )
    assert "has no checkpoint" in refused(replace(base, out=tmp_path / "new", finish=True))
    config = replace(base, out=tmp_path / "run" / "thesis.tex")
    assert "thesis.tex is a file; a training run is a folder" in refused(config, StorageError)


def test_a_disk_that_fills_up(base, done, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    config = replace(base, out=tmp_path / "base")
    # The batches of which the first weights are made are waiting: 32 of 256 rows of 2 layers, beside a buffer of 2048.
    needed = 2 * (4 * 32 * 64 * 6 + 2048 * 32 * 4 + 32 * 256 * 32 * 4)
    monkeypatch.setattr(train_job.shutil, "disk_usage", lambda path: Usage(10**9, 0, needed))
    assert f"and {needed:,} are free" in refused(config, StorageError)
    assert lines(config.out) == []
    free = iter([10**9, 10**9, 1000])  # at the start, at the first checkpoint, at the second
    monkeypatch.setattr(train_job.shutil, "disk_usage", lambda path: Usage(10**9, 0, next(free)))
    assert "The checkpoint of step 12 takes" in refused(config, StorageError)
    assert checkpoint.latest(config.out).name == "step-00000006"
    monkeypatch.undo()
    assert run(config).resumed_step == 6 and weights(config.out) == weights(base.out)


# --- log, page, command ----------------------------------------------------------------------------------


def test_tensorboard_and_wandb_get_the_log(base, tmp_path, monkeypatch):
    calls = []

    class Recorder:
        def __init__(self, *args, **options):
            calls.append(("open", args, options))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def log(self, values, step):
            calls.append((values, step))

        def close(self):
            calls.append("closed")

        finish = close

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Recorder))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Recorder))
    run(replace(base, out=tmp_path / "run", layers=(0,), tokens=2 * BATCH, tensorboard=True, wandb="saes"))
    first = next(train_log.read(tmp_path / "run"))
    assert ("layer0/fvu", first["fvu"], 1) in calls and calls.count("closed") == 2
    assert calls[0][2] == {"purge_step": 1} and calls[1][2]["project"] == "saes"
    assert any(call[1] == 1 and call[0]["layer0/loss"] == first["loss"] for call in calls if isinstance(call[0], dict))


@pytest.mark.parametrize(("option", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb")])
def test_logs_whose_package_is_missing(base, tmp_path, monkeypatch, option, package):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    text = refused(replace(base, out=tmp_path / "run", **option))
    assert f"the package {package} is not installed" in text


def test_the_page_has_a_line_per_sae_and_runs_nothing(base, done):
    text = train_page.page(done)
    assert "<script" not in text and "@@" not in text and "http" not in text.replace("http-equiv", "")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in text
    panels = text.split("<figure")[2:]
    assert panels[0].count("<polyline") == 2 and ">layer0</li>" in text
    points = re.search(r'points="([^"]*)"', panels[0])[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == STEPS and heights[-1] > heights[0]  # lower on the page: the FVU fell
    rates = next(panel for panel in panels if "Learning rate" in panel)
    assert rates.count("<polyline") == 1 and "<title>all</title>" in rates
    last = lines(base.out)[-1]["fvu"]
    assert f">{last:.3g}<" in panels[0]


def test_the_command_prints_the_next_one_and_json(base, done, capsys):
    args = [str(part) for part in arguments(base)]
    assert dispatch(args) == 0
    out = capsys.readouterr().out
    assert f"next: qscope evaluate --sae {base.out} --layers 0 2" in out and "FVU" in out
    Path(done.report).unlink()
    assert dispatch([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["saes"] == to_json(done)["saes"] and Path(done.report).exists()
    assert json.loads((base.out / "result.json").read_text())["saes"] == found["saes"]
