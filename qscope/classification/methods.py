"""What every classifier is to the tables that compare them: a name, and a way to learn from some of the texts.

Methods that only score are decided alike: a threshold chosen on the calibration split by the same rule for all of them.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from qscope.classification.metrics import Prediction
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints


class Threshold(NamedTuple):
    """How the scores of two classes are cut, on the calibration split."""

    rule: Literal["f1", "fpr"] = "f1"
    """f1: where F1 is highest; fpr: where the false-positive rate is at most `target`"""
    target: float = 0.05


@dataclass(frozen=True)
class Problem:
    """Texts 0 to T - 1 with their classes, and which of them may be looked at."""

    label: Ints
    """[T]; with two classes, 1 is the positive one. Those of other texts than `train` and `calibration` are not read"""
    classes: int
    train: Ints
    """Numbers of the texts to learn from; one that stands there twice counts twice"""
    calibration: Ints
    """Numbers of the texts to choose thresholds on"""
    threshold: Threshold = field(default_factory=Threshold)
    seed: int = 0

    def __post_init__(self) -> None:
        for what, texts in (("training", self.train), ("calibration", self.calibration)):
            if len(texts) and not 0 <= texts.min() <= texts.max() < len(self.label):
                raise InputError(
                    f"The {what} split names texts {texts.min()} to {texts.max()}, and there are {len(self.label)} "
                    "texts. Give numbers of texts; a mask is turned into them by numpy.flatnonzero."
                )
        if len(np.unique(self.label[self.train])) < 2:
            raise InputError(
                f"The {len(self.train)} training texts are of one class only. Give at least two texts of each class."
            )


class Learned(NamedTuple):
    """What a method has to say of all T texts; shapes as in `Prediction`."""

    scores: Floats
    decisions: Ints | None = None
    """None: cut by the threshold of the problem; with several classes the highest score, the lowest class of equals"""
    probability: Floats | None = None
    """None: with two classes, Platt's scaling of the scores on the calibration split"""
    facts: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Method:
    """A classifier bound to the arrays that it looks at."""

    name: str
    learn: Callable[[Problem], Learned]
    note: str = ""
    """How it is made, in a sentence for the report"""

    def fit(self, problem: Problem) -> Prediction:
        """Learn from the training split, calibrate on the calibration split, and judge all T texts.

        Raises InputError where a split does not hold what the method needs.
        """
        learned = self.learn(problem)
        facts = dict(learned.facts)
        decisions, probability = learned.decisions, learned.probability
        if problem.classes > 2:
            decisions = np.argmax(learned.scores, axis=1) if decisions is None else decisions
            return Prediction(learned.scores, decisions.astype(np.int64), probability, facts)
        scores, positive = learned.scores[problem.calibration], problem.label[problem.calibration] == 1
        if decisions is None:
            facts["threshold"] = choose_threshold(scores, positive, problem.threshold)
            decisions = learned.scores > facts["threshold"]
        if probability is None and 0 < positive.sum() < len(positive):
            probability = platt(scores, positive, learned.scores)
            facts["probability"] = "Platt's scaling on the calibration split"
        return Prediction(learned.scores, decisions.astype(np.int64), probability, facts)


def choose_threshold(scores: Floats, positive: npt.NDArray[np.bool_], threshold: Threshold) -> float:
    """The cut t: a text is positive if its score > t. scores, positive: [T] of the calibration split.

    f1: halfway between the neighbouring scores that the best cut separates; of equal F1 the highest cut.
    fpr: the lowest score of a negative text that at most `target` of the negative texts exceed; below all scores if all
    of them may.

    Raises InputError without positive texts (f1) or without negative ones (fpr), and for a target outside 0 to 1.
    """
    if threshold.rule == "fpr" and not 0 <= threshold.target <= 1:
        raise InputError(f"The false-positive rate to hold is {threshold.target}; give one between 0 and 1.")
    needed = int(positive.sum() if threshold.rule == "f1" else (~positive).sum())
    if not needed:
        side = "positive" if threshold.rule == "f1" else "negative"
        raise InputError(
            f"The calibration split ({len(positive)} texts) has no {side} text to choose a threshold by. Make it "
            "larger, or give more labelled texts."
        )
    return _best_f1(scores, positive) if threshold.rule == "f1" else _at_rate(scores[~positive], threshold.target)


def _best_f1(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    values, run = np.unique(-scores, return_inverse=True)
    values = -values
    every = np.cumsum(np.bincount(run))
    hits = np.cumsum(np.bincount(run, weights=positive))
    best = int(np.argmax(2 * hits / (every + positive.sum())))
    if best + 1 == len(values):
        return float(np.nextafter(values[-1], -np.inf))
    upper, lower = values[best], values[best + 1]
    middle = lower + (upper - lower) / 2
    return float(middle if lower <= middle < upper else lower)  # neighbours in floating point, or an infinite side


def _at_rate(negative: Floats, target: float) -> float:
    falling = -np.sort(-negative)
    allowed = int(np.floor(target * len(negative) + 1e-9))  # 0.29 x 100 is 28.999... in floating point
    if allowed >= len(negative):
        return float(np.nextafter(falling[-1], -np.inf))
    return float(falling[allowed])


def platt(scores: Floats, positive: npt.NDArray[np.bool_], of: Floats) -> Floats:
    """Probabilities of the positive class for the scores `of`: a logistic curve through the scores [T] of known texts.

    With Platt's (1999) targets (n + 1) / (n + 2) and 1 / (m + 2) for n positive and m negative texts, which keep the
    curve from becoming a step.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    centre, scale = float(scores.mean()), float(scores.std()) or 1.0
    target = np.where(positive, (n + 1) / (n + 2), 1 / (m + 2))
    given = np.concatenate([scores, scores])[:, None]
    side = np.repeat([1, 0], len(scores))
    model = sklearn("linear_model").LogisticRegression(C=1e10, tol=1e-8, max_iter=1000)
    model.fit((given - centre) / scale, side, sample_weight=np.concatenate([target, 1 - target]))
    return sigmoid((of - centre) / scale * float(model.coef_[0, 0]) + float(model.intercept_[0]))


def sigmoid(x: Floats) -> Floats:
    found: Floats = importlib.import_module("scipy.special").expit(x)
    return found


def sklearn(part: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as error:
        raise InputError("The baselines need scikit-learn: pip install 'qscope[classify]'.") from error
