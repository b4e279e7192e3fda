"""Writing a feature store so that nothing can be lost or half written.

The unit of progress is the shard: temporary file, fsync, rename, fsync of the folder, then one line in
shards.jsonl, fsynced. After a crash at any point the journal names exactly the shards that are whole.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qscope.errors import StoreError
from qscope.files import (
    acquire_lock,
    append_line,
    claim_folder,
    fsync_folder,
    safetensors_header,
    size_problem,
    storage_error,
    sweep,
    write_file,
)
from qscope.store_format import (
    JOURNAL,
    MANIFEST,
    SHARD_FILE,
    TEMPORARY,
    TOKENIZER,
    LayerRecord,
    Manifest,
    ShardRecord,
    StoreSettings,
    array_forms,
    canonical_json,
    read_journal,
    read_manifest,
    shard_name,
)
from qscope.store_packing import EXTREME_ROW, NAN_ROW

# In the order in which the library lays tensors of these types into a file.
_SAFETENSORS_DTYPES = {"float32": "F32", "uint32": "U32", "float16": "F16", "uint16": "U16", "uint8": "U8"}


def safetensors_parts(
    arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> tuple[list[memoryview | bytes], int]:
    """A safetensors file as its pieces and its size.

    Written here because the library puts the metadata in another order in every process (safetensors 0.8),
    and the same features must give the same bytes. Otherwise the file is what the library would write.
    """
    parts: list[memoryview | bytes] = []
    forms = []
    rank = list(_SAFETENSORS_DTYPES)
    for name, array in sorted(arrays.items(), key=lambda item: (rank.index(item[1].dtype.name), item[0])):
        flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        forms.append((name, _SAFETENSORS_DTYPES[array.dtype.name], array.shape, flat.nbytes))
        parts.append(flat.view(np.uint8).data)
    header, size = safetensors_header(forms, metadata)
    return [header, *parts], size


class StoreWriter:
    """Creates or resumes a feature store. Open it with :meth:`open`, as a context manager.

    with StoreWriter.open("codes", settings) as writer:
        for index, (key, arrays) in enumerate(work):
            writer.add(index, key, arrays)
        writer.complete({"documents": 120})
    """

    def __init__(self, path: Path, manifest: Manifest, lock: Any) -> None:
        self.path = path
        self._manifest = manifest
        self._lock = lock
        self.repaired: str | None = None
        """What `repair` found wrong, if anything."""
        self._records: list[ShardRecord] = []
        self._journal_bytes = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str], settings: StoreSettings, *, repair: bool = False) -> "StoreWriter":
        """Takes the folder for writing: new, empty, or a store with the same settings, which is resumed.

        repair: encode a finished shard that is missing or has another size again, with all after it; without
        it such a shard is a `StoreError`. Also refused with `StoreError`: a second writer, a folder that
        holds something else, other settings, a newer store format. `StorageError`: the folder cannot be
        written to.
        """
        folder = Path(path)
        claim_folder(folder, MANIFEST, TEMPORARY, "feature store")
        lock = acquire_lock(folder)
        try:
            writer = cls(folder, _settle_manifest(folder, settings), lock)
            writer._adopt(repair)
        except BaseException:
            lock.release()
            raise
        return writer

    @property
    def settings(self) -> StoreSettings:
        return self._manifest.settings

    @property
    def settings_key(self) -> str:
        return self._manifest.settings_key

    @property
    def finished(self) -> list[ShardRecord]:
        """Records of the finished shards, 0 to the last."""
        return list(self._records)

    def add(
        self,
        index: int,
        key: str,
        arrays: Mapping[str, npt.NDArray[Any]],
        meta: Mapping[str, Any] | None = None,
    ) -> ShardRecord:
        """Writes shard `index`: the next one, or one that is finished.

        A finished shard with the same key is left alone; with another key it and all after it are written
        again. key: identifies the text and all else that the shard depends on. arrays: what `shard_arrays`
        returns. meta: JSON values, kept in the record.
        """
        self._check_open()
        if index < len(self._records) and self._records[index].key == key:
            return self._records[index]
        if not 0 <= index <= len(self._records):
            raise StoreError(
                f"Shard {index} cannot be written to {self.path} yet: shards are added in order, the next is"
                f" {len(self._records)}."
            )
        try:
            canonical_json(meta)
        except (TypeError, ValueError) as error:
            raise StoreError(f"The meta of shard {index} cannot be kept as JSON: {error}.") from error
        self._check_arrays(arrays)
        doc = arrays["doc"]
        if (doc[1:] < doc[:-1]).any():
            raise StoreError(f"Shard {index} was given tokens out of order; sort them by document.")
        self.truncate_from(index)
        self._set_manifest(self._manifest.model_copy(update={"complete": False, "totals": {}}))
        path = self.path / shard_name(index)
        header = {"index": str(index), "key": key, "settings_key": self.settings_key}
        parts, size = safetensors_parts(arrays, header)
        record = ShardRecord(
            index=index,
            file=path.name,
            sha256=write_file(path, parts, size),
            bytes=size,
            key=key,
            tokens=len(doc),
            documents=int(np.count_nonzero(np.diff(doc))) + min(1, len(doc)),
            first_doc=int(doc[0]) if len(doc) else None,
            last_doc=int(doc[-1]) if len(doc) else None,
            layers={layer: _layer_record(arrays, layer) for layer in self.settings.layers},
            meta=dict(meta or {}),
        )
        self._append(record.line())
        self._records.append(record)
        return record

    def truncate_from(self, index: int) -> None:
        """Forgets the finished shards from `index` on, in the journal first: it never names a lost one."""
        self._check_open()
        if index >= len(self._records):
            return
        self._set_manifest(self._manifest.model_copy(update={"complete": False, "totals": {}}))
        dropped = self._records[index:]
        text = b"".join(record.line() for record in self._records[:index])
        write_file(self.path / JOURNAL, [text], len(text))
        self._records, self._journal_bytes = self._records[:index], len(text)
        try:
            for record in dropped:
                (self.path / record.file).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def complete(self, totals: Mapping[str, Any] | None = None) -> None:
        """Marks the store finished. totals: JSON values; `shards` and `tokens` are added or checked."""
        self._check_open()
        counted = {"shards": len(self._records), "tokens": sum(record.tokens for record in self._records)}
        given = dict(totals or {})
        for name, count in counted.items():
            if given.setdefault(name, count) != count:
                raise StoreError(f"{self.path}: totals claim {given[name]} {name}, but the shards hold {count}.")
        self._set_manifest(self._manifest.model_copy(update={"complete": True, "totals": given}))

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Copies a tokenizer (anything with `save_pretrained(folder)`) into the store, once."""
        self._check_open()
        target, temporary = self.path / TOKENIZER, self.path / f".tmp-{TOKENIZER}"
        if target.is_dir():
            return
        try:
            temporary.mkdir()
            tokenizer.save_pretrained(str(temporary))
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            fsync_folder(temporary)
            os.rename(temporary, target)
            fsync_folder(self.path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise storage_error(error, target) from error
            raise

    def close(self) -> None:
        """Releases the folder. What was added stays."""
        self._lock.release()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise StoreError(f"{self.path} is closed: open the store again with StoreWriter.open to write to it.")

    def _adopt(self, repair: bool) -> None:
        """Brings the folder to the state that the journal describes."""
        journal = self.path / JOURNAL
        shards = sorted(name for name in os.listdir(self.path) if SHARD_FILE.fullmatch(name))
        try:
            sweep(self.path, TEMPORARY)
            if not journal.exists():
                if shards:
                    raise StoreError(
                        f"{self.path} holds {len(shards)} shard files but no {JOURNAL} to say what they are."
                        f" Restore {JOURNAL}, or encode into a new folder."
                    )
                write_file(journal, [], 0)
            self._records, self._journal_bytes = read_journal(self.path)
            if journal.stat().st_size != self._journal_bytes:
                with open(journal, "r+b") as handle:
                    handle.truncate(self._journal_bytes)
                    os.fsync(handle.fileno())
            for record in self._records:
                problem = size_problem(self.path / record.file, record.bytes)
                if problem and repair:
                    self.repaired = f"{self.path / record.file} was finished, but {problem}"
                    self.truncate_from(record.index)
                    break
                if problem:
                    raise StoreError(
                        f"{self.path / record.file} was finished, but {problem}. Restore the file, or open"
                        f" the store with repair=True to encode shard {record.index} and all after it again."
                    )
            # A shard that was renamed but not journalled before a crash: it will be written again.
            for name in set(shards) - {record.file for record in self._records}:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def _set_manifest(self, manifest: Manifest) -> None:
        if manifest != self._manifest:
            text = manifest.text()
            write_file(self.path / MANIFEST, [text], len(text))
            self._manifest = manifest

    def _append(self, line: bytes) -> None:
        append_line(self.path / JOURNAL, self._journal_bytes, line)
        self._journal_bytes += len(line)

    def _check_arrays(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        expected = array_forms(self.settings)
        if arrays.keys() != expected.keys():
            raise StoreError(
                f"A shard of {self.path} takes the arrays {', '.join(sorted(expected))}; it was given"
                f" {', '.join(sorted(arrays))}. Build them with pack_layer and shard_arrays."
            )
        n = len(arrays["doc"])
        for name, (dtypes, shape) in expected.items():
            array = arrays[name]
            if array.dtype.name not in dtypes or array.shape != (n, *shape):
                raise StoreError(
                    f"{self.path}: {name} of a new shard is {array.dtype.name}{list(array.shape)}, expected"
                    f" {' or '.join(dtypes)}{[n, *shape]}. Build it with pack_layer and shard_arrays."
                )


def _settle_manifest(folder: Path, settings: StoreSettings) -> Manifest:
    """The manifest that is there, if its settings are these; else a new one, written."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        differences = manifest.settings.differences(settings)
        if differences:
            raise StoreError(
                f"{folder} was begun with other settings: {'; '.join(differences[:12])}"
                f"{'; ...' if len(differences) > 12 else ''}. Use the old settings to resume, or give another"
                " folder."
            )
        return manifest
    manifest = Manifest(settings=settings, settings_key=settings.settings_key())
    text = manifest.text()
    write_file(folder / MANIFEST, [text], len(text))
    return manifest


def _layer_record(arrays: Mapping[str, npt.NDArray[Any]], layer: int) -> LayerRecord:
    values, flags = arrays[f"{layer}.values"], arrays[f"{layer}.flags"]
    return LayerRecord(
        nnz=int(np.count_nonzero(values)),
        nan_rows=int(np.count_nonzero(flags & NAN_ROW)),
        extreme_rows=int(np.count_nonzero(flags & EXTREME_ROW)),
        values="float16" if values.dtype == np.float16 else "float32",
    )
