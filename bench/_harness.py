"""Runs one case: every provider checked first, then all timed side by side, one row each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ._case import OURS, YARDSTICK, Case, Provider
from ._results import Row
from ._timing import Call, Rotation, captured, input_sets, interleaved, peak_mib, quantiles

Emit = Callable[[Row], None]
ROUNDS = {"cuda": 50, "cpu": 21}
SECONDS = {"cuda": 0.8, "cpu": 4.0}
# Above this, launching the kernels is no part of the time that could be seen, and a second timing buys nothing.
LONGEST_REPLAY_MS = 20.0


class Ceiling(NamedTuple):
    """What was measured of the machine in this run."""

    copy_gbps: float


class Outcome(NamedTuple):
    """What `run_case` says beside its rows."""

    rows: list[Row]
    faults: list[str]
    """Our own providers that were wrong or failed: the run must not succeed."""


def run_case(case: Case, device: str, ceiling: Ceiling, common: Row, emit: Emit, rounds: int = 0) -> Outcome:
    """Check and time every provider of a case; each row goes to `emit` as soon as it is known."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    base: Row = {"op": case.op, **case.sizes._asdict(), "dtype": case.dtype, "copy_gbps": ceiling.copy_gbps, **common}
    rows, faults = [], []

    def record(name: str, **fields: Any) -> None:
        role = case.providers[name].role
        rows.append({**base, "provider": name, "role": role, **fields})
        emit(rows[-1])

    first = case.inputs(0)
    want = case.want(first)
    right: dict[str, list[Call]] = {}
    for name, provider in case.providers.items():
        call, state, note = _checked(case, provider, first, want)
        if call is not None:
            right[name] = [call]
            continue
        record(name, mode="eager", correct=state, note=note)
        excused = provider.missing or (provider.optional and state != "no")
        if provider.role == OURS and not excused:
            faults.append(f"{case}: {name} {'is wrong' if state == 'no' else 'failed'}: {note}")
    for seed in range(1, input_sets(first, device)):
        other = case.inputs(seed)
        for name, calls in right.items():
            calls.append(case.providers[name].make(other))
    calls = {name: Rotation(each) for name, each in right.items()}
    peaks = {name: peak_mib(call) if kind == "cuda" else None for name, call in calls.items()}
    seconds = case.seconds or SECONDS[kind]
    notes = {name: p.note(first) for name, p in case.providers.items() if p.note is not None and name in right}
    eager = interleaved(dict(calls), device, rounds or ROUNDS[kind], seconds)
    _emit_times(case, ceiling, "eager", eager, peaks, {}, notes, record)
    if kind == "cuda":
        medians = {name: quantiles(times)[1] for name, times in eager.items()}
        short = {name: call for name, call in calls.items() if medians[name] <= LONGEST_REPLAY_MS}
        graph, problems = _graph_times(case, short, medians, want, rounds or ROUNDS[kind], seconds)
        _emit_times(case, ceiling, "graph", graph, peaks, problems, notes, record)
        faults += [f"{case}: {n} {p}" for n, p in problems.items() if "wrong" in p and case.providers[n].role == OURS]
    return Outcome(rows, faults)


def _checked(case: Case, provider: Provider, first: Any, want: Any) -> tuple[Call | None, str | None, str]:
    """(call, "yes", "") of a provider that is right; (None, "no" or None, why) of one that is not timed."""
    if provider.missing:
        return None, None, provider.missing
    try:
        call = provider.make(first)
        result = call()
        wrong = _wrong(case, provider, result, want)
    except Exception as error:  # a peer may raise anything: its row says what; run_case makes ours a fault, exit 1
        return None, None, f"failed: {type(error).__name__}: {_short(error)}"
    return (call, "yes", "") if wrong is None else (None, "no", f"wrong result, not timed: {wrong}")


def _wrong(case: Case, provider: Provider, result: Any, want: Any) -> str | None:
    """What the check finds, or None."""
    shown = result if provider.adapt is None else provider.adapt(result)
    try:
        (provider.check or case.check)(shown, want, provider.precision)
    except AssertionError as error:
        return _short(error)
    return None


def _graph_times(
    case: Case, calls: dict[str, Rotation], medians: dict[str, float], want: Any, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Replay times per call, and why a provider has none. A replay's result is checked like an eager one."""
    replays: dict[str, Call] = {}
    repeats: dict[str, int] = {}
    problems: dict[str, str] = {}
    for name, rotation in calls.items():
        provider = case.providers[name]
        try:
            replay, repeats[name], result = captured(rotation, medians[name])
        except RuntimeError as error:  # what torch raises for work that cannot be captured; it has run eagerly
            problems[name] = f"not captured into a CUDA graph: {_short(error)}"
            torch.cuda.synchronize()
            continue
        # Work in place has changed its input by now, and with several input sets the last result is of another one.
        if len(rotation.calls) == 1 and not case.in_place:
            wrong = _wrong(case, provider, result, want)
            if wrong is not None:
                problems[name] = f"wrong result under graph replay, not timed: {wrong}"
                continue
        del result
        replays[name] = replay
    times = interleaved(replays, "cuda", rounds, seconds) if replays else {}
    return {name: [ms / repeats[name] for ms in values] for name, values in times.items()}, problems


def _emit_times(
    case: Case,
    ceiling: Ceiling,
    mode: str,
    times: dict[str, list[float]],
    peaks: dict[str, float | None],
    problems: dict[str, str],
    notes: dict[str, str],
    record: Callable[..., None],
) -> None:
    gemm = None
    if case.gemm in times:
        product = max(stage.flop for stage in case.floor.stages)
        gemm = product / quantiles(times[case.gemm])[1] / 1e9
    floor = case.floor.ms(ceiling.copy_gbps, gemm or None)
    for name, values in times.items():
        p20, p50, p80 = quantiles(values)
        yardstick = case.providers[name].role == YARDSTICK
        record(
            name,
            mode=mode,
            correct="yes",
            note=notes.get(name, ""),
            **{"min_ms": values[0], "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "rounds": len(values)},
            tflops=case.floor.flop / p50 / 1e9 if case.floor.flop and not yardstick else None,
            gbps=None if yardstick else case.floor.bytes / p50 / 1e6,
            floor_ms=floor,
            share_of_floor=floor / p50 if floor is not None and not yardstick else None,
            peak_mib=peaks.get(name),
        )
    for name, problem in problems.items():
        record(name, mode=mode, correct="no" if "wrong" in problem else None, note=problem)


def _short(error: BaseException) -> str:
    """The first line of an error, one row wide."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
