"""Runs the trainers of bench_train.py side by side and writes what was measured."""

import csv
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._facts import common_facts
from ._train_data import PlantedSpec, pca_fvu
from ._train_peers import OURS, TRAINERS, Job
from ._train_worker import Missing, Task, serve, source

Row = dict[str, Any]
Say = Callable[[str], None]
SWEEP, MEASURED = "sweep", "measured"
PCA = "rank-K PCA"
COLUMNS = (
    *("stage", "data", "trainer", "version", "D", "F", "K", "batch", "tokens", "dead_after", "seed", "lr_factor"),
    *("tokens_per_s", "slowest_block", "fastest_block", "peak_mib", "setup_s", "fvu", "mmcs", "match", "silent"),
    *("note", "device", "threads", "torch", "triton", "python", "commit", "uncommitted", "utc"),
)
_SHAPE = ("data", "D", "F", "K", "batch", "tokens", "dead_after")
_PACKAGES = {"sae-lens": "sae-lens", "dictionary_learning": "dictionary-learning", "eai-sparsify": "eai-sparsify"}


@dataclass(frozen=True)
class Setting:
    """One data set and the shape trained on it."""

    name: str
    data: str
    """"planted" or a path, as in Task"""
    d_in: int
    d_sae: int
    k: int
    batch: int
    tokens: int
    blocks: int
    held_out: int
    planted: PlantedSpec = field(default_factory=PlantedSpec)

    def __post_init__(self) -> None:
        if self.tokens % (self.batch * self.blocks):
            raise ValueError(f"{self.tokens} tokens are not {self.blocks} equal blocks of batches of {self.batch}.")

    def task(self, trainer: str, factor: float, seed: int, device: str, threads: int) -> Task:
        # In a run this short nothing would ever be dead after the usual 10 million tokens.
        job = Job(
            self.d_in, self.d_sae, self.k, self.batch, self.tokens // self.batch, self.tokens // 8, factor, seed, device
        )
        return Task(trainer, self.data, job, self.planted, self.blocks, self.held_out, threads)

    def shape(self) -> Row:
        sizes = {"D": self.d_in, "F": self.d_sae, "K": self.k, "batch": self.batch, "tokens": self.tokens}
        return {"data": self.name, **sizes, "dead_after": self.tokens // 8}


class _Entry:
    """A worker process and what it has answered."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.task, self.speeds, self.curve = task, [], []  # type: tuple[Task, list[float], list[Row]]
        self.note, self.facts = "", {}  # type: tuple[str, Row]
        self.failed = False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(task, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._read()

    def ask(self, what: str) -> Any:
        """The answer; None once the worker has failed."""
        if self.note:
            return None
        self.pipe.send(what)
        return self._read()

    def _read(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            answer = RuntimeError("its process ended")
        if isinstance(answer, Exception):
            self.note, self.failed = str(answer), not isinstance(answer, Missing)
            return None
        return answer

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def run_group(tasks: Sequence[Task], together: bool) -> list[_Entry]:
    """All tasks, a block of each in turn (together), or one after the other where memory holds only one."""
    if not together:
        return [run_group([task], True)[0] for task in tasks] if len(tasks) > 1 else run_group(tasks, True)
    entries = [_Entry(task) for task in tasks]
    for entry in entries:
        entry.curve.append(entry.ask("glance"))
    for left in reversed(range(tasks[0].blocks)):
        for entry in entries:
            entry.speeds.append(entry.ask("block"))
        for entry in entries:
            entry.curve.append(entry.ask("glance" if left else "evaluate"))
    for entry in entries:
        entry.facts = entry.ask("facts") or {}
        entry.close()
    return entries


def row_of(setting: Setting, stage: str, entry: _Entry) -> Row:
    job, trainer = entry.task.job, entry.task.trainer
    row: Row = {"stage": stage, **setting.shape(), "trainer": trainer, "version": _version(trainer)}
    row |= {"seed": job.seed, "lr_factor": job.lr_factor, "note": entry.note}
    if not entry.note:
        speeds = sorted(entry.speeds)
        row |= {"tokens_per_s": statistics.median(speeds), "slowest_block": speeds[0], "fastest_block": speeds[-1]}
        row |= entry.facts | {name: value for name, value in entry.curve[-1].items() if name != "tokens"}
        row["curve"] = entry.curve
    return row | common_facts(job.device)


def _version(trainer: str) -> str:
    package = _PACKAGES.get(trainer.split()[0])
    if package is None:
        return torch.__version__ if trainer.startswith("torch") else ""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def pca_row(setting: Setting, seed: int, device: str) -> Row:
    """The control."""
    task = setting.task(OURS, 1.0, seed, device, torch.get_num_threads())
    data = source(task)
    fvu = pca_fvu(data, task.job.steps, data.held_out(setting.held_out), setting.k)
    row: Row = {"stage": MEASURED, **setting.shape(), "trainer": PCA, "seed": seed, "fvu": fvu, "note": ""}
    return row | common_facts(device)


def sweep(
    setting: Setting, trainers: Iterable[str], factors: Sequence[float], device: str, threads: int, say: Say
) -> list[Row]:
    """Every trainer at every multiple of its rate, first seed: which rate each of them likes at this length."""
    rows = []
    for trainer in trainers:
        for factor in factors:
            (entry,) = run_group([setting.task(trainer, factor, 0, device, threads)], True)
            rows.append(row_of(setting, SWEEP, entry))
            say(line(rows[-1]))
            if entry.note:
                break
    return rows


def measure(
    setting: Setting, trainers: Sequence[str], rates: dict[str, float], seed: int, device: str, threads: int, say: Say
) -> list[Row]:
    """The trainers side by side, each at its own rate; and the control."""
    rows = []
    tasks = [setting.task(trainer, rates.get(trainer, 1.0), seed, device, threads) for trainer in trainers]
    # On a GPU a neighbour's memory would count as its own, and the widest dense trainers fill one alone.
    for entry in run_group(tasks, together=not device.startswith("cuda")):
        rows.append(row_of(setting, MEASURED, entry))
        say(line(rows[-1]))
    rows.append(pca_row(setting, seed, device))
    say(line(rows[-1]))
    return rows


def line(row: Row) -> str:
    """A row as it is printed when it is done."""
    parts = [f"{row['stage']} {row['data']} {row['trainer']}", f"seed {row['seed']}"]
    if row["note"]:
        return ", ".join([*parts, row["note"]])
    if row.get("tokens_per_s"):
        parts += [f"lr x{row['lr_factor']:g}", f"{row['tokens_per_s']:,.0f} tokens/s"]
    parts += [f"{name} {row[name]:.4f}" for name in ("fvu", "mmcs", "match", "silent") if row.get(name) is not None]
    return ", ".join(parts)


def best_rates(rows: Iterable[Row], setting: Setting) -> dict[str, float]:
    """The multiple with the least final FVU of each trainer in the sweep of this setting."""
    shape, found = setting.shape(), {}  # type: tuple[Row, dict[str, tuple[float, float]]]
    for row in rows:
        same = row["stage"] == SWEEP and all(row[name] == shape[name] for name in _SHAPE)
        if same and row.get("fvu") is not None:
            found[row["trainer"]] = min((row["fvu"], row["lr_factor"]), found.get(row["trainer"], (float("inf"), 0.0)))
    return {trainer: factor for trainer, (_, factor) in found.items()}


class Results:
    """train-<device>.json with every row and its curve, and the rows alone as .csv."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def replace(self, rows: list[Row]) -> None:
        """Take the place of what earlier runs said on the same stage, data and trainers; write both files."""
        new = {(row["stage"], row["data"], row["trainer"]) for row in rows}
        self.rows = [row for row in self.rows if (row["stage"], row["data"], row["trainer"]) not in new] + rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps([_shown(row) for row in self.rows], indent=1) + "\n", encoding="utf-8")
        with self.path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(_shown, self.rows))


def _shown(value: Any) -> Any:
    """Five significant digits: more than any of these carries."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _shown(each) for name, each in value.items()}
    return [_shown(each) for each in value] if isinstance(value, list) else value


def faults(rows: Iterable[Row]) -> list[str]:
    """Our own trainers that failed: the run must not succeed."""
    ours = (OURS, "torch dense")
    return [f"{row['data']}: {row['trainer']}: {row['note']}" for row in rows if row["trainer"] in ours and row["note"]]


ALL = tuple(TRAINERS)
