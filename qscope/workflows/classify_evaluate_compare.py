"""All methods on the same texts, and the studies: what `qscope classify evaluate` computes once the texts are read."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from qscope.classification import fitting
from qscope.classification.fitting import FitSettings
from qscope.classification.rule import OneVsRest, OrRule, Rule
from qscope.errors import InputError
from qscope.finding.pooled import PooledCodes
from qscope.workflows import classify_evaluate_studies as studies
from qscope.workflows.classify_evaluate_methods import (
    PROBE,
    RANDOM,
    Data,
    Entry,
    RandomRules,
    fit_baselines,
    random_rules,
)
from qscope.workflows.classify_evaluate_result import ChosenFeature, Stability
from qscope.workflows.classify_evaluate_rule import Rules, features_of, file_entry, fit_data, fixed
from qscope.workflows.classify_evaluate_rule import describe as describe_rule
from qscope.workflows.classify_evaluate_table import layer_lines, losses, per_class, table, verdict
from qscope.workflows.classify_read import Membership, block_rows, read_block, train_limits
from qscope.workflows.encoder import Encoder
from qscope.workflows.text_features import TokenTexts, concatenate

STUDIES = ("efficiency", "transfer", "stability", "sensitivity")


@dataclass(frozen=True)
class Wanted:
    """What is asked of a comparison; as in the options of `qscope classify evaluate`."""

    settings: FitSettings
    multi_layer: int
    preact: bool
    skip: tuple[str, ...]
    replicates: int
    train_shares: tuple[float, ...]
    train_draws: int
    choice_replicates: int
    draws: int
    seed: int


class Clock:
    """Seconds of the parts of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass
class Compared:
    rule: OrRule | OneVsRest | None
    """The headline rule"""
    top1: dict[int, float]
    notes: list[str]
    parts: dict[str, Any] = field(default_factory=dict)
    """Fields of the result"""


def compare(
    wanted: Wanted, data: Data, encoder: Encoder, tokens: TokenTexts, given: Rule | None, clock: Clock
) -> Compared:
    """Fit everything, judge it on the test texts, and study the headline rule.

    given: a rule from a file, which learns nothing more; rules are fitted beside it only for the studies that it cannot
    take part in.
    """
    with _progress() as step:
        with clock("rules"):
            rules, name, entries, notes = _rules(wanted, data, encoder, tokens, given)
        with clock("baselines"):
            entries += fit_baselines(data, wanted.skip, step)
            headline = next(entry for entry in entries if entry.name == name)
            k = len(_first(headline).clauses)
            randoms = _randoms(wanted, data, headline, k)
        if randoms is None and RANDOM not in wanted.skip and wanted.draws:
            notes.append(
                f"Fewer than {k} features fire in {wanted.settings.min_texts} training texts: no random rules."
            )
        with clock("intervals"):
            rows, _ = table(data, name, entries, randoms, wanted.replicates, wanted.seed)
            top1 = {} if rules is None else rules.top1
            shown = [e for e in entries if e.name == name or e.family != "rule"]
            lines = layer_lines(data, shown, top1, wanted.replicates, wanted.seed)
        found = Compared(headline.rule, top1, notes)
        found.parts = {
            "headline": name,
            "verdict": verdict(data, rows),
            "loses": losses(data, rows),
            "rows": rows,
            "layers": lines,
            "per_class": per_class(data, [entry for entry in entries if entry.family != "none"]),
        }
        found.parts |= _studies(wanted, data, rules, headline, entries, k, clock, step, notes)
    return found


def _rules(
    wanted: Wanted, data: Data, encoder: Encoder, tokens: TokenTexts, given: Rule | None
) -> tuple[Rules | None, str, list[Entry], list[str]]:
    """(rules fitted here, name of the headline rule, rules, notes)."""
    if given is not None:
        name, codes = "rule (from the file)", data.codes
        if given.membership == "preact":
            codes = read_named(encoder, data, tokens, features_of(given), "preact")
        return None, name, [file_entry(given, name, data, codes)], []
    rules = Rules.fit(data, wanted.settings, wanted.multi_layer)
    name, entries = rules.entries()
    notes = []
    if rules.left_out:
        most = ", ".join(map(str, rules.left_out))
        notes.append(f"K={most}: fewer features than that speak for the class at its layer, so there is no such rule.")
    if wanted.preact:
        headline = next(entry for entry in entries if entry.name == name)
        entries.append(_on_preactivations(wanted, data, encoder, tokens, headline))
    return rules, name, entries, notes


def _on_preactivations(wanted: Wanted, data: Data, encoder: Encoder, tokens: TokenTexts, headline: Entry) -> Entry:
    """The features of the headline rule with thresholds on pre-activations, at its false-positive rate."""
    assert headline.rule is not None
    codes = read_named(encoder, data, tokens, features_of(headline.rule), "preact")
    parts = headline.rule.rules if isinstance(headline.rule, OneVsRest) else (headline.rule,)
    found, targets = [], []
    calibration = data.problem.calibration
    for number, part in zip(data.targets, parts, strict=True):
        target = wanted.settings.target
        if target is None:
            decided = part.decide(data.codes)[calibration]
            target = float(decided[data.problem.label[calibration] != number].mean())
        settings = replace(wanted.settings, target=target, membership="preact")
        found.append(fitting.make_candidate(fit_data(codes, data.problem, number), part.clauses, settings).rule)
        targets.append(target)
    rule = OneVsRest(tuple(found), headline.rule.majority) if isinstance(headline.rule, OneVsRest) else found[0]
    name = f"{headline.name}, pre-activations"
    method = fixed(name, codes, rule)
    detail = f"{describe_rule(rule, data.labelled.names)}; thresholds at the false-positive rate "
    detail += (
        f"{min(targets):.3g} to {max(targets):.3g} of calibration texts" if len(targets) > 1 else f"{targets[0]:.3g}"
    )
    return Entry(name, "rule", rule.layers, method, method.fit(data.problem), detail, {}, rule)


def read_named(
    encoder: Encoder, data: Data, tokens: TokenTexts, features: Mapping[int, Sequence[int]], membership: Membership
) -> dict[int, PooledCodes]:
    """Codes of named features of all texts, by another run of the model as far as the deepest layer that is needed."""
    limits = train_limits(encoder, tokens, data.problem.train, tuple(features))
    blocks = [
        read_block(encoder, features, tokens.rows(range(rows.start, rows.stop)), membership, limits)
        for rows in block_rows(tokens.lengths)
    ]
    return {layer: concatenate([block.codes[layer] for block in blocks]) for layer in features}


def _first(entry: Entry) -> OrRule:
    assert entry.rule is not None
    return entry.rule.rules[0] if isinstance(entry.rule, OneVsRest) else entry.rule


def _randoms(wanted: Wanted, data: Data, headline: Entry, k: int) -> RandomRules | None:
    """At the layer of the headline rule, of its first class where there are several."""
    if RANDOM in wanted.skip:
        return None
    calibrated = wanted.settings.target is not None
    layer = _first(headline).layers[-1]
    return random_rules(data, layer, k, wanted.draws, wanted.settings.min_texts, calibrated)


def _studies(
    wanted: Wanted,
    data: Data,
    rules: Rules | None,
    headline: Entry,
    entries: Sequence[Entry],
    k: int,
    clock: Clock,
    step: Callable[[str], None],
    notes: list[str],
) -> dict[str, Any]:
    """Fields of the result that a study fills; empty where it was skipped or cannot be made."""
    skip = wanted.skip
    steady: list[Stability] = []
    found: dict[str, Any] = {"curve": [], "transfers": [], "feature_overlap": [], "sensitivity": []}
    learners = [e for e in entries if e.family not in ("rule", "none")]
    studied = [headline, *learners] if rules is not None else learners
    if "efficiency" not in skip:
        with clock("data efficiency"):
            shares, draws = wanted.train_shares, wanted.train_draws
            found["curve"] = studies.efficiency(data, studied, shares, draws, wanted.seed, step)
    if "transfer" not in skip:
        with clock("transfer"):
            found["transfers"] = studies.transfers(data, [e for e in studied if e is headline or e.name == PROBE], step)
            if found["transfers"] and rules is not None:
                found["feature_overlap"] = studies.feature_overlap(data, rules.choose(10))
    features = listed(headline.rule, data)
    if rules is not None and headline.rule is not None:
        with clock("stability"):
            replicates = 0 if "stability" in skip else wanted.choice_replicates
            try:
                steady, features = rules.stability(k, headline.rule, replicates, wanted.seed)
            except InputError as error:  # too few texts to draw again
                notes.append(f"The stability of the features could not be measured: {error}")
                steady, features = rules.stability(k, headline.rule, 0, wanted.seed)
        if "sensitivity" not in skip:
            with clock("sensitivity"):
                found["sensitivity"] = rules.sensitivity(k)
    return found | {"stability": steady, "features": features}


def listed(rule: OrRule | OneVsRest | None, data: Data) -> list[ChosenFeature]:
    """The features of a rule, by what it says of itself."""
    if rule is None:
        return []
    parts = rule.rules if isinstance(rule, OneVsRest) else (rule,)
    names = data.labelled.names if isinstance(rule, OneVsRest) else ("",)
    return [
        ChosenFeature(name, c.layer, c.feature, True, c.threshold, c.rate_positive or 0.0, c.rate_negative or 0.0, None)
        for name, part in zip(names, parts, strict=True)
        for c in part.clauses
    ]


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    from tqdm import tqdm

    with tqdm(desc="fit", unit="fit", dynamic_ncols=True, mininterval=0.5) as bar:

        def step(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield step
