"""What `qscope classify fit` found."""

from dataclasses import dataclass

from qscope.workflows.steer_find_result import Context


@dataclass(frozen=True)
class ClauseFound:
    """A feature of the rule, on the training texts; formulas: docs/classify.md."""

    of: str
    """The class; of two classes the positive one"""
    layer: int
    feature: int
    threshold: float
    """The clause fires where the text's activation is above it"""
    meaning: str
    rate_positive: float
    """Share of the positive training texts in which the feature fires"""
    rate_negative: float
    rate_difference: float
    mean_difference: float
    auroc: float
    log_odds: float
    z: float
    q: float
    """Benjamini-Hochberg over the ranked features of the layer"""
    lens: tuple[str, ...]
    """Tokens that its decoder row raises most, by the logit lens"""
    contexts: tuple[Context, ...]
    """Its strongest tokens in training texts"""


@dataclass(frozen=True)
class LayerLine:
    """What a layer offers, on the training texts."""

    of: str
    layer: int
    sae: str
    top1_difference: float
    """Largest difference of firing rates, pooling any"""
    top1_feature: int
    chosen: bool


@dataclass(frozen=True)
class SensitivityLine:
    """Another choice. Calibration texts may choose thresholds; nothing here saw a test text."""

    of: str
    layers: str
    k: int
    pooling: str
    threshold: str
    """0, or calibrated to a false-positive rate"""
    training: dict[str, float | None]
    """f1, precision, recall, false_positive_rate"""
    calibration: dict[str, float | None]
    chosen: bool


@dataclass(frozen=True)
class ClassifyFitResult:
    model: str
    about: dict[str, str]
    notes: tuple[str, ...]
    classes: tuple[str, ...]
    """Two classes: the negative one, the positive one"""
    counts: dict[str, dict[str, int]]
    """Part of the split -> class -> texts"""
    layers: tuple[LayerLine, ...]
    clauses: tuple[ClauseFound, ...]
    sensitivity: tuple[SensitivityLine, ...]
    rule_path: str | None = None
    html: str | None = None
    out: str | None = None
