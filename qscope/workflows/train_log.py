"""What a training run writes down: means over some steps, a line each, and whether the loss has diverged.

    log.jsonl   one object per SAE and line: step, tokens, sae, seconds, tokens_per_second, lr, and the figures

A resumed run cuts off what was written after its checkpoint, so no step occurs twice.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.files import storage_error, write_all
from qscope.training import StepStats

FILE = "log.jsonl"
MEANS = ("loss", "fvu", "l0", "aux", "grad_norm")
"""Means over the steps of a line whose loss was finite."""
SUMS = ("overflow", "skipped")
"""Sums over the run."""
FIGURES = (*MEANS, "dead_share", *SUMS)

HARMLESS = 0.05
"""A loss (in units of the variance) up to which nothing has diverged, however low it was before."""

SHORT = 8
"""Steps whose mean loss may become the lowest. Not a whole line: one in which a run diverges has no low mean."""


class Window:
    """Figures of one SAE since the last line. Everything stays on the device until `line`."""

    def __init__(self, device: torch.device, factor: float) -> None:
        self.factor = factor
        self.means = torch.zeros(len(MEANS), dtype=torch.float64, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.dead_share = torch.zeros((), dtype=torch.float64, device=device)
        self.best = torch.full((), math.inf, dtype=torch.float64, device=device)
        """The loss of the first step, before any update, or the lowest mean of `SHORT` steps (fewer at the end of a
        line) if that is less"""
        self.recent = torch.zeros(2, dtype=torch.float64, device=device)
        """Sum and number of the finite losses that are not yet in such a mean"""
        self.streak = torch.zeros((), dtype=torch.int64, device=device)
        """Steps in a row, up to now, whose loss was not finite or far above `best`"""

    def add(self, stats: StepStats) -> None:
        values = torch.stack([getattr(stats, name).double() for name in MEANS])
        finite = values.isfinite().all()
        self.means += torch.where(finite, values, 0.0)
        self.good += finite
        self.sums += torch.stack([getattr(stats, name).double() for name in SUMS])
        self.dead_share = stats.dead_share.double()
        self.best = torch.where(self.best.isinf() & finite, values[0], self.best)
        low = values[0] <= (self.factor * self.best).clamp_min(HARMLESS)
        self.streak = torch.where(finite & low, 0, self.streak + 1)
        self.recent += torch.where(finite, torch.stack([values[0], torch.ones_like(values[0])]), 0.0)
        self._lower_best(self.recent[1] >= SHORT)

    def _lower_best(self, when: Tensor) -> None:
        mean = self.recent[0] / self.recent[1]  # 0 / 0 of no step lowers nothing
        self.best = torch.where(when & (mean < self.best), mean, self.best)
        self.recent = torch.where(when, 0.0, self.recent)

    def line(self) -> dict[str, float | None]:
        """The figures, and a fresh start for the next line. Waits for the device."""
        found = torch.cat([self.means, self.sums, self.dead_share[None], self.good.double()[None]]).tolist()
        good = found.pop()
        means = [value / good if good else None for value in found[: len(MEANS)]]
        self._lower_best(self.recent[1] > 0)
        self.means.zero_()
        self.good.zero_()
        return dict(zip((*MEANS, *SUMS, "dead_share"), [*means, *found[len(MEANS) :]], strict=True))

    def stands(self) -> tuple[int, float]:
        """`streak` and `best`."""
        return int(self.streak), float(self.best)

    def state(self) -> dict[str, Tensor]:
        """On the host."""
        return {name: getattr(self, name).cpu() for name in _STATE}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name in _STATE:
            setattr(self, name, state[name].to(self.best.device, copy=True))


_STATE = ("means", "good", "sums", "dead_share", "best", "recent", "streak")


class Log:
    """`log.jsonl`, and TensorBoard and Weights & Biases where they are asked for."""

    def __init__(self, folder: Path, tensorboard: bool, wandb: str | None) -> None:
        self.path, self.folder, self.project = folder / FILE, folder, wandb
        self._handle: int | None = None
        self._writer: Any = None
        self._run: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError(
                    "--tensorboard was given, and the package tensorboard is not installed: pip install tensorboard."
                ) from error
            self._board = SummaryWriter
        self.tensorboard = tensorboard
        if wandb is not None:
            try:
                self._wandb: Any = importlib.import_module("wandb")
            except ImportError as error:
                raise InputError(
                    f"--wandb {wandb} was given, and the package wandb is not installed: pip install wandb."
                ) from error

    def open(self, position: int, step: int, run_id: str, config: dict[str, Any]) -> None:
        """Goes on behind the first `position` bytes, which tell of the steps up to `step`."""
        try:
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            size = os.fstat(self._handle).st_size
            if size < position:
                print(f"qscope: {self.path} lacks its last {position - size} bytes; going on without", file=sys.stderr)
            self.position = min(size, position)
            os.ftruncate(self._handle, self.position)
            os.lseek(self._handle, 0, os.SEEK_END)
        except OSError as error:
            raise storage_error(error, self.path) from error
        if self.tensorboard:
            self._writer = self._board(str(self.folder / "tensorboard"), purge_step=step + 1)
        if self.project is not None:
            self._run = self._wandb.init(
                project=self.project, id=run_id, resume="allow", dir=str(self.folder), config=config
            )

    def write(self, step: int, records: list[dict[str, Any]]) -> None:
        """The lines of one step."""
        assert self._handle is not None
        data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        try:
            write_all(self._handle, memoryview(data))
        except OSError as error:
            raise storage_error(error, self.path, len(data)) from error
        self.position += len(data)
        scalars = {
            f"{record['sae']}/{name}": value
            for record in records
            for name, value in record.items()
            if name in (*FIGURES, "lr", "tokens_per_second") and value is not None
        }
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(scalars, step=step)

    def sync(self) -> int:
        """Bytes of the log, all of them on the disk."""
        assert self._handle is not None
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise storage_error(error, self.path) from error
        return self.position

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()
        self._writer = self._run = None


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's log; one that a killed run left half is left out."""
    try:
        with (folder / FILE).open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.endswith(b"\n"):
                    yield _record(line, folder / FILE, number)
    except FileNotFoundError:
        return


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and {"sae", "step"} <= record.keys():
            return record
    except ValueError:
        pass
    raise InputError(f"Line {number} of {path} is damaged. Restore the file, or begin the run again in another folder.")


def last_figures(folder: Path, name: str, first_step: int) -> dict[str, float]:
    """Figures of one SAE: means over the lines after `first_step`, the last value of what counts up or stands."""
    lines = [line for line in read(folder) if line["sae"] == name]
    late = [line for line in lines if line["step"] > first_step] or lines[-1:]
    found: dict[str, float] = {}
    for figure in FIGURES if lines else ():
        values = [line[figure] for line in late if line[figure] is not None]
        if values:
            found[figure] = sum(values) / len(values) if figure in MEANS else values[-1]
    return found
