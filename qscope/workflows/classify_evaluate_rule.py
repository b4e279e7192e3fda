"""The rules of `qscope classify evaluate`: fitted here or read from a file, each as a method like the baselines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qscope.classification import fitting, studies
from qscope.classification.fitting import Candidate, Fit, FitData, FitSettings, Ranked
from qscope.classification.methods import Learned, Method, Problem
from qscope.classification.metrics import Prediction, figures
from qscope.classification.rule import Choice, FeatureRule, MulticlassRule, OneVsRest, OrRule, Rule, Source
from qscope.classification.rule_file import load_rule
from qscope.errors import InputError
from qscope.finding.pooled import Ints, PooledCodes, Pooling
from qscope.workflows.classify_evaluate_methods import Data, Entry
from qscope.workflows.classify_evaluate_result import ChosenFeature, SensitivityRow, Stability
from qscope.workflows.classify_inputs import Labelled
from qscope.workflows.classify_rules import limit_details

Codes = Mapping[int, PooledCodes]
TOP = 10
"""Features of each group whose overlap is reported (Qwen-Scope, section 5)"""
_LISTED = 8  # features that the stability table lists for each class


@dataclass(frozen=True)
class Form:
    """How a rule is made: k features of one layer (None: by top1-diff), or one feature of each of `several` layers."""

    k: int
    layer: int | None = None
    several: int | None = None


# --- one rule --------------------------------------------------------------------------------------------


def fit_rule(codes: Codes, problem: Problem, settings: FitSettings, form: Form) -> OrRule | OneVsRest:
    """A rule learned from the training texts of the problem. Raises InputError as `fitting` does."""
    targets = [1] if problem.classes == 2 else list(range(problem.classes))
    found = []
    for number in targets:
        data = fit_data(codes, problem, number)
        top1 = {form.layer: 0.0} if form.layer is not None else fitting.top1_differences(data)
        layers = fitting.best_layers(top1, form.several or 1)
        each = form.k if form.several is None else 1
        clauses = [c for layer in layers for c in fitting.rank_features(data, layer, settings).clauses(each)]
        found.append(fitting.make_candidate(data, clauses, settings).rule)
    return found[0] if problem.classes == 2 else OneVsRest(tuple(found), majority(problem))


def fit_data(codes: Codes, problem: Problem, number: int) -> FitData:
    """The class `number` against all others."""
    size = len(problem.label)
    train, calibration = (np.bincount(part, minlength=size) for part in (problem.train, problem.calibration))
    return FitData(codes, problem.label == number, train, calibration)


def majority(problem: Problem) -> int:
    return int(np.bincount(problem.label[problem.train], minlength=problem.classes).argmax())


def judge(rule: OrRule | OneVsRest, codes: Codes) -> Learned:
    return Learned(rule.scores(codes, rule.membership), rule.decide(codes, rule.membership).astype(np.int64))


def method_of(name: str, codes: Codes, settings: FitSettings, form: Form) -> Method:
    """The rule of this form as a method that learns anew each time."""
    return Method(name, lambda problem: judge(fit_rule(codes, problem, settings, form), codes))


def fixed(name: str, codes: Codes, rule: OrRule | OneVsRest) -> Method:
    """A rule that learns nothing more."""
    return Method(name, lambda problem: judge(rule, codes))


def describe(rule: OrRule | OneVsRest, names: Sequence[str]) -> str:
    """Its features and thresholds in words."""
    if isinstance(rule, OneVsRest):
        parts = [f"{name}: {describe(part, ())}" for name, part in zip(names, rule.rules, strict=True)]
        return "; ".join(parts) + f"; where none fires {names[rule.majority]}"
    said = [f"{c.layer}/{c.feature}" + (f" > {c.threshold:.3g}" if c.threshold else "") for c in rule.clauses]
    return "features (layer/id) " + ", ".join(said)


# --- all rules -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """Rules fitted on the training texts, at every layer and for every K."""

    data: Data
    codes: Codes
    settings: FitSettings
    several: int
    fits: tuple[Fit, ...]
    """Of the positive class, or of each class"""
    left_out: tuple[int, ...]
    """K for which there are too few features"""

    @classmethod
    def fit(cls, data: Data, settings: FitSettings, several: int) -> "Rules":
        """Raises InputError where there are too few features even for the smallest K."""
        codes = data.codes
        found, usable = [], settings.counts
        each = [fit_data(codes, data.problem, number) for number in data.targets]
        for part in each:
            best = fitting.best_layers(fitting.top1_differences(part), 1)[0]
            most = len(fitting.rank_features(part, best, settings).features)
            usable = tuple(k for k in usable if k <= most) or (min(settings.counts),)
        several = min(several, len(codes))
        for part in each:
            found.append(fitting.fit(part, replace(settings, counts=usable), multi_layer=several))
        left_out = tuple(k for k in settings.counts if k not in usable)
        return cls(data, codes, replace(settings, counts=usable), several, tuple(found), left_out)

    @property
    def top1(self) -> dict[int, float]:
        """Layer -> largest difference of firing rates of one feature; several classes: their mean."""
        return {layer: float(np.mean([f.top1[layer] for f in self.fits])) for layer in self.codes}

    def at(self, k: int, layer: int | None) -> OrRule | OneVsRest | None:
        """The rule of k features at a layer, None: at the layer by top1-diff of each class; None if there is none."""
        found = []
        for part in self.fits:
            wanted = part.layer if layer is None else layer
            own = [c.rule for c in part.candidates if c.rule.layers == (wanted,) and c.count == k]
            if not own:
                return None
            found.append(own[0])
        return self.together(found)

    def together(self, found: Sequence[OrRule]) -> OrRule | OneVsRest:
        return found[0] if self.data.classes == 2 else OneVsRest(tuple(found), majority(self.data.problem))

    def entries(self) -> tuple[str, list[Entry]]:
        """(name of the headline rule, all rules). Headline: best F1 on the calibration texts, smallest K of equals."""
        ks = sorted(self.settings.counts)
        entries = [entry for k in ks if (entry := self._entry(k)) is not None]
        calibration = self.data.problem.calibration
        label = self.data.problem.label[calibration]

        def value(entry: Entry) -> float:
            table = figures(label, self.data.classes, entry.prediction.take(calibration))
            return table[self.data.main].value or 0.0

        best = max(entries, key=value)  # the first of equals, and K ascends
        if self.several > 1:
            rule = self.together([f.multi_layer.rule for f in self.fits if f.multi_layer is not None])
            form = Form(1, several=self.several)
            method = method_of(f"rule, {self.several} layers", self.codes, self.settings, form)
            entries.append(self._of(method, rule, {}))
        return best.name, entries

    def _entry(self, k: int) -> Entry | None:
        rule = self.at(k, None)
        if rule is None:
            return None
        found = {layer: other for layer in self.codes if (other := self.at(k, layer)) is not None}
        method = method_of(f"rule, K={k}", self.codes, self.settings, Form(k))
        return self._of(method, rule, {layer: self._judged(method, other) for layer, other in found.items()})

    def _of(self, method: Method, rule: OrRule | OneVsRest, at_layer: Mapping[int, Prediction]) -> Entry:
        return Entry(
            method.name, "rule", rule.layers, method, self._judged(method, rule),
            describe(rule, self.data.labelled.names), at_layer, rule,
        )  # fmt: skip

    def _judged(self, method: Method, rule: OrRule | OneVsRest) -> Prediction:
        return fixed(method.name, self.codes, rule).fit(self.data.problem)

    # --- what the choice depends on ---

    def ranked(self, place: int, weight: Ints, layer: int) -> Ranked:
        """Features of a layer by weights [T] of the training texts; place: of the class among those with a rule."""
        data = fit_data(self.codes, self.data.problem, self.data.targets[place])
        return fitting.rank_features(replace(data, train=weight), layer, self.settings)

    def choose(self, count: int, place: int | None = None) -> Callable[[Ints], list[tuple[int, int, int]]]:
        """Weights [T] -> the best features as (class, layer, feature), at the layers that all training texts chose."""
        places = range(len(self.fits)) if place is None else (place,)

        def chosen(weight: Ints) -> list[tuple[int, int, int]]:
            return [
                (self.data.targets[i], self.fits[i].layer, int(feature))
                for i in places
                for feature in self.ranked(i, weight, self.fits[i].layer).features[:count]
            ]

        return chosen

    def stability(
        self, k: int, headline: OrRule | OneVsRest, replicates: int, seed: int
    ) -> tuple[list[Stability], list[ChosenFeature]]:
        """How stable the choice of k features is, and the features that it is about; without replicates these alone."""
        labelled, problem = self.data.labelled, self.data.problem
        group = labelled.group if len(labelled.groups) > 1 else None
        rules = headline.rules if isinstance(headline, OneVsRest) else (headline,)
        steady, features = [], []
        for place, rule in enumerate(rules):
            name = labelled.names[self.data.targets[place]] if self.data.classes > 2 else ""
            inclusion: dict[tuple[int, int], float] = {}
            if replicates >= 2:
                label = (problem.label == self.data.targets[place]).astype(np.int64)
                found = studies.choice_stability(self.choose(k, place), label, problem.train, replicates, seed, group)
                steady.append(Stability(name, found.with_all, found.between, found.halves, found.splits))
                inclusion = {(layer, feature): share for (_, layer, feature), share in found.inclusion.items()}
            features += self._listed(name, place, rule, inclusion)
        return steady, features

    def _listed(
        self, name: str, place: int, rule: OrRule, inclusion: Mapping[tuple[int, int], float]
    ) -> list[ChosenFeature]:
        """The features of the rule, then those that replicates chose most often in their stead."""
        size = len(self.data.problem.label)
        ranked = self.ranked(place, np.bincount(self.data.problem.train, minlength=size), self.fits[place].layer)
        rates = {
            int(feature): (float(a), float(b))
            for feature, a, b in zip(ranked.features, ranked.rate_positive, ranked.rate_negative, strict=True)
        }
        own = [(c.layer, c.feature) for c in rule.clauses]
        found = [
            ChosenFeature(
                name, c.layer, c.feature, True, c.threshold, c.rate_positive or 0.0, c.rate_negative or 0.0,
                inclusion.get((c.layer, c.feature), 0.0) if inclusion else None,
            )
            for c in rule.clauses
        ]  # fmt: skip
        others = [key for key in inclusion if key not in own and key[1] in rates]
        for layer, feature in others[: max(0, _LISTED - len(own))]:
            share = inclusion[layer, feature]
            found.append(ChosenFeature(name, layer, feature, False, None, *rates[feature], share))
        return found

    def sensitivity(self, k: int) -> list[SensitivityRow]:
        """Every layer, K, threshold and (two classes) pooling; several classes: the same setting for each."""
        targets = (None, 0.01, 0.05) if self.settings.target in (None, 0.01, 0.05) else (None, self.settings.target)
        poolings: tuple[Pooling, ...] = ("any", "mean", "last") if self.data.classes == 2 else (self.settings.pooling,)
        tables = []
        for number in self.data.targets:
            data = fit_data(self.codes, self.data.problem, number)
            rows = fitting.sensitivity(data, self.settings, targets=targets, poolings=poolings)
            tables.append({(r.layer, r.count, r.target, r.pooling): r.candidate for r in rows})
        common = [key for key in tables[0] if all(key in table for table in tables)]
        layers = {fit.layer for fit in self.fits}
        chosen = (next(iter(layers)) if len(layers) == 1 else None, k, self.settings.target, self.settings.pooling)
        return [self._sensitivity_row(key, [table[key] for table in tables], key == chosen) for key in common]

    def _sensitivity_row(
        self, key: tuple[int, int, float | None, Pooling], found: Sequence[Candidate], chosen: bool
    ) -> SensitivityRow:
        layer, k, target, pooling = key
        problem = self.data.problem
        prediction = fixed("", self.codes, self.together([c.rule for c in found])).fit(problem)
        training, calibration, test = (
            figures(problem.label[part], problem.classes, prediction.take(part))[self.data.main].value
            for part in (problem.train, problem.calibration, self.data.test)
        )
        threshold = "0" if target is None else f"{100 * target:g} % false positives"
        setting = {"layer": str(layer), "K": str(k), "threshold": threshold, "pooling": pooling}
        return SensitivityRow(setting, training, calibration, test, chosen)


# --- rule files ------------------------------------------------------------------------------------------


def read_rule(path: Path, labelled: Labelled) -> tuple[Rule, list[str]]:
    """The rule with notes. Raises InputError where it is not for classes such as those of the texts."""
    rule = load_rule(path)
    if isinstance(rule, MulticlassRule):
        if not labelled.multiclass or rule.classes != labelled.names:
            raise InputError(
                f"The rule {path} tells apart {', '.join(rule.classes)}; the texts have {', '.join(labelled.names)}"
                f"{'' if labelled.multiclass else ', of which one is positive'}. Give texts of these classes, with "
                "--multiclass."
            )
        return rule, []
    if labelled.multiclass:
        raise InputError(
            f"The rule {path} looks for {rule.classes[0]!r} and --multiclass makes every label a class. Say --positive "
            "LABEL instead."
        )
    notes = []
    if rule.classes[0] != labelled.names[1]:
        notes.append(
            f"The rule was fitted to look for {rule.classes[0]!r}; the positive class of these texts is called "
            f"{labelled.names[1]!r}."
        )
    return rule, notes


def features_of(rule: OrRule | OneVsRest) -> dict[int, list[int]]:
    """Layer -> ids, ascending."""
    found: dict[int, set[int]] = {}
    for part in rule.rules if isinstance(rule, OneVsRest) else (rule,):
        for clause in part.clauses:
            found.setdefault(clause.layer, set()).add(clause.feature)
    return {layer: sorted(ids) for layer, ids in sorted(found.items())}


def file_entry(rule: Rule, name: str, data: Data, codes: Codes) -> Entry:
    """A rule from a file as a method that learns nothing. codes: of the rule's membership."""
    method = fixed(name, codes, rule)
    prediction = method.fit(data.problem)
    return Entry(name, "rule", rule.layers, method, prediction, describe(rule, data.labelled.names), {}, rule)


def named_rule(
    rule: OrRule | OneVsRest, names: Sequence[str], source: Source, settings: FitSettings, top1: Mapping[int, float],
    limits: Mapping[int, float],
) -> Rule:  # fmt: skip
    """The rule with all that is needed to use it elsewhere. limits: layer -> norm of an attention sink."""
    choice = Choice(
        metric=settings.metric,
        layer_rule="top1-diff",
        threshold_rule="0" if settings.target is None else f"false-positive rate {settings.target:g} on calibration",
        top1_difference={str(layer): value for layer, value in top1.items()},
        details=limit_details(limits),
    )
    if isinstance(rule, OneVsRest):
        rules = tuple(
            FeatureRule(r.clauses, r.pooling, r.membership, classes=(name, f"not {name}"), source=source, chosen=choice)
            for name, r in zip(names, rule.rules, strict=True)
        )
        return MulticlassRule(rules=rules, majority=rule.majority, classes=tuple(names))
    negative, positive = names
    return FeatureRule(
        rule.clauses, rule.pooling, rule.membership, classes=(positive, negative), source=source, chosen=choice
    )
