"""Activations on disk: what `qscope encode --activations` writes and SAEs are trained from.

    activations.json                   settings, `complete` flag and totals
    shards.jsonl                       one line per finished shard, appended after its files' renames
    shard-00000.tokens.safetensors     doc, position (in it), place (in the model's window), token: uint32 [N]
    shard-00000.layer-15.safetensors   x [N, D]: the residual of layer 15 at these tokens

Numbers are bfloat16, float16 or float32; a float16 file that would make a number infinite is float32 instead,
and its record says so. The guarantees are those of the feature store: the shard is the unit of progress, every
file has its sha256 in the journal, a killed and resumed run leaves the same bytes, one writer at a time.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qscope.errors import StoreError
from qscope.files import (
    acquire_lock,
    append_line,
    claim_folder,
    differences,
    file_sha256,
    size_problem,
    storage_error,
    sweep,
    tensor_parts,
    write_file,
)

FORMAT = "qscope-activations"
VERSION = 1
MANIFEST = "activations.json"
JOURNAL = "shards.jsonl"
COLUMNS = ("doc", "position", "place", "token")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_SHARD_FILE = re.compile(r"shard-\d{5,}\.(tokens|layer-\d+)\.safetensors")
_TEMPORARY = re.compile(rf"\.tmp-(probe|activations\.json|shards\.jsonl|{_SHARD_FILE.pattern})")
_OPEN_FILES = 64


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def file_name(index: int, layer: int | None) -> str:
    """Of a shard's activations at a layer, or of its tokens. Journals carry no names, so none can lead elsewhere."""
    return f"shard-{index:05d}.{'tokens' if layer is None else f'layer-{layer}'}.safetensors"


@dataclass(frozen=True)
class ActivationRecord:
    """One line of shards.jsonl. `files`: layer, or "tokens" -> (sha256, bytes); `first`: tokens at place 0."""

    index: int
    key: str
    tokens: int
    first: int
    last_doc: int | None
    dtypes: dict[str, str]
    """layer -> dtype on disk"""
    files: dict[str, list[Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    """The encoder's."""

    def line(self) -> bytes:
        return _canonical(asdict(self)) + b"\n"

    def paths(self, folder: Path) -> dict[Path, list[Any]]:
        names = {name: None if name == "tokens" else int(name) for name in self.files}
        return {folder / file_name(self.index, layer): self.files[name] for name, layer in names.items()}


# --- writing ---------------------------------------------------------------------------------------------


class ActivationWriter:
    """Creates or resumes an activation store, as a context manager.

    settings: JSON object of everything that the activations depend on; at least `layers` (list), `dtype` (of
        `DTYPES`) and `widths` (layer as text -> D).
    """

    def __init__(self, path: Path, settings: dict[str, Any], lock: Any) -> None:
        self.path, self.settings, self._lock = path, settings, lock
        self.settings_key = hashlib.sha256(_canonical(settings)).hexdigest()
        self.repaired: str | None = None
        """What `repair` found wrong, if anything."""
        self._records: list[ActivationRecord] = []
        self._journal_bytes = 0

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], settings: Mapping[str, Any], *, repair: bool = False
    ) -> "ActivationWriter":
        """As `StoreWriter.open`. Raises `StoreError` for other settings (naming them), damage, a second writer."""
        folder, plain = Path(path), json.loads(_canonical(dict(settings)))
        claim_folder(folder, MANIFEST, _TEMPORARY, "store of activations")
        lock = acquire_lock(folder)
        try:
            writer = cls(folder, plain, lock)
            writer._settle()
            writer._adopt(repair)
        except BaseException:
            lock.release()
            raise
        return writer

    @property
    def finished(self) -> list[ActivationRecord]:
        return list(self._records)

    def add(
        self,
        index: int,
        key: str,
        columns: Mapping[str, npt.NDArray[Any]],
        layers: Mapping[int, Tensor],
        meta: Mapping[str, Any] | None = None,
    ) -> ActivationRecord:
        """Writes shard `index`: the next one, or one that is finished (left alone if its key is the same).

        columns: `COLUMNS`, integers [N]. layers: every layer of the settings -> [N, D] on any device.
        """
        if index < len(self._records) and self._records[index].key == key:
            return self._records[index]
        if not 0 <= index <= len(self._records):
            raise StoreError(
                f"Shard {index} cannot be written to {self.path} yet: shards are added in order, the next is "
                f"{len(self._records)}."
            )
        self._check(columns, layers)
        self.truncate_from(index)
        self._write_manifest(complete=False, totals={})
        tokens = {name: torch.from_numpy(np.asarray(columns[name]).astype(np.uint32)) for name in COLUMNS}
        files, dtypes = {"tokens": self._write(index, key, None, tokens)}, {}
        for layer, x in sorted(layers.items()):
            x = stored(x, DTYPES[self.settings["dtype"]])
            files[str(layer)] = self._write(index, key, layer, {"x": x})
            dtypes[str(layer)] = str(x.dtype).removeprefix("torch.")
        doc, place = columns["doc"], columns["place"]
        record = ActivationRecord(
            index=index,
            key=key,
            tokens=len(doc),
            first=int(np.count_nonzero(np.asarray(place) == 0)),
            last_doc=int(doc[-1]) if len(doc) else None,
            dtypes=dtypes,
            files=files,
            meta=json.loads(_canonical(dict(meta or {}))),
        )
        append_line(self.path / JOURNAL, self._journal_bytes, record.line())
        self._journal_bytes += len(record.line())
        self._records.append(record)
        return record

    def truncate_from(self, index: int) -> None:
        """Forgets the finished shards from `index` on, in the journal first: it never names a lost one."""
        if index >= len(self._records):
            return
        self._write_manifest(complete=False, totals={})
        dropped = self._records[index:]
        text = b"".join(record.line() for record in self._records[:index])
        write_file(self.path / JOURNAL, [text], len(text))
        self._records, self._journal_bytes = self._records[:index], len(text)
        for record in dropped:
            for path in record.paths(self.path):
                path.unlink(missing_ok=True)

    def complete(self, totals: Mapping[str, Any] | None = None) -> None:
        """Marks the store finished. totals: JSON values, kept; `shards`, how many there are, is added."""
        self._write_manifest(complete=True, totals={**(totals or {}), "shards": len(self._records)})

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> "ActivationWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, columns: Mapping[str, Any], layers: Mapping[int, Tensor]) -> None:
        wanted = {int(layer): width for layer, width in self.settings["widths"].items()}
        n = len(columns["doc"])
        shapes = {layer: tuple(x.shape) for layer, x in layers.items()}
        if (
            set(columns) != set(COLUMNS)
            or any(len(columns[name]) != n for name in columns)
            or shapes != {layer: (n, width) for layer, width in wanted.items()}
        ):
            raise StoreError(
                f"A shard of {self.path} takes the columns {', '.join(COLUMNS)} of one length N and [N, D] with D = "
                f"{wanted} per layer; it was given {', '.join(columns)} and {shapes} for {n} tokens."
            )

    def _write(self, index: int, key: str, layer: int | None, tensors: Mapping[str, Tensor]) -> list[Any]:
        parts, size = tensor_parts(tensors, {"index": str(index), "key": key, "settings_key": self.settings_key})
        return [write_file(self.path / file_name(index, layer), parts, size), size]

    def _write_manifest(self, complete: bool, totals: dict[str, Any]) -> None:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "settings_key": self.settings_key,
            "complete": complete,
            "totals": totals,
        }
        text = json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
        path = self.path / MANIFEST
        if not path.exists() or path.read_bytes() != text:
            write_file(path, [text], len(text))

    def _settle(self) -> None:
        if not (self.path / MANIFEST).exists():
            self._write_manifest(complete=False, totals={})
            return
        changed = differences(read_manifest(self.path)["settings"], self.settings)
        if changed:
            raise StoreError(
                f"{self.path} was begun with other settings: {'; '.join(changed[:12])}. Use the old settings to "
                "resume, or give another folder."
            )

    def _adopt(self, repair: bool) -> None:
        """Brings the folder to the state that the journal describes."""
        journal = self.path / JOURNAL
        try:
            sweep(self.path, _TEMPORARY)
            if not journal.exists():
                write_file(journal, [], 0)
            self._records, self._journal_bytes = read_journal(self.path, self.settings["layers"])
            for record in self._records:
                problem = _first_problem(record, self.path)
                if problem and not repair:
                    raise StoreError(f"{problem}. Restore the file, or have the shard encoded again (repair).")
                if problem:
                    self.repaired = problem
                    self.truncate_from(record.index)
                    break
            known = {path.name for record in self._records for path in record.paths(self.path)}
            for name in os.listdir(self.path):
                if _SHARD_FILE.fullmatch(name) and name not in known:  # written, and not journalled before a crash
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.path) from error


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, or in float32 where float16 would make a finite number infinite. NaN and infinity stay."""
    y = x.to(dtype)
    if dtype == torch.float16 and bool((y.isinf() & x.isfinite()).any()):
        return x.to(torch.float32)
    return y


def _first_problem(record: ActivationRecord, folder: Path) -> str | None:
    for path, (_, size) in record.paths(folder).items():
        problem = size_problem(path, size)
        if problem:
            return f"{path} was finished, but {problem}"
    return None


# --- reading ---------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """activations.json. Raises `StoreError`: none, foreign, damaged, changed, or of a newer qscope."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(
            f"{folder} is not a store of activations: it has no {MANIFEST}. Give a folder that `qscope encode "
            "--activations` wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Restore the file, or encode into a new folder.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(f"{path} does not describe a store of activations (no format {FORMAT!r}).")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise StoreError(
            f"{folder} was written in format {content.get('version')}; this qscope reads up to {VERSION}. Use the "
            "newer qscope that wrote it."
        )
    settings = content.get("settings")
    if (
        not isinstance(settings, dict)
        or hashlib.sha256(_canonical(settings)).hexdigest() != content.get("settings_key")
        or settings.get("dtype") not in DTYPES
    ):
        raise StoreError(f"{path}: the settings were changed after the store was written. Restore the file.")
    return content


def read_journal(folder: Path, layers: list[int]) -> tuple[list[ActivationRecord], int]:
    """Records of the finished shards, and the length of the sound part of shards.jsonl.

    A last line that a crash cut off is not counted; damage anywhere else is a `StoreError`.
    """
    path = folder / JOURNAL
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}. Restore the file, or encode again.") from error
    names = {item.name for item in fields(ActivationRecord)}
    wanted = {"tokens", *map(str, layers)}
    records: list[ActivationRecord] = []
    length = 0
    for number, line in enumerate(lines):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1:
                break
            raise StoreError(f"{path}, line {number + 1}, is damaged ({error}). Restore the file.") from error
        if not isinstance(content, dict) or set(content) != names or content["index"] != number:
            raise StoreError(f"{path}, line {number + 1}, does not describe shard {number}. Restore the file.")
        if set(content["files"]) != wanted or set(content["dtypes"].values()) - set(DTYPES):
            raise StoreError(f"{path}, line {number + 1}, names other files than the settings. Restore the file.")
        records.append(ActivationRecord(**content))
        length += len(line) + 1
    return records, length


class ActivationStore:
    """A finished activation store, opened for reading. Sizes are checked at once, hashes by `verify`.

    Raises `StoreError` for one that is not there, not complete, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.settings: dict[str, Any] = manifest["settings"]
        self.settings_key: str = manifest["settings_key"]
        self.totals: dict[str, Any] = manifest["totals"]
        if not manifest["complete"]:
            raise StoreError(
                f"{self.path} is not complete: encoding was interrupted. Run the same encode command again; it goes on "
                "from there."
            )
        self.layers: tuple[int, ...] = tuple(self.settings["layers"])
        self.widths: dict[int, int] = {int(layer): width for layer, width in self.settings["widths"].items()}
        self.records, _ = read_journal(self.path, self.settings["layers"])
        if len(self.records) != self.totals.get("shards"):
            raise StoreError(
                f"{self.path / JOURNAL} lists {len(self.records)} shards, and {self.totals.get('shards')} were "
                "written. Restore the file, or run the same encode command again."
            )
        for record in self.records:
            problem = _first_problem(record, self.path)
            if problem:
                raise StoreError(f"{problem}. Restore the file, or run the same encode command again.")
        self._slice = functools.lru_cache(_OPEN_FILES)(self._open_slice)

    @property
    def tokens(self) -> int:
        return sum(record.tokens for record in self.records)

    def key(self) -> str:
        """sha256 over what the store holds."""
        return hashlib.sha256(b"".join(record.line() for record in self.records)).hexdigest()

    def dtype(self, layers: list[int]) -> torch.dtype:
        """Narrowest dtype that holds what is stored of `layers`."""
        kinds = {record.dtypes[str(layer)] for record in self.records for layer in layers} or {self.settings["dtype"]}
        return DTYPES[kinds.pop()] if len(kinds) == 1 else torch.float32

    def rows(self, shard: int, layer: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Activations of tokens start..stop-1 of a shard: [n, D] in the file's dtype, on the host."""
        x: Tensor = self._slice(shard, layer, "x")[start : self.records[shard].tokens if stop is None else stop]
        return x

    def column(self, shard: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """doc, position, place or token of tokens start..stop-1: [n] uint32."""
        x: Tensor = self._slice(shard, None, name)[start : self.records[shard].tokens if stop is None else stop]
        return x

    def _open_slice(self, shard: int, layer: int | None, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path, record = self.path / file_name(shard, layer), self.records[shard]
        try:
            found = safe_open(str(path), framework="pt").get_slice(name)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} is damaged: {error}. Restore the file, or encode again.") from error
        shape = [record.tokens] if layer is None else [record.tokens, self.widths[layer]]
        if found.get_shape() != shape:
            raise StoreError(f"{path} holds {name} {found.get_shape()}, expected {shape}. Restore the file.")
        return found

    def verify(self) -> None:
        """Reads every file and compares its sha256. Raises `StoreError` naming those that differ."""
        damaged = [
            path.name
            for record in self.records
            for path, (sha256, _) in record.paths(self.path).items()
            if file_sha256(path) != sha256
        ]
        if damaged:
            raise StoreError(
                f"{len(damaged)} files of {self.path} are not what was written: {', '.join(damaged[:5])}. Delete them "
                "and run the same encode command again."
            )
