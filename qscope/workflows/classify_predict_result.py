"""What `qscope classify predict` and `stream` say of texts."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ClassifyPredictResult:
    model: str
    about: dict[str, str]
    notes: tuple[str, ...]
    texts: int
    decided: dict[str, int]
    """Class -> texts"""
    truncated: int
    """Texts with more tokens than the rule's context"""
    empty: int
    """Texts without a token that counts: nothing can fire in them"""
    tokens: int
    """Read in this run"""
    tokens_per_second: float
    """Of this run; 0 where all was there already"""
    resumed: int
    """Texts that an earlier run had decided"""
    out: Path | None
    failed: int = 0
    """Lines of `stream` that could not be read: each has a line that says why"""

    @property
    def exit_status(self) -> int:
        return 2 if self.failed else 0
