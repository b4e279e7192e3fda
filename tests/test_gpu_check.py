"""make gpu-check without a GPU: which steps ONLY means, how time is shared out, what is left of a stopped step."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import gpu_check, gpu_small_set
from scripts.gpu_check import BENCHES, SHARES, Done, Step

ROOT = Path(__file__).parents[1]
OUT_OF_TIME = "\nnot measured, out of time: steer_add N=1 D=2048 K=8 bfloat16\n"
ABOUT = {"device": "NVIDIA H200", "python": "3.12.1", "driver": None}


def python(name, code, seconds=10.0, **more):
    return Step(name, [sys.executable, "-c", code], seconds, **more)


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("", list(SHARES)),
        ("steer_add", ["steer_add"]),
        ("table, tests", ["tests", "table"]),
        ("tests steer_add,", ["tests", "steer_add"]),
    ],
)
def test_only_names_the_steps_in_the_order_of_a_full_run(only, names):
    assert gpu_check.chosen(only) == names


def test_an_unknown_step_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--only", "testz"])
    assert stop.value.code == 2
    assert "testz; the steps are tests, sanitizer, topk_encode" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_in_one_line_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "absent_gpu", lambda: "CUDA finds no device")
    assert gpu_check.main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "gpu-check: no NVIDIA GPU on this machine (CUDA finds no device); nothing was checked."


def test_every_operator_has_a_step_and_the_shares_fit_into_ten_minutes():
    from bench import OPS

    assert list(BENCHES) == list(OPS)
    assert sum(SHARES.values()) <= 570


def test_deadlines_fill_the_budget_and_leave_later_steps_their_share():
    steps = [python("a", "", 10), python("b", "", 30)]
    assert gpu_check.deadlines(steps, 80) == [20, 80]
    assert gpu_check.deadlines(steps, 4) == [1, 4]
    assert gpu_check.deadlines(steps[1:], 570) == [570]


def test_a_step_is_stopped_with_its_children_and_keeps_its_output(tmp_path, capsys):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import subprocess, sys, time
print('measured', flush=True)
subprocess.Popen([sys.executable, '-c', {child!r}])
time.sleep(60)
"""
    start = time.perf_counter()
    done = gpu_check.run(python("slow", code), 2.0)
    assert time.perf_counter() - start < 15
    assert done.state.startswith("STOPPED after 2 s") and not done.good
    assert done.output == "measured\n" and "measured" in capsys.readouterr().out
    if pid.exists():  # a loaded machine may stop the step before its child has started
        for _ in range(50):
            if not _alive(int(pid.read_text())):
                break
            time.sleep(0.1)
        assert not _alive(int(pid.read_text()))


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().split()[2] == "Z")


def test_steps_run_on_after_a_failure_and_unused_time_is_handed_on(capsys):
    steps = [
        python("bad", "print('why'); raise SystemExit(3)"),
        Step("no pytest", [], 1.0, "pytest is not installed"),
        Step("no tool", [], 1.0, "compute-sanitizer was not found", optional=True),
        python("good", "print(1)"),
    ]
    done = gpu_check.run_steps(steps, 30)
    assert [step.good for step in done] == [False, False, True, True]
    assert done[0].state == "FAILED with exit status 3" and done[0].output == "why\n"
    assert done[1].state == "FAILED: pytest is not installed"
    out = capsys.readouterr().out
    first, last = (line for line in out.splitlines() if "at most" in line)
    assert "bad: at most 14 s" in first
    assert int(last.split("at most ")[1].split()[0]) > 20, "what the first steps did not use"
    assert "s so far" in out


def test_a_benchmark_is_told_to_end_by_itself():
    steps = gpu_check.build_steps(["topk_select", "table"], Path("/results"))
    assert steps[0].command[1:] == ["-m", "bench", "--device", "cuda", "--out", "/results", "--op", "topk_select"]
    assert steps[1].command[-1] == "--table"
    print_arguments = "import sys; print(sys.argv[1:])"
    step = Step("fake", [sys.executable, "-c", print_arguments], 5.0)
    assert gpu_check.run(step, 40).output == "[]\n"


def test_the_budget_reaches_the_benchmark(monkeypatch, tmp_path):
    (tmp_path / "bench.py").write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    done = gpu_check.run(Step("fake", [sys.executable, "-m", "bench"], 5.0), 40.0)
    assert done.output == "['--budget-s', '25']\n"


def test_tests_step_holds_every_file_with_gpu_tests_and_nothing_else():
    step = gpu_check._tests()
    files = {name for name in step.command if name.endswith(".py")}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py")} <= files
    assert "tests/test_cli.py" not in files


def test_missing_pytest_is_a_failure_that_says_that_no_test_ran(monkeypatch):
    monkeypatch.setattr(gpu_check.util, "find_spec", lambda name: None)
    assert "NO GPU TEST WAS RUN" in gpu_check._tests().problem


def test_report_files_hold_the_steps_and_the_table(tmp_path):
    (tmp_path / "nvidia-h200.md").write_text("# Benchmarks on NVIDIA H200\n\n| 0.50x | **LOSES** |\n")
    done = [
        Done("tests", "ok", 12.4, "....\n41 passed in 12 s\n"),
        Done("steer_add", "STOPPED after 3 s", 3.0, "x" * 30000 + OUT_OF_TIME),
    ]
    path = gpu_check.write(tmp_path, ABOUT, done)
    page = path.read_text()
    assert path.name == "gpu-check-nvidia-h200.md"
    assert "| steer_add | STOPPED after 3 s | 3 |" in page and "Tests: 41 passed in 12 s" in page
    assert "- not measured, out of time: steer_add N=1" in page, "what was left out is not passed over"
    assert "## Benchmarks on NVIDIA H200" in page and "**LOSES**" in page and "driver" not in page
    record = json.loads((tmp_path / "gpu-check-nvidia-h200.json").read_text())
    assert record["steps"][0]["name"] == "tests" and len(record["steps"][1]["output"]) == 20000
    assert len(list(tmp_path.iterdir())) <= 8, "a call on a lent machine returns no more files"


def test_sanitizer_is_found_beside_nvcc_or_left_out(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    step = gpu_check._sanitizer()
    assert step.optional and "not found" in step.problem
    (tmp_path / "bin").mkdir()
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / "bin" / name).touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_check.sanitizer() == str(tmp_path / "bin" / "compute-sanitizer")
    assert gpu_check._sanitizer().command[-1].endswith("compute-sanitizer")


@pytest.mark.parametrize("matmul", [True, False])
def test_the_small_set_calls_every_operator_with_arguments_that_it_takes(matmul):
    """On a CPU: what the sanitizer watches must not end with a TypeError on the day there is a GPU."""
    from qscope import ops

    calls = gpu_small_set.operators(matmul, "cpu")
    for call in calls.values():
        call()
    multiply = {"topk_encode", "topk_encode_certified", "topk_encode_packed", "pack_encoder"}
    names = {name.split()[0] for name in calls} | (set() if matmul else multiply)
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and name[0].islower()}
    assert functions - names <= {"fired_bitmap", "settings_tensor"}, "an operator is missing from the small set"


def test_it_runs_with_nothing_but_python(tmp_path):
    """Neither an installation nor a package is needed to learn that there is nothing to check."""
    command = [sys.executable, "-S", "-E", str(ROOT / "scripts" / "gpu_check.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "torch is not installed" in done.stdout, done.stderr
