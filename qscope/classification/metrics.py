"""Figures of classifiers, for two classes and for several, equal to scikit-learn's where it has them.

Each is a function of how often every text counts, for many such counts at once: ones give the figure itself, bootstrap
replicates (`resampling.py`) the spread of it. A figure that is not defined is None with the reason, never a warning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints

BINS = 10
"""Of the expected calibration error"""
BINARY = ("accuracy", "precision", "recall", "f1", "false_positive_rate", "auroc", "auprc", "brier", "ece")
SEVERAL = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "macro_auroc", "brier", "ece")
REASONS = {
    "precision": "nothing is decided positive",
    "recall": "there are no positive texts",
    "f1": "there are no positive texts and nothing is decided positive",
    "false_positive_rate": "there are no negative texts",
    "auroc": "there is one class only",
    "auprc": "there is one class only",
    "macro_precision": "a class that occurs is never decided",
    "macro_recall": "a class that is decided has no texts",
    "macro_auroc": "a class has no texts, or all of them",
    "brier": "the method gives no probabilities",
    "ece": "the method gives no probabilities",
}


class Figure(NamedTuple):
    value: float | None
    reason: str | None = None
    """Why there is no value"""


@dataclass(frozen=True)
class Prediction:
    """What a method says of T texts. With two classes, class 1 is the positive one."""

    scores: Floats
    """[T], larger for the positive class; with several classes [T, C]"""
    decisions: Ints
    """[T] classes"""
    probability: Floats | None = None
    """[T] of the positive class; with several classes [T, C]"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What fitting chose: plain numbers and text"""

    def take(self, texts: npt.NDArray[Any]) -> "Prediction":
        """The same for some texts: a mask [T] or their numbers."""
        probability = None if self.probability is None else self.probability[texts]
        return Prediction(self.scores[texts], self.decisions[texts], probability, self.facts)

    def of_class(self, number: int) -> "Prediction":
        """One class of several against the rest."""
        probability = None if self.probability is None else self.probability[:, number]
        return Prediction(self.scores[:, number], (self.decisions == number).astype(np.int64), probability, self.facts)


class Measure(Protocol):
    """Figures of one prediction."""

    names: tuple[str, ...]

    def values(self, counts: Floats, names: Sequence[str]) -> dict[str, Floats]:
        """The figures `names`, each [B], for counts [B, T] (whole numbers); NaN where undefined."""
        ...


def measure(label: Ints, classes: int, prediction: Prediction) -> Measure:
    """The figures of `prediction` where the classes of the texts are `label` [T].

    Raises InputError for labels, decisions or scores that do not fit `classes` or each other, and scores that are NaN.
    """
    _check(label, classes, prediction)
    return _Binary(label, prediction) if classes == 2 else _Several(label, classes, prediction)


def figures(label: Ints, classes: int, prediction: Prediction) -> dict[str, Figure]:
    """Figures of T texts by name: those of BINARY for two classes, of SEVERAL for more.

    auroc: P(positive text above negative) + 1/2 P(equal). auprc: average precision, without interpolation. brier: mean
    squared distance of the probabilities from the truth, with several classes summed over them. ece: texts in 10 bins
    of equal mass by the probability (of the decided class, when there are several), a text in bin
    floor(10 x share of texts with a smaller probability), so that equal probabilities share a bin; the mean over the
    texts of |mean probability - share of the class| of their bin. Macro figures: over classes that occur in labels or
    decisions, each counting the same.
    """
    found = measure(label, classes, prediction)
    values = found.values(np.ones((1, len(label))), found.names)
    return {name: figure(name, float(value[0]), len(label)) for name, value in values.items()}


def figure(name: str, value: float, texts: int) -> Figure:
    """A value that is NaN, as None with the reason."""
    if not np.isnan(value):
        return Figure(value)
    return Figure(None, REASONS[name] if texts else "there are no texts")


def by_group(
    label: Ints, classes: int, prediction: Prediction, group: Ints, names: Sequence[str]
) -> dict[str, dict[str, Figure]]:
    """The figures of the texts of each group; group [T]: places in `names`."""
    found = {}
    for number, name in enumerate(names):
        texts = np.flatnonzero(group == number)
        found[name] = figures(label[texts], classes, prediction.take(texts))
    return found


def by_class(label: Ints, prediction: Prediction, names: Sequence[str]) -> dict[str, dict[str, Figure]]:
    """Binary figures of each of several classes against the rest."""
    return {
        name: figures((label == number).astype(np.int64), 2, prediction.of_class(number))
        for number, name in enumerate(names)
    }


def confusion(label: Ints, decisions: Ints, classes: int) -> Ints:
    """[C, C] texts of class i (row) that are decided j (column)."""
    return np.bincount(label * classes + decisions, minlength=classes**2).reshape(classes, classes)


class Spread(NamedTuple):
    """Of a figure over draws or seeds."""

    mean: float | None
    deviation: float | None
    """With n - 1; None for fewer than two values"""
    lowest: float | None
    highest: float | None
    values: int
    """How many are defined"""


def spread(found: Sequence[Figure]) -> Spread:
    """Figures without a value are left out."""
    values = np.array([figure.value for figure in found if figure.value is not None])
    if not len(values):
        return Spread(None, None, None, None, 0)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return Spread(float(values.mean()), deviation, float(values.min()), float(values.max()), len(values))


# --- how they are counted ----------------------------------------------------------------------------------


def _check(label: Ints, classes: int, prediction: Prediction) -> None:
    texts = len(label)
    shape = (texts,) if classes == 2 else (texts, classes)
    given = (
        [prediction.scores.shape]
        if prediction.probability is None
        else [
            prediction.scores.shape,
            prediction.probability.shape,
        ]
    )
    if classes < 2 or prediction.decisions.shape != (texts,) or any(found != shape for found in given):
        raise InputError(
            f"{texts} labels of {classes} classes do not go with decisions {list(prediction.decisions.shape)} and "
            f"scores or probabilities {[list(found) for found in given]}. Expected: at least two classes, a decision "
            f"for each text, and scores {list(shape)}."
        )
    for what, values in (("Labels", label), ("Decisions", prediction.decisions)):
        if texts and not 0 <= values.min() <= values.max() < classes:
            raise InputError(
                f"{what} run from {values.min()} to {values.max()}; with {classes} classes they are 0 to {classes - 1}."
            )
    nan = int(np.isnan(prediction.scores).sum())
    if nan:
        raise InputError(f"{nan} scores are NaN, which have no order. Leave these texts out, or mend the method.")


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, np.nan), where=below != 0)


class _Runs:
    """Texts by falling score, equal scores together: J runs."""

    def __init__(self, scores: Floats, positive: npt.NDArray[np.bool_]) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ordered = scores[self.order]
        # -0 and 0 are equal here, and so are infinities, whose difference would be NaN
        self.starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(scores) else np.arange(0)
        self.scores = ordered[self.starts]
        self.positive = positive[self.order].astype(np.float64)

    def sums(self, counts: Floats) -> tuple[Floats, Floats]:
        """[B, J] each: texts and positive texts of each run."""
        taken = counts[:, self.order]
        hits = taken * self.positive
        if len(self.starts) == len(self.order):
            return taken, hits
        return np.add.reduceat(taken, self.starts, axis=1), np.add.reduceat(hits, self.starts, axis=1)


def _auroc(every: Floats, hits: Floats) -> Floats:
    """[B] in whole numbers up to the division, so exact."""
    misses = every - hits
    below = misses.sum(axis=1, keepdims=True) - np.cumsum(misses, axis=1)
    return _ratio((hits * (2 * below + misses)).sum(axis=1), 2 * hits.sum(axis=1) * misses.sum(axis=1))


def _average_precision(every: Floats, hits: Floats) -> Floats:
    positives, texts = hits.sum(axis=1), every.sum(axis=1)
    precision = _ratio(np.cumsum(hits, axis=1), np.cumsum(every, axis=1))
    found = _ratio(np.where(hits > 0, precision * hits, 0.0).sum(axis=1), positives)
    return np.where(positives < texts, found, np.nan)


def _calibration_error(every: Floats, hits: Floats, probability: Floats) -> Floats:
    texts = every.sum(axis=1, keepdims=True)
    below = texts - np.cumsum(every, axis=1)
    place = np.minimum(np.floor(_ratio(BINS * below, texts)), BINS - 1)
    rows = np.arange(len(every))[:, None] * BINS
    gaps = np.bincount(
        (rows + np.nan_to_num(place).astype(np.int64)).ravel(),
        weights=(every * probability - hits).ravel(),
        minlength=len(every) * BINS,
    )
    return _ratio(np.abs(gaps.reshape(-1, BINS)).sum(axis=1), texts[:, 0])


class _Binary:
    names: tuple[str, ...] = BINARY

    def __init__(self, label: Ints, prediction: Prediction) -> None:
        self.positive = label == 1
        decided = prediction.decisions == 1
        self.prediction = prediction
        cells = (self.positive & decided, ~self.positive & decided, self.positive & ~decided, ~self.positive & ~decided)
        self.cells = np.stack(cells, axis=1).astype(np.float64)

    @cached_property
    def by_score(self) -> _Runs:
        return _Runs(self.prediction.scores, self.positive)

    @cached_property
    def by_probability(self) -> _Runs | None:
        return None if self.prediction.probability is None else _Runs(self.prediction.probability, self.positive)

    def values(self, counts: Floats, names: Sequence[str]) -> dict[str, Floats]:
        tp, fp, fn, tn = (counts @ self.cells).T
        found = {
            "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
            "precision": _ratio(tp, tp + fp),
            "recall": _ratio(tp, tp + fn),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
            "false_positive_rate": _ratio(fp, fp + tn),
        }
        if {"auroc", "auprc"} & set(names):
            runs = self.by_score.sums(counts)
            found |= {"auroc": _auroc(*runs), "auprc": _average_precision(*runs)}
        found |= _calibration(counts, names, self.by_probability, self._squares)
        return {name: found[name] for name in names}

    @cached_property
    def _squares(self) -> Floats | None:
        probability = self.prediction.probability
        return None if probability is None else (probability - self.positive) ** 2


class _Several:
    names: tuple[str, ...] = SEVERAL

    def __init__(self, label: Ints, classes: int, prediction: Prediction) -> None:
        self.label, self.classes, self.prediction = label, classes, prediction
        self.cell = label * classes + prediction.decisions
        self.order = np.argsort(self.cell, kind="stable")

    @cached_property
    def runs(self) -> list[_Runs]:
        return [_Runs(self.prediction.scores[:, c], self.label == c) for c in range(self.classes)]

    def values(self, counts: Floats, names: Sequence[str]) -> dict[str, Floats]:
        table = self._tables(counts)
        right = np.einsum("bii->bi", table)
        truth, decided = table.sum(axis=2), table.sum(axis=1)
        present = truth + decided > 0
        shares = {"precision": (right, decided), "recall": (right, truth), "f1": (2 * right, truth + decided)}
        found = {"accuracy": _ratio(right.sum(axis=1), truth.sum(axis=1))}
        for name, (above, below) in shares.items():
            share = np.where(present, _ratio(above, below), 0.0)
            found[f"macro_{name}"] = _ratio(share.sum(axis=1), present.sum(axis=1).astype(np.float64))
        if "macro_auroc" in names:
            found["macro_auroc"] = np.mean([_auroc(*runs.sums(counts)) for runs in self.runs], axis=0)
        found |= _calibration(counts, names, self.by_probability, self._squares)
        return {name: found[name] for name in names}

    def _tables(self, counts: Floats) -> Floats:
        """[B, C, C] as `confusion`."""
        table = np.zeros((len(counts), self.classes**2))
        if len(self.cell):
            cells, starts = np.unique(self.cell[self.order], return_index=True)
            table[:, cells] = np.add.reduceat(counts[:, self.order], starts, axis=1)
        return table.reshape(-1, self.classes, self.classes)

    @cached_property
    def by_probability(self) -> _Runs | None:
        """Of the decided class."""
        probability, decided = self.prediction.probability, self.prediction.decisions
        if probability is None:
            return None
        return _Runs(np.take_along_axis(probability, decided[:, None], axis=1)[:, 0], decided == self.label)

    @cached_property
    def _squares(self) -> Floats | None:
        probability = self.prediction.probability
        if probability is None:
            return None
        return ((probability - np.eye(self.classes)[self.label]) ** 2).sum(axis=1)


def _calibration(counts: Floats, names: Sequence[str], runs: _Runs | None, squares: Floats | None) -> dict[str, Floats]:
    if runs is None or squares is None:
        return {"brier": np.full(len(counts), np.nan), "ece": np.full(len(counts), np.nan)}
    found = {"brier": _ratio(counts @ squares, counts.sum(axis=1))}
    if "ece" in names:
        found["ece"] = _calibration_error(*runs.sums(counts), runs.scores)
    return found
