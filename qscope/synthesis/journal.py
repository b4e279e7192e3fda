"""What a run has finished so far: a folder with its options and a journal, a batch a line.

options.json    what the run was asked; another run in the same folder must be asked the same
journal.jsonl   finished batches in their order; one is on the disk before the next is begun
"""

import json
import re
from pathlib import Path
from typing import Any

from qscope.errors import StoreError
from qscope.files import acquire_lock, append_line, claim_folder, differences, storage_error, write_file

OPTIONS, JOURNAL = "options.json", "journal.jsonl"
_TEMPORARY = re.compile(r"\.tmp-.*|\..*\.part")


class BatchJournal:
    """Batches by arm, in their order."""

    def __init__(self, folder: Path, options: dict[str, Any], what: str = "synthesis") -> None:
        """Raises StoreError where the folder holds something else, another run's options, or is in use."""
        claim_folder(folder, OPTIONS, _TEMPORARY, f"{what} run")
        self._lock = acquire_lock(folder)
        self.folder, self.path = folder, folder / JOURNAL
        self._batches: dict[str, list[Any]] = {}
        self._length = 0
        try:
            self._agree(options)
            self._read()
        except OSError as error:
            self.close()
            raise storage_error(error, self.path) from error
        except BaseException:
            self.close()
            raise

    def _agree(self, options: dict[str, Any]) -> None:
        path, options = self.folder / OPTIONS, json.loads(json.dumps(options))
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
                f"{self.folder} holds a run with other options: {'; '.join(changed[:5])}. Give the same options to go "
                "on with it, or another --out."
            )

    def _read(self) -> None:
        self.path.touch()
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):  # a write that was killed; the next append cuts it off
                break
            try:
                row = json.loads(line)
                batches = self._batches.setdefault(row["arm"], [])
                if row["batch"] != len(batches):
                    raise ValueError(f"batch {row['batch']} stands where {len(batches)} belongs")
                batches.append(row["rows"])
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{self.path} is damaged in line {number}: {error}. Remove that line and those behind it (their "
                    "batches are made again), or the folder."
                ) from error
            self._length += len(line)

    def batches(self, arm: str) -> list[Any]:
        """Rows of the finished batches."""
        return list(self._batches.get(arm, []))

    def put(self, arm: str, rows: Any) -> Any:
        """Keep the arm's next batch; gives back the rows as they will be read again."""
        batches = self._batches.setdefault(arm, [])
        row = {"arm": arm, "batch": len(batches), "rows": rows}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        append_line(self.path, self._length, line)
        self._length += len(line)
        batches.append(json.loads(line)["rows"])
        return batches[-1]

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> "BatchJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
