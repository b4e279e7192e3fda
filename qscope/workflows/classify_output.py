"""The file of JSON lines that `qscope classify predict` writes block by block, so that a killed run goes on.

While it is written it is called `NAME.part`, and `NAME.options` says what the run was asked. A block is on the
disk before the next is begun. One that was cut short is made again from its first line, so that the same tokens stand
in the same batches and a run that was killed gives the bytes of one that was not.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qscope.errors import InputError, StoreError
from qscope.files import append_line, differences, fsync_folder, storage_error, write_file


def line(row: Any) -> bytes:
    """A row as a line of JSON in UTF-8."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


class BlockFile:
    """Lines of JSON, in blocks of known sizes."""

    def __init__(self, path: Path, options: dict[str, Any], blocks: Sequence[int]) -> None:
        """
        Args:
            options: all that the lines depend on, as JSON; a run with others is refused.
            blocks: how many lines each block has.

        Raises:
            InputError: where the file exists already.
            StoreError: where an unfinished file is of a run that was asked something else.
        """
        self.path = path
        self.part, self.options = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.options")
        if path.exists():
            raise InputError(f"{path} exists already. Give another --out, or remove the file.")
        self.lock = self._lock()
        self.done, self._length = 0, 0
        """Blocks that are on the disk, and their bytes"""
        try:
            self._begin(json.loads(json.dumps(options)))
            self.done, self._length = self._count(blocks)
        except OSError as error:
            self.close()
            raise storage_error(error, self.part) from error
        except BaseException:
            self.close()
            raise

    def _lock(self) -> Any:
        from filelock import FileLock, Timeout

        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0, thread_local=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise StoreError(
                f"{self.path} is being written by another process. Wait until it has finished, or give another --out."
            ) from error
        except OSError as error:
            raise storage_error(error, self.path) from error
        return lock

    def _begin(self, options: Any) -> None:
        if self.options.exists() and self.part.exists():
            try:
                before = json.loads(self.options.read_text(encoding="utf-8"))
            except ValueError as error:
                raise StoreError(f"{self.options} is damaged: {error}. Remove it and {self.part}.") from error
            changed = differences(before, options)
            if changed:
                raise StoreError(
                    f"{self.part} is of a run that was asked something else: {'; '.join(changed[:5])}. Give the same "
                    "options to go on with it, or another --out, or remove it."
                )
            return
        data = json.dumps(options, indent=1, ensure_ascii=False).encode()
        write_file(self.options, [data], len(data))
        self.part.write_bytes(b"")

    def _count(self, blocks: Sequence[int]) -> tuple[int, int]:
        data = self.part.read_bytes()
        ends = (np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1).tolist()
        lines = done = 0
        for size in blocks:
            if lines + size > len(ends):
                break
            lines, done = lines + size, done + 1
        return done, ends[lines - 1] if lines else 0

    def put(self, rows: Sequence[Any]) -> None:
        """Write a block through to the disk. Raises StorageError."""
        data = b"".join(line(row) for row in rows)
        append_line(self.part, self._length, data)
        self._length += len(data)
        self.done += 1

    def finished(self) -> list[Any]:
        """The rows that are on the disk."""
        lines = self.part.read_bytes()[: self._length].splitlines()
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise StoreError(f"{self.part} is damaged: {error}. Remove it and start again.") from error

    def finish(self) -> None:
        """Give the file its name."""
        try:
            os.truncate(self.part, self._length)
            os.replace(self.part, self.path)
            fsync_folder(self.path.parent)
            self.options.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.path) from error

    def close(self) -> None:
        self.lock.release()
