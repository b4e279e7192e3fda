"""What a run has finished so far: a folder with its options and a journal, a JSON object a line.

options.json    what the run was asked; another run in the same folder must be asked the same
journal.jsonl   each finished piece: generations of a batch, scores of a detector, side effects of a batch
"""

import json
import re
from pathlib import Path
from typing import Any

from qscope.errors import StoreError
from qscope.files import acquire_lock, append_line, claim_folder, differences, storage_error, write_file

OPTIONS, JOURNAL = "options.json", "journal.jsonl"
_TEMPORARY = re.compile(r"\.tmp-.*|\..*\.part")


class Journal:
    """Finished pieces by key. A line is on the disk before the next piece is begun."""

    def __init__(self, folder: Path, options: dict[str, Any], what: str) -> None:
        """Raises StoreError where the folder is no `what`, or one that was asked something else."""
        claim_folder(folder, OPTIONS, _TEMPORARY, what)
        self._what = what
        self._lock = acquire_lock(folder)
        self.path = folder / JOURNAL
        self.pieces: dict[tuple[Any, ...], Any] = {}
        self._length = 0
        try:
            self._agree(folder / OPTIONS, options)
            self._read()
        except OSError as error:
            self.close()
            raise storage_error(error, self.path) from error
        except BaseException:
            self.close()
            raise

    def _agree(self, path: Path, options: dict[str, Any]) -> None:
        options = json.loads(json.dumps(options))
        if not path.exists():
            data = json.dumps(options, indent=1, ensure_ascii=False).encode()
            write_file(path, [data], len(data))
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path} is damaged: {error}. Remove the folder and start again.") from error
        changed = differences(before, options)
        if changed:
            raise StoreError(
                f"{path.parent} holds a {self._what} with other options: {'; '.join(changed[:5])}. Give the same "
                "options to go on with it, or another --out."
            )

    def _read(self) -> None:
        self.path.touch()
        data = self.path.read_bytes()
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # a write that was killed; the next append cuts it off
                break
            try:
                piece = json.loads(line)
                self.pieces[tuple(piece["key"])] = piece["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{self.path} is damaged in line {number}: {error}. Remove that line (its piece is made again), "
                    "or the folder."
                ) from error
            self._length += len(line)

    def get(self, *key: Any) -> Any:
        """The value of a finished piece, or None."""
        return self.pieces.get(key)

    def put(self, *key: Any, value: Any) -> Any:
        """Keep a finished piece; gives back the value as it will be read again."""
        line = json.dumps({"key": list(key), "value": value}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        append_line(self.path, self._length, line)
        self._length += len(line)
        self.pieces[key] = json.loads(line)["value"]
        return self.pieces[key]

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
