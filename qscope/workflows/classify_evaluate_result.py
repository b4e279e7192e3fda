"""What `qscope classify evaluate` found: one table of all methods on the same texts, and what it was made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qscope.classification.resampling import Estimate
from qscope.finding.stability import Interval

Family = Literal["rule", "features", "residual", "text", "none"]
"""What a method reads: a few features by name, all features, the residual stream, the words, nothing"""
EMPTY = Estimate(None, None, None)


@dataclass(frozen=True)
class MethodRow:
    """One line of the table."""

    method: str
    family: Family
    layer: str
    """The layer or layers that it reads; empty for those that read words"""
    detail: str
    """Features, thresholds, hyper-parameters: what was chosen, and on which texts"""
    headline: bool
    """This is the rule that all others are compared with"""
    figures: dict[str, Estimate]
    ahead: dict[str, Estimate]
    """Headline rule minus this method, the same replicates for both; empty for the headline rule"""
    judgement: Literal["", "rule wins", "rule loses"]
    """Where the whole interval of the difference of F1 (macro-F1) is on one side of 0"""
    groups: dict[str, dict[str, float | None]]
    """Group -> texts, positive, f1 (macro_f1), auroc of its test texts"""
    confusion: list[list[int]]
    """[true class][class decided], test texts, classes in their order (binary: negative, positive)"""
    reliability: list[tuple[float, float, int]]
    """Mean probability, share that is positive (multi-class: right), texts, per bin; empty without probabilities"""


@dataclass(frozen=True)
class LayerLine:
    """A method at one layer, test texts. Nothing was chosen from these lines."""

    method: str
    family: Family
    layer: int
    f1: Estimate
    """Multi-class: macro-F1"""
    auroc: Estimate
    chosen: bool
    """The table has the method at this layer"""
    top1_difference: float | None
    """Of training texts; None for what is no rule"""


@dataclass(frozen=True)
class CurvePoint:
    """A method that was fitted on a share of the training texts."""

    method: str
    family: Family
    share: float
    texts: int
    """Training texts at this share"""
    f1: Estimate
    """Mean over the draws with the lowest and the highest; None where it could not be fitted, with the reason"""
    draws: int


@dataclass(frozen=True)
class Transfer:
    """A method fitted on the training texts of one group and tested on the test texts of another."""

    method: str
    family: Family
    groups: list[str]
    sources: list[str]
    """What the rows learned from: the groups, then all of them together"""
    f1: list[list[float | None]]
    """[source][group of the test texts]; multi-class: macro-F1. None where there is too little to fit or to test"""


@dataclass(frozen=True)
class ChosenFeature:
    """A feature of the headline rule, or one that bootstrap replicates chose in its stead."""

    of: str
    """The class; empty for a binary rule"""
    layer: int
    feature: int
    in_rule: bool
    threshold: float | None
    rate_positive: float
    """Share of the positive training texts in which it fires"""
    rate_negative: float
    inclusion: float | None
    """Share of the replicates of the training texts that choose it; None without replicates"""


@dataclass(frozen=True)
class Stability:
    of: str
    """The class; empty for a binary rule"""
    with_all: Interval
    """|A n B| / |A u B| between the features of a bootstrap replicate and those of all training texts"""
    between: Interval
    """Of two replicates"""
    halves: Interval
    """Of two halves of the training texts with no text in common"""
    replicates: int


@dataclass(frozen=True)
class SensitivityRow:
    """Another setting of the rule. `training` is what a choice may look at, the others were looked at once, here."""

    setting: dict[str, str]
    """layer, K, threshold, pooling"""
    training_f1: float | None
    calibration_f1: float | None
    test_f1: float | None
    """Multi-class: macro-F1"""
    chosen: bool


@dataclass(frozen=True)
class ClassifyEvaluateResult:
    title: str
    classes: list[str]
    """Binary: negative, positive"""
    multiclass: bool
    headline: str
    """Name of the rule that all others are compared with"""
    verdict: str
    loses: list[str]
    """A sentence for every figure, group or class in which the rule loses"""
    notes: list[str]
    about: dict[str, str]
    counts: dict[str, dict[str, int]]
    """Part of the split -> class -> texts"""
    rows: list[MethodRow]
    layers: list[LayerLine]
    curve: list[CurvePoint]
    transfers: list[Transfer]
    feature_overlap: list[list[float | None]]
    """Jaccard of the features that the groups of `transfers` choose on their own"""
    features: list[ChosenFeature]
    stability: list[Stability]
    sensitivity: list[SensitivityRow]
    per_class: dict[str, dict[str, dict[str, float | None]]]
    """Multi-class: method -> class -> precision, recall, f1, auroc"""
    seconds: dict[str, float]
    out: Path

    @property
    def page(self) -> Path:
        return self.out / "evaluate.html"

    @property
    def main_figure(self) -> str:
        return "macro_f1" if self.multiclass else "f1"

    def to_json(self) -> Any:
        return plain(self)


def plain(value: Any) -> Any:
    """Plain data by field name; paths as text."""
    from dataclasses import fields, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def table(rows: Sequence[MethodRow], names: Sequence[str]) -> list[list[str]]:
    """The table as cells of a CSV file, the head first; an undefined figure is an empty cell."""
    head = ["method", "reads", "layer", "headline", "detail"]
    head += [f"{name}{part}" for name in names for part in ("", "_low", "_high")]
    compared = list(next((row.ahead for row in rows if row.ahead), {}))
    head += [f"rule_minus_this_{name}{part}" for name in compared for part in ("", "_low", "_high")] + ["judgement"]
    lines = [head]
    for row in rows:
        figures = [row.figures.get(name, EMPTY) for name in names]
        figures += [row.ahead.get(name, EMPTY) for name in compared]
        numbers = [number for found in figures for number in (found.value, found.low, found.high)]
        cells = ["" if number is None else repr(number) for number in numbers]
        lines.append([row.method, row.family, row.layer, str(row.headline).lower(), row.detail, *cells, row.judgement])
    return lines
