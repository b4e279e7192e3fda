"""The benchmarks' own logic: floors, the refusal of wrong providers, result files, tables, bars."""

import csv
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import OPS, _checks, _facts, _floors, _harness, _peers, _results, _run, _timing, cases
from bench._case import OURS, QWEN_SCOPE, YARDSTICK, Case, Provider, Sizes
from bench._summary import CPU_BARS, GPU_BARS, summary
from qscope import cli
from qscope.errors import InputError, QscopeError
from qscope.report import bench_plot, bench_text
from qscope.workflows import bench as workflow

ROOT = Path(__file__).parents[1]
N = 8192

# kernels.md, section 2, by hand: FLOP in T, floor in ms at 790 TFLOP/s, compulsory MB (K = 100, float32 values),
# gathered GB at K = 50, float32 gradient [F, D] written in ms at 4.3 TB/s, h read and written in us.
TABLE = {
    "A": (1.10, 1.39, 174, 1.68, 0.06, 15.6),
    "B": (4.40, 5.57, 611, 3.36, 0.25, 31),
    "C": (6.87, 8.70, 929, 4.19, 0.39, 39),
    "D": (4.40, 5.57, 577, 1.68, 0.25, 15.6),
}


@pytest.mark.parametrize("name", TABLE)
def test_floors_are_those_of_the_reference_notes(name):
    """To the digits that the notes print."""
    (D, F), (tflop, ms, megabytes, gathered, written, steered) = QWEN_SCOPE[name], TABLE[name]
    assert _floors.gemm_flop(N, D, F) / 1e12 == pytest.approx(tflop, abs=0.006)
    assert _floors.encode(N, D, F, 100, 2).ms(4300, 790) == pytest.approx(ms, abs=0.006)
    assert _floors.encode_bytes(N, D, F, 100, 2) / 1e6 == pytest.approx(megabytes, abs=1)
    assert _floors.gather_bytes(N, D, 50, 2) / 1e9 == pytest.approx(gathered, abs=0.006)
    (gradients,) = _floors.sparse_grads(0, D, F, 50, 2).stages
    assert gradients.bytes / 2 / 4.3e9 == pytest.approx(written, abs=0.006)
    assert _floors.steer_add(N, D, 2).ms(4300, None) * 1e3 == pytest.approx(steered, abs=0.5)


def test_floors_of_shape_a_to_the_byte():
    """Written out, so that a factor that is lost shows: 8192 tokens, 2048 wide, 32768 features, K = 50."""
    assert _floors.select_bytes(N, 32768, 50, 2) == 8192 * 32768 * 2 + 8192 * 50 * 6 == 539328512
    assert _floors.encode_bytes(N, 2048, 32768, 50, 2, value=2) == 33554432 + 134217728 + 2457600
    assert _floors.decode(N, 2048, 50, 2).bytes == 1677721600
    assert _floors.decode_loss(N, 2048, 50, 2).bytes == 1677721600 + 2 * 33554432
    assert _floors.sparse_grads(N, 2048, 32768, 50, 2).bytes == 2 * 1677721600 + 2 * 268435456
    every_row = _floors.row_update_bytes(N, 2048, 32768, 32768)
    assert every_row == pytest.approx(24 * 2 * 32768 * 2048, rel=1e-6)
    assert _floors.touched_rows(1, 32768, 1) == pytest.approx(1)
    step = _floors.train_step(N, 2048, 32768, 50, 2)
    parts = _floors.encode(N, 2048, 32768, 50, 2).ms(4300, 790) + 3 * 1677721600 / 4.3e9
    assert step.ms(4300, 790) == pytest.approx(parts + _floors.row_update_bytes(N, 2048, 32768, 50) / 4.3e9)


def test_a_floor_is_the_longer_of_product_and_traffic_and_needs_the_rate_it_names():
    floor = _floors.Floor([_floors.Stage(flop=2e9, bytes=1e6), _floors.Stage(bytes=3e6)])
    assert floor.ms(copy_gbps=1, gemm_tflops=1) == pytest.approx(2 + 3)
    assert floor.ms(copy_gbps=1, gemm_tflops=4) == pytest.approx(1 + 3)
    assert floor.ms(copy_gbps=1, gemm_tflops=None) is None
    assert _floors.encode(1, 2048, 32768, 50, 2).ms(4300, None) == pytest.approx(0.0312, abs=1e-4)


def fake_case(providers, in_place=False):
    def check(result, want, precision):
        assert result == want, f"{result} is not {want}"

    return Case("fake", Sizes(4, 8, 16, 2), "float32", lambda seed: (torch.zeros(1),), lambda i: 1, check, providers,
                _floors.Floor([_floors.Stage(bytes=1e6)], 1e9), seconds=0.01, in_place=in_place)  # fmt: skip


def answering(value, calls, role="peer", **more):
    return Provider(lambda i: lambda: calls.append(value) or value, role, **more)


def run_fake(providers):
    rows = []
    outcome = _harness.run_case(fake_case(providers), "cpu", _harness.Ceiling(1.0), {"device": "x"}, rows.append, 3)
    assert rows == outcome.rows
    return {row["provider"]: row for row in rows}, outcome.faults


def test_a_wrong_peer_is_reported_and_not_timed():
    calls = []
    rows, faults = run_fake({"mine": answering(1, calls, OURS), "theirs": answering(2, calls)})
    assert faults == []
    assert rows["theirs"]["correct"] == "no" and "2 is not 1" in rows["theirs"]["note"]
    assert "p50_ms" not in rows["theirs"] and calls.count(2) == 1
    assert rows["mine"]["correct"] == "yes" and rows["mine"]["rounds"] == 3


def test_every_provider_is_checked_before_any_is_timed():
    calls = []
    run_fake({"a": answering(1, calls, OURS), "b": answering(True, calls)})
    assert calls[:2] == [1, True] and len(calls) == 2 + 2 * 4
    assert calls[2::2] == [1] * 4 and calls[3::2] == [True] * 4, "rounds are interleaved"


@pytest.mark.parametrize("ours", ["wrong", "raises"])
def test_a_fault_of_ours_ends_with_status_1(monkeypatch, tmp_path, capsys, ours):
    def fail(i):
        raise ValueError("a bug\nwith a second line")

    mine = answering(3, [], OURS) if ours == "wrong" else Provider(fail, OURS)
    main = importlib.import_module("bench.__main__")
    monkeypatch.setattr(_run, "cases", lambda op, device, quick: [fake_case({"mine": mine, "peer": answering(1, [])})])
    monkeypatch.setattr(_run, "copy_gbps", lambda device: 10.0)
    argv = ["bench", "--op", "topk_select", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert main.main() == 1
    assert "FAULT: fake N=4" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.csv")
    rows = {row["provider"]: row for row in _results.read(path)}
    assert rows["mine"]["p50_ms"] is None and ("3 is not 1" if ours == "wrong" else "a bug") in rows["mine"]["note"]
    assert rows["peer"]["p50_ms"] > 0, "the others are still measured"
    assert "a bug" not in rows["mine"]["note"] or "second line" not in rows["mine"]["note"]


def test_a_peer_that_is_not_installed_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(_peers.PACKAGES, "sae-lens", "no_such_module_here")
    missing = _peers.provider("sae-lens", lambda i: pytest.fail("must not be made"))
    rows, faults = run_fake({"mine": answering(1, [], OURS), "sae-lens": missing})
    assert rows["sae-lens"]["note"] == "not installed" and rows["sae-lens"]["correct"] is None and faults == []


@pytest.mark.parametrize(("value", "is_fault"), [("refuse", False), (2, True)])
def test_a_variant_of_ours_may_refuse_a_shape_but_not_be_wrong(value, is_fault):
    def make(i):
        if value == "refuse":
            raise ValueError("needs whole rows")
        return lambda: value

    rows, faults = run_fake({"mine": answering(1, [], OURS), "variant": Provider(make, OURS, optional=True)})
    assert "p50_ms" not in rows["variant"] and bool(faults) == is_fault


def test_floor_share_and_rates_of_a_row(monkeypatch):
    times = {"mine": [2.0, 2.0, 4.0], "product": [1.0] * 3}
    monkeypatch.setattr(_harness, "interleaved", lambda *_: times)
    providers = {"mine": answering(1, [], OURS), "product": answering(1, [], YARDSTICK)}
    stage = _floors.Stage(flop=4e9, bytes=1e6)
    case = dataclasses.replace(fake_case(providers), floor=_floors.Floor([stage], 4e9), gemm="product")
    rows = _harness.run_case(case, "cpu", _harness.Ceiling(10.0), {}, lambda row: None).rows
    mine = next(row for row in rows if row["provider"] == "mine")
    # The product alone ran 4 GFLOP in 1 ms, traffic asks 0.1 ms: the floor is 1 ms, half of what was taken.
    assert mine["floor_ms"] == pytest.approx(1) and mine["share_of_floor"] == pytest.approx(0.5)
    assert (mine["tflops"], mine["gbps"]) == (pytest.approx(2), pytest.approx(0.5))
    assert (mine["p20_ms"], mine["p50_ms"], mine["p80_ms"], mine["rounds"]) == (2, 2, 4, 3)


def test_on_a_gpu_every_right_provider_has_an_eager_and_a_graph_row(monkeypatch):
    """The GPU's clocks replaced, since there is none here: what is captured, divided, checked again and reported."""

    def captured(rotation, eager_ms):
        result = rotation()
        if result == 7:
            raise RuntimeError("called a synchronizing CUDA operation")
        return rotation, 4, 5 if result == 1.0 and isinstance(result, float) else result

    clock = {"mine": [8.0] * 3, "waits": [8.0] * 3, "lies": [8.0] * 3, "slow": [40.0] * 3}
    monkeypatch.setattr(_harness, "input_sets", lambda *_: 1)
    monkeypatch.setattr(_harness, "peak_mib", lambda call: 2.5)
    monkeypatch.setattr(_harness, "captured", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(_harness, "interleaved", lambda calls, *_: {name: clock[name] for name in calls})
    providers = {
        "mine": answering(1, [], OURS),
        "waits": Provider(lambda i: lambda: 7, adapt=lambda result: 1),
        "lies": answering(1.0, [], OURS),
        "slow": answering(1, []),
    }
    outcome = _harness.run_case(fake_case(providers), "cuda", _harness.Ceiling(1.0), {}, lambda row: None)
    rows = {(row["provider"], row["mode"]): row for row in outcome.rows}
    assert rows["mine", "eager"]["p50_ms"] == 8 and rows["mine", "graph"]["p50_ms"] == 2, "one replay is four calls"
    assert rows["mine", "graph"]["peak_mib"] == 2.5
    assert "not captured into a CUDA graph: called a synchronizing" in rows["waits", "graph"]["note"]
    assert rows["lies", "graph"]["correct"] == "no" and "p50_ms" not in rows["lies", "graph"]
    assert ("slow", "graph") not in rows, "launches are no part of 40 ms"
    (fault,) = outcome.faults
    assert "lies wrong result under graph replay" in fault


def row(provider="qscope", role="ours", p50=1.0, **more):
    about = {"device": "NVIDIA H200", "torch": "2.11.0", "python": "3.12.1", "commit": "c" * 40, "uncommitted": "yes"}
    sizes = {"op": "sparse_decode", "mode": "graph", "N": 8192, "D": 2048, "F": 32768, "K": 50, "dtype": "bfloat16"}
    names = ("min_ms", "p20_ms", "p50_ms", "p80_ms")
    times = {**dict.fromkeys(names, p50), "rounds": 9, "correct": "yes"} if p50 else {}
    return {"provider": provider, "role": role, **sizes, **times, **about, **more}


def test_result_file_has_the_columns_and_keeps_rows_as_they_come(tmp_path):
    path = tmp_path / "device.csv"
    file = _results.ResultFile(path)
    file.append(row())
    assert len(_results.read(path)) == 1, "on the disk before the next is measured"
    file.append(row("embedding_bag", "peer", 2.0))
    header = path.read_text().splitlines()[0].split(",")
    wanted = (
        "op provider mode N D F K dtype p20_ms p50_ms p80_ms rounds tflops gbps share_of_floor peak_mib correct note"
    )
    assert set(wanted.split()) <= set(header) and {"device", "torch", "triton", "python", "commit"} <= set(header)
    assert next(csv.DictReader(path.open()))["uncommitted"] == "yes"
    other = _results.ResultFile(path)
    other.append(row(op="topk_select"))
    assert [r["op"] for r in _results.read(path)] == ["sparse_decode", "sparse_decode", "topk_select"]
    again = _results.ResultFile(path)
    again.append(row(p50=0.5))
    rows = _results.read(path)
    assert [(r["op"], r["p50_ms"]) for r in rows] == [("topk_select", 1.0), ("sparse_decode", 0.5)]
    assert (rows[0]["N"], rows[0]["note"], rows[0]["peak_mib"]) == (8192, None, None)


def test_table_puts_the_ratio_first_and_marks_what_is_lost():
    rows = [
        row(),
        row("embedding_bag", "peer", 3.0),
        row("eai-sparsify decode", "peer", 0.5),
        row("sae-lens", "peer", None, note="not installed"),
    ]
    page = bench_text.markdown(rows, summary(rows))
    assert "| 3.00x | 3.00x |  | sparse_decode N=8192 D=2048 F=32768 K=50 bfloat16 graph | qscope | 1.000 |" in page
    lost = page.split("## Where qscope loses")[1].split("##")[0]
    assert "| 0.50x | 0.50x | **LOSES** |" in lost and "embedding_bag" not in lost
    assert "| sae-lens | sparse_decode | not installed |" in page
    assert "with uncommitted changes" in page and "cccccccccccc" in page


def test_bars_are_judged_at_their_hardest_case():
    rows = [
        row(share_of_floor=0.9),
        row("embedding_bag", "peer", 3.0),
        row("eai-sparsify decode", "peer", 0.5),
        row(F=65536, share_of_floor=0.6),
        row("embedding_bag", "peer", 2.0, F=65536),
    ]
    bars = {bar.name: bar for bar in summary(rows).bars}
    assert len(bars) == len(GPU_BARS)
    assert bars["decode, share of its gather floor"].met is False
    assert "0.6x at N=8192 D=2048 F=65536" in bars["decode, share of its gather floor"].measured
    assert bars["decode against embedding_bag"].met is True
    assert bars["decode against eai-sparsify"].met is False
    assert bars["steer_add at N=1 under graph replay"].met is None
    page = bench_text.markdown(rows, summary(rows))
    assert "| **MISSED** | decode, share of its gather floor | >= 0.7x | 0.6x" in page
    steering = [row(op="steer_add", N=1, F=0, K=8, p50=0.004), row(op="steer_add", mode="eager", N=1, F=0, K=8, p50=1)]
    assert next(b for b in summary(steering).bars if "N=1" in b.name).measured.startswith("4 us at N=1")


def test_bars_belong_to_the_device_they_were_set_for():
    assert summary([row(device="NVIDIA A10G")]).bars == []
    cpu = summary([row(device="AMD EPYC", threads="2", mode="eager")]).bars
    assert [bar.name for bar in cpu] == [bar.name for bar in CPU_BARS]


def test_every_bar_names_providers_that_the_cases_have():
    """A renamed provider would turn its bar into `not measured` for good."""
    rows = []
    for case in (case for op in OPS for case in cases(op, "cuda")):
        for mode in ("eager", "graph"):
            base = {"op": case.op, "mode": mode, **case.sizes._asdict(), "dtype": case.dtype, "device": "NVIDIA H200"}
            for name, provider in case.providers.items():
                times = dict.fromkeys(("min_ms", "p50_ms", "share_of_floor"), 1.0)
                rows.append({**base, "provider": name, "role": provider.role, **times})
    assert [bar.name for bar in summary(rows).bars if bar.met is None] == []


@pytest.mark.parametrize("op", OPS)
def test_cases_cover_the_shapes_that_were_promised(op):
    found = cases(op, "cuda")
    assert all(case.op.startswith(op) for case in found)
    assert len({str(case) for case in found}) == len(found)
    if op not in ("train_step", "steer_add"):
        assert {case.sizes.F for case in found} == {F for _, F in QWEN_SCOPE.values()}
        assert {case.sizes.K for case in found} == {50, 100}
    assert any(case.sizes.N == 8192 for case in found)
    assert all(sum(p.role == OURS for p in case.providers.values()) >= 1 for case in found)
    assert all(not case.gemm or case.gemm in case.providers for case in found)


@pytest.mark.parametrize("op", OPS)
def test_our_result_passes_the_check_of_its_case_and_a_wrong_one_does_not(op):
    """The check is what lends a time its meaning: it has to be able to fail."""
    case = cases(op, "cpu", quick=True)[0]
    inputs = case.inputs(0)
    want = case.want(inputs)
    provider = next(iter(case.providers.values()))
    assert provider.role == OURS
    result = provider.make(inputs)()
    shown = result if provider.adapt is None else provider.adapt(result)
    case.check(shown, want, provider.precision)
    parts = list(shown) if isinstance(shown, tuple) else [shown]
    for place, part in enumerate(parts):
        spoiled = parts.copy()
        if isinstance(part, torch.Tensor):
            spoiled[place] = part.clone()
            spoiled[place].view(-1)[-1:] += 1 if not part.dtype.is_floating_point else part.abs().max().to(part.dtype)
        else:
            spoiled[place] = part * 1.5
        with pytest.raises(AssertionError):
            case.check(tuple(spoiled) if isinstance(shown, tuple) else spoiled[0], want, provider.precision)


def test_the_certificate_finds_a_neighbour_and_a_double():
    """The k + 1st score in place of the k-th has the right value at its id: only the threshold shows it."""
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    _checks.check_topk((scores[:, [1, 0, 2]], torch.tensor([[1, 0, 2]])), scores, 3, 1e-3)
    for ids, message in (([0, 1, 3], "was left out"), ([0, 1, 1], "selected twice"), ([0, 1, 4], "was left out")):
        with pytest.raises(AssertionError, match=message):
            _checks.check_topk((scores[:, ids], torch.tensor([ids])), scores, 3, 1e-3)
    with pytest.raises(AssertionError, match="off its score"):
        _checks.check_topk((scores[:, :3] + 0.1, torch.tensor([[0, 1, 2]])), scores, 3, 1e-3)


def test_input_sets_stay_one_on_a_cpu_and_quantiles_are_taken_from_sorted_times():
    assert _timing.input_sets((torch.zeros(4),), "cpu") == 1
    assert _timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 5.0)
    turns = []
    rotation = _timing.Rotation([lambda i=i: turns.append(i) for i in range(3)])
    for _ in range(6):
        rotation()
    assert sorted(turns) == [0, 0, 1, 1, 2, 2]


def test_a_budget_leaves_cases_out_and_says_which(monkeypatch):
    monkeypatch.setattr(_run, "copy_gbps", lambda device: 10.0)
    done = _run.run(["topk_select"], "cpu", quick=True, budget_s=0.0)
    assert len(done.left_out) == len(cases("topk_select", "cpu", True)) and "topk_select N=256" in done.left_out[0]


def test_facts_do_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = _facts.common_facts("cpu")
    assert facts["commit"].startswith("sources-") and facts["uncommitted"] is None
    assert facts["torch"] == torch.__version__
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(_facts, "ROOT", tmp_path)
    digests = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "kernels" / "x.py").write_text(text)
        digests.append(_facts.commit())
    assert digests[0] == digests[2] != digests[1]


def test_qscope_bench_prints_a_table_and_json(tmp_path, capsys, monkeypatch):
    harness = importlib.import_module("qscope._bench._run") if "qscope._bench" in sys.modules else None
    workflow.cases_package()
    harness = harness or importlib.import_module("qscope._bench._run")
    monkeypatch.setattr(harness, "copy_gbps", lambda device: 10.0)
    argv = ["bench", "--op", "topk_select", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out = capsys.readouterr().out
    assert not stop.value.code and "topk_select N=256 F=4096 K=50 bfloat16 eager" in out and "torch topk" in out
    assert len(_results.read(next(tmp_path.glob("*.csv")))) == 4
    with pytest.raises(SystemExit):
        cli.main([*argv[:-2], "--json"])
    result = json.loads(capsys.readouterr().out)
    assert {r["op"] for r in result["rows"]} == {"topk_select"} and result["faults"] == []


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="cannot be measured here"):
        workflow.run(workflow.BenchConfig(device="tpu"))


def test_workflow_and_folder_name_the_same_operators():
    assert set(workflow.Op.__args__) == set(OPS)
    scripts = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    programs = {"encode", "train", "steer", "coverage", "classify", "feature_penalty"}  # whole ones: their own main
    assert scripts == {*OPS, *programs}


def test_folder_runs_as_a_module_from_the_repository():
    command = [sys.executable, "-m", "bench", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--budget-s" in done.stdout, done.stderr


def test_plots_without_matplotlib_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(QscopeError, match="pip install matplotlib"):
        bench_plot.write_plots([row()], tmp_path)


def test_one_plot_per_operator(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, which is optional")
    rows = [row(F=F, share_of_floor=0.5) for F in (32768, 65536)] + [row("embedding_bag", "peer", 2.0)]
    (path,) = bench_plot.write_plots(rows, tmp_path)
    assert path.name == "sparse_decode.svg" and path.stat().st_size > 5000
