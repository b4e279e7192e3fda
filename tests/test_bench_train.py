"""The training benchmark: its data, its measures, and a planted dictionary that qscope recovers."""

import dataclasses
import json
import math

import pytest
import torch

from bench import _train_data, _train_peers, _train_run, _train_table, _train_worker, bench_train
from bench._train_data import Planted, PlantedSpec
from bench._train_peers import Job
from bench._train_worker import Task, Worker, recovery

SPEC = PlantedSpec(32, 64, 3)
JOB = Job(d_in=32, d_sae=128, k=3, batch=256, steps=200, dead_after=6400, lr_factor=3.0, seed=0, device="cpu")


def trained(name, job=JOB):
    worker = Worker(Task(name, "planted", job, SPEC, blocks=2, held_out=2048, threads=1))
    curve = [worker.evaluate()]
    for _ in range(2):
        worker.block()
        curve.append(worker.evaluate())
    return curve


@pytest.fixture(scope="module")
def curves():
    return {name: trained(name) for name in ("qscope", "torch dense")}


def test_the_dictionary_is_not_known_at_the_start(curves):
    """The trainers' first directions come from a generator too; with the planted one's seed they would be the truth."""
    # the largest of 128 cosines of random directions in 32 dimensions: about 0.45
    assert curves["qscope"][0]["mmcs"] < 0.55
    assert curves["qscope"][0]["match"] == 0


def test_qscope_recovers_a_planted_dictionary(curves):
    """At the end of a run of seconds; without the encoder's or the decoder's gradient it stays far below."""
    first, _, last = curves["qscope"]
    assert last["tokens"] == 200 * 256
    assert last["mmcs"] > 0.9
    assert last["match"] > 0.8
    assert last["fvu"] < 0.2 < 0.5 < first["fvu"]


def test_qscope_learns_what_the_dense_recipe_learns(curves):
    """Same first weights and batches. Rows without a gradient stand still in qscope's Adam and drift in torch's, and
    it looks for dead features every 8 steps: the curves are close, not equal."""
    for ours, dense in zip(curves["qscope"], curves["torch dense"], strict=True):
        assert ours["fvu"] == pytest.approx(dense["fvu"], abs=0.02)
        assert ours["mmcs"] == pytest.approx(dense["mmcs"], abs=0.05)
    assert curves["qscope"][0] == pytest.approx(curves["torch dense"][0], abs=1e-4)


def test_planted_tokens_are_sums_of_the_features():
    source = Planted(dataclasses.replace(SPEC, features=24), batch=512, seed=3, device="cpu")
    first, second = source.batches(5, 2)
    assert torch.equal(first, source.batches(5, 1)[0])
    assert not torch.equal(first, second)
    # 24 features in 32 dimensions are independent, so the codes can be read off
    codes = torch.linalg.lstsq(source.truth.T.double(), (first - source.offset).T.double()).solution.T
    assert torch.equal((codes.abs() > 1e-4).sum(1), torch.full((512,), 3))
    assert codes.min() > -1e-4
    frequency = (codes > 1e-4).float().mean(0)
    assert frequency[:6].mean() > frequency[-6:].mean() * 1.3  # Zipf
    assert source.held_out(512).allclose(source.held_out(512))
    assert not torch.equal(source.held_out(512), first)


def test_recovery_of_known_rows():
    truth = torch.eye(4)
    rows = torch.tensor([[2.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, -3]])
    found = recovery(truth, rows)
    assert found["mmcs"] == pytest.approx((1 + 2 * math.sqrt(0.5) + 0) / 4)
    assert found["match"] == 0.25


def test_pca_control_against_singular_values():
    source = Planted(SPEC, batch=512, seed=1, device="cpu")
    x = torch.cat(source.batches(0, 4)).double()
    apart = x - x.mean(0)
    left = torch.linalg.svdvals(apart).square()
    assert _train_data.pca_fvu(source, 4, x.float(), 3) == pytest.approx(float(left[3:].sum() / left.sum()), rel=1e-6)


def test_command_line_writes_rows_curves_and_a_page(tmp_path, monkeypatch, capsys):
    """Through its worker processes; a peer that is not there gets a line, no failure."""
    monkeypatch.setattr(bench_train, "settings", lambda *_: [small()])
    given = ["--trainers", "qscope", "sae-lens", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert bench_train.main([*given[:2], *given[3:], "--sweep", "--lr-factors", "1", "3"]) == 0
    assert bench_train.main([*given, "--seeds", "1"]) == 0
    (path,) = tmp_path.glob("train-*.json")
    rows = json.loads(path.read_text())
    swept = {row["lr_factor"]: row["fvu"] for row in rows if row["stage"] == "sweep"}
    (ours,) = [row for row in rows if row["stage"] == "measured" and row["trainer"] == "qscope"]
    assert ours["lr_factor"] == min(swept, key=swept.get) == 3
    assert ours["fvu"] == swept[3.0]  # the same run again, to the bit
    assert [point["tokens"] for point in ours["curve"]] == [0, 2560, 5120]
    assert ours["tokens_per_s"] > 0
    assert ours["commit"]
    assert {"qscope", "sae-lens", _train_run.PCA} == {row["trainer"] for row in rows if row["stage"] == "measured"}
    page = path.with_suffix(".md").read_text()
    assert f"| 1.00x | qscope | x3 | {ours['tokens_per_s']:,.0f} |" in page
    assert len(path.with_suffix(".csv").read_text().splitlines()) == len(rows) + 1


def small():
    return _train_run.Setting("planted", "planted", 32, 128, 3, 256, 5120, 2, 1024, SPEC)


def test_losses_are_named_with_their_figures():
    """Faster but worse beyond the seeds' range, slower, and no difference."""
    base = {"stage": "measured", "data": "d", "note": "", "peak_mib": None, "device": "c", "commit": "x", "python": "3"}
    base |= {name: 1 for name in ("D", "F", "K", "batch", "tokens")} | {"lr_factor": 1.0}

    def run(trainer, speed, fvu):
        return base | {"trainer": trainer, "tokens_per_s": speed, "fvu": fvu, "curve": [{"tokens": 0, "fvu": 1.0}]}

    rows = [run("qscope", 100.0, 0.20), run("qscope", 100.0, 0.22), run("a", 50.0, 0.19), run("b", 200.0, 0.205)]
    page = _train_table.markdown(rows)
    losses = page.split("## Where qscope loses")[1].split("##")[0].strip().splitlines()
    assert losses == [
        "- d, fvu: 0.2100 +- 0.0100 against 0.1900 of a",
        "- d, tokens/s: 100 against 200 of b",
    ]
    assert "| 2.00x | a | x1 | 50 |" in page


def test_a_failure_of_ours_fails_the_run():
    rows = [{"data": "d", "trainer": name, "note": "broke"} for name in ("qscope", "sae-lens")]
    assert _train_run.faults(rows) == ["d: qscope: broke"]


def test_a_trainer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(_train_worker, "missing", lambda _: "not installed")
    with pytest.raises(_train_worker.Missing, match="not installed"):
        trained("sae-lens")
    assert _train_peers.missing("qscope") == ""
