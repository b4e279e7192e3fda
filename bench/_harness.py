"""Time several providers of one operation fairly: interleaved, round by round, in one process."""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = Path(__file__).resolve().parents[1]


def arguments(description: str, rounds: int) -> argparse.Namespace:
    """The options that every benchmark script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds per case (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def device_name(device: str) -> str:
    """The name of the processor that is measured."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def slug(device: str) -> str:
    """The processor's name as part of a file name."""
    return "".join(c if c.isalnum() else "-" for c in device_name(device).lower()).strip("-")


def common_facts(device: str) -> dict[str, Any]:
    """What every row of a result file says about where it was measured."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def measure(
    providers: dict[str, Callable[[], Any]], device: str, rounds: int, check: Callable[[Any], None]
) -> dict[str, list[float]]:
    """Milliseconds of every round of every provider. Rounds are interleaved, so that a slow spell of the
    machine falls on all of them. `check` gets every provider's result first and raises where it is wrong."""
    for call in providers.values():
        check(call())
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, call in providers.items():
            times[name].append(_once(call, device))
    return {name: sorted(values) for name, values in times.items()}


def _once(call: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


class Report:
    """Prints one line per case, ratio first, and writes all rows to results/<name>-<device>.json."""

    def __init__(self, name: str, device: str):
        self.name, self.device, self.rows = name, device, []
        self.common = common_facts(device)

    def add(self, op: str, mode: str, shape: dict[str, int], dtype: str, times: dict[str, list[float]]) -> None:
        """Record one case; the first provider is ours, the others are its peers."""
        ours, *peers = times
        for name, values in times.items():
            p20, p50, p80 = (values[min(len(values) - 1, int(len(values) * q))] for q in (0.2, 0.5, 0.8))
            self.rows.append(
                dict(op=op, provider=name, mode=mode, shape=shape, dtype=dtype, min_ms=values[0])
                | dict(p20_ms=p20, p50_ms=p50, p80_ms=p80, rounds=len(values))
                | self.common
            )
        size = " ".join(f"{key}={value}" for key, value in shape.items())
        for peer in peers:
            fastest = times[peer][0] / times[ours][0]
            median = times[peer][len(times[peer]) // 2] / times[ours][len(times[ours]) // 2]
            print(
                f"{fastest:5.2f}x (median {median:5.2f}x)  {op} {mode} {size} {dtype}: "
                f"{ours} {times[ours][0]:.2f} ms, {peer} {times[peer][0]:.2f} ms",
                flush=True,
            )

    def write(self) -> Path:
        """Write the rows as JSON; returns the path."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.name}-{slug(self.device)}.json"
        path.write_text(json.dumps(self.rows, indent=1) + "\n")
        return path


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
