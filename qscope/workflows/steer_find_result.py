"""What `qscope steer find` found."""

from dataclasses import dataclass
from typing import Any

from qscope.finding.stability import Agreement, Interval, LayerTop


@dataclass(frozen=True)
class Context:
    """A token of a positive text at which a feature fires strongly."""

    before: str
    token: str
    after: str
    activation: float


@dataclass(frozen=True)
class HeldOut:
    """A feature on the texts that were kept out of ranking, layer choice and scale."""

    mean_difference: float
    rate_difference: float
    auroc: float


@dataclass(frozen=True)
class FeatureFound:
    """One feature, on the training texts; formulas: docs/steer-find.md."""

    feature: int
    mean_positive: float
    mean_negative: float
    mean_difference: float
    rate_positive: float
    rate_negative: float
    rate_difference: float
    auroc: float
    t: float
    p: float
    q: float
    """Benjamini-Hochberg over all ranked features of all layers"""
    nu: float
    density_positive: float
    density_negative: float
    dense: bool
    """It fires at more than 10 % of the negative tokens: more of the language than of the property"""
    scale: float | None
    """0.99 quantile of its activation over the positive training tokens at which it fires; None: at none"""
    score: Interval | None = None
    """The metric that ranks, with its bootstrap interval"""
    inclusion: float | None = None
    """Share of the bootstrap replicates that have it among the top features"""
    lens: tuple[str, ...] = ()
    """Tokens that its decoder row raises most, by the logit lens"""
    lens_target: float | None = None
    output_score: float | None = None
    target_change: float | None = None
    held_out: HeldOut | None = None
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True)
class TokenFacts:
    """Of all texts of one layer."""

    texts: int
    tokens: int
    kept: int
    extreme: int
    """Left out as attention sinks: norm above 10 times the median"""
    nan: int
    """Left out because something was not finite"""


@dataclass(frozen=True)
class LayerFound:
    """One layer."""

    sae: str
    d_sae: int
    k: int
    tokens: TokenFacts
    residual_norm: float
    """Median over the kept tokens"""
    ranked: int
    """Features that fire in enough texts to be ranked and tested"""
    significant: int
    """Of those, with q <= --fdr and a positive t"""
    top1: LayerTop
    features: tuple[FeatureFound, ...]
    """Best first"""
    bootstrap: Agreement | None = None
    halves: Agreement | None = None
    paraphrase: Agreement | None = None
    mismatch: str | None = None


@dataclass(frozen=True)
class UnusualFeature:
    """One feature of a bad case; formulas: docs/steer-find.md."""

    feature: int
    activation: float
    firing: float
    z: float
    pool_mean: float
    pool_rate: float
    exceed: float
    dense: bool
    scale: float | None
    lens: tuple[str, ...] = ()
    contexts: tuple[Context, ...] = ()


@dataclass(frozen=True)
class LayerDiagnosis:
    sae: str
    d_sae: int
    k: int
    tokens: TokenFacts
    residual_norm: float
    features: tuple[UnusualFeature, ...]
    mismatch: str | None = None


@dataclass(frozen=True)
class SteerFindResult:
    """Exactly one of `layers` and `diagnosis` is filled."""

    model: str
    about: dict[str, str]
    """What was compared on what: sets, options, versions"""
    notes: tuple[str, ...]
    layers: dict[str, LayerFound]
    diagnosis: dict[str, LayerDiagnosis]
    layer: int
    """The chosen one"""
    chosen: tuple[int, ...]
    """Features of it that the spec holds"""
    reason: str
    """How layer and features were chosen"""
    targets: tuple[str, ...]
    """Tokens that output scores are about"""
    spec: dict[str, Any]
    """The steering spec; written to `spec_path`"""
    spec_path: str | None = None
    html: str | None = None
    out: str | None = None
