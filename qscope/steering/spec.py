"""What to do to a model, as data: a few edits of residuals, kept as JSON or YAML."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from qscope.errors import InputError, StorageError
from qscope.steering import positions

FORMAT, VERSION = "qscope-steering", 1

Mode = Literal["add", "clamp", "scale", "ablate", "orthogonalise"]
Unit = Literal["absolute", "quantile", "residual"]
Activation = Literal["preact", "exact"]
Skip = Literal["first", "special"]


@dataclass(frozen=True)
class Gate:
    """The condition of an edit: another feature is active at the same token."""

    feature: int
    layer: int | None = None
    """Where it is read; default: the layer of the edit. Not a later one."""
    threshold: float = 0.0
    mode: Activation = "preact"
    """preact: <W_enc row, h> + b_enc > threshold, which a feature outside the k largest may pass too; exact: the
    feature is among the k of the full encode, with a value > threshold >= 0."""

    def __post_init__(self) -> None:
        _whole("feature of when", self.feature)
        _choice("mode of when", self.mode, Activation)
        _number("threshold", self.threshold)
        if self.mode == "exact" and self.threshold < 0:
            raise InputError(f"threshold {self.threshold} was given; activations are never below 0: give 0 or more.")


@dataclass(frozen=True)
class Edit:
    """One change of the residual h after one decoder block, at the chosen tokens.

    d is the direction: the feature's W_dec row as it is, or the given vector.

    add: h + strength d.  clamp: h + (strength - z) d.  scale: h + (strength - 1) z d.  ablate: h - z d.
    orthogonalise: h - <h, d> d / |d|^2.  z is the feature's activation. All edits of a layer read h as it comes in and
    are added together.
    """

    layer: int
    """Decoder block, from 0, whose output is changed."""
    feature: int | None = None
    """Of the SAE of this layer; or give `vector`."""
    vector: str | tuple[float, ...] | None = None
    """The direction itself: D numbers, "file.safetensors#name", or "file.gguf" (a control vector: its direction.N)."""
    mode: Mode = "add"
    strength: float = 0.0
    unit: Unit = "absolute"
    """Of strength, for add and clamp. quantile: times `scale`, a quantile of the feature's own activations. residual:
    times `scale`, the typical norm of the residual, with d made a unit vector (add only)."""
    scale: float | None = None
    activation: Activation = "preact"
    """What z is. preact: ReLU(<W_enc row, h> + b_enc). exact: the activation after TopK, 0 outside the k largest. With
    exact, h' = h + sum (z' - z) d is the reconstruction of the changed features with the error term kept."""
    tokens: str = "all"
    """`qscope.steering.positions`: all, prompt, generated, 5, 3-7, 0,2,5-8"""
    after: int | str | None = None
    """Only tokens behind the first occurrence of this one: an id, or text that is one token."""
    skip: tuple[Skip, ...] = ()
    """first: not the first token of a sequence. special: not the tokenizer's special tokens."""
    when: Gate | None = None

    def __post_init__(self) -> None:
        for name, kinds in (("mode", Mode), ("unit", Unit), ("activation", Activation)):
            _choice(name, getattr(self, name), kinds)
        _whole("layer", self.layer)
        if self.feature is not None:
            _whole("feature", self.feature)
        for name in (self.skip,) if isinstance(self.skip, str) else self.skip:
            _choice("skip", name, Skip)
        _number("strength", self.strength)
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        if (self.feature is None) == (self.vector is None):
            raise InputError(f"{self} names a feature and a vector, or neither; an edit has exactly one direction.")
        if self.vector is not None and self.mode in ("clamp", "scale", "ablate"):
            raise InputError(
                f"mode {self.mode} was given for a plain vector, which has no activation that could be set; give a "
                "feature, or the mode add or orthogonalise."
            )
        if self.vector is not None and not isinstance(self.vector, str):
            for value in self.vector:
                _number("vector", value)
        self._check_unit()
        positions.parse(self.tokens)
        if self.when is not None and self.when.layer is not None and self.when.layer > self.layer:
            raise InputError(
                f"An edit of layer {self.layer} is to depend on a feature of layer {self.when.layer}, which the model "
                "computes later; a condition is read at the same or an earlier layer."
            )

    def _check_unit(self) -> None:
        accepted = {"absolute": ("add", "clamp", "scale"), "quantile": ("add", "clamp"), "residual": ("add",)}
        if self.unit == "absolute":
            return
        if self.mode not in accepted[self.unit] or (self.unit == "quantile" and self.feature is None):
            raise InputError(
                f"unit {self.unit} was given with mode {self.mode}; quantile goes with add and clamp of a feature, "
                "residual with add."
            )
        if self.scale is None or not math.isfinite(self.scale) or self.scale <= 0:
            raise InputError(
                f"unit {self.unit} was given with scale {self.scale}; it needs the number above 0 that strength is "
                "multiplied with, as `qscope steer find` writes it."
            )

    @property
    def amount(self) -> float:
        """strength in absolute numbers (of a unit vector for `residual`)."""
        return self.strength * (self.scale or 1.0) if self.unit != "absolute" else self.strength


@dataclass(frozen=True)
class SAEReference:
    """Which SAE the feature ids of a layer belong to."""

    source: str
    """For `qscope.SAE.from_pretrained`"""
    hash: str | None = None
    """`qscope.SAE.weight_hash` of the float32 SAE"""


@dataclass(frozen=True)
class SteeringSpec:
    """Edits, and the SAEs that their features belong to."""

    edits: tuple[Edit, ...]
    saes: Mapping[int, SAEReference] = field(default_factory=dict)
    model: str | None = None
    """The model it was made for: a note, not checked."""
    note: str | None = None

    def scaled(self, factor: float) -> "SteeringSpec":
        """The same with the strengths of its `add` edits times `factor`."""
        _number("factor", factor)
        edits = (dataclasses.replace(e, strength=e.strength * factor) if e.mode == "add" else e for e in self.edits)
        return dataclasses.replace(self, edits=tuple(edits))

    def to_json(self) -> dict[str, Any]:
        """Plain data; what has its default value is left out."""
        content: dict[str, Any] = {"format": FORMAT, "format_version": VERSION}
        content |= {name: getattr(self, name) for name in ("model", "note") if getattr(self, name) is not None}
        content["saes"] = {str(layer): _plain(reference) for layer, reference in sorted(self.saes.items())}
        return content | {"edits": [_plain(edit) for edit in self.edits]}

    @classmethod
    def from_json(cls, content: Any) -> "SteeringSpec":
        """The inverse of `to_json`. Raises InputError naming the field that is wrong."""
        given = _object(content, "a steering spec", ("format", "format_version", "model", "note", "saes", "edits"))
        if given.get("format", FORMAT) != FORMAT or given.get("format_version", VERSION) != VERSION:
            found = f"{given.get('format')} version {given.get('format_version')}"
            raise InputError(f"The steering spec says it is {found}; this qscope reads {FORMAT} version {VERSION}.")
        if not isinstance(given.get("edits"), list):
            raise InputError("The steering spec has no list `edits`; one object for each change is expected there.")
        for name in ("model", "note"):
            if given.get(name) is not None and not isinstance(given[name], str):
                raise InputError(f"`{name}` of the steering spec is {given[name]!r}; text is expected.")
        saes = _object(given.get("saes", {}), "`saes`", None)
        if not all(key.isdecimal() for key in map(str, saes)):
            raise InputError(f"`saes` of the steering spec has the keys {list(saes)}; layers from 0 are expected.")
        _distinct_fields([(str(int(key)), None) for key in saes])
        return cls(
            tuple(_edit(edit, f"edit {i}") for i, edit in enumerate(given["edits"])),
            {int(layer): _made(SAEReference, item, f"the SAE of layer {layer}") for layer, item in saes.items()},
            given.get("model"),
            given.get("note"),
        )

    @classmethod
    def load(cls, path: str | Path) -> "SteeringSpec":
        """Reads a .json, .yaml or .yml file. Raises InputError for what is in it, StorageError if it cannot be read."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"The steering spec {path} could not be read: {error}.") from error
        try:
            if path.suffix in (".yaml", ".yml"):
                return cls.from_json(_from_yaml(text))
            return cls.from_json(json.loads(text, object_pairs_hook=_distinct_fields))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}. Name a YAML file .yaml.") from error

    def save(self, path: str | Path) -> Path:
        """Writes it, as JSON unless the name ends in .yaml or .yml; returns the path."""
        path = Path(path)
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        if path.suffix in (".yaml", ".yml"):
            import yaml

            text = yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, path)
        except OSError as error:
            raise StorageError(f"The steering spec could not be written to {path}: {error}.") from error
        return path


def _distinct_fields(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Of two values under one name the later would win unseen."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"the field {name!r} is given twice in one object; once is expected.")
        found[name] = value
    return found


def _from_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [self.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            _distinct_fields([(name if isinstance(name, str) else str(name), None) for name in names])
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"it is not YAML: {error}") from error


def _plain(item: Any) -> dict[str, Any]:
    """Fields that are not at their default."""
    found = {}
    for f in dataclasses.fields(item):
        value = getattr(item, f.name)
        if value == f.default:
            continue
        value = _plain(value) if dataclasses.is_dataclass(value) else value
        found[f.name] = list(value) if isinstance(value, tuple) else value
    return found


def _edit(content: Any, what: str) -> Edit:
    given = dict(_object(content, what, None))
    if given.get("when") is not None:
        given["when"] = _made(Gate, given["when"], f"`when` of {what}")
    for name in ("vector", "skip"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    return _made(Edit, given, what)


def _made(kind: Any, content: Any, what: str) -> Any:
    """A dataclass from an object; unknown, missing and wrongly typed fields are named."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    given = _object(content, what, tuple(fields))
    missing = [n for n, f in fields.items() if n not in given and f.default is dataclasses.MISSING]
    if missing:
        raise InputError(f"The steering spec lacks {', '.join(missing)} in {what}.")
    hints = get_type_hints(kind)
    for name, value in given.items():
        if not _fits(value, hints[name]):
            hint = " (YAML reads 1e3 as text; write 1.0e+3)" if isinstance(value, str) and _is_number(value) else ""
            raise InputError(f"`{name}` of {what} is {value!r}; {_words(hints[name])} is expected{hint}.")
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "e" in text.lower()


def _fits(value: Any, hint: Any) -> bool:
    names = str(hint)
    if value is None:
        return "None" in names
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return "int" in names or hint is float or hint == (float | None)
    if isinstance(value, float):
        return hint is float or hint == (float | None)
    if isinstance(value, str):
        return "str" in names or "Literal" in names
    return (isinstance(value, tuple) and "tuple" in names) or dataclasses.is_dataclass(value)


def _words(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint).replace("typing.", ""))


def _object(content: Any, what: str, names: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{what} is {type(content).__name__}; an object with named fields is expected.")
    unknown = [] if names is None else [key for key in content if key not in names]
    if unknown:
        raise InputError(f"{what} has the unknown field {unknown[0]!r}; accepted are {', '.join(names or ())}.")
    return content


def _choice(name: str, value: Any, kinds: Any) -> None:
    if value not in get_args(kinds):
        raise InputError(f"{name} {value!r} was given; accepted are {', '.join(get_args(kinds))}.")


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} is {value!r}; a whole number (int) is expected.")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}; a finite number is expected.")
