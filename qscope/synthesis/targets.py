"""Which features examples are wanted for: a list, the features of a classification rule, or those that matter by what
is said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qscope.classification.rule import FeatureRule, MulticlassRule
from qscope.detectors import Detector
from qscope.errors import InputError


@dataclass(frozen=True)
class Target:
    """A feature that examples are wanted for."""

    layer: int
    feature: int
    threshold: float = 0.0
    """An example fires it if its largest activation over the tokens is above this"""
    meaning: str | None = None
    label: str | None = None
    """Of its examples"""
    relevance: float | None = None
    """0 to 1, where the target was chosen by that"""
    contexts: tuple[str, ...] = ()
    """Passages that fire it, the strongest first"""
    scale: float | None = None
    """Its largest activation in those"""

    @property
    def key(self) -> tuple[int, int]:
        return self.layer, self.feature

    @property
    def name(self) -> str:
        return f"{self.layer}:{self.feature}"


def listed(names: Sequence[str], threshold: float = 0.0, label: str | None = None) -> tuple[Target, ...]:
    """Targets of `layer:feature`, such as 15:2401. InputError for anything else."""
    found = []
    for name in names:
        layer, colon, feature = name.partition(":")
        if not (colon and layer.isdecimal() and feature.isdecimal()):
            raise InputError(f"The target {name!r} was given. Accepted: layer:feature in numbers, such as 15:2401.")
        found.append(Target(int(layer), int(feature), threshold, label=label))
    return distinct(found)


def from_rule(
    rule: FeatureRule | MulticlassRule, thresholds: bool = False, label: str | None = None
) -> tuple[Target, ...]:
    """The features of a rule; thresholds: with the rule's own, else 0. The label is the class that each speaks for.

    Raises InputError for a rule whose activations are not those that verification reads (pooling any, TopK).
    """
    parts = (rule,) if isinstance(rule, FeatureRule) else rule.rules
    if any(part.pooling != "any" or part.membership != "topk" for part in parts):
        raise InputError(
            f"The rule has the pooling {parts[0].pooling!r} and the membership {parts[0].membership!r}; targets of a "
            "rule need 'any' and 'topk'. Fit the rule with these, or name the features with --features."
        )
    names = (rule.classes[0],) if isinstance(rule, FeatureRule) else rule.classes
    found = [
        Target(c.layer, c.feature, c.threshold if thresholds else 0.0, c.meaning, label or name, scale=c.scale)
        for name, part in zip(names, parts, strict=True)
        for c in part.clauses
    ]
    return distinct(found)


def relevant(
    explanations: Mapping[tuple[int, int], str], judge: Detector, least: float, label: str | None = None
) -> tuple[Target, ...]:
    """T = {(layer, feature): s >= least}: the features whose explanation the judge finds relevant (equation 19).

    judge: any detector, which scores the explanation's text: `keywords:` and `regex:` are rules, `judge:QUESTION` asks
    a model. InputError where none is relevant.
    """
    keys = sorted(explanations)
    scores = judge([explanations[key] for key in keys], [""] * len(keys))
    found = tuple(
        Target(layer, feature, meaning=explanations[layer, feature], label=label, relevance=score)
        for (layer, feature), score in zip(keys, scores, strict=True)
        if score >= least
    )
    if not found:
        raise InputError(
            f"None of {len(keys)} explained features is relevant by {judge.name} (highest {max(scores, default=0):g}, "
            f"wanted {least:g}). Ask more broadly, or name features with --features."
        )
    return found


def distinct(targets: Sequence[Target]) -> tuple[Target, ...]:
    """Each feature once, the first of equals. InputError for none."""
    found = {target.key: target for target in reversed(targets)}
    if not found:
        raise InputError("No target feature was given. Name some with --features, --rule or --explanations.")
    return tuple(found[key] for key in dict.fromkeys(target.key for target in targets))


def explained(targets: Sequence[Target], meanings: Mapping[tuple[int, int], str]) -> tuple[Target, ...]:
    """The same with a meaning where one is known and none is set."""
    return tuple(t if t.meaning else replace(t, meaning=meanings.get(t.key)) for t in targets)
