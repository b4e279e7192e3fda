"""Rows with fields, out of .jsonl, .jsonl.gz, .csv and .parquet files, and texts made of them.

`qscope.data` streams one text field of corpora that need not fit in memory; here are rows that carry labels, answers or
groups beside their text, and are few enough to be kept.
"""

import csv
import gzip
import io
import json
import math
import string
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qscope.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_FIELD_BYTES = 1 << 27  # csv refuses fields above 128 KiB unless told otherwise


@dataclass
class RecordCounts:
    """What became of the rows of one or several files."""

    rows: int = 0
    broken: int = 0
    """Not JSON, not an object, or with more or fewer columns than the head of the CSV file: left out"""
    replaced: int = 0
    """Characters that stand for bytes that were not UTF-8, or for lone surrogates"""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Record(NamedTuple):
    """One row."""

    number: int
    """Its place in the file, from 0, broken rows included"""
    fields: dict[str, Any]


def read_records(path: Path, counts: RecordCounts | None = None) -> list[Record]:
    """All rows of the file, in order.

    Args:
        counts: is updated as rows are read.

    Raises:
        InputError: for a file of another kind, one that cannot be read to its end, or one without a usable row.
    """
    counts = RecordCounts() if counts is None else counts
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise InputError(f"{path} has a name that does not tell its format. Accepted: {', '.join(SUFFIXES)}.")
    reader = _parquet if name.endswith(".parquet") else _csv if name.endswith(".csv") else _jsonl
    before = counts.broken
    try:
        if not path.is_file():
            raise InputError(f"There is no file {path}. Accepted: {', '.join(SUFFIXES)}.")
        found = reader(path, counts)
    except (OSError, EOFError, zlib.error, csv.Error) as error:  # BadGzipFile is an OSError
        raise InputError(f"{path} cannot be read to its end: {error}. Mend the file or leave it out.") from error
    if not found:
        broken = f" ({counts.broken - before} broken ones were left out)" if counts.broken > before else ""
        raise InputError(f"{path} holds no usable row{broken}. Give a file with at least one, or leave it out.")
    return found


def _text(data: bytes, counts: RecordCounts) -> str:
    text = data.decode("utf-8-sig", "replace")
    counts.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
    return text


def _jsonl(path: Path, counts: RecordCounts) -> list[Record]:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    found: list[Record] = []
    for number, line in enumerate(raw for raw in data.splitlines() if raw.strip()):
        counts.rows += 1
        try:
            row = json.loads(_text(line, counts))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.append(Record(number, row))
        else:
            counts.broken += 1
    return found


def _csv(path: Path, counts: RecordCounts) -> list[Record]:
    limit = csv.field_size_limit(_FIELD_BYTES)
    try:
        rows = csv.reader(io.StringIO(_text(path.read_bytes(), counts), newline=""))
        head = next(rows, [])
        if len(set(head)) < len(head):
            raise InputError(f"The first row of {path} names a column twice: {', '.join(head)}. Name each once.")
        found: list[Record] = []
        for number, row in enumerate(row for row in rows if row):
            counts.rows += 1
            if len(row) == len(head):
                found.append(Record(number, dict(zip(head, row, strict=True))))
            else:
                counts.broken += 1
    finally:
        csv.field_size_limit(limit)
    return found


def _parquet(path: Path, counts: RecordCounts) -> list[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file, and pyarrow is not installed: pip install 'qscope[report]'."
        ) from (error)
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}. Mend the file or leave it out.") from error
    counts.rows += len(rows)
    return [Record(number, row) for number, row in enumerate(rows)]


# --- texts -----------------------------------------------------------------------------------------------


class TextMaker:
    """The text of a record: one field, or a template such as "{question}\\n{choices}".

    A list is joined by new lines, anything else that is not a string is written as JSON. `\\n` and `\\t` typed in a
    template count as the characters they name; {{ and }} are braces.
    """

    def __init__(self, field: str = "text", template: str | None = None) -> None:
        typed = (template or "").replace("\\n", "\n").replace("\\t", "\t")
        try:
            self._parts = list(string.Formatter().parse(typed))
        except ValueError as error:
            raise InputError(
                f"The template {template!r} cannot be read: {error}. Accepted: text with field names in braces, "
                'for example "Question: {question}"; {{ and }} are braces.'
            ) from error
        if template is None:
            self._parts = [("", field, "", None)]  # a field whose name holds braces or dots is still one field
        self.fields = tuple(dict.fromkeys(name for _, name, _, _ in self._parts if name is not None))
        if template is None and not field:
            raise InputError("The name of the field is empty. Give the name of a field of the file.")
        if not self.fields or "" in self.fields:
            raise InputError(f"The template {template!r} names no field. Name fields in braces, such as {{question}}.")
        if any(form or conversion for _, _, form, conversion in self._parts):
            raise InputError(
                f"The template {template!r} has a ':' or '!' in braces. Only names of fields are accepted."
            )

    def __call__(self, record: Record) -> str:
        """Raises KeyError for a field that the record lacks."""
        return "".join(
            literal + (_plain(record.fields[name]) if name is not None else "") for literal, name, _, _ in self._parts
        )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # no lone surrogates
    if isinstance(value, list | tuple):
        return "\n".join(map(_plain, value))
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for a missing text
        return ""
    return str(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False, default=str)


def check_fields(path: Path, records: Sequence[Record], wanted: Iterable[str], option: str) -> None:
    """Refuse fields that the first row lacks: that is a mistyped option, not a gap in the data. InputError."""
    present = records[0].fields
    missing = [name for name in wanted if name not in present]
    if missing:
        raise InputError(
            f"{path} has no field {missing[0]!r}. Its fields: {', '.join(map(str, present)) or 'none'}. Name the right "
            f"one with {option}."
        )


def require(path: Path, record: Record, maker: TextMaker) -> str:
    """The text of a record; InputError that names the row where a field is missing."""
    try:
        return maker(record)
    except KeyError as error:
        raise InputError(
            f"Row {record.number + 1} of {path} has no field {error.args[0]!r}, which its first row has. Mend the row "
            "or remove it."
        ) from error
