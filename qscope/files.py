"""Where qscope keeps what it makes or fetches once, what a file holds, and writes that either happen or do not."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_kernels._build import cache_dir

from qscope.errors import StorageError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EMBEDDED",
    "EMBEDDED_FOLDER",
    "LOCK",
    "acquire_lock",
    "append_line",
    "cache_dir",
    "claim_folder",
    "differences",
    "file_sha256",
    "fsync_folder",
    "safetensors_header",
    "size_problem",
    "storage_error",
    "sweep",
    "tensor_parts",
    "write_all",
    "write_file",
]

LOCK = ".lock"

EMBEDDED = "embedded"
"""Name of the SAEs that come with qscope, for the model that `qscope.embedded` makes"""
EMBEDDED_FOLDER = Path(__file__).parent / "assets" / "smollm2-135m"


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def differences(old: Any, new: Any) -> list[str]:
    """The places in which two JSON values differ, each as `saes[0].k: 50 -> 100`."""
    left, right = _flat(old), _flat(new)
    names = list(left) + [name for name in right if name not in left]
    absent = "absent"
    return [
        f"{name}: {left.get(name, absent)} -> {right.get(name, absent)}"
        for name in names
        if left.get(name, absent) != right.get(name, absent)
    ]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        parts = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        parts = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {name: json.dumps(value)}
    return {key: text for part, item in parts for key, text in _flat(item, part).items()}


# --- writing ---------------------------------------------------------------------------------------------

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


def write_all(handle: int, data: memoryview) -> None:
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
                write_all(handle, memoryview(part))
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


def append_line(path: Path, length: int, line: bytes) -> None:
    """Appends to a journal of `length` sound bytes, durably. Raises `StorageError`."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            # Cuts off what an append that failed in this process may have left.
            os.ftruncate(handle, length)
            os.lseek(handle, 0, os.SEEK_END)
            write_all(handle, memoryview(line))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise storage_error(error, path, len(line)) from error


def claim_folder(folder: Path, manifest: str, temporary: re.Pattern[str], what: str) -> None:
    """Makes the folder and proves, before any computing, that it is ours and can be written to.

    Ours: empty, or with the file `manifest`; else a `StoreError` that calls it not a `what`.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder} is a file; a {what} is a folder. Give the path of a new or empty folder.")
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder.parent)
        names = sorted(os.listdir(folder))
        foreign = [name for name in names if name != LOCK and not temporary.fullmatch(name)]
        if foreign and manifest not in names:
            raise StoreError(
                f"{folder} is not empty and not a {what}: it holds {', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}. Give a new or empty folder."
            )
        probe = folder / ".tmp-probe"
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            write_all(handle, memoryview(b"qscope"))
            os.fsync(handle)
        finally:
            os.close(handle)
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


def sweep(folder: Path, temporary: re.Pattern[str]) -> None:
    """Removes what a killed writer left behind."""
    for name in os.listdir(folder):
        if not temporary.fullmatch(name):
            continue
        path = folder / name
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def size_problem(path: Path, size: int) -> str | None:
    """Why `path` is not the plain file of `size` bytes that was written there, if it is not."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return "it is missing"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a plain file any more"
    return None if status.st_size == size else f"it has {status.st_size} bytes instead of {size}"


# --- safetensors -----------------------------------------------------------------------------------------


def safetensors_header(
    forms: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """Header of a safetensors file and the file's size. forms: (name, dtype code, shape, bytes) in file order.

    Written here because the library puts the metadata in another order in every process (safetensors 0.8), and
    equal contents must give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, code, shape, size in forms:
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


# In the order in which the library lays tensors of these types into a file: by falling size of an element.
_TORCH_CODES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "uint8": "U8",
    "int8": "I8",
    "bool": "BOOL",
}


def tensor_parts(
    tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]
) -> tuple[Iterator[memoryview | bytes], int]:
    """A safetensors file as its pieces, for `write_file`, and its size. One tensor at a time is copied to the host."""
    rank = list(_TORCH_CODES)
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    unknown = sorted({kind for kind in kinds.values() if kind not in _TORCH_CODES})
    if unknown:
        raise ValueError(f"Tensors of dtype {', '.join(unknown)} cannot be saved; accepted: {', '.join(rank)}.")
    order = sorted(tensors, key=lambda name: (rank.index(kinds[name]), name))
    forms = [
        (n, _TORCH_CODES[kinds[n]], tensors[n].shape, tensors[n].numel() * tensors[n].element_size()) for n in order
    ]
    header, size = safetensors_header(forms, metadata)

    def parts() -> Iterator[memoryview | bytes]:
        yield header
        for name in order:
            yield _host_bytes(tensors[name])

    return parts(), size


def _host_bytes(tensor: "Tensor") -> memoryview:
    import torch

    host = tensor.detach().cpu().contiguous()
    # A tensor of one element or none counts as contiguous whatever its stride is.
    flat = host.as_strided((host.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
