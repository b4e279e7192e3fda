"""GPU tests, sanitizer and all benchmarks on a machine with an NVIDIA GPU, in under ten minutes.

    python scripts/gpu_check.py [--only NAME[,NAME]] [--out bench/results] [--budget-s 570]
    make gpu-check [ONLY=NAME[,NAME]] [OUT=bench/results]

Needs torch and triton, no network and no installation. Each step runs in its own process until its share of the time
is over; what earlier steps did not use is left to later ones. Written to --out: <device>.csv (rows, kept even of a step
that was stopped), <device>.md, gpu-check-<device>.md (this run and the tables) and gpu-check-<device>.json (output).
Without an NVIDIA GPU it says so in one line and exits 0. Exit status 0 only if every step that ran succeeded.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "pytest")
BENCHES = {
    "topk_encode": 80,
    "topk_select": 25,
    "sparse_decode": 40,
    "decode_loss": 30,
    "sparse_grads": 30,
    "train_step": 45,
    "steer_add": 20,
    "feature_stats": 20,
}
SHARES = {
    "tests": 200,
    "sanitizer": 50,
    **BENCHES,
    "table": 10,
}  # seconds; shares of the budget. The tests compile about 270 kernels first
GRACE_S = 15  # a benchmark begins no case in its last seconds, so that it ends by itself
_KEPT = 20_000  # characters of a step's output in the JSON file


class Step(NamedTuple):
    """A process to run, and its share of the time."""

    name: str
    command: list[str]
    seconds: float
    problem: str = ""
    """Why it cannot run; it then counts as failed, or as left out if that says so."""
    optional: bool = False


class Done(NamedTuple):
    """What became of a step."""

    name: str
    state: str
    """ok, FAILED, STOPPED (out of time) or not run."""
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        return self.state == "ok" or self.state.startswith("left out")


def absent_gpu() -> str | None:
    """Why nothing can be checked here, or None if there is an NVIDIA GPU that torch can use."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    if not torch.cuda.is_available():
        return "torch was built without CUDA" if torch.version.cuda is None else "CUDA finds no device"
    return None


def chosen(only: str) -> list[str]:
    """The names of the steps that `only` asks for, in the order of a full run; all of them if it is empty.

    Raises ValueError for a name that is no step.
    """
    asked = [name.strip() for name in only.replace(" ", ",").split(",") if name.strip()]
    unknown = sorted(set(asked) - set(SHARES))
    if unknown:
        raise ValueError(f"ONLY names {', '.join(unknown)}; the steps are {', '.join(SHARES)}.")
    return [name for name in SHARES if not asked or name in asked]


def deadlines(steps: Sequence[Step], budget_s: float) -> list[float]:
    """Seconds after the start at which each step has to end. Shares grow or shrink together to fill the budget.

    A step may use what those before it left over, never what those after it need.
    """
    total, ends = sum(step.seconds for step in steps), []
    for step in steps:
        ends.append((ends[-1] if ends else 0.0) + step.seconds * budget_s / total)
    return ends


def build_steps(names: Sequence[str], out: Path) -> list[Step]:
    """The steps of these names on this machine."""
    makers = {"tests": _tests, "sanitizer": _sanitizer}
    steps = []
    for name in names:
        if name in makers:
            steps.append(makers[name]())
        else:
            arguments = ["--table"] if name == "table" else ["--op", name]
            command = [sys.executable, "-m", "bench", "--device", "cuda", "--out", str(out), *arguments]
            steps.append(Step(name, command, SHARES[name]))
    return steps


def _tests() -> Step:
    """Only files that hold GPU tests are collected: others may need packages that this machine does not have."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=10"]
    missing = "" if util.find_spec("pytest") else "pytest is not installed here, so NO GPU TEST WAS RUN"
    return Step("tests", [*command, *(str(p.relative_to(ROOT)) for p in files)], SHARES["tests"], missing)


def _sanitizer() -> Step:
    tool = sanitizer()
    if tool is None:
        return Step("sanitizer", [], SHARES["sanitizer"], "compute-sanitizer was not found", optional=True)
    script = str(Path(__file__).resolve().parent / "gpu_small_set.py")
    return Step("sanitizer", [sys.executable, script, "--sanitizer", tool], SHARES["sanitizer"])


def sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or beside nvcc."""
    folders = [Path(found).resolve().parent for found in [shutil.which("nvcc")] if found]
    folders += [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    search = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=search)


def run_steps(steps: Sequence[Step], budget_s: float) -> list[Done]:
    """Run the steps one after the other, each until its deadline; print how each ended and the time so far."""
    begin, done = time.perf_counter(), []
    for step, end in zip(steps, deadlines(steps, budget_s), strict=True):
        start = time.perf_counter() - begin
        if step.problem:
            state = f"left out: {step.problem}" if step.optional else f"FAILED: {step.problem}"
            done.append(Done(step.name, state, 0.0, ""))
        else:
            print(f"== {step.name}: at most {end - start:.0f} s: {' '.join(step.command[1:])[:160]}", flush=True)
            done.append(run(step, end - start))
        total = time.perf_counter() - begin
        print(f"== {step.name}: {done[-1].state}, {done[-1].seconds:.0f} s; {total:.0f} s so far", flush=True)
    return done


def run(step: Step, limit_s: float) -> Done:
    """Run one step with the kernels importable and really compiled, showing its output; stop it at the limit."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH")]
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    command = list(step.command)
    if command[1:3] == ["-m", "bench"]:
        command += ["--budget-s", f"{max(1.0, limit_s - GRACE_S):.0f}"]
    start, lines = time.perf_counter(), []
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None

    def show(stream: Any) -> None:
        for line in stream:
            print(line, end="", flush=True)
            lines.append(line)

    reader = threading.Thread(target=show, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        process.wait(timeout=max(1.0, limit_s))
        state = "ok" if process.returncode == 0 else f"FAILED with exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        state = f"STOPPED after {limit_s:.0f} s, its share of the time; rows measured until then are kept"
    _end(process)
    reader.join(timeout=5)
    return Done(step.name, state, time.perf_counter() - start, "".join(lines))


def _end(process: "subprocess.Popen[str]") -> None:
    """End the step's own process group, children included; nothing else belongs to it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue


def machine() -> dict[str, Any]:
    """Device, driver, versions and commit: what a figure needs to mean anything later."""
    import torch

    sys.path.insert(0, str(ROOT))
    from bench._facts import commit, uncommitted

    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "--id=0"]
    return {
        "device": device.name,
        "compute capability": f"{device.major}.{device.minor}",
        "memory": f"{device.total_memory / 2**30:.1f} GiB",
        "multiprocessors": device.multi_processor_count,
        "driver, highest clock, power limit": _ask(query),
        "CUDA of torch": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "nvcc": "found" if shutil.which("nvcc") else "not found",
        "commit": commit(),
        "uncommitted changes": uncommitted(),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _ask(command: list[str]) -> str | None:
    """Output of a command that only reads, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def report(about: dict[str, Any], done: Sequence[Done], page: str) -> str:
    """gpu-check-<device>.md: the machine, how each step ended, and the benchmark tables of `page`."""
    lines = [f"# make gpu-check on {about['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items() if value is not None]
    lines += ["", "| step | result | seconds |", "| --- | --- | --- |"]
    lines += [f"| {step.name} | {step.state} | {step.seconds:.0f} |" for step in done]
    lines += ["", f"Together {sum(step.seconds for step in done):.0f} s."]
    left_out = [line for step in done for line in step.output.splitlines() if line.startswith("not measured")]
    lines += ["", *(f"- {line}" for line in left_out), ""] if left_out else []
    lines += [f"Tests: {line}" for step in done if step.name == "tests" for line in step.output.splitlines()[-1:]]
    return "\n".join(lines) + ("\n\n" + page.replace("# Benchmarks", "## Benchmarks", 1) if page else "\n")


def write(out: Path, about: dict[str, Any], done: Sequence[Done]) -> Path:
    """Write the two files of this run; returns the Markdown one."""
    slug = "".join(c if c.isalnum() else "-" for c in about["device"].lower()).strip("-")
    table = out / f"{slug}.md"
    steps = [step._asdict() | {"output": step.output[-_KEPT:], "seconds": round(step.seconds, 1)} for step in done]
    (out / f"gpu-check-{slug}.json").write_text(json.dumps({"machine": about, "steps": steps}, indent=1) + "\n")
    path = out / f"gpu-check-{slug}.md"
    path.write_text(report(about, done, table.read_text(encoding="utf-8") if table.exists() else ""), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"steps, separated by commas: {', '.join(SHARES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    parser.add_argument("--budget-s", type=float, default=570, help="seconds for everything (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        names = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    reason = absent_gpu()
    if reason is not None:
        print(f"gpu-check: no NVIDIA GPU on this machine ({reason}); nothing was checked.")
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    about = machine()
    done = run_steps(build_steps(names, out), args.budget_s)
    print(f"gpu-check: {write(out, about, done)}")
    bad = [step.name for step in done if not step.good]
    print(f"gpu-check: {len(done) - len(bad)} of {len(done)} steps succeeded{'; not: ' * bool(bad)}{', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
