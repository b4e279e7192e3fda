"""Labelled texts for `qscope classify`: rows of files with a text, a label and, where asked for, a group."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.finding.pooled import Ints
from qscope.records import RecordCounts, TextMaker, check_fields, read_records, require

YES = {"0": "1", "false": "true", "no": "yes", "negative": "positive", "-1": "1", "neg": "pos"}
"""Labels of the negative class -> of the positive one, where both are plain enough to go without --positive"""
_SHOWN = 12  # labels that a message lists


@dataclass(frozen=True)
class LabelFacts:
    """What became of the rows."""

    files: tuple[str, ...]
    rows: int
    """Of all files"""
    broken: int
    """Rows that could not be read: left out"""
    replaced: int
    """Characters that stand for bytes that were not UTF-8"""
    empty: int
    """Rows without text: left out"""
    unlabelled: int
    """Rows without a label: left out"""
    duplicates: int
    """Rows whose text stood in an earlier row"""
    dropped: int
    """Of those, left out"""
    conflicts: int
    """Texts that occur with more than one class"""
    sampled_from: int | None
    """Texts before --max-texts, where that left some out"""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Labelled:
    """T texts, each of one class."""

    texts: tuple[str, ...]
    label: Ints
    """[T] places in `names`"""
    names: tuple[str, ...]
    """Classes. Two classes: the negative one, the positive one; several: in the order of their names"""
    group: Ints
    """[T] places in `groups`"""
    groups: tuple[str, ...]
    """In the order of their names; one empty name where no field was given"""
    facts: LabelFacts
    multiclass: bool = False

    @property
    def positive(self) -> npt.NDArray[np.bool_]:
        """[T], of two classes."""
        return self.label == 1

    def __len__(self) -> int:
        return len(self.texts)

    def counts(self) -> dict[str, int]:
        """Class -> texts."""
        found = np.bincount(self.label, minlength=len(self.names)).tolist()
        return dict(zip(self.names, found, strict=True))

    def notes(self) -> list[str]:
        """A sentence for everything that was left out or is odd."""
        facts = self.facts
        said = [
            (facts.broken, f"{facts.broken} of {facts.rows} rows could not be read and are left out"),
            (facts.replaced, f"{facts.replaced} characters stand for bytes that were not UTF-8"),
            (facts.empty, f"{facts.empty} rows have no text and are left out"),
            (facts.unlabelled, f"{facts.unlabelled} rows have no label and are left out"),
            (facts.duplicates, f"{facts.duplicates} rows repeat the text of an earlier one ({self._dropped()})"),
            (facts.conflicts, f"{facts.conflicts} texts occur with more than one label{self._kept()}"),
            (facts.sampled_from, f"{len(self)} of {facts.sampled_from} texts were drawn (--max-texts)"),
        ]
        return [text for number, text in said if number]

    def _dropped(self) -> str:
        if self.facts.dropped:
            return "left out: --drop-duplicates"
        return "kept, all on the same side of the split; --drop-duplicates leaves them out"

    def _kept(self) -> str:
        return "; the first row of each counts" if self.facts.dropped else ""


class _Row(NamedTuple):
    text: str
    label: str
    group: str


def read_labelled(
    files: Sequence[str | Path],
    text_field: str = "text",
    label_field: str = "label",
    group_field: str | None = None,
    positive: str | None = None,
    multiclass: bool = False,
    drop_duplicates: bool = False,
    max_texts: int | None = None,
    seed: int = 0,
) -> Labelled:
    """Texts of .jsonl, .jsonl.gz, .csv and .parquet files with their labels.

    Labels are compared as text: true is "true", 1 and 1.0 are "1".

    Args:
        text_field: its name, or a template such as "{title} {body}".
        positive: the label of the positive class; with more than two labels, that one against all others. Needed
            unless the two labels are 0 and 1, false and true, no and yes, negative and positive, or the like.
        multiclass: every label is a class, and `names` lists them.
        drop_duplicates: of rows with the same text the first counts.
        max_texts: draw at most so many, those with the smallest hash of seed and text: a larger sample holds a smaller
            one, and rows with the same text are drawn together as far as the number allows.

    Raises:
        InputError: for files, fields and labels that cannot be used, saying how to name the right ones.
    """
    if multiclass and positive is not None:
        raise InputError(
            f"--multiclass and --positive {positive} were given; the first makes every label a class, the second sets "
            "one label against the others. Give one of them."
        )
    if not files:
        raise InputError("No file with labelled texts was given. Give at least one (.jsonl, .csv or .parquet).")
    counts = RecordCounts()
    rows, empty, unlabelled = _rows([Path(file) for file in files], text_field, label_field, group_field, counts)
    if not rows:
        raise InputError(
            f"No row has both a text ({text_field!r}: {empty} empty) and a label ({label_field!r}: {unlabelled} "
            "missing). Name other fields with --text-field and --label-field."
        )
    names = _classes([row.label for row in rows], label_field, positive, multiclass)
    rows = rows if multiclass else [row._replace(label=names[row.label == names[1]]) for row in rows]
    repeated, conflicts = _repeats(rows)
    kept = [row for row, again in zip(rows, repeated, strict=True) if not (again and drop_duplicates)]
    drawn = _draw(kept, max_texts, seed)
    present = [name for name in names if any(row.label == name for row in drawn)]
    if len(present) < len(names):
        missing = [name for name in names if name not in present]
        raise InputError(
            f"After sampling and leaving out duplicates no text of the class {missing[0]!r} remains "
            f"({len(drawn)} texts). Give more texts, or a larger --max-texts."
        )
    groups = sorted({row.group for row in drawn})
    place, of = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(groups)}
    return Labelled(
        texts=tuple(row.text for row in drawn),
        label=np.array([place[row.label] for row in drawn], np.int64),
        names=names,
        group=np.array([of[row.group] for row in drawn], np.int64),
        groups=tuple(groups),
        facts=LabelFacts(
            files=tuple(str(file) for file in files),
            rows=counts.rows,
            broken=counts.broken,
            replaced=counts.replaced,
            empty=empty,
            unlabelled=unlabelled,
            duplicates=sum(repeated),
            dropped=sum(repeated) if drop_duplicates else 0,
            conflicts=conflicts,
            sampled_from=len(kept) if len(drawn) < len(kept) else None,
        ),
        multiclass=multiclass,
    )


def text_maker(text_field: str) -> TextMaker:
    """A name without braces is a field, one with braces a template."""
    return TextMaker(template=text_field) if "{" in text_field else TextMaker(field=text_field)


def text_hash(text: str) -> str:
    """sha256 (hex) of the UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _rows(
    files: list[Path], text_field: str, label_field: str, group_field: str | None, counts: RecordCounts
) -> tuple[list[_Row], int, int]:
    """(rows with text and label, rows without text, rows without label)."""
    maker = text_maker(text_field)
    found: list[_Row] = []
    empty = unlabelled = 0
    for path in files:
        records = read_records(path, counts)
        check_fields(path, records, maker.fields, "--text-field")
        check_fields(path, records, (label_field,), "--label-field")
        if group_field is not None:
            check_fields(path, records, (group_field,), "--group-field")
        for record in records:
            text, label = require(path, record, maker), _plain(record.fields.get(label_field))
            group = "" if group_field is None else _plain(record.fields.get(group_field))
            if not text.strip():
                empty += 1
            elif not label:
                unlabelled += 1
            else:
                found.append(_Row(text, label, group))
    return found, empty, unlabelled


def _plain(value: Any) -> str:
    """A label or group as text; empty for a missing one."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip().encode("utf-8", "replace").decode()  # "?" for a lone surrogate, which no file can hold


def _classes(labels: list[str], field: str, positive: str | None, multiclass: bool) -> tuple[str, ...]:
    """Names of the classes; of two, the negative one first."""
    found = sorted(set(labels))
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    if len(found) == 1:
        raise InputError(
            f"All {len(labels)} texts have the label {found[0]!r} (field {field!r}); a classifier needs texts of at "
            "least two classes. Add texts of another class, or name another field with --label-field."
        )
    if multiclass and len(found) == 2:
        raise InputError(
            f"--multiclass was given, and the field {field!r} holds two labels: {shown}. Leave --multiclass out; "
            f"--positive {found[1]} or --positive {found[0]} says which is looked for."
        )
    if multiclass:
        return tuple(found)
    if positive is not None:
        if positive not in found:
            raise InputError(
                f"--positive {positive} was given, and no text has that label. The labels of field {field!r}: {shown}."
            )
        others = [label for label in found if label != positive]
        return (others[0] if len(others) == 1 else f"not {positive}", positive)
    if len(found) > 2:
        raise InputError(
            f"The field {field!r} holds {len(found)} labels: {shown}. Say --multiclass to tell them all apart, or "
            "--positive LABEL to set one of them against all others."
        )
    for negative in found:
        if YES.get(negative.lower()) == next(label for label in found if label != negative).lower():
            return (negative, next(label for label in found if label != negative))
    raise InputError(
        f"The labels of field {field!r} are {found[0]} and {found[1]}, which do not tell what is looked for. Say it: "
        f"--positive {found[1]}, or --positive {found[0]}."
    )


def _repeats(rows: list[_Row]) -> tuple[list[bool], int]:
    """(whether the text stood in an earlier row, texts with more than one class)."""
    seen: dict[str, set[str]] = {}
    repeated = []
    for row in rows:
        repeated.append(row.text in seen)
        seen.setdefault(row.text, set()).add(row.label)
    return repeated, sum(len(labels) > 1 for labels in seen.values())


def _draw(rows: list[_Row], most: int | None, seed: int) -> list[_Row]:
    if most is None or len(rows) <= most:
        return rows
    keys = [hashlib.sha256(f"{seed}\0{row.text}".encode()).digest() for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (keys[i], i))
    return [rows[i] for i in sorted(order[:most])]
