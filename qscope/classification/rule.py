"""A classifier that says why: a text is positive if one of a few features fires in it strongly enough.

y = 1[ max over clauses f of pooled activation a_f > threshold_f ]    (Qwen-Scope, equation 15, thresholds added)

The pooled activation is by default the largest over the tokens that count (pooling "any"). Membership "topk": the
activation is 0 unless the feature is among the K largest of its token, as the SAE defines it. "preact":
ReLU(W_enc[f] x + b_enc[f]) whether or not it is among them; at least as large, so thresholds of one do not hold for the
other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints, PooledCodes, Pooling

Membership = Literal["topk", "preact"]
Truncate = Literal["right", "left"]
AnyRule = TypeVar("AnyRule", bound="OrRule")
_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # what pydantic asks of a file


@dataclass(frozen=True)
class Clause:
    """One feature of a rule. It fires in a text whose pooled activation is above the threshold."""

    layer: int
    feature: int
    threshold: float = 0.0
    scale: float = 1.0
    """The 0.99 quantile of the pooled activations above 0 of the training texts; 1 if there are none"""
    score: float | None = None
    """By the metric that chose it, on the training texts"""
    rate_positive: float | None = None
    """Share of the positive training texts in which the pooled activation is above 0"""
    rate_negative: float | None = None
    meaning: str | None = None

    __pydantic_config__: ClassVar[Any] = _STRICT


@dataclass(frozen=True)
class RuleSAE:
    """The SAE of one layer."""

    layer: int
    sha256: str
    """`SAE.weight_hash()`"""
    d_sae: int
    k: int
    source: str | None = None

    __pydantic_config__: ClassVar[Any] = _STRICT


@dataclass(frozen=True)
class Source:
    """What the activations were made with. A rule holds for no other."""

    model: str
    model_sha256: str
    tokenizer_sha256: str
    saes: tuple[RuleSAE, ...]
    context_size: int
    truncate: Truncate = "right"
    bos: bool = False
    dtype: str = "float32"
    """Of the model"""
    precision: str = "exact"
    """Of the encoding"""

    __pydantic_config__: ClassVar[Any] = _STRICT

    def sae(self, layer: int) -> RuleSAE:
        """Raises InputError for a layer without SAE."""
        for sae in self.saes:
            if sae.layer == layer:
                return sae
        layers = ", ".join(str(sae.layer) for sae in self.saes)
        raise InputError(f"The rule has a feature of layer {layer} and names the SAEs of {layers or 'no layer'}.")

    def check_model(self, name: str, sha256: str, tokenizer_sha256: str) -> None:
        """Raises InputError unless this is the model and tokenizer that are named here."""
        for what, theirs, ours in (
            ("model", sha256, self.model_sha256),
            ("tokenizer", tokenizer_sha256, self.tokenizer_sha256),
        ):
            if theirs != ours:
                raise InputError(
                    f"The rule was fitted with the {what} of {self.model} (sha256 {ours[:12]}), and {name} has another "
                    f"(sha256 {theirs[:12]}). Give that model with --model, or fit a rule for this one."
                )

    def check_sae(self, layer: int, sha256: str) -> None:
        """Raises InputError unless this is the SAE that is named here for the layer. sha256: `SAE.weight_hash()`."""
        sae = self.sae(layer)
        if sae.sha256 != sha256:
            named = f"the SAE {sae.source}" if sae.source else "an SAE"
            raise InputError(
                f"The rule was fitted with {named} for layer {layer} (sha256 {sae.sha256[:12]}), and this SAE is "
                f"another (sha256 {sha256[:12]}). Give that SAE with --sae, or fit a rule for this one."
            )


@dataclass(frozen=True)
class Choice:
    """How a rule came about: everything here looked at training and calibration texts only."""

    metric: str
    layer_rule: str
    threshold_rule: str
    top1_difference: dict[str, float] = field(default_factory=dict)
    """Layer -> largest rate difference on the training texts"""
    training: dict[str, float | None] = field(default_factory=dict)
    """Figures of the rule by name, on the training texts"""
    calibration: dict[str, float | None] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    __pydantic_config__: ClassVar[Any] = _STRICT


class Evidence(NamedTuple):
    """A clause that fired in a text."""

    clause: int
    """Its place in the rule"""
    layer: int
    feature: int
    token: int
    """Place of the token among those that were given; of the largest activation (the first of equals), or the last"""
    activation: float
    """Pooled; that of the token unless the pooling is "mean" """
    threshold: float
    meaning: str | None


@dataclass(frozen=True)
class OrRule:
    """An OR of clauses, C in number, of which one must fire. Raises InputError for none, and for a repeated feature."""

    clauses: tuple[Clause, ...]
    pooling: Pooling = "any"
    membership: Membership = "topk"

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        places = [(clause.layer, clause.feature) for clause in self.clauses]
        if not places or len(set(places)) < len(places):
            raise InputError(f"A rule needs at least one feature and every feature once; given (layer, id): {places}.")
        for clause in self.clauses:
            if not (clause.threshold >= 0 and 0 < clause.scale < np.inf):
                raise InputError(
                    f"Feature {clause.feature} of layer {clause.layer} has the threshold {clause.threshold} and the "
                    f"scale {clause.scale}; a threshold is at least 0 and a scale above 0."
                )

    @property
    def layers(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted({clause.layer for clause in self.clauses}))

    @property
    def thresholds(self) -> Floats:
        """[C]"""
        return np.array([clause.threshold for clause in self.clauses], np.float64)

    @property
    def scales(self) -> Floats:
        """[C]"""
        return np.array([clause.scale for clause in self.clauses], np.float64)

    def check_membership(self, membership: Membership) -> None:
        """Raises InputError unless the rule's thresholds are for this membership."""
        if membership != self.membership:
            raise InputError(
                f"The rule's thresholds hold for the membership {self.membership!r}, and {membership!r} was asked for: "
                "pre-activations count features outside the K largest too. Ask for the rule's own membership, or fit "
                f"the rule with the membership {membership!r}."
            )

    def values(self, codes: Mapping[int, PooledCodes], membership: Membership = "topk") -> Floats:
        """[T, C] pooled activations. codes: layer -> codes of the same T texts, of the given membership.

        Raises InputError for another membership than the rule's, and for a missing layer.
        """
        self.check_membership(membership)
        return pooled_values(codes, [(clause.layer, clause.feature) for clause in self.clauses], self.pooling)

    def fires(self, values: Floats) -> npt.NDArray[np.bool_]:
        """[T, C] which clauses fire. values: as from `values`."""
        return values > self.thresholds

    def decide_values(self, values: Floats) -> npt.NDArray[np.bool_]:
        """[T] from pooled activations [T, C]."""
        return np.asarray(self.fires(values).any(axis=1))

    def score_values(self, values: Floats) -> Floats:
        """[T] from pooled activations [T, C]."""
        return np.asarray((values / self.scales).max(axis=1))

    def decide(self, codes: Mapping[int, PooledCodes], membership: Membership = "topk") -> npt.NDArray[np.bool_]:
        """[T] whether a text is positive."""
        return self.decide_values(self.values(codes, membership))

    def scores(self, codes: Mapping[int, PooledCodes], membership: Membership = "topk") -> Floats:
        """[T] the largest activation / scale of the clauses: orders texts, whatever the thresholds are."""
        return self.score_values(self.values(codes, membership))

    def evidence(self, activations: Floats, keep: npt.NDArray[np.bool_]) -> list[Evidence]:
        """The clauses that fire in one text, the largest activation / scale first (of equals, in the rule's order).

        activations: [S, C] of its tokens (`token_activations`, `RuleModule.activations`); keep: [S] those that count.
        """
        places = np.flatnonzero(keep)
        if not len(places):
            return []
        kept = np.asarray(activations, np.float64)[places]
        pooled = {"any": kept.max(axis=0), "mean": kept.sum(axis=0) / len(kept), "last": kept[-1]}[self.pooling]
        token = np.full(len(self.clauses), len(kept) - 1) if self.pooling == "last" else kept.argmax(axis=0)
        fired = np.flatnonzero(pooled > self.thresholds)
        found = []
        for i in fired[np.argsort(-pooled[fired] / self.scales[fired], kind="stable")].tolist():
            clause = self.clauses[i]
            place, value = int(places[token[i]]), float(pooled[i])
            found.append(Evidence(i, clause.layer, clause.feature, place, value, clause.threshold, clause.meaning))
        return found

    def token_activations(
        self, codes: Mapping[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]]
    ) -> npt.NDArray[np.float32]:
        """[S, C] from TopK codes. codes: layer -> (top_acts [S, K], top_indices [S, K]) of the same S tokens.

        Raises InputError for a rule on pre-activations.
        """
        self.check_membership("topk")
        size = len(next(iter(codes.values()))[0])
        found = np.zeros((size, len(self.clauses)), np.float32)
        for place, clause in enumerate(self.clauses):
            acts, indices = codes[clause.layer]
            found[:, place] = np.where(indices == clause.feature, acts, np.float32(0)).max(axis=1)
        return np.maximum(found, 0)

    def with_thresholds(
        self: AnyRule, thresholds: Sequence[float] | Floats, scales: Sequence[float] | Floats
    ) -> AnyRule:
        """The same features with other thresholds [C] and scales [C]."""
        clauses = tuple(
            replace(clause, threshold=float(threshold), scale=float(scale))
            for clause, threshold, scale in zip(self.clauses, thresholds, scales, strict=True)
        )
        return replace(self, clauses=clauses)

    def with_meanings(self: AnyRule, meanings: Mapping[tuple[int, int], str]) -> AnyRule:
        """meanings: (layer, feature) -> text."""
        clauses = tuple(replace(c, meaning=meanings.get((c.layer, c.feature), c.meaning)) for c in self.clauses)
        return replace(self, clauses=clauses)


def check_names(classes: Sequence[str]) -> None:
    """Raises InputError for two classes of one name: decisions are told by it."""
    if len(set(classes)) < len(classes):
        raise InputError(f"The classes of a rule are {', '.join(classes)}; each needs a name of its own.")


@dataclass(frozen=True, kw_only=True)
class FeatureRule(OrRule):
    """A rule with all that is needed to use it elsewhere. Raises InputError for a feature that its SAE lacks."""

    classes: tuple[str, str]
    """(positive, negative)"""
    source: Source
    chosen: Choice | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.classes)
        for clause in self.clauses:
            d_sae = self.source.sae(clause.layer).d_sae
            if not 0 <= clause.feature < d_sae:
                raise InputError(
                    f"The rule names feature {clause.feature} of layer {clause.layer}, whose SAE has the features 0 "
                    f"to {d_sae - 1}."
                )


@dataclass(frozen=True)
class OneVsRest:
    """One rule per class against all others, R in number.

    The class of a text: of the rules that fire, the one with the largest score (activation / scale), the lowest class
    of equals. If none fires: the class with most training texts.
    """

    rules: tuple[OrRule, ...]
    """In the order of the classes"""
    majority: int
    """The class with most training texts, the lowest of equals"""

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        if len(self.rules) < 2 or not 0 <= self.majority < len(self.rules):
            raise InputError(
                f"There are {len(self.rules)} rules, and the class with most texts is number {self.majority}; a rule "
                "for several classes needs one rule for each of at least two."
            )
        if len({rule.membership for rule in self.rules}) > 1:
            raise InputError("The rules of the classes have different memberships; fit them all with the same.")

    @property
    def membership(self) -> Membership:
        return self.rules[0].membership

    @property
    def layers(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted({layer for rule in self.rules for layer in rule.layers}))

    def check_membership(self, membership: Membership) -> None:
        self.rules[0].check_membership(membership)

    def values(self, codes: Mapping[int, PooledCodes], membership: Membership = "topk") -> list[Floats]:
        """Per rule, [T, C] pooled activations of its clauses; raises InputError as `OrRule.values`."""
        return [rule.values(codes, membership) for rule in self.rules]

    def score_values(self, values: Sequence[Floats]) -> Floats:
        """[T, R] from what `values` gives."""
        return np.stack([rule.score_values(part) for rule, part in zip(self.rules, values, strict=True)], axis=1)

    def decide_values(self, values: Sequence[Floats]) -> Ints:
        """[T] numbers of classes."""
        fires = [rule.decide_values(part) for rule, part in zip(self.rules, values, strict=True)]
        return largest_firing(self.score_values(values), np.stack(fires, axis=1), self.majority)

    def scores(self, codes: Mapping[int, PooledCodes], membership: Membership = "topk") -> Floats:
        """[T, R]"""
        return self.score_values(self.values(codes, membership))

    def decide(self, codes: Mapping[int, PooledCodes], membership: Membership = "topk") -> Ints:
        """[T] numbers of classes."""
        return self.decide_values(self.values(codes, membership))


@dataclass(frozen=True, kw_only=True)
class MulticlassRule(OneVsRest):
    """Rules of several classes with all that is needed to use them elsewhere."""

    classes: tuple[str, ...]
    rules: tuple[FeatureRule, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.classes)
        if len(self.classes) != len(self.rules) or any(rule.source != self.source for rule in self.rules):
            raise InputError(
                f"The {len(self.rules)} rules of {len(self.classes)} classes must be one for each class, all for the "
                "same model and SAEs."
            )

    @property
    def source(self) -> Source:
        return self.rules[0].source


Rule = FeatureRule | MulticlassRule


def largest_firing(scores: Floats, fires: npt.NDArray[np.bool_], majority: int) -> Ints:
    """[T] class of T texts from scores and firing rules, [T, R] each."""
    best = np.where(fires, scores, -np.inf).argmax(axis=1)
    return np.where(fires.any(axis=1), best, majority).astype(np.int64)


def pooled_values(
    codes: Mapping[int, PooledCodes], features: Sequence[tuple[int, int]], pooling: Pooling = "any"
) -> Floats:
    """[T, C] pooled activations of C features (layer, id); 0 where one is silent, and for texts without tokens.

    Raises InputError for a layer that is not in `codes`, and for layers of different numbers of texts.
    """
    missing = sorted({layer for layer, _ in features} - set(codes))
    if missing or not codes:
        raise InputError(
            f"The rule needs layer {', '.join(map(str, missing))}, and the features of "
            f"{', '.join(map(str, sorted(codes))) or 'no layer'} are given. Read that layer too (--layers)."
        )
    sizes = {len(found.tokens) for found in codes.values()}
    if len(sizes) > 1:
        raise InputError(f"The layers hold features of {' and '.join(map(str, sorted(sizes)))} texts, not of the same.")
    table = np.zeros((sizes.pop(), len(features)))
    for place, (layer, feature) in enumerate(features):
        found = codes[layer]
        column = int(np.searchsorted(found.features, feature))
        if column == len(found.features) or found.features[column] != feature:
            continue
        low, high = np.searchsorted(found.column, [column, column + 1])
        text = found.text[low:high]
        if pooling == "mean":
            table[text, place] = found.total[low:high] / found.tokens[text]
        else:
            table[text, place] = (found.largest if pooling == "any" else found.last)[low:high]
    return table
