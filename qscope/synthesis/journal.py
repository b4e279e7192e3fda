"""The journal of a synthesis: finished batches by arm, in their order; one is on the disk before the next is begun."""

from pathlib import Path
from typing import Any

from qscope.errors import StoreError
from qscope.journal import Journal


class BatchJournal(Journal):
    """Batches by arm, in their order."""

    def __init__(self, folder: Path, options: dict[str, Any], what: str = "synthesis run") -> None:
        """Raises StoreError as `Journal` does, and where a batch is missing."""
        super().__init__(folder, options, what)
        self._batches: dict[str, list[Any]] = {}
        try:
            for arm, number in self.pieces:
                batches = self._batches.setdefault(arm, [])
                if number != len(batches):
                    raise StoreError(
                        f"{self.path} is damaged: batch {number} of {arm} stands where {len(batches)} belongs. Remove "
                        "the lines from there on (their batches are made again), or the folder."
                    )
                batches.append(self.pieces[arm, number])
        except ValueError as error:
            self.close()
            raise StoreError(f"{self.path} is not the journal of a synthesis: {error}. Remove the folder.") from error
        except StoreError:
            self.close()
            raise

    def batches(self, arm: str) -> list[Any]:
        """Rows of the finished batches."""
        return list(self._batches.get(arm, []))

    def add(self, arm: str, rows: Any) -> Any:
        """Keep the arm's next batch; gives back the rows as they will be read again."""
        batches = self._batches.setdefault(arm, [])
        batches.append(self.put(arm, len(batches), value=rows))
        return batches[-1]

    def __enter__(self) -> "BatchJournal":
        return self
