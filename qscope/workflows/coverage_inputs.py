"""The benchmarks that `qscope coverage` compares: items of files as texts, documents of feature stores as codes."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qscope.errors import InputError
from qscope.finding.pooled import Floats
from qscope.records import SUFFIXES, Record, RecordCounts, TextMaker, check_fields, read_records, require
from qscope.store import FeatureStore
from qscope.store_format import MANIFEST

if TYPE_CHECKING:
    from qscope.workflows.coverage import CoverageConfig

LEAST_MODELS = 3  # a rank correlation over two models is -1 or 1 whatever they score


@dataclass(frozen=True)
class Item:
    """One item of a benchmark as the model reads it."""

    row: int
    """Its place in the file, from 0"""
    text: str


@dataclass(frozen=True)
class Benchmark:
    """Items of a file, or a feature store whose documents are items."""

    name: str
    source: str
    items: tuple[Item, ...] = ()
    store: FeatureStore | None = None
    rows: int = 0
    broken: int = 0
    replaced: int = 0
    empty: int = 0
    """Rows whose text is empty: left out"""
    duplicates: int = 0
    """Items whose text stood in the same benchmark before"""
    dropped: int = 0
    """Of those, left out"""
    sampled_from: int | None = None
    """Items before --max-items, where that left some out"""


def gather(config: "CoverageConfig") -> tuple[Benchmark, ...]:
    """Read all benchmarks. Raises InputError for names given twice, unknown fields and benchmarks without items."""
    named = [(_shown(name), path) for name, path in map(_named, config.benchmarks)]
    names = [name for name, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(
            f"Two benchmarks are called {twice[0]!r} (a file's name, up to the dot, unless you say another). Name them "
            f"apart: {twice[0]}-a=FIRST {twice[0]}-b=SECOND."
        )
    fields, templates = (
        _by_name("--field-of", config.field_of, names),
        _by_name("--template-of", config.template_of, names),
    )
    both = sorted(fields.keys() & templates.keys())
    if both:
        raise InputError(f"--field-of and --template-of both name {both[0]}. Give one of them for each benchmark.")
    prefix = _prefix(config.prefix_file)
    found = []
    for name, path in named:
        if os.path.isdir(path):  # False, not an error, where it cannot be looked at
            if name in fields or name in templates:
                raise InputError(
                    f"--field-of or --template-of names {name}, a feature store, whose text was chosen by `qscope "
                    "encode`. Leave it out."
                )
            found.append(_store(name, path))
            continue
        template = templates.get(name, None if name in fields else config.template)
        maker = TextMaker(fields.get(name, config.field), template)
        option = "--field or --template (of one benchmark: --field-of, --template-of)"
        found.append(_file(name, path, maker, option, prefix, config))
    _check(config, found)
    return tuple(found)


def _check(config: "CoverageConfig", benchmarks: Sequence[Benchmark]) -> None:
    """Refuse before the model runs what would be refused after it."""
    stores = [benchmark for benchmark in benchmarks if benchmark.store is not None]
    if stores and config.other_sae:
        raise InputError(
            f"--other-sae was given, and {stores[0].name} is a feature store, which holds the codes of its own SAE "
            "only. Give the text it was made of instead, or leave --other-sae out."
        )
    smallest = min(benchmarks, key=_size)
    if config.match_items is not None and config.match_items > _size(smallest):
        raise too_many(config.match_items, smallest.name, _size(smallest))


def too_many(n: int, name: str, items: int) -> InputError:
    return InputError(
        f"--match-items is {n}, and {name} has {items} items. Give at most as many as the smallest benchmark has; up "
        "to half of them there are intervals."
    )


def _size(benchmark: Benchmark) -> int:
    return len(benchmark.items) if benchmark.store is None else benchmark.rows


def _named(text: str) -> tuple[str, Path]:
    """(name, path) of `name=path` or of a path, which may itself hold an equals sign."""
    name, sign, path = text.partition("=")
    if sign and name and path and not os.path.exists(text):
        return name, Path(path)
    whole = Path(text).name
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if whole.lower().endswith(s)), "")
    return whole[: len(whole) - len(suffix)] or text, Path(text)


def _shown(text: str) -> str:
    """A name as reports and terminals can write it: no control characters, no bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _by_name(option: str, given: tuple[str, ...], names: list[str]) -> dict[str, str]:
    found = dict(text.split("=", 1) for text in given if "=" in text)
    wrong = [text for text in given if text.partition("=")[0] not in names or "=" not in text]
    if wrong:
        raise InputError(
            f"{option} {wrong[0]!r} was given; NAME=VALUE is accepted, with a benchmark's name: {', '.join(names)}."
        )
    return found


def _prefix(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prefix-file {path} cannot be read: {error}. Give a file of UTF-8 text.") from error


def _store(name: str, path: Path) -> Benchmark:
    if not os.path.exists(path / MANIFEST):
        raise InputError(
            f"The benchmark {name} is the folder {path}, which is no feature store. Accepted: a folder that `qscope "
            f"encode` wrote (its documents are the items), or a file ({', '.join(SUFFIXES)})."
        )
    store = FeatureStore(path)
    if not store.num_documents:
        raise InputError(f"The feature store {path} holds no document, so the benchmark {name} is empty. Leave it out.")
    return Benchmark(name, _shown(str(path)), store=store, rows=store.num_documents)


def _file(name: str, path: Path, maker: TextMaker, option: str, prefix: str, config: "CoverageConfig") -> Benchmark:
    counts = RecordCounts()
    records = read_records(path, counts)
    answer = config.answer_field
    check_fields(path, records, maker.fields, option)
    if answer is not None:
        check_fields(path, records, (answer,), "--answer-field")
    ending = None if answer is None else TextMaker(answer)
    items, seen, empty, duplicates = [], set(), 0, 0
    for record in records:
        text = _text(path, record, maker, ending)
        if not text.strip():
            empty += 1
            continue
        key = _digest(text)
        again = key in seen
        duplicates += again
        seen.add(key)
        if not (again and config.drop_duplicates):
            items.append(Item(record.number, text))
    if not items:
        raise InputError(
            f"The benchmark {name} ({path}) is empty: the text of all its {len(records)} rows is empty. Name another "
            "field, or leave the file out."
        )
    found = Benchmark(
        name, _shown(str(path)), tuple(items), None, counts.rows, counts.broken, counts.replaced, empty, duplicates,
        duplicates if config.drop_duplicates else 0,
    )  # fmt: skip
    found = sample(found, config.max_items, config.seed)
    return replace(found, items=tuple(Item(item.row, prefix + item.text) for item in found.items))


def _text(path: Path, record: Record, maker: TextMaker, ending: TextMaker | None) -> str:
    text = require(path, record, maker)
    if ending is None or not text.strip():
        return text
    space = "" if text[-1].isspace() else " "
    return text + space + require(path, record, ending)


def sample(benchmark: Benchmark, most: int | None, seed: int) -> Benchmark:
    """At most `most` items, those with the smallest hash of seed and text: a larger sample holds a smaller one."""
    if most is None or len(benchmark.items) <= most:
        return benchmark
    order = sorted(benchmark.items, key=lambda item: (_digest(f"{seed}\0{item.text}"), item.row))
    kept = sorted(order[:most], key=lambda item: item.row)
    return replace(benchmark, items=tuple(kept), sampled_from=len(benchmark.items))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


# --- scores of models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores of models on benchmarks of the suite."""

    models: tuple[str, ...]
    benchmarks: tuple[str, ...]
    values: Floats
    """[models, benchmarks]"""
    notes: tuple[str, ...]


def read_scores(path: Path, names: tuple[str, ...]) -> Scores:
    """A table with a row per model and a column per benchmark; the first column names the model.

    Models without a score for some benchmark of the suite are left out and named; so are benchmarks that the table
    lacks. Raises InputError when fewer than three models or two benchmarks are left.
    """
    records = read_records(path)
    label, *columns = _columns(path, records)
    known = [name for name in names if name in columns]
    if len(known) < 2:
        raise InputError(
            f"--scores {path} has the columns {', '.join(columns)}; of the suite ({', '.join(names)}) it needs at "
            "least two. Name the columns as the benchmarks are named."
        )
    models, rows, missing = [], [], []
    for record in records:
        values = [_number(path, record, record.fields.get(name)) for name in known]
        model = str(record.fields.get(label, f"row {record.number + 1}"))
        if any(math.isnan(value) for value in values):
            missing.append(model)
        else:
            models.append(model)
            rows.append(values)
    if len(models) < LEAST_MODELS:
        gone = f" ({len(missing)} lack a score: {_some(missing)})" if missing else ""
        raise InputError(
            f"--scores {path} has {len(models)} models with a score on every benchmark{gone}; at least {LEAST_MODELS} "
            "are needed. Fill the table or leave --scores out."
        )
    notes = [f"{len(missing)} models lack a score in {path.name} and are left out: {_some(missing)}"] if missing else []
    absent = [name for name in names if name not in columns]
    notes += [f"{path.name} has no scores for: {', '.join(absent)}"] if absent else []
    return Scores(tuple(models), tuple(known), np.array(rows, np.float64), tuple(notes))


def read_item_scores(path: Path, benchmark: Benchmark) -> tuple[tuple[str, ...], Floats, tuple[str, ...]]:
    """(models, scores [models, items], notes): a row per row of the benchmark's file, a column per model.

    A column that is not numbers throughout is not a model; a model that lacks some item is left out and named.
    """
    counts = RecordCounts()
    records = read_records(path, counts)
    if counts.rows != benchmark.rows or counts.broken:
        broken = f" ({counts.broken} of them broken)" if counts.broken else ""
        raise InputError(
            f"--item-scores {path} has {counts.rows} rows{broken}, and {benchmark.source} has {benchmark.rows}. Give a "
            "row for each row of the benchmark, broken ones included, in the same order, and a column for each model."
        )
    by_row = {record.number: record for record in records}
    wanted = [item.row for item in benchmark.items]
    models, columns, missing = [], [], []
    names = _columns(path, records)
    for name in names:
        try:
            values = [_number(path, by_row[row], by_row[row].fields.get(name)) for row in wanted]
        except InputError:  # a column of words (an id, the question), not one of scores
            continue
        if any(math.isnan(value) for value in values):
            missing.append(name)
        else:
            models.append(name)
            columns.append(values)
    if len(models) < LEAST_MODELS:
        raise InputError(
            f"--item-scores {path} has {len(models)} columns that are numbers for every item; at least {LEAST_MODELS} "
            f"models are needed. Its columns: {', '.join(names)}."
        )
    notes = [f"item scores of {benchmark.name}: {len(models)} columns are taken for models: {_some(models)}"]
    if missing:
        notes.append(f"models that lack a score of some item of {benchmark.name} are left out: {_some(missing)}")
    return tuple(models), np.array(columns, np.float64), tuple(notes)


def _columns(path: Path, records: Sequence[Record]) -> list[str]:
    """Of all rows: a row of a .jsonl file may lack a score."""
    found = list(dict.fromkeys(name for record in records for name in record.fields))
    if not found:
        raise InputError(f"{path} has no columns. Give a table with a column for each score.")
    return found


def _number(path: Path, record: Record, value: Any) -> float:
    """NaN for a missing one."""
    if value is None or (
        isinstance(value, str) and value.strip().lower() in ("", "nan", "na", "n/a", "null", "none", "-")
    ):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"Row {record.number + 1} of {path} holds {json.dumps(value, default=str)[:60]} where a score is expected. "
            "Give numbers; an empty cell is a missing score."
        ) from error
    if math.isinf(number):
        raise InputError(f"Row {record.number + 1} of {path} holds an infinite score. Give finite numbers.")
    return number


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
