"""Which texts a rule was fitted on and which were kept for the test, by the hash of each text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from qscope.classification import Split
from qscope.errors import InputError
from qscope.files import write_file
from qscope.workflows.classify_inputs import text_hash

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")


def split_path(rule: Path) -> Path:
    """The file beside the rule file `rule`."""
    return rule.with_name(f"{rule.name.removesuffix('.json')}.split.jsonl")


def parts_of(texts: Sequence[str], split: Split) -> dict[str, Part]:
    """Hash of every different text -> its part."""
    found: dict[str, Part] = {}
    for name in PARTS:
        for i in np.flatnonzero(getattr(split, name)).tolist():
            found[text_hash(texts[i])] = name
    return found


def test_digest(parts: Mapping[str, Part]) -> str:
    """One hash for all test texts, whatever their order."""
    return hashlib.sha256("".join(sorted(key for key, part in parts.items() if part == "test")).encode()).hexdigest()


def write_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """A line for each text: {"sha256": of its UTF-8 bytes, "part": train, calibration or test}. Raises StorageError."""
    lines = [json.dumps({"sha256": key, "part": part}) + "\n" for key, part in sorted(parts.items())]
    data = "".join(lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, [data], len(data))


def read_parts(path: Path) -> dict[str, Part]:
    """Hash -> part. Raises InputError for a file that `write_parts` did not write."""
    found: dict[str, Part] = {}
    try:
        for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(raw)
            if row["part"] not in PARTS:
                raise ValueError(f"line {number} names the part {row['part']!r}")
            found[str(row["sha256"])] = row["part"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no list of parts that `qscope classify fit` wrote: {error}.") from error
    return found


def split_of(texts: Sequence[str], parts: Mapping[str, Part]) -> Split:
    """The parts of these texts; those that fitting never saw are test texts as well."""
    names = [parts.get(text_hash(text), "test") for text in texts]
    masks = [np.array([name == part for name in names], bool) for part in PARTS]
    return Split(*masks)
