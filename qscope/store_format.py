"""The feature store on disk, format 1: its files, settings and shard records.

    manifest.json            settings, `complete` flag and totals
    shards.jsonl             one line per finished shard, appended after the shard's rename
    shard-00000.safetensors  doc, position, token u32 [N]; per layer L the tensors L.values, L.indices,
                             L.indices_high (d_sae > 65536 only) and L.flags, see qscope.store_packing
    tokenizer/               copy of the tokenizer

Nothing here depends on time, process or machine: a killed and resumed run leaves the same bytes.
"""

import builtins
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, TypeVar

from qscope.errors import StoreError
from qscope.files import differences
from qscope.store_packing import COLUMNS, Form, layer_forms


class MissingPackageError(StoreError, ImportError):
    """A package that only this part of qscope uses is not installed."""


try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Field,
        NonNegativeInt,
        PositiveInt,
        ValidationError,
        model_validator,
    )
except ImportError as error:
    raise MissingPackageError(
        f"Feature stores need the package pydantic, which cannot be imported here ({error}). It checks the"
        " files of a store as they are read. Install it: pip install 'qscope[cli]' or pip install pydantic."
    ) from error

STORE_VERSION = 1
FORMAT = "qscope-feature-store"
MANIFEST = "manifest.json"
JOURNAL = "shards.jsonl"
TOKENIZER = "tokenizer"
TEMPORARY = re.compile(r"\.tmp-(probe|manifest\.json|shards\.jsonl|shard-\d{5,}\.safetensors|tokenizer)")
SHARD_FILE = re.compile(r"shard-\d{5,}\.safetensors")


def shard_name(index: int) -> str:
    """File name of a shard. Records may carry no other, so no name can lead out of the folder."""
    return f"shard-{index:05d}.safetensors"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes. NaN and Inf raise `ValueError`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelIdentity(_Frozen):
    """The language model whose residual stream was read."""

    name: str
    sha256: str


class SAEIdentity(_Frozen):
    """The SAE of one layer. `sha256` is `SAE.weight_hash()`; `source` is where it came from, or None; `mismatch`
    says in what way it was made for something else, where that was allowed."""

    layer: int = Field(ge=0)
    sha256: str
    d_sae: int = Field(gt=0, lt=2**31)
    k: PositiveInt
    source: str | None = None
    mismatch: str | None = None


class TextOptions(_Frozen):
    """How text was read. `field`: key or column of the text; `format`: of the sources, or `auto`; `strict`:
    broken rows and NaN activations are errors."""

    field: str = "text"
    format: str = "auto"
    strict: bool = False


class StoreSettings(_Frozen):
    """Everything the features depend on. Two runs with equal settings and equal text write equal bytes.

    `versions`: of the packages whose arithmetic or tokens could change; `device`: cpu, or the name of the GPU.
    """

    store_version: PositiveInt = STORE_VERSION
    qscope_version: str
    model: ModelIdentity
    tokenizer_sha256: str
    saes: list[SAEIdentity] = Field(min_length=1)
    dtype: str
    versions: dict[str, str] = {}
    device: str
    precision: str
    context_size: PositiveInt
    bos: bool = False
    batch_tokens: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    shard_bytes: PositiveInt
    text: TextOptions = TextOptions()
    sources: list[str] = []

    @model_validator(mode="after")
    def _one_sae_per_layer(self) -> "StoreSettings":
        layers = [sae.layer for sae in self.saes]
        if len(set(layers)) != len(layers):
            raise ValueError(f"layers {layers} name a layer twice; a store holds one SAE per layer")
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sae.layer for sae in self.saes)

    def sae(self, layer: int) -> SAEIdentity:
        """The SAE of a layer, or `StoreError` naming the layers there are."""
        for sae in self.saes:
            if sae.layer == layer:
                return sae
        raise StoreError(f"layer {layer} is not in this store; it holds layers {', '.join(map(str, self.layers))}.")

    def settings_key(self) -> str:
        """sha256 hex of the settings as canonical JSON."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    def differences(self, new: "StoreSettings") -> list[str]:
        """The fields in which `new` differs, each as `saes[0].k: 50 -> 100`."""
        return differences(self.model_dump(mode="json"), new.model_dump(mode="json"))


class LayerRecord(_Frozen):
    """Counts of one layer of a shard. `values`: dtype on disk."""

    nnz: NonNegativeInt
    nan_rows: NonNegativeInt
    extreme_rows: NonNegativeInt
    values: Literal["float16", "float32"]


class ShardRecord(_Frozen):
    """One line of shards.jsonl. `key` identifies the text and all else that the shard depends on; `documents`
    counts those with tokens in the shard, `first_doc` and `last_doc` are the outermost of them; `meta` is the
    encoder's."""

    index: NonNegativeInt
    file: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: NonNegativeInt
    key: str
    tokens: NonNegativeInt
    documents: NonNegativeInt
    first_doc: NonNegativeInt | None
    last_doc: NonNegativeInt | None
    layers: dict[int, LayerRecord]
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _safe_name(self) -> "ShardRecord":
        if self.file != shard_name(self.index):
            raise ValueError(f"shard {self.index} is called {self.file!r}; only {shard_name(self.index)!r} is allowed")
        return self

    def line(self) -> builtins.bytes:
        return canonical_json(self.model_dump(mode="json")).encode() + b"\n"


class Manifest(_Frozen):
    """manifest.json."""

    format: Literal["qscope-feature-store"] = "qscope-feature-store"
    settings: StoreSettings
    settings_key: str
    complete: bool = False
    totals: dict[str, Any] = {}

    def text(self) -> bytes:
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, allow_nan=False)
        return text.encode() + b"\n"


_File = TypeVar("_File", bound=BaseModel)


def _parse(kind: type[_File], data: bytes, where: str) -> _File:
    """A file's JSON as `kind`, or `StoreError` with the first reason in one line."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"{where} is damaged or no part of a feature store: "
            f"{place + ': ' if place else ''}{first['msg']}."
            " Restore the file, or encode into a new folder."
        ) from error


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a store. Raises `StoreError`: none, foreign, damaged, or written by a newer qscope."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(
            f"{folder} is not a feature store: it has no {MANIFEST}. Give the folder that `qscope encode` wrote."
        ) from error
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error.strerror}. Give the folder that `qscope encode` wrote."
        ) from error
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not JSON ({error}). Restore the file, or encode into a new folder.") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise StoreError(f"{path} does not describe a feature store (no format {FORMAT!r}). Give another folder.")
    settings = raw.get("settings")
    version = settings.get("store_version") if isinstance(settings, dict) else None
    if isinstance(version, int) and version > STORE_VERSION:
        raise StoreError(
            f"{folder} was written in store format {version}; this qscope reads up to format {STORE_VERSION}."
            " Use the newer qscope that wrote it."
        )
    manifest = _parse(Manifest, data, str(path))
    # The key covers the settings as written, so that a default for a field added later changes nothing.
    if hashlib.sha256(canonical_json(settings).encode()).hexdigest() != manifest.settings_key:
        raise StoreError(
            f"{path}: the settings were changed after the store was written. Restore the file, or encode into"
            " a new folder."
        )
    return manifest


def read_journal(folder: Path) -> tuple[list[ShardRecord], int]:
    """Records of the finished shards, and the byte length of the sound part of shards.jsonl.

    What a crash may leave at the end, a line without its newline or one that is not JSON, is not counted.
    Damage anywhere else is a `StoreError`.
    """
    path = folder / JOURNAL
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    lines = data.split(b"\n")[:-1]
    records: list[ShardRecord] = []
    length = 0
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 1},"
        if number == len(lines) - 1 and not _is_json(line):
            break
        record = _parse(ShardRecord, line, where)
        if record.index != number:
            raise StoreError(f"{where} describes shard {record.index}, expected {number}. Restore the file.")
        records.append(record)
        length += len(line) + 1
    return records, length


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def array_forms(settings: StoreSettings) -> dict[str, Form]:
    """Accepted dtypes and trailing shape of every array of a shard, [N, ...], by its name on disk."""
    forms: dict[str, Form] = {name: (("uint32",), ()) for name in COLUMNS}
    for sae in settings.saes:
        forms |= {f"{sae.layer}.{name}": form for name, form in layer_forms(sae.d_sae, sae.k).items()}
    return forms
