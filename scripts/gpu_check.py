"""Run the GPU tests and every benchmark on this machine's NVIDIA GPU; write the results to bench/results/.

    python scripts/gpu_check.py [--tests-only | --bench-only] [--out bench/results]

Without an NVIDIA GPU it says so in one line and exits 0. Each bench/bench_*.py runs in its own process with
no arguments; lines of its output that are JSON objects become the `records` of its result file, the rest is
kept as text. Exit status 0 only if the tests and every benchmark succeeded.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors")


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


def git(*args: str) -> str | None:
    """Output of a read-only git command, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Device, driver, versions and commit: what a figure needs to mean anything later."""
    import torch

    device = torch.cuda.get_device_properties(0)
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
            "--id=0",
        ]
        smi = subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        smi = None
    versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
    status = git("status", "--porcelain")
    return {
        "device": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "driver_maxclock_powerlimit": smi,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def run(command: list[str]) -> tuple[int, str, float]:
    """Run with the kernels importable and really compiled; show the output and return status, output,
    seconds."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH")]
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    start, lines = time.perf_counter(), []
    with subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines), time.perf_counter() - start


def split_records(output: str) -> tuple[list[dict[str, Any]], list[str]]:
    """JSON objects printed one per line, and the other lines."""
    records, text = [], []
    for line in output.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        (records if isinstance(value, dict) else text).append(value if isinstance(value, dict) else line)
    return records, text


def check(name: str, command: list[str], about: dict[str, Any], out: Path) -> bool:
    """Run one step and write its result file; True if it succeeded."""
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    status, output, seconds = run(command)
    records, text = split_records(output)
    result = {
        "name": name,
        "command": command[1:],
        "exit_status": status,
        "seconds": round(seconds, 1),
    } | about
    result |= {
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "records": records,
        "output": text,
    }
    device = "".join(c if c.isalnum() else "-" for c in about["device"]).strip("-").lower()
    path = out / f"{name}.{device}.{(about['commit'] or 'nocommit')[:12]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    verdict = "ok" if status == 0 else f"FAILED with exit status {status}"
    print(f"== {name}: {verdict}, {seconds:.0f} s -> {path}", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--tests-only", action="store_true", help="run the tests marked gpu, no benchmarks")
    only.add_argument("--bench-only", action="store_true", help="run the benchmarks, no tests")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the result files")
    args = parser.parse_args()
    reason = absent_gpu()
    if reason is not None:
        print(f"gpu-check: no NVIDIA GPU on this machine ({reason}); nothing was checked.")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine()
    steps: list[tuple[str, list[str]]] = []
    if not args.bench_only:
        steps.append(("gpu_tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]))
    if not args.tests_only:
        scripts = sorted((ROOT / "bench").glob("bench_*.py"))
        steps += [(path.stem, [sys.executable, str(path.relative_to(ROOT))]) for path in scripts]
    done = {name: check(name, command, about, args.out) for name, command in steps}
    failed = [name for name, ok in done.items() if not ok]
    print(
        f"gpu-check: {len(done) - len(failed)} of {len(done)} steps succeeded"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
