"""What `qscope explain` returns."""

from dataclasses import dataclass
from pathlib import Path

from qscope.explaining.journal import Explanation


@dataclass(frozen=True)
class MeanScore:
    """A score over features."""

    features: int
    """That have it"""
    balanced_accuracy: float
    balanced_accuracy_interval: tuple[float, float] | None
    """95 % of the mean over features, by Student's t; None for a single one"""
    auroc: float
    auroc_interval: tuple[float, float] | None
    unanswered: int
    """Examples without a usable answer, of all features"""


@dataclass(frozen=True)
class ExplainResult:
    """Explanations of features, and how far they hold."""

    about: dict[str, str]
    """Where they come from: model, SAEs, explainer, judge"""
    explanations: tuple[Explanation, ...]
    """In the order asked for"""
    made: int
    """By this run; the others were found in the folder"""
    scores: dict[str, MeanScore]
    requests: dict[str, dict[str, int]]
    """Of each model that was asked: `qscope.endpoint.Counts`"""
    notes: tuple[str, ...]
    path: str
    """The file of explanations"""
    rule_path: str | None
    html: Path | None

    @property
    def exit_status(self) -> int:
        """2 where a model was to write a sentence and did not."""
        return 2 if any(one.problem for one in self.explanations) else 0
