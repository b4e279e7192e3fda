"""Rules as JSON files."""

import json
from pathlib import Path
from typing import Any

from qscope.classification.rule import FeatureRule, MulticlassRule, Rule
from qscope.errors import InputError
from qscope.files import write_file

FORMAT = "qscope-rule"
VERSION = 1
_KINDS: dict[str, Any] = {"binary": FeatureRule, "multiclass": MulticlassRule}


def to_json(rule: Rule) -> str:
    """A rule as JSON text; `from_json` gives an equal rule."""
    kind = "binary" if isinstance(rule, FeatureRule) else "multiclass"
    body = _adapter(kind).dump_python(rule, mode="json")
    content = {"format": FORMAT, "version": VERSION, "kind": kind, "rule": body}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes, name: str = "The text") -> Rule:
    """The rule of a JSON text. Raises InputError, which calls it `name`, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not JSON ({error}). Give a rule that `qscope classify fit` wrote.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{name} holds no classification rule. Give a rule that `qscope classify fit` wrote.")
    if content.get("version") != VERSION or content.get("kind") not in list(_KINDS):
        raise InputError(
            f"{name} holds a rule of the kind {content.get('kind')!r}, version {content.get('version')!r}; this qscope "
            f"reads the kinds {' and '.join(_KINDS)}, version {VERSION}. Fit it again, or use the qscope that wrote it."
        )
    from pydantic import ValidationError

    try:
        rule: Rule = _adapter(content["kind"]).validate_json(json.dumps(content.get("rule")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "rule"
        raise InputError(
            f"{name} holds a rule that is not whole: {place}: {first['msg']} ({error.error_count()} in all). Give it "
            "as `qscope classify fit` wrote it."
        ) from error
    except InputError as error:
        raise InputError(f"{name} holds a rule that cannot be: {error}") from error
    return rule


def save_rule(rule: Rule, path: str | Path) -> Path:
    """Writes the rule atomically. Raises StorageError."""
    data = to_json(rule).encode("utf-8")
    write_file(Path(path), [data], len(data))
    return Path(path)


def load_rule(path: str | Path) -> Rule:
    """Raises InputError for a file that cannot be read or holds no rule."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"The rule {path} could not be read: {error.strerror or error}.") from error
    return from_json(data, str(path))


def _adapter(kind: str) -> Any:
    try:
        from pydantic import TypeAdapter
    except ImportError as error:
        raise InputError("Rule files are checked with pydantic: pip install 'qscope[classify]'.") from error
    return TypeAdapter(_KINDS[kind])
