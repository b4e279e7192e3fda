"""`qscope train` in two processes: the weights of one process, one log, resuming with another number of them."""

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qscope import native
from qscope.errors import InputError
from qscope.training import checkpoint
from qscope.workflows import train_job, train_log
from qscope.workflows.train import TrainConfig, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("train_worker.py")
BATCH, STEPS, STOP = 256, 24, 10
# As in tests/training/test_parallel.py: with an eps near the size of the gradients a difference in rounding stays one.
OPTIONS = dict(
    layers=(0, 2), k=(3,), d_sae=(301,), tokens=STEPS * BATCH, batch_tokens=BATCH, buffer_tokens=4096, context_size=64,
    lr=1e-3, eps=1e-2, dead_after_tokens=2 * BATCH, device="cpu", dtype="float32", log_every=4, checkpoint_steps=1000,
)  # fmt: skip
NEAR_WEIGHTS, NEAR_LOG = 1e-6, 2e-5
LAYERS = ("layer0", "layer2")


def command(config, **more):
    options = {"text": config.text, "model": (config.model,), "out": (config.out,), "timeout": 20, **OPTIONS, **more}
    parts = ["train"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        parts += [f"--{name.replace('_', '-')}", *map(str, values)]
    return parts


def torchrun(*arguments):
    native.load()  # compiled once, not by both
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def ports(count):
    """That are free."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes: more threads sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tiny, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:40]))
    corpus = (str(folder / "docs.jsonl"),)
    return TrainConfig(text=corpus, out=folder / "alone", model=tiny.model, model_tokens=2048, **OPTIONS)


@pytest.fixture(scope="module")
def alone(base):
    return run(base)


class Interrupted(train_log.Window):
    def add(self, stats):
        super().add(stats)
        if stats.step == STOP:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def halves(base, alone):
    """A run of one process that was lost after a checkpoint, to go on with two."""
    config = replace(base, out=base.out.with_name("begun-by-one"), checkpoint_steps=STOP - 1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_job, "Window", Interrupted)
        run(config)
    return config


@pytest.fixture(scope="module")
def outcomes(base, halves):
    """name -> [exit status, standard output, standard error] of both processes."""
    whole = {"model_tokens": 2048}
    runs = {
        "dp": (command(replace(base, out=base.out.with_name("dp")), **whole, dp=2), None),
        "tp": (command(replace(base, out=base.out.with_name("tp")), **whole, tp=2), None),
        "spread": (command(replace(base, out=base.out.with_name("spread")), **whole, spread=2), None),
        "stopped": (command(replace(base, out=base.out.with_name("stopped")), spread=2), STOP),
        "begun-by-one": (command(halves, tp=2), None),
        "crowd": (command(replace(base, out=base.out.with_name("crowd"), layers=(0,)), spread=2, layers=(0,)), None),
    }
    plan = base.out.with_name("runs.json")
    plan.write_text(json.dumps([[*each, port] for each, port in zip(runs.values(), ports(len(runs)), strict=True)]))
    ended = torchrun(WORKER, plan, base.out.with_name("outcomes"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    each = [json.loads(base.out.with_name(f"outcomes.{rank}").read_text()) for rank in (0, 1)]
    return {name: [found[number] for found in each] for number, name in enumerate(runs)}


def lines(folder):
    timing = ("seconds", "tokens_per_second")
    return [{k: v for k, v in line.items() if k not in timing} for line in train_log.read(Path(folder))]


def compare(folder, base, exact=False):
    """Weights, log and counts of a run with those of one process alone."""
    for layer in LAYERS:
        files = [path / layer / "sae.safetensors" for path in (folder, base.out)]
        if exact:
            assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in files}) == 1, layer
        ours, right = map(load_file, files)
        assert ours.keys() == right.keys()
        for name, tensor in right.items():
            torch.testing.assert_close(ours[name], tensor, rtol=NEAR_WEIGHTS, atol=NEAR_WEIGHTS, msg=f"{layer} {name}")
    got, want = lines(folder), lines(base.out)
    assert [(line["step"], line["sae"]) for line in got] == [(line["step"], line["sae"]) for line in want]
    if exact:
        assert got == want
    for ours, right in zip(got, want, strict=True):
        for name, value in right.items():
            assert ours[name] == value or abs(ours[name] - value) <= NEAR_LOG * max(abs(value), 1e-3), (name, right)
    assert want[-1]["aux"] > 1e-4, "AuxK must be at work"
    found, wanted = (json.loads((path / "result.json").read_text()) for path in (folder, base.out))
    assert found["counts"] == wanted["counts"] and found["complete"] and list(found["saes"]) == list(LAYERS)


@pytest.mark.parametrize("axis", ["dp", "tp", "spread"])
def test_two_processes_train_what_one_does(outcomes, base, axis):
    first, second = outcomes[axis]
    assert first[0] == second[0] == 0, first[2] + second[2]
    compare(base.out.with_name(axis), base, exact=axis == "spread")


def test_the_first_process_prints_and_reports(outcomes, base):
    for axis in ("dp", "tp", "spread"):
        first, second = outcomes[axis]
        assert "next: qscope evaluate" in first[1] and "train:" in first[2]
        assert second[1] == second[2] == ""
        folder = base.out.with_name(axis)
        assert (folder / "report.html").exists()
        about = json.loads((folder / "result.json").read_text())["about"]
        assert about["processes"] == "2: " + ", ".join(f"{a} {2 if a == axis else 1}" for a in ("spread", "dp", "tp"))


def test_a_signal_to_any_process_stops_all_with_a_checkpoint_that_one_process_goes_on_from(outcomes, base):
    """The batches of windows stay as long as they were, though --model-tokens was not given."""
    folder = base.out.with_name("stopped")
    first, second = outcomes["stopped"]
    assert first[0] == second[0] == 130, first[2] + second[2]
    saved = checkpoint.load(checkpoint.latest(folder))
    assert saved.step == STOP and list(saved.trainers) == [*LAYERS, "run"]
    assert saved.config["activations"]["windows"] == 2048 // 64
    assert not {"spread", "dp", "tp", "timeout"} & saved.config.keys()
    assert run(replace(base, out=folder, model_tokens=None)).resumed_step == STOP
    compare(folder, base)


def test_two_processes_go_on_from_a_checkpoint_of_one(outcomes, base):
    first, second = outcomes["begun-by-one"]
    assert first[0] == second[0] == 0, first[2] + second[2]
    folder = base.out.with_name("begun-by-one")
    assert json.loads((folder / "result.json").read_text())["resumed_step"] == STOP - 1
    assert f"going on from step {STOP - 1} of {STEPS}" in first[2] and second[2] == ""
    compare(folder, base)


def test_more_parts_than_saes_are_refused(outcomes):
    for status, _, said in outcomes["crowd"]:
        assert status == 2 and "--spread 2 was given, and this run trains 1 SAEs" in said


def test_sizes_that_do_not_fit_the_processes(base, monkeypatch):
    ended = torchrun("-m", "qscope", *command(replace(base, out=base.out.with_name("none")), dp=4))
    assert ended.returncode != 0 and not base.out.with_name("none").exists()
    said = [line for line in ended.stderr.splitlines() if line.startswith("qscope: error:")]
    assert said and all("spread=1, dp=4, tp=1 were asked for in a run of 2 processes" in line for line in said)
    with pytest.raises(InputError, match="Start the command with torchrun"):
        run(replace(base, tp=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(InputError, match=re.escape("their product 2")):  # all of them would train the same
        run(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dp": 3}, "--batch-tokens 256 cannot be dealt to --dp 3 processes"),
        ({"dp": 256}, "at least 512"),
        ({"tp": 0}, "--tp is 0"),
        ({"timeout": 0.0}, "--timeout is 0.0"),
    ],
)
def test_options_that_cannot_be(base, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replace(base, **options)
