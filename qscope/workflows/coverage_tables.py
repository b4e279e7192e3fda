"""coverage.json and its tables: overlaps, items, features and curves as CSV, each written whole or not at all."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qscope.errors import StorageError
from qscope.files import storage_error, write_file
from qscope.finding.pooled import Floats, Ints
from qscope.workflows.coverage_result import CoverageResult, PairFound

TABLES = ("overlaps.csv", "benchmarks.csv", "curves.csv", "items.csv", "features.csv")


@dataclass(frozen=True)
class Detail:
    """What the tables say of one benchmark at one layer, too long for the result."""

    rows: Ints
    """[N] rows of the file"""
    sizes: Ints
    """[N] features"""
    covered: Floats
    """[N] share of its features that another item fires too; nan: it fires none"""
    exclusive: Ints
    """[N] features that no other item of the benchmark fires"""
    worth: Floats
    """[N] sum of 1 / m over its features"""
    order: Ints
    """Items in the order in which the greedy subset takes them"""
    subset: int
    """How many of those the subset has"""
    counts: Ints
    """[F] items that fire each feature"""


_INTERVALS = ("matched_interval", "null_interval", "above_null", "above_cross")

Details = Mapping[str, Mapping[str, Detail]]
"""Layer -> benchmark"""


def write_tables(result: CoverageResult, details: Details) -> CoverageResult:
    """Write coverage.json and the tables into the result's folder. Raises StorageError where that is impossible."""
    folder = Path(result.out)
    result = replace(result, tables=("coverage.json", *TABLES))
    made = (_overlaps(result), _benchmarks(result), _curves(result), _items(details), _features(details))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    for name, rows in zip(TABLES, made, strict=True):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        _write(folder / name, text.getvalue())
    plain = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False, ensure_ascii=False)
    _write(folder / "coverage.json", plain + "\n")
    return result


def _write(path: Path, text: str) -> None:
    data = text.encode("utf-8", "replace")
    if path.is_dir():
        raise StorageError(f"{path} is a folder, and a table is to be written there. Choose another --out.")
    write_file(path, [data], len(data))


def _overlaps(result: CoverageResult) -> Iterable[Sequence[Any]]:
    yield ("layer", *_pair_columns())
    for layer, found in result.layers.items():
        for pair in found.pairs:
            yield (layer, *_flat(pair))


def _pair_columns() -> list[str]:
    names = []
    for field in dataclasses.fields(PairFound):
        if field.name in _INTERVALS:
            names += [f"{field.name}_low", f"{field.name}_high"]
        else:
            names.append(field.name)
    return names


def _flat(pair: PairFound) -> list[Any]:
    cells: list[Any] = []
    for field in dataclasses.fields(pair):
        value = getattr(pair, field.name)
        if field.name in _INTERVALS:
            cells += ["", ""] if value is None else [value.low, value.high]
        else:
            cells.append("" if value is None else value)
    return cells


def _benchmarks(result: CoverageResult) -> Iterable[Sequence[Any]]:
    n = result.match_items
    yield (
        "layer", "benchmark", "items", "features", "features_per_item", "silent_items", "redundancy",
        f"features_at_{n}", f"redundancy_at_{n}", f"redundancy_at_{n}_low", f"redundancy_at_{n}_high", "subset_items",
        "random_subset_items", "unique_features", f"unique_features_at_{n}", f"null_features_at_{n}",
        f"null_redundancy_at_{n}",
    )  # fmt: skip
    for layer, found in result.layers.items():
        unique = {m.name: m for m in found.marginal}
        for b in found.benchmarks:
            interval, alone = b.matched_redundancy_interval, unique[b.name]
            cells = (
                layer, b.name, b.items, b.features, b.mean_size, b.silent, b.redundancy, b.matched_features,
                b.matched_redundancy, *((None, None) if interval is None else (interval.low, interval.high)), b.subset,
                b.random_subset, alone.unique, alone.matched, b.null_features, b.null_redundancy,
            )  # fmt: skip
            yield tuple("" if cell is None else cell for cell in cells)


def _curves(result: CoverageResult) -> Iterable[Sequence[Any]]:
    yield ("layer", "benchmark", "curve", "items", "share", "features")
    for layer, found in result.layers.items():
        for b in found.benchmarks:
            for name, points in (("random", b.curve), ("greedy", b.subset_curve)):
                yield from ((layer, b.name, name, n, share, share * b.features) for n, share in points)


def _items(details: Details) -> Iterable[Sequence[Any]]:
    yield ("layer", "benchmark", "row", "features", "covered", "exclusive", "worth", "greedy_place", "in_subset")
    for layer, benchmarks in details.items():
        for name, d in benchmarks.items():
            place = np.zeros(len(d.rows), np.int64)
            place[d.order] = np.arange(1, len(d.order) + 1)
            columns = (d.rows, d.sizes, d.covered, d.exclusive, d.worth, place)
            for row, size, covered, alone, worth, at in zip(*(c.tolist() for c in columns), strict=True):
                known = "" if np.isnan(covered) else covered
                yield (layer, name, row, size, known, alone, worth, at or "", int(0 < at <= d.subset))


def _features(details: Details) -> Iterable[Sequence[Any]]:
    """A row for each feature that some benchmark fires; cells: how many items of each benchmark fire it."""
    names = next(iter(details.values())).keys()
    yield ("layer", "feature", *names)
    for layer, benchmarks in details.items():
        counts = np.stack([benchmarks[name].counts for name in names], axis=1)
        for feature in np.flatnonzero(counts.any(axis=1)).tolist():
            yield (layer, feature, *counts[feature].tolist())
