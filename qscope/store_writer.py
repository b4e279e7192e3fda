"""Writing a feature store so that nothing can be lost or half written.

The unit of progress is the shard: temporary file, fsync, rename, fsync of the folder, then one line in
shards.jsonl, fsynced. After a crash at any point the journal names exactly the shards that are whole.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from qscope.errors import StorageError, StoreError
from qscope.store_format import (
    JOURNAL,
    LOCK,
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

_CHUNK = 8 << 20
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def storage_error(error: OSError, path: Path, needed: int | None = None) -> StorageError:
    """An `OSError` as one paragraph: what was being written, what is free, and how to go on."""
    resume = " What was finished before is valid; run the same command again and it goes on from there."
    if error.errno in _FULL:
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} bytes are free"
        except OSError:
            free = "free space unknown"
        size = f"{needed:,} bytes were needed, " if needed is not None else ""
        return StorageError(f"{path} could not be written: {_FULL[error.errno]} ({size}{free}). Make room.{resume}")
    if error.errno in _DENIED:
        return StorageError(
            f"{path} could not be written: {error.strerror}. Give a folder that this user may write to, or"
            f" change its permissions.{resume}"
        )
    return StorageError(f"{path} could not be written: {error.strerror or error}.{resume}")


def fsync_folder(path: Path) -> None:
    """Makes renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no fsync for folders; there the rename is as durable as it gets.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data[:_CHUNK]) :]


def write_file(path: Path, parts: Iterable[memoryview | bytes], needed: int) -> str:
    """Replaces `path` by the parts, atomically and durably; their sha256. Raises `StorageError`."""
    temporary = path.with_name(f".tmp-{path.name}")
    digest = hashlib.sha256()
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            for part in parts:
                digest.update(part)
                _write_all(handle, memoryview(part))
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the first failure is the one to report
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(error, path, needed) from error
        raise
    return digest.hexdigest()


# In the order in which the library lays tensors of these types into a file.
_SAFETENSORS_DTYPES = {"float32": "F32", "uint32": "U32", "float16": "F16", "uint16": "U16", "uint8": "U8"}


def safetensors_parts(
    arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> tuple[list[memoryview | bytes], int]:
    """A safetensors file as its pieces and its size.

    Written here because the library puts the metadata in another order in every process (safetensors 0.8),
    and the same features must give the same bytes. Otherwise the file is what the library would write.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts: list[memoryview | bytes] = []
    offset = 0
    rank = list(_SAFETENSORS_DTYPES)
    for name, array in sorted(arrays.items(), key=lambda item: (rank.index(item[1].dtype.name), item[0])):
        flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + flat.nbytes],
        }
        offset += flat.nbytes
        parts.append(flat.view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts], 8 + len(text) + offset


def acquire_lock(folder: Path) -> Any:
    """Exclusive lock on a folder's `.lock`, or `StoreError` at once when another process holds it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise StoreError(
            f"{folder} is being written by another process, which holds {folder / LOCK}. Wait until it"
            " has finished, or"
            " give another folder."
        ) from error
    except OSError as error:
        raise storage_error(error, folder / LOCK) from error
    return lock


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
        _claim(folder)
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
            for name in os.listdir(self.path):
                if TEMPORARY.fullmatch(name):
                    _remove(self.path / name)
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
                problem = _size_problem(self.path / record.file, record.bytes)
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
        path = self.path / JOURNAL
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                # Cuts off what an append that failed in this process may have left.
                os.ftruncate(handle, self._journal_bytes)
                os.lseek(handle, 0, os.SEEK_END)
                _write_all(handle, memoryview(line))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise storage_error(error, path, len(line)) from error
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


def _claim(folder: Path) -> None:
    """Makes the folder and proves, before any computing, that it is ours and can be written to."""
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; a feature store is a folder. Give the path of a new or empty folder.")
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder.parent)
        names = sorted(os.listdir(folder))
        foreign = [name for name in names if name != LOCK and not TEMPORARY.fullmatch(name)]
        if foreign and MANIFEST not in names:
            raise StoreError(
                f"{folder} is not empty and not a feature store: it holds {', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}. Give a new or empty folder."
            )
        probe = folder / ".tmp-probe"
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            _write_all(handle, memoryview(b"qscope"))
            os.fsync(handle)
        finally:
            os.close(handle)
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


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


def _remove(path: Path) -> None:
    if stat.S_ISDIR(path.lstat().st_mode):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size_problem(path: Path, size: int) -> str | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return "it is missing"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a plain file any more"
    return None if status.st_size == size else f"it has {status.st_size} bytes instead of {size}"


def _layer_record(arrays: Mapping[str, npt.NDArray[Any]], layer: int) -> LayerRecord:
    values, flags = arrays[f"{layer}.values"], arrays[f"{layer}.flags"]
    return LayerRecord(
        nnz=int(np.count_nonzero(values)),
        nan_rows=int(np.count_nonzero(flags & NAN_ROW)),
        extreme_rows=int(np.count_nonzero(flags & EXTREME_ROW)),
        values="float16" if values.dtype == np.float16 else "float32",
    )
