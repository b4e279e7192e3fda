"""The steering benchmark on a model of seconds: what it checks, what it keeps, what it calls a loss."""

import contextlib
import json

import pytest
import torch

from bench import _steer_peers, _steer_table, bench_steer


@pytest.fixture(scope="module")
def scene():
    return bench_steer.make_scene("tiny", "cpu", 8)


def test_all_contestants_give_the_same_tokens_and_leave_the_model_as_it_was(scene):
    plain = bench_steer.generate(scene.model, 8, "eager")
    cases = _steer_peers.cases(scene)
    faults, good = bench_steer.check(scene.model, cases, 8)
    assert faults == []
    assert [case.name for case in good] == [
        "single feature", "32 features", "all layers", "conditional, preact", "conditional, exact",
    ]  # fmt: skip
    assert torch.equal(bench_steer.generate(scene.model, 8, "eager"), plain)


def test_a_contestant_that_does_something_else_is_found(scene):
    case = _steer_peers.cases(scene)[0]
    wrong = _steer_peers.Case(case.name, {**case.contestants, "nothing": contextlib.nullcontext})
    idle = _steer_peers.Case("idle", {"qscope": contextlib.nullcontext})
    faults, good = bench_steer.check(scene.model, [wrong, idle], 8)
    assert good == []
    assert faults[0] == "single feature: nothing gave other tokens than qscope"
    assert faults[1].startswith("idle: the steered text is the unsteered one")


def test_gates_open_at_some_tokens_and_not_at_others(scene):
    for case in _steer_peers.cases(scene)[3:]:
        with case.contestants["qscope"]() as steering:
            bench_steer.generate(scene.model, 8, "eager")
        assert 0 < steering.fired.sum() < steering.fired.numel()


def test_command_line_keeps_rows_and_a_page(tmp_path, capsys):
    given = ["--model", "tiny", "--tokens", "4", "--rounds", "3", "--cases", "single feature", "--device", "cpu"]
    given += ["--threads", "1", "--out", str(tmp_path)]
    assert bench_steer.main(given) == 0
    assert bench_steer.main([*given, "--modes", "graphs"]) == 0
    assert bench_steer.main(given) == 0  # takes the place of the first
    (path,) = tmp_path.glob("steer-*.json")
    rows = json.loads(path.read_text())
    keys = [(row["mode"], row["provider"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {mode for mode, _ in keys} == {"eager", "graphs"}
    ours = next(row for row in rows if row["provider"] == "qscope" and row["mode"] == "eager")
    assert ours["rounds"] == 3
    assert ours["ms_min"] <= ours["ms"]
    assert (
        f"| {ours['ratio']:.3f}x | {ours['ratio_min']:.3f}x | single feature | qscope |"
        in path.with_suffix(".md").read_text()
    )
    for peer in _steer_peers.PACKAGES:
        row = next(row for row in rows if row["provider"] == peer and row["mode"] == "eager")
        assert ("ratio" in row) != bool(row["note"])


def test_ratios_are_those_of_the_rounds():
    clock = {"unsteered": [4.0, 2.0, 8.0, 2.0], "a": [9.0, 3.0, 8.0, 4.0]}
    now = []

    @contextlib.contextmanager
    def attach(name):
        now.append(name)
        yield

    found = bench_steer.interleaved(
        {name: lambda name=name: attach(name) for name in clock}, lambda: clock[now[-1]].pop(0), 3, 9.0, {}
    )
    assert found == {"unsteered": [2.0, 8.0, 2.0], "a": [3.0, 8.0, 4.0]}
    assert now[:4] == ["a", "unsteered", "unsteered", "a"]  # another one begins each time


def row(case, provider, ratio, least, mode="eager", **more):
    base = {
        "model": "m",
        "dtype": "float32",
        "mode": mode,
        "threads": 1,
        "clock": "wall",
        "device": "d",
        "torch": "2",
        "python": "3",
    }
    base |= {"commit": "c", "note": "", "ms": 1.0, "ms_min": 1.0, "rounds": 3, "version": ""}
    return base | {"case": case, "provider": provider, "ratio": ratio, "ratio_min": least} | more


def test_losses_are_named_beyond_the_noise():
    rows = [
        row("x", "unsteered, once more", 1.02, 0.99), row("x", "qscope", 1.10, 1.08), row("x", "slow", 1.2, 1.2),
        row("x", "within", 1.09, 1.07), row("x", "once", 1.0, 1.09), row("x", "fast", 1.02, 1.01),
        row("x", "gone", 0, 0, note="not installed"),
    ]  # fmt: skip
    page = _steer_table.markdown(rows)
    losses = page.split("## Where qscope loses")[1].split("##")[0].strip().splitlines()
    assert losses == ["- x (eager): 1.100x against 1.020x of fast"]
    assert "- gone, x: not installed" in page


def test_the_bar_holds_for_graphs_on_a_gpu():
    late = row("x", "qscope", 1.05, 1.04, mode="graphs", threads=None, compiled=1)
    assert "1.050x per token with CUDA graphs" in bench_steer.too_slow(late)
    for changes in (dict(ratio_min=1.02), dict(mode="eager"), dict(threads=2), dict(provider="repeng"), dict(note="-")):
        assert bench_steer.too_slow(late | changes) == ""
    assert "compiled the decoding 8 times" in bench_steer.too_slow(late | dict(compiled=8, ratio=1.0))
