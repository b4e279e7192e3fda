"""Files as such: what a damaged one looks like, hashing, and writes that either happen or do not."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qscope.errors import CheckpointError, StorageError
from qscope.files import file_sha256


def head_of(path: Path) -> bytes:
    """The first 4096 bytes. Raises CheckpointError for none, only zeros, a Git LFS pointer or a web page."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, but a checkpoint file is expected here.")
    try:
        with path.open("rb") as file:
            head = file.read(4096)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    text = head.lstrip().lower()
    if not head:
        reason = "it is empty; the download or copy did not finish"
    elif head.startswith(b"version https://git-lfs"):
        reason = "it is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from"
    elif text.startswith((b"<!doctype html", b"<html")):
        reason = "it is a web page, most likely an error page saved under this name; download the file again"
    elif not head.strip(b"\0"):
        reason = "it begins with zeros only; the download or copy did not finish"
    else:
        return head
    raise CheckpointError(f"{path} ({size} bytes) is not a checkpoint: {reason}.")


def sha256_of(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {path} cannot be made: {error.strerror or error}.") from error


def _sweep(path: Path) -> None:
    """Removes what a killed save of the same file left behind on this host."""
    prefix = f".{path.name}.tmp-{socket.gethostname()}-"
    for stale in path.parent.glob(f"{prefix}*"):
        pid = stale.name.removeprefix(prefix)
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            stale.unlink(missing_ok=True)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, removed at the end whatever happens; `commit` it inside the block."""
    temp = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        _sweep(path)
        yield temp
    except OSError as error:
        free = _free_bytes(path.parent)
        raise StorageError(
            f"{path} could not be written: {error.strerror or error} ({free}). No partial file was left."
        ) from error
    finally:
        temp.unlink(missing_ok=True)


def commit(temp: Path, path: Path) -> None:
    """Makes `temp` durable and gives it its name; after a crash there is the old file or the new one."""
    sync(temp)
    os.replace(temp, path)
    sync(path.parent)


def _free_bytes(folder: Path) -> str:
    try:
        room = os.statvfs(folder)
    except OSError:
        return "free space unknown"
    return f"{room.f_bavail * room.f_frsize} bytes free"
