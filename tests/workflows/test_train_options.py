"""Options of `qscope train`, and its log, without a run."""

import re
from dataclasses import fields, replace

import pytest
import torch

from qscope.errors import InputError
from qscope.training import Recipe, StepStats
from qscope.workflows import train_log
from qscope.workflows.train import TrainConfig

BASE = TrainConfig(text=("x",), model="m", layers=(0, 2), k=(4,), d_sae=(64,), batch_tokens=256)


def test_every_recipe_field_is_an_option_with_the_same_default():
    options = {item.name: item.default for item in fields(TrainConfig)}
    own = {"d_sae", "k", "seed", "dead_after_tokens"}  # tuples here, and made from --tokens
    assert {item.name: item.default for item in fields(Recipe) if item.name not in own} == {
        item.name: options[item.name] for item in fields(Recipe) if item.name not in own
    }
    config = TrainConfig(text=("x",), tokens=20_000_000, betas=(0.5, 0.9), k=(3, 5), seed=(1, 2))
    found = config.recipes(64)
    assert [(r.d_sae, r.k, r.seed, r.dead_after_tokens, r.betas) for r in found] == [
        (1024, k, seed, 2_000_000, (0.5, 0.9)) for k in (3, 5) for seed in (1, 2)
    ]
    assert TrainConfig(text=("x",), tokens=10**9).recipes(64)[0].dead_after_tokens == 10_000_000


def test_the_preset_is_what_the_paper_discloses():
    config = TrainConfig(text=("x",), preset="qwen-scope")
    (found,) = config.recipes(2048)
    assert (found.objective, found.k, found.d_sae, found.aux_weight) == ("topk", 50, 32768, 1 / 32)
    assert TrainConfig(text=("x",), preset="qwen-scope", k=(100,)).recipes(2048)[0].k == 100
    with pytest.raises(InputError, match=r"--preset qwen-scope means --aux-weight 0\.03125, and 0\.1 was given"):
        TrainConfig(text=("x",), preset="qwen-scope", aux_weight=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ()}, "none of --text, --dataset and --activations"),
        ({"dataset": "d"}, "2 of --text, --dataset and --activations"),
        ({"k": (65,)}, "k=65; accepted is 1 to d_sae=64"),
        ({"k": (4, 4)}, "--k 4 4 names a value twice"),
        ({"seed": ()}, "--seed names no value"),
        ({"tokens": 100}, "less than one batch of 256"),
        ({"transcoder_in": ("1",)}, "--transcoder-in names 1 points and --transcoder-out 0"),
        ({"transcoder_in": ("1",), "transcoder_out": ("2",)}, "were both given"),
        ({"layers": ()}, "was given without --layers"),
        ({"divergence_factor": 1.0}, "more than 1"),
        ({"keep_last": 0}, "--keep-last is 0"),
        ({"model": ""}, "--model is empty"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        replace(BASE, **options)


def stats_of(step, loss, **values):
    names = ("fvu", "l0", "aux", "dead_share", "grad_norm", "overflow", "skipped")
    tensors = {name: torch.tensor(float(values.get(name, 1.0))) for name in names}
    return StepStats(step=step, tokens=step, lr=0.1, loss=torch.tensor(float(loss)), **tensors)


def test_steps_that_are_not_finite_count_for_the_streak_and_not_for_the_means():
    window = train_log.Window(torch.device("cpu"), 10.0)
    for loss in (0.5, 0.3, float("nan"), float("inf")):
        window.add(stats_of(1, loss))
    assert int(window.streak) == 2
    line = window.line()
    assert line["loss"] == pytest.approx(0.4) and line["overflow"] == 4 and float(window.best) == line["loss"]
    for loss in (3.9, 4.1, 4.1):
        window.add(stats_of(2, loss))
    assert int(window.streak) == 2  # 10 times the best is the limit
    other = train_log.Window(torch.device("cpu"), 10.0)
    other.restore(window.state())
    assert other.line() == window.line()
    for _ in range(2):
        other.add(stats_of(3, float("nan")))
    assert other.line()["loss"] is None and int(other.streak) == 4 and float(other.best) < 0.5


def test_a_log_that_lost_its_end_is_continued_with_a_warning(tmp_path, capsys):
    log = train_log.Log(tmp_path, False, None)
    log.open(0, 0, "id", {})
    log.write(1, [{"step": 1, "sae": "a", "loss": 0.5}])
    log.close()
    log.open(log.position + 10, 1, "id", {})
    assert "lacks its last 10 bytes" in capsys.readouterr().err
    log.write(2, [{"step": 2, "sae": "a", "loss": None}])
    log.close()
    with (tmp_path / "log.jsonl").open("ab") as stream:
        stream.write(b'{"step": 3')  # a killed run's last line
    assert [line["step"] for line in train_log.read(tmp_path)] == [1, 2]
