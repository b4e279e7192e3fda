"""Runs the cases of several operators and keeps their rows."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import cases
from ._case import Case
from ._facts import common_facts
from ._harness import Ceiling, run_case
from ._results import ResultFile, Row
from ._timing import copy_gbps


@dataclass
class Run:
    """What a run produced."""

    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Our own results that were wrong, or failed."""
    left_out: list[str] = field(default_factory=list)
    """Cases that the budget had no time for."""


def run(
    ops: Iterable[str],
    device: str,
    *,
    quick: bool = False,
    rounds: int = 0,
    budget_s: float | None = None,
    csv: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Run:
    """Run every case of `ops` on `device`; rows are appended to `csv` as they are measured."""
    end = None if budget_s is None else time.perf_counter() + budget_s
    done, file, common = Run(), None if csv is None else ResultFile(csv), common_facts(device)

    def emit(row: Row) -> None:
        done.rows.append(row)
        if file is not None:
            file.append(row)

    ceiling = Ceiling(copy_gbps(device))
    say(f"large copy: {ceiling.copy_gbps:,.1f} GB/s")
    for op in ops:
        for case in cases(op, device, quick):
            if end is not None and time.perf_counter() >= end:
                done.left_out.append(str(case))
                say(f"not measured, out of time: {case}")
                continue
            try:
                rows, faults = run_case(case, device, ceiling, common, emit, rounds)
            except (RuntimeError, AssertionError) as error:  # out of memory, a reference that fails: the others count
                rows, faults = [], [f"{case}: could not be measured: {type(error).__name__}: {error}"]
            done.faults += faults
            for line in [*_lines(case, rows), *(f"  FAULT {fault}" for fault in faults)]:
                say(line)
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
    return done


def _lines(case: Case, rows: list[Row]) -> list[str]:
    lines = [str(case)]
    for row in rows:
        time_ms = f"{row['p50_ms']:10.4f} ms" if row.get("p50_ms") is not None else f"{'-':>10}   "
        share = row.get("share_of_floor")
        floor = f"{100 * share:5.0f} % of floor" if share is not None else ""
        lines.append(f"  {row['provider']:28} {row['mode']:6} {time_ms} {floor} {row.get('note') or ''}".rstrip())
    return lines
