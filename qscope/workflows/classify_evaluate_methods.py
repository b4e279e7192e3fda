"""The baselines of `qscope classify evaluate`, each at every layer; calibration texts choose the layer in the table."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qscope.classification import baselines
from qscope.classification.methods import Method, Problem
from qscope.classification.metrics import Prediction, figures
from qscope.classification.rule import OneVsRest, OrRule
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints, PooledCodes
from qscope.workflows.classify_evaluate_result import Family
from qscope.workflows.classify_inputs import Labelled
from qscope.workflows.text_features import TextFeatures

PROBE, MEANS, ALL_FEATURES = "linear probe", "difference of means", "all SAE features"
WORDS, CHARACTERS, RANDOM, MAJORITY = "TF-IDF (words)", "TF-IDF (characters)", "random features", "majority"
BASELINES = (PROBE, MEANS, WORDS, CHARACTERS, ALL_FEATURES, RANDOM, MAJORITY)
FAMILY: dict[str, Family] = {
    PROBE: "residual",
    MEANS: "residual",
    WORDS: "text",
    CHARACTERS: "text",
    ALL_FEATURES: "features",
    RANDOM: "features",
    MAJORITY: "none",
}


@dataclass(frozen=True)
class Data:
    """Labelled texts, their features, and which of them may be looked at for what."""

    labelled: Labelled
    features: TextFeatures
    problem: Problem
    test: Ints
    """Numbers of the test texts"""

    @property
    def classes(self) -> int:
        return self.problem.classes

    @property
    def main(self) -> str:
        return "f1" if self.classes == 2 else "macro_f1"

    @property
    def curve(self) -> str:
        return "auroc" if self.classes == 2 else "macro_auroc"

    @property
    def targets(self) -> list[int]:
        """The classes that have a rule: the positive one of two, or all."""
        return [1] if self.classes == 2 else list(range(self.classes))

    @functools.cached_property
    def codes(self) -> dict[int, PooledCodes]:
        return {layer: self.features.codes(layer) for layer in self.features.layers}

    @functools.cached_property
    def _sparse(self) -> dict[int, Any]:
        return {}

    def sparse(self, layer: int) -> tuple[Any, Ints]:
        """(CSR [T, C] of the largest activations, [C] ids of its columns)."""
        if layer not in self._sparse:
            codes = self.codes[layer]
            self._sparse[layer] = baselines.sparse_features(codes, "any"), codes.features
        found: tuple[Any, Ints] = self._sparse[layer]
        return found


@dataclass(frozen=True)
class Entry:
    """A method that has been fitted."""

    name: str
    family: Family
    layers: tuple[int, ...]
    method: Method
    prediction: Prediction
    """Of all T texts"""
    detail: str
    at_layer: Mapping[int, Prediction] = field(default_factory=dict)
    """Its predictions at every layer, where it was fitted at several"""
    rule: OrRule | OneVsRest | None = None


def fit_baselines(data: Data, skip: Sequence[str], step: Callable[[str], None]) -> Iterator[Entry]:
    """All baselines but the random features, and those of `skip`. step: is told what was fitted."""
    makers: dict[str, Callable[[int], Method]] = {
        PROBE: lambda layer: baselines.residual_probe(data.features.residual(layer, "mean"), PROBE),
        MEANS: lambda layer: baselines.mean_difference(data.features.residual(layer, "mean"), MEANS),
        ALL_FEATURES: lambda layer: baselines.feature_probe(data.sparse(layer)[0], ALL_FEATURES),
    }
    plain: dict[str, Callable[[], Method]] = {
        WORDS: lambda: baselines.tfidf(data.labelled.texts, "word", WORDS),
        CHARACTERS: lambda: baselines.tfidf(data.labelled.texts, "char", CHARACTERS),
        MAJORITY: lambda: baselines.majority(MAJORITY),
    }
    for name in BASELINES:
        if name in skip:
            continue
        if name in makers:
            yield _at_best_layer(name, makers[name], data, step)
        elif name in plain:
            method = plain[name]()
            prediction = method.fit(data.problem)
            step(name)
            yield Entry(name, FAMILY[name], (), method, prediction, describe(method, prediction))


def _at_best_layer(name: str, make: Callable[[int], Method], data: Data, step: Callable[[str], None]) -> Entry:
    """The layer with the highest AUROC of the calibration texts; the lowest of equals."""
    methods = {layer: make(layer) for layer in data.features.layers}
    found = {}
    for layer, method in methods.items():
        found[layer] = method.fit(data.problem)
        step(f"{name}, layer {layer}")
    value = {layer: calibration_value(data, prediction) for layer, prediction in found.items()}
    layer = max(value, key=lambda layer: (value[layer], -layer))
    detail = describe(methods[layer], found[layer])
    if len(found) > 1:
        detail += f". Layer {layer} of {', '.join(map(str, found))} by the AUROC of the calibration texts"
    return Entry(name, FAMILY[name], (layer,), methods[layer], found[layer], detail, found)


def calibration_value(data: Data, prediction: Prediction) -> float:
    """AUROC of the calibration texts, accuracy where it is not defined."""
    calibration = data.problem.calibration
    table = figures(data.problem.label[calibration], data.classes, prediction.take(calibration))
    value = table[data.curve].value
    return (table["accuracy"].value or 0.0) if value is None else value


@dataclass(frozen=True)
class RandomRules:
    """OR rules of features that were drawn at random."""

    layer: int
    detail: str
    draws: tuple[Prediction, ...]
    """Of all T texts"""


def random_rules(data: Data, layer: int, k: int, draws: int, min_texts: int, calibrated: bool) -> RandomRules | None:
    """Rules of k features each at the rule's layer; None where too few features fire, and for no draws."""
    features, ids = data.sparse(layer)
    found, detail = [], ""
    for draw in range(draws):
        method = baselines.random_features(
            features, ids, k, draw, min_texts, "threshold" if calibrated else "fires", RANDOM
        )
        try:
            found.append(method.fit(data.problem))
        except InputError:  # the same for every draw: they draw from the same features
            return None
        detail = detail or describe(method, found[0])
    return RandomRules(layer, detail, tuple(found)) if found else None


def describe(method: Method, prediction: Prediction) -> str:
    """The note of a method with what fitting chose."""
    facts = prediction.facts
    parts = []
    if "C" in facts:
        parts.append(f"C {facts['C']:g}" + ("" if facts.get("folds") else " (too few texts to choose it)"))
    if facts.get("converged") is False:
        parts.append("not converged")
    if "terms" in facts:
        parts.append(f"{facts['terms']:,} n-grams")
    if isinstance(facts.get("features"), int):
        parts.append(f"{facts['features']:,} features")
    if "threshold" in facts:
        parts.append(f"threshold {facts['threshold']:.4g} of the score, by the calibration texts")
    return method.note + (f" ({', '.join(parts)})" if parts else "")


def reliability(prediction: Prediction, label: Ints, test: Ints, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean probability, share that is so, texts) of test texts in bins of equal mass; equal probabilities share one.

    With two classes of the positive one, else of the decided one.
    """
    if prediction.probability is None:
        return []
    if prediction.probability.ndim == 1:
        probability: Floats = prediction.probability[test]
        right = label[test] == 1
    else:
        decided = prediction.decisions[test]
        probability, right = prediction.probability[test, decided], decided == label[test]
    _, run, counts = np.unique(probability, return_inverse=True, return_counts=True)
    below = (np.cumsum(counts) - counts)[run]
    place = np.minimum(bins * below // max(1, len(test)), bins - 1)
    found = []
    for number in np.unique(place):
        mine = place == number
        found.append((float(probability[mine].mean()), float(right[mine].mean()), int(mine.sum())))
    return found
