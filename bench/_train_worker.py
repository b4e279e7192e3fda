"""One trainer in a process of its own: its memory is its own, and no library changes another."""

import contextlib
import dataclasses
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._train_data import Planted, PlantedSpec, Source, Stored
from ._train_peers import TRAINERS, Contestant, Job, missing

MATCH = 0.9
"""Cosine from which a planted feature counts as found"""
SAMPLE_BATCHES = 8
"""Batches that a trainer may measure before it starts; they are trained on as well"""
GLANCE = 4096
"""Held-out tokens for a point of the curve before the last"""
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Task:
    """One run of one trainer on one data set."""

    trainer: str
    data: str
    """"planted" or the path of an .npy file of activations"""
    job: Job
    planted: PlantedSpec
    blocks: int
    held_out: int
    threads: int


class Missing(Exception):
    """The trainer's package is not there."""


def source(task: Task) -> Source:
    job = task.job
    if task.data == "planted":
        return Planted(task.planted, job.batch, job.seed, job.device)
    return Stored(Path(task.data), job.batch, task.held_out, job.device)


class Worker:
    """Trains in `blocks` equal parts; evaluates whenever asked."""

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        torch.set_float32_matmul_precision("high")  # on a GPU what is left in float32 may use TF32, for all alike
        why = missing(task.trainer)
        if why:
            raise Missing(why)
        self.task, self.source = task, source(task)
        self.held_out = self.source.held_out(task.held_out)
        self.per_block = task.job.steps // task.blocks
        sample = self.source.batches(0, min(SAMPLE_BATCHES, task.job.steps))
        self.ready = self.source.batches(0, self.per_block)  # so that the memory of a block is in the baseline
        self.done, self.seconds, self.peak = 0, 0.0, 0.0
        _warm_up(task)
        self.baseline = _resident(self.task.job.device)
        start = time.perf_counter()
        self.contestant: Contestant = TRAINERS[task.trainer](task.job, sample)
        self.setup_s = time.perf_counter() - start

    def block(self) -> float:
        """Trains on the next block; tokens per second."""
        batches = self.ready or self.source.batches(self.done * self.per_block, self.per_block)
        self.ready = []
        _reset_peak(self.task.job.device)
        start = time.perf_counter()
        for x in batches:
            self.contestant.step(x)
        _wait(self.task.job.device)
        seconds = time.perf_counter() - start
        self.peak = max(self.peak, _peak(self.task.job.device) - self.baseline)
        self.done += 1
        self.seconds += seconds
        return self.per_block * self.task.job.batch / seconds

    def glance(self) -> dict[str, Any]:
        """`evaluate` on fewer tokens, for a point of the curve."""
        return self.evaluate(GLANCE)

    @torch.no_grad()
    def evaluate(self, tokens: int | None = None) -> dict[str, Any]:
        """On the held-out tokens: FVU, features that never fire there, and how many planted features were found."""
        codes, decoder = self.contestant.model()
        held_out = self.held_out[:tokens]
        fired = torch.zeros(self.task.job.d_sae, dtype=torch.bool, device=held_out.device)
        missed = torch.zeros((), dtype=torch.float64, device=held_out.device)
        for x in held_out.split(self.task.job.batch):
            found = codes(x)
            missed += (x - found.x_hat.float()).square().sum(dtype=torch.float64)
            fired |= found.fired
        about = (held_out - held_out.mean(0)).square().sum(dtype=torch.float64)
        facts = {
            "tokens": self.done * self.per_block * self.task.job.batch,
            "fvu": float(missed / about),
            "silent": float((~fired).float().mean()),
        }
        return facts if self.source.truth is None else facts | recovery(self.source.truth, decoder)

    def facts(self) -> dict[str, Any]:
        return {"setup_s": self.setup_s, "train_s": self.seconds, "peak_mib": self.peak if self.peak > 0 else None}


def _warm_up(task: Task) -> None:
    """A few tiny steps, so that code loaded on first use counts neither as time nor as memory of the run."""
    tiny = dataclasses.replace(task.job, d_in=16, d_sae=64, k=4, batch=64, steps=10)
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)).to(tiny.device) for i in range(4)]
    contestant = TRAINERS[task.trainer](tiny, batches)
    for x in batches:
        contestant.step(x)
    codes, _ = contestant.model()
    with torch.no_grad():
        codes(batches[0])


def recovery(truth: Tensor, decoder: Tensor) -> dict[str, float]:
    """Mean over planted features of the largest cosine with a decoder row, and the share of those above MATCH."""
    rows = F.normalize(decoder.float(), dim=1)
    best = torch.cat([(part @ rows.T).amax(1) for part in truth.split(4096)])
    return {"mmcs": float(best.mean()), "match": float((best > MATCH).float().mean())}


def serve(task: Task, pipe: Any) -> None:
    """Answers "block", "glance", "evaluate" and "facts" until the pipe closes; first "", or why there is nothing."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            worker = Worker(task)
            pipe.send("")
            while True:
                pipe.send(getattr(worker, pipe.recv())())
    except EOFError:  # the parent has what it wants
        return
    except Missing as why:
        pipe.send(Missing(str(why)))
    except Exception as error:  # a peer may raise anything; the parent's row says what, and our own fails the run
        traceback.print_exc()
        pipe.send(RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _status(name: str) -> float:
    """A size of this process in MiB; 0 where the system does not say."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def _resident(device: str) -> float:
    """MiB in use now: of the device, on a CPU of the process."""
    return torch.cuda.memory_allocated(device) / 2**20 if torch.device(device).type == "cuda" else _status("VmRSS")


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # where it is refused, the peak is that since the start
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if torch.device(device).type == "cuda" else _status("VmHWM")
