"""Fitting a rule: which features, of which layer, with which thresholds. Test texts are never looked at.

Training texts rank the features, and the layers by top1-diff: the largest difference of firing rates of one feature
(Qwen-Scope, equations 13 to 17). Calibration texts set the thresholds, and the number of features unless it is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from qscope.classification.log_odds import log_odds
from qscope.classification.metrics import Prediction, figures
from qscope.classification.rule import AnyRule, Clause, Membership, OneVsRest, OrRule, pooled_values
from qscope.classification.split import LEAST, Split
from qscope.classification.thresholds import calibrate, scales
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints, PooledCodes, Pooling
from qscope.finding.scores import Sample, auroc, mean_difference, ranking, rate_difference, texts_firing

FitMetric = Literal["rate", "auroc", "log_odds", "mean"]
METRICS: tuple[FitMetric, ...] = ("rate", "auroc", "log_odds", "mean")
COUNTS = (1, 2, 5, 10)


@dataclass(frozen=True)
class FitSettings:
    """What is asked of a fit. Raises InputError for what cannot be."""

    metric: FitMetric = "rate"
    """rate: difference of firing rates (the paper's); auroc; log_odds, of features with a false discovery rate of at
    most `fdr`; mean: difference of mean activation"""
    counts: tuple[int, ...] = COUNTS
    """Numbers of features K; those of a smaller K are among those of a larger one"""
    target: float | None = None
    """False-positive rate on the calibration texts that the thresholds hold; None: thresholds 0, as in the paper"""
    pooling: Pooling = "any"
    membership: Membership = "topk"
    """Of the codes that are given; the rule is for this one only"""
    min_texts: int = 2
    """Training texts in which a feature must fire"""
    fdr: float = 0.05

    def __post_init__(self) -> None:
        if not self.counts or any(k < 1 for k in self.counts) or len(set(self.counts)) < len(self.counts):
            raise InputError(f"Numbers of features are whole, at least 1 and given once; given: {list(self.counts)}.")
        if self.metric not in METRICS:
            raise InputError(f"The metric is {self.metric!r}; accepted are {', '.join(METRICS)}.")
        for what, value in (("false-positive rate", self.target), ("false discovery rate", self.fdr)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"The {what} to hold is {value}; give one between 0 and 1.")


@dataclass(frozen=True)
class FitData:
    """Codes of T texts, what they are, and which of them count how often.

    Raises InputError where training or calibration has fewer than two texts of a class.
    """

    codes: Mapping[int, PooledCodes]
    """layer -> codes of all T texts, of the membership that the rule will be used with"""
    positive: npt.NDArray[np.bool_]
    """[T]"""
    train: Ints
    """[T] how often the text counts, 0 for those of other parts"""
    calibration: Ints
    """[T]"""

    def __post_init__(self) -> None:
        if not self.codes:
            raise InputError("There is no layer to fit a rule on. Give the features of at least one.")
        for layer, codes in self.codes.items():
            if len({len(codes.tokens), len(self.positive), len(self.train), len(self.calibration)}) > 1:
                raise InputError(
                    f"Layer {layer} holds features of {len(codes.tokens)} texts; labels are given for "
                    f"{len(self.positive)}, training weights for {len(self.train)} and calibration weights for "
                    f"{len(self.calibration)}. They must be of the same texts."
                )
        for part, weight in (("training", self.train), ("calibration", self.calibration)):
            sides = [int(((weight > 0) & side).sum()) for side in (self.positive, ~self.positive)]
            if min(sides) < LEAST:
                raise InputError(
                    f"The {part} part has {sides[0]} positive and {sides[1]} negative texts; at least {LEAST} of each "
                    "are needed. Give more labelled texts."
                )

    @classmethod
    def of_split(cls, codes: Mapping[int, PooledCodes], positive: npt.NDArray[np.bool_], split: Split) -> "FitData":
        return cls(codes, positive, split.train.astype(np.int64), split.calibration.astype(np.int64))

    def sample(self, layer: int, pooling: Pooling) -> Sample:
        return Sample(self.codes[layer], self.positive, np.zeros(len(self.positive), np.int64), pooling)


@dataclass(frozen=True)
class Ranked:
    """Features of a layer that can be chosen, best first, R in number."""

    layer: int
    features: Ints
    """[R]"""
    scores: Floats
    """[R] by the metric"""
    rate_positive: Floats
    """[R] share of the positive training texts with a pooled activation above 0"""
    rate_negative: Floats

    def clauses(self, count: int) -> tuple[Clause, ...]:
        """The first `count`, thresholds 0. Raises InputError if there are fewer."""
        if count > len(self.features):
            raise InputError(
                f"K={count} was asked for, and layer {self.layer} has {len(self.features)} features that speak for "
                "the positive class in the training texts. Ask for fewer, or give more texts."
            )
        table = zip(self.features, self.scores, self.rate_positive, self.rate_negative, strict=True)
        return tuple(
            Clause(self.layer, int(feature), score=float(score), rate_positive=float(own), rate_negative=float(other))
            for feature, score, own, other in list(table)[:count]
        )


@dataclass(frozen=True)
class Candidate:
    """A rule that could be chosen, with its figures."""

    rule: OrRule
    settings: FitSettings
    training: dict[str, float | None]
    """Name -> figure: those of `qscope.classification.metrics.figures`, and fpr"""
    calibration: dict[str, float | None]

    @property
    def count(self) -> int:
        """K"""
        return len(self.rule.clauses)


@dataclass(frozen=True)
class Fit:
    """All candidates of a binary rule, and the one that was chosen."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """By layer, then K"""
    layer: int
    """Of the largest top1-difference, the lowest of equals; or the one that was asked for"""
    top1: dict[int, float]
    """layer -> largest difference of firing rates, pooling any, training texts"""
    multi_layer: Candidate | None
    """One feature each of the best layers"""


@dataclass(frozen=True)
class MulticlassFit:
    """One fit per class against all others."""

    rule: OneVsRest
    fits: tuple[Fit, ...]
    majority: int


# --- features and layers -----------------------------------------------------------------------------------


def rank_features(data: FitData, layer: int, settings: FitSettings) -> Ranked:
    """Features that fire in enough training texts and speak for the positive class, best first.

    Of equal scores the larger difference of mean activation comes first, then the lowest id.
    """
    sample, weight = data.sample(layer, settings.pooling), data.train
    firing = texts_firing(sample, weight)
    scores, eligible = _scores(sample, weight, settings, firing >= max(1, settings.min_texts))
    order = ranking(scores, mean_difference(sample, weight), eligible)
    own, other = _fired(sample, weight)
    return Ranked(layer, sample.codes.features[order], scores[order], own[order], other[order])


def _scores(
    sample: Sample, weight: Ints, settings: FitSettings, enough: npt.NDArray[np.bool_]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """[C] each: score, and whether the feature can be chosen."""
    if settings.metric == "log_odds":
        found = log_odds(sample, weight, enough)
        return found.log_odds, enough & (found.log_odds > 0) & (found.q <= settings.fdr)
    if settings.metric == "auroc":
        area = auroc(sample, weight)
        return area, enough & (area > 0.5)
    difference = (rate_difference if settings.metric == "rate" else mean_difference)(sample, weight)
    return difference, enough & (difference > 0)


def _fired(sample: Sample, weight: Ints) -> tuple[Floats, Floats]:
    """[C] each: share of the positive and of the negative texts with a pooled activation above 0."""
    positive, negative, n, m = sample.sides(weight)
    fires = (sample.pooled[0] > 0).astype(np.float64)
    return sample.sum(positive, fires) / n, sample.sum(negative, fires) / m


def top1_differences(data: FitData) -> dict[int, float]:
    """layer -> the largest difference of firing rates of one feature (Qwen-Scope, equation 16), training texts.

    With the pooling any, whatever the rule's is; 0 where no feature fires.
    """
    found = {}
    for layer in sorted(data.codes):
        differences = rate_difference(data.sample(layer, "any"), data.train)
        found[layer] = float(differences.max(initial=0.0))
    return found


def best_layers(top1: Mapping[int, float], count: int) -> list[int]:
    """The `count` layers of the largest top1-difference, best first, the lowest of equals.

    Raises InputError if there are fewer.
    """
    if not 1 <= count <= len(top1):
        raise InputError(
            f"{count} layers were asked for, and features of {len(top1)} are given. Ask for 1 to that many."
        )
    return sorted(top1, key=lambda layer: (-top1[layer], layer))[:count]


def feature_scores(data: FitData, layer: int, pooling: Pooling = "any") -> dict[str, npt.NDArray[np.generic]]:
    """All measures of all features of a layer on the training texts, [C] each, by name.

    feature, rate, auroc, mean, log_odds, z, q, rate_positive, rate_negative, texts.
    """
    sample, weight = data.sample(layer, pooling), data.train
    odds = log_odds(sample, weight)
    own, other = _fired(sample, weight)
    return {
        "feature": sample.codes.features,
        "rate": rate_difference(sample, weight),
        "auroc": auroc(sample, weight),
        "mean": mean_difference(sample, weight),
        "log_odds": odds.log_odds,
        "z": odds.z,
        "q": odds.q,
        "rate_positive": own,
        "rate_negative": other,
        "texts": texts_firing(sample, weight),
    }


# --- rules -------------------------------------------------------------------------------------------------


def make_candidate(data: FitData, clauses: Sequence[Clause], settings: FitSettings) -> Candidate:
    """A rule of these features: scales from the training texts, thresholds from the calibration texts where asked."""
    values = pooled_values(data.codes, [(clause.layer, clause.feature) for clause in clauses], settings.pooling)
    negative = np.repeat(values, np.where(data.positive, 0, data.calibration), axis=0)
    rule = OrRule(tuple(clauses), settings.pooling, settings.membership)
    rule = refit(rule, settings.membership, np.repeat(values, data.train, axis=0), negative, settings.target)
    training, calibration = (
        rule_figures(rule, values, data.positive, weight) for weight in (data.train, data.calibration)
    )
    return Candidate(rule, settings, training, calibration)


def refit(rule: AnyRule, membership: Membership, training: Floats, negative: Floats, target: float | None) -> AnyRule:
    """The same features for codes of another membership.

    Args:
        training: [T, C] pooled activations of the training texts, of that membership; they give the scales.
        negative: [N, C] those of the negative calibration texts.
        target: false-positive rate that the thresholds hold on them; None: thresholds 0.

    Raises:
        InputError: as `calibrate`.
    """
    thresholds = np.zeros(len(rule.clauses)) if target is None else calibrate(negative, target).thresholds
    return replace(rule, membership=membership).with_thresholds(thresholds, scales(training))


def rule_figures(
    rule: OrRule, values: Floats, positive: npt.NDArray[np.bool_], weight: Ints
) -> dict[str, float | None]:
    """Figures by name of a rule on some texts; None where one is undefined.

    values: [T, C] its pooled activations; weight: [T] how often each text counts.
    """
    rows = np.repeat(np.arange(len(weight)), weight)
    values, labels = values[rows], positive[rows]
    decisions = rule.decide_values(values)
    prediction = Prediction(rule.score_values(values), decisions.astype(np.int64))
    found = {name: figure.value for name, figure in figures(labels.astype(np.int64), 2, prediction).items()}
    negatives = int((~labels).sum())
    return found | {"fpr": int((decisions & ~labels).sum()) / negatives if negatives else None}


def fit(
    data: FitData,
    settings: FitSettings | None = None,
    layer: int | None = None,
    count: int | None = None,
    multi_layer: int | None = None,
) -> Fit:
    """Rules of all layers and numbers of features, and one of them chosen.

    Args:
        layer: the chosen rule's; None: by top1-diff on the training texts.
        count: the chosen rule's K; None: the one with the highest F1 on the calibration texts, the smallest of equals.
        multi_layer: also a rule of one feature each of so many layers, the best by top1-diff.

    Raises:
        InputError: where the chosen layer has fewer features that can be chosen than `count`, or than the smallest K
            (a larger K is left out), and for a layer or K that is not among those given.
    """
    settings = settings or FitSettings()
    top1 = top1_differences(data)
    best = best_layers(top1, 1)[0] if layer is None else layer
    if best not in data.codes:
        raise InputError(f"Layer {best} was asked for, and the features of {sorted(data.codes)} are given.")
    if count is not None and count not in settings.counts:
        raise InputError(
            f"K={count} was asked for, and rules are fitted for {list(settings.counts)}. Name it there too."
        )
    ranked = {number: rank_features(data, number, settings) for number in sorted(data.codes)}
    candidates = []
    needed = min(settings.counts) if count is None else count
    for number, features in ranked.items():
        for k in sorted(settings.counts):
            if k <= len(features.features) or (number == best and k == needed):  # the latter to be refused
                candidates.append(make_candidate(data, features.clauses(k), settings))
    own = [c for c in candidates if c.rule.layers == (best,) and count in (None, c.count)]
    several = None
    if multi_layer is not None:
        clauses = [ranked[number].clauses(1)[0] for number in best_layers(top1, multi_layer)]
        several = make_candidate(data, clauses, settings)
    return Fit(min(own, key=lambda c: (-_f1(c), c.count)), tuple(candidates), best, top1, several)


def _f1(candidate: Candidate) -> float:
    return candidate.calibration["f1"] or 0.0  # undefined where nothing is called positive: no better than 0


def fit_multiclass(
    codes: Mapping[int, PooledCodes],
    label: Ints,
    names: Sequence[str],
    train: Ints,
    calibration: Ints,
    settings: FitSettings | None = None,
    layer: int | None = None,
    count: int | None = None,
) -> MulticlassFit:
    """A rule for each class against all others; `layer` and `count` as in `fit`, for all classes.

    Args:
        label: [T] places in `names`; train, calibration: [T] how often each text counts.

    Raises:
        InputError: as `fit`, naming the class.
    """
    if len(names) < 2:
        raise InputError(f"There are {len(names)} classes to tell apart; give texts of at least two.")
    fits = []
    for number, name in enumerate(names):
        try:
            fits.append(fit(FitData(codes, label == number, train, calibration), settings, layer, count))
        except InputError as error:
            raise InputError(f"The class {name!r} against all others: {error}") from error
    majority = int(np.bincount(label, weights=train, minlength=len(names)).argmax())
    return MulticlassFit(OneVsRest(tuple(found.chosen.rule for found in fits), majority), tuple(fits), majority)


# --- sensitivity -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SensitivityRow:
    """Another way to choose the rule; test texts decide nothing here."""

    layer: int
    count: int
    target: float | None
    """None: threshold 0"""
    pooling: Pooling
    metric: FitMetric
    candidate: Candidate


def sensitivity(
    data: FitData,
    settings: FitSettings,
    layers: Sequence[int] | None = None,
    targets: Sequence[float | None] = (None, 0.01, 0.05),
    poolings: Sequence[Pooling] = ("any", "mean", "last"),
    metrics: Sequence[FitMetric] | None = None,
) -> list[SensitivityRow]:
    """Every combination of layer, metric, pooling, threshold and K; a K with too few features is left out.

    layers: default all; metrics: default the one of the settings.
    """
    rows = []
    for layer in sorted(data.codes) if layers is None else layers:
        for metric in metrics or (settings.metric,):
            for pooling in poolings:
                asked = replace(settings, metric=metric, pooling=pooling)
                ranked = rank_features(data, layer, asked)
                counts = [k for k in sorted(settings.counts) if k <= len(ranked.features)]
                for target in targets:
                    for k in counts:
                        found = make_candidate(data, ranked.clauses(k), replace(asked, target=target))
                        rows.append(SensitivityRow(layer, k, target, pooling, metric, found))
    return rows
