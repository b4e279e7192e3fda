"""Time the operators beside their peers on this machine. The cases stand in bench/, one file per operator."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from qscope.errors import InputError

Op = Literal[
    "topk_encode",
    "topk_select",
    "sparse_decode",
    "decode_loss",
    "sparse_grads",
    "train_step",
    "steer_add",
    "feature_stats",
]


@dataclass(frozen=True)
class BenchConfig:
    """Time the operators beside their peers; each result is checked before it is timed.

    Example: qscope bench --op topk_encode sparse_decode --quick
    """

    op: tuple[Op, ...] = ()
    """Operators; all of them if none is named."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    quick: bool = False
    """The smallest shape only: seconds on a GPU, half a minute on a CPU."""
    out: Path | None = None
    """Folder for the rows as a CSV file; they are only printed otherwise."""
    plot: Path | None = None
    """Folder for one picture per operator, ms and share of the floor against F (needs matplotlib)."""


@dataclass(frozen=True)
class BenchResult:
    rows: list[dict[str, Any]]
    ratios: list[Any]
    bars: list[Any]
    faults: list[str]
    left_out: list[str] = field(default_factory=list)
    csv: str | None = None
    plot: Path | None = None

    @property
    def exit_status(self) -> int:
        """1 where one of our own results was wrong: no time counts then."""
        return 1 if self.faults else 0


def run(config: BenchConfig) -> BenchResult:
    """Run the cases. Raises InputError for a device that is not there."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {config.device} cannot be measured here: use cpu{_cuda()}.")
    bench = cases_package()
    path = None if config.out is None else config.out / f"{_module('_facts').slug(_name(device))}.csv"
    done = _module("_run").run(config.op or bench.OPS, device, quick=config.quick, csv=path, say=_progress)
    summary = _module("_summary").summary(done.rows)
    csv = None if path is None else str(path)
    return BenchResult(done.rows, summary.ratios, summary.bars, done.faults, done.left_out, csv, config.plot)


def cases_package() -> ModuleType:
    """bench/, which a wheel carries as qscope._bench and a checkout beside the package."""
    name = "qscope._bench"
    folder = Path(__file__).resolve().parents[2] / "bench"
    if name in sys.modules or not (folder / "_harness.py").is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> Any:
    return importlib.import_module(f"{cases_package().__name__}.{name}")


def _name(device: str) -> str:
    name: str = _module("_facts").device_name(device)
    return name


def _cuda() -> str:
    return " or cuda" if torch.cuda.is_available() else " (torch finds no NVIDIA GPU)"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
