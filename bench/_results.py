"""One CSV per device with the rows of all benchmarks, appended as they are measured: a killed run keeps its rows."""

import csv
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_FLOATS = (
    *("min_ms", "p20_ms", "p50_ms", "p80_ms", "tflops", "gbps"),
    *("copy_gbps", "floor_ms", "share_of_floor", "peak_mib"),
)
_INTEGERS = ("N", "D", "F", "K", "rounds")
COLUMNS = (
    *("op", "provider", "role", "mode", "N", "D", "F", "K", "dtype"),
    *("min_ms", "p20_ms", "p50_ms", "p80_ms", "rounds", *_FLOATS[4:]),
    *("correct", "note", "device", "threads", "torch", "triton", "python", "commit", "uncommitted", "utc"),
)


def read(path: Path) -> list[Row]:
    """The rows of a result file, numbers as numbers and empty fields as None; [] where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(name, text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(name: str, text: str | None) -> Any:
    if not text:
        return 0 if name in _INTEGERS[:4] else None
    return int(text) if name in _INTEGERS else float(text) if name in _FLOATS else text


class ResultFile:
    """Appends rows; the first row of an operator in this run replaces that operator's rows of earlier runs."""

    def __init__(self, path: Path):
        self.path = path
        self._fresh: set[str] = set()

    def append(self, row: Row) -> None:
        """Write one row through to the disk."""
        if row["op"] not in self._fresh:
            self._fresh.add(row["op"])
            self._rewrite([old for old in read(self.path) if old["op"] != row["op"]])
        with self.path.open("a", newline="") as file:
            _writer(file).writerow(_shown(row))

    def _rewrite(self, rows: list[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}.part")
        with scratch.open("w", newline="") as file:
            writer = _writer(file)
            writer.writeheader()
            writer.writerows(map(_shown, rows))
        os.replace(scratch, self.path)


def _writer(file: Any) -> "csv.DictWriter[str]":
    return csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")


def _shown(row: Row) -> Row:
    """Five significant digits: more than any timing carries."""
    return {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
