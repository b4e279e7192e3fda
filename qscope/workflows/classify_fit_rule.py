"""Codes of training and calibration texts to a rule, what its features mean, and what else could have been chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from qscope._version import __version__
from qscope.classification import FeatureRule, MulticlassRule, Split, save_rule
from qscope.classification.fitting import (
    Candidate,
    Fit,
    FitData,
    feature_scores,
    fit,
    fit_multiclass,
    make_candidate,
)
from qscope.classification.rule import Choice, Clause, Rule, Source
from qscope.errors import ModelError
from qscope.finding.output_score import logit_lens
from qscope.finding.pooled import Ints, PooledCodes
from qscope.workflows.classify_fit_result import ClassifyFitResult, ClauseFound, LayerLine, SensitivityLine
from qscope.workflows.classify_fit_sensitivity import one_class, several_classes
from qscope.workflows.classify_inputs import Labelled
from qscope.workflows.classify_read import block_rows, read_block, token_text, train_limits
from qscope.workflows.classify_rules import LIMIT, PREACT, limit_details, of_rules, source_of
from qscope.workflows.classify_split import parts_of, split_path, test_digest, write_parts
from qscope.workflows.encoder import Encoder
from qscope.workflows.steer_find_result import Context
from qscope.workflows.text_features import TextFeatures, TokenTexts, concatenate

if TYPE_CHECKING:
    from qscope.workflows.classify_fit import ClassifyFitConfig

Scores = Mapping[str, npt.NDArray[Any]]
CONTEXTS = 3  # texts shown of each feature
LENS = 10


@dataclass(frozen=True)
class Fitting:
    """What was read. S texts are seen, those of training and calibration; arrays of S unless said otherwise."""

    config: "ClassifyFitConfig"
    encoder: Encoder
    data: Labelled
    """All texts"""
    split: Split
    """Of all texts"""
    seen: Ints
    """[S] places in `data`"""
    texts: TokenTexts
    features: TextFeatures

    @cached_property
    def codes(self) -> dict[int, PooledCodes]:
        return {layer: self.features.codes(layer) for layer in self.features.layers}

    @cached_property
    def label(self) -> Ints:
        return self.data.label[self.seen]

    @cached_property
    def limits(self) -> dict[int, float]:
        """Layer -> residual norm above which a token is an attention sink, by the first training texts."""
        return train_limits(self.encoder, self.texts, np.flatnonzero(self.weight("train")), self.encoder.layers)

    def weight(self, part: str) -> Ints:
        """1 for the texts of a part."""
        return np.asarray(getattr(self.split, part)[self.seen], np.int64)

    def of_class(self, number: int, codes: Mapping[int, PooledCodes] | None = None) -> FitData:
        """One class against all others."""
        found = self.codes if codes is None else codes
        return FitData(found, self.label == number, self.weight("train"), self.weight("calibration"))

    @cached_property
    def source(self) -> Source:
        config = self.config
        return source_of(self.encoder, config.model, config.sae, config.context_size, config.truncate)


def fitted(found: Fitting) -> ClassifyFitResult:
    """Choose, calibrate, explain and write the rule."""
    config, several = found.config, found.data.multiclass
    settings = config.settings()
    if several:
        train, calibration = found.weight("train"), found.weight("calibration")
        many = fit_multiclass(
            found.codes, found.label, found.data.names, train, calibration, settings, config.layer, config.count
        )
        fits, majority = dict(enumerate(many.fits)), many.majority
    else:
        fits = {1: fit(found.of_class(1), settings, config.layer, config.count, config.multi_layer)}
        majority = -1
    chosen = _chosen(found, fits)
    details = _details(found, sorted({layer for c in chosen.values() for layer in c.rule.layers}))
    parts = {number: _rule(found, number, fits[number], candidate, details) for number, candidate in chosen.items()}
    rule: Rule = (
        MulticlassRule(rules=tuple(parts.values()), majority=majority, classes=found.data.names)
        if several
        else parts[1]
    )
    clauses, meanings, notes = _explain(found, parts)
    rule = _with_meanings(rule, meanings)
    sensitivity = _sensitivity(found, fits, chosen) if config.sensitivity else ()
    path = save_rule(rule, _made(config.rule))
    write_parts(split_path(path), parts_of(found.data.texts, found.split))
    return ClassifyFitResult(
        model=found.encoder.model_name,
        about=_about(found, rule),
        notes=(*found.data.notes(), *_notes(found, rule), *_left_out(found, fits), *notes),
        classes=found.data.names,
        counts=found.split.counts(found.data.label, found.data.names),
        layers=_layers(found, fits, chosen),
        clauses=clauses,
        sensitivity=tuple(sensitivity),
        rule_path=str(path),
        html=None if config.html is None else str(config.html),
        out=None if config.out is None else str(config.out),
    )


# --- the rule --------------------------------------------------------------------------------------------


def _chosen(found: Fitting, fits: Mapping[int, Fit]) -> dict[int, Candidate]:
    """Class -> its rule; for the membership preact, the same features with thresholds of their pre-activations."""
    picked = {number: one.multi_layer or one.chosen for number, one in fits.items()}
    if found.config.membership == "topk":
        return picked
    offered = {
        number: candidate.rule.clauses if fits[number].multi_layer else _most(fits[number]).rule.clauses
        for number, candidate in picked.items()
    }
    codes = _preact(found, [clause for clauses in offered.values() for clause in clauses])
    return {number: _on_preact(found, number, offered[number], codes, fits[number]) for number in picked}


def _most(one: Fit) -> Candidate:
    """Of the chosen layer, the candidate with most features: they hold those of all others, in the same order."""
    return max((c for c in one.candidates if c.rule.layers == (one.layer,)), key=lambda c: c.count)


def _preact(found: Fitting, clauses: Sequence[Clause]) -> dict[int, PooledCodes]:
    """Pre-activations of these features in all texts that are seen: the model runs again, the other features do not."""
    from tqdm import tqdm

    wanted: dict[int, list[int]] = {}
    for layer, feature in sorted({(clause.layer, clause.feature) for clause in clauses}):
        wanted.setdefault(layer, []).append(feature)
    parts: dict[int, list[PooledCodes]] = {layer: [] for layer in wanted}
    with tqdm(total=int(found.texts.lengths.sum()), unit="tok", unit_scale=True, desc="preact", mininterval=0.5) as bar:
        for rows in block_rows(found.texts.lengths):
            texts = found.texts.rows(range(rows.start, rows.stop))
            block = read_block(found.encoder, wanted, texts, "preact", found.limits)
            for layer, codes in block.codes.items():
                parts[layer].append(codes)
            bar.update(int(texts.lengths.sum()))
    return {layer: concatenate(codes) for layer, codes in parts.items()}


def _on_preact(
    found: Fitting, number: int, clauses: tuple[Clause, ...], codes: Mapping[int, PooledCodes], one: Fit
) -> Candidate:
    config, settings = found.config, replace(found.config.settings(), membership="preact")
    data = found.of_class(number, codes)
    rates = {layer: feature_scores(data, layer, config.pooling) for layer in {clause.layer for clause in clauses}}
    clauses = tuple(_rates(clause, rates[clause.layer]) for clause in clauses)
    counts = (len(clauses),) if one.multi_layer else tuple(k for k in sorted(settings.counts) if k <= len(clauses))
    if config.count is not None and not one.multi_layer:
        counts = (config.count,)
    made = [make_candidate(data, clauses[:k], settings) for k in counts]
    return min(made, key=lambda candidate: (-(candidate.calibration["f1"] or 0.0), candidate.count))


def _rates(clause: Clause, scores: Scores) -> Clause:
    row = np.flatnonzero(scores["feature"] == clause.feature)
    own, other = (float(scores[name][row[0]]) if len(row) else 0.0 for name in ("rate_positive", "rate_negative"))
    return replace(clause, rate_positive=own, rate_negative=other)


def _details(found: Fitting, layers: list[int]) -> dict[str, str]:
    """What a rule must hold besides its features: which tokens count, and which texts were set aside."""
    config, parts = found.config, parts_of(found.data.texts, found.split)
    return {
        **limit_details({layer: found.limits[layer] for layer in layers}),
        "split": f"shares {1 - config.calibration - config.test:g}, {config.calibration:g}, {config.test:g}, seed "
        f"{config.seed}",
        "test texts": f"sha256 {test_digest(parts)}",
        "versions": _versions(),
    }


def _rule(found: Fitting, number: int, one: Fit, candidate: Candidate, details: Mapping[str, str]) -> FeatureRule:
    config, names = found.config, found.data.names
    other = f"not {names[number]}" if found.data.multiclass else names[0]
    layer_rule = "top1 difference, training texts"
    if config.multi_layer is not None:
        layer_rule = f"one feature of each of the {config.multi_layer} layers with the largest {layer_rule}"
    elif config.layer is not None:
        layer_rule = "given"
    count = f"given: {config.count}" if config.count is not None else "highest F1, calibration texts"
    threshold = "0" if config.max_fpr is None else f"false-positive rate <= {config.max_fpr:g}, calibration texts"
    return FeatureRule(
        candidate.rule.clauses,
        candidate.rule.pooling,
        candidate.rule.membership,
        classes=(names[number], other),
        source=found.source,
        chosen=Choice(
            metric=config.metric,
            layer_rule=layer_rule,
            threshold_rule=threshold,
            top1_difference={str(layer): value for layer, value in one.top1.items()},
            training=candidate.training,
            calibration=candidate.calibration,
            details={**details, "number of features": count if config.multi_layer is None else "one of each layer"},
        ),
    )


def _with_meanings(rule: Rule, meanings: Mapping[tuple[int, int], str]) -> Rule:
    if isinstance(rule, FeatureRule):
        return rule.with_meanings(meanings)
    return replace(rule, rules=tuple(part.with_meanings(meanings) for part in rule.rules))


# --- what it means ---------------------------------------------------------------------------------------


def _explain(
    found: Fitting, parts: Mapping[int, FeatureRule]
) -> tuple[tuple[ClauseFound, ...], dict[tuple[int, int], str], tuple[str, ...]]:
    """(every clause with its figures, what each feature means, notes)."""
    lens, notes = _lens(found, parts)
    listed: list[ClauseFound] = []
    meanings: dict[tuple[int, int], str] = {}
    for number, part in parts.items():
        shown = _contexts(found, number, part)
        scores = {layer: feature_scores(found.of_class(number), layer, part.pooling) for layer in part.layers}
        for i, clause in enumerate(part.clauses):
            key = (clause.layer, clause.feature)
            meanings.setdefault(key, _meaning(shown[i], lens.get(key, ())))
            listed.append(
                _clause(
                    found.data.names[number], clause, scores[clause.layer], meanings[key], lens.get(key, ()), shown[i]
                )
            )
    return tuple(listed), meanings, notes


def _clause(
    of: str, clause: Clause, scores: Scores, meaning: str, lens: tuple[str, ...], shown: tuple[Context, ...]
) -> ClauseFound:
    """Rates of firing are of the rule's membership, the other figures of TopK codes, which ranked the feature."""
    row = int(np.flatnonzero(scores["feature"] == clause.feature)[0])
    figure = {name: float(scores[name][row]) for name in ("auroc", "mean", "log_odds", "z", "q", "rate")}
    return ClauseFound(
        of=of,
        layer=clause.layer,
        feature=clause.feature,
        threshold=clause.threshold,
        meaning=meaning,
        rate_positive=clause.rate_positive or 0.0,
        rate_negative=clause.rate_negative or 0.0,
        rate_difference=figure["rate"],
        mean_difference=figure["mean"],
        auroc=figure["auroc"],
        log_odds=figure["log_odds"],
        z=figure["z"],
        q=figure["q"],
        lens=lens,
        contexts=shown,
    )


def _lens(
    found: Fitting, parts: Mapping[int, FeatureRule]
) -> tuple[dict[tuple[int, int], tuple[str, ...]], tuple[str, ...]]:
    """Feature -> the tokens that its decoder row raises most."""
    wanted: dict[int, list[int]] = {}
    for layer, feature in sorted({(c.layer, c.feature) for part in parts.values() for c in part.clauses}):
        wanted.setdefault(layer, []).append(feature)
    lens, decode = {}, found.encoder.tokenizer.decode
    try:
        for layer, ids in wanted.items():
            rows = found.encoder.saes[layer].W_dec.detach()[ids]
            tokens = logit_lens(found.encoder.model, rows, []).tokens[:, :LENS]
            for feature, row in zip(ids, tokens, strict=True):
                lens[(layer, feature)] = tuple(str(decode([int(i)])) for i in row)
    except ModelError as error:  # a model whose final norm is not where it is looked for still has its rule
        return lens, (f"no raised tokens: {error}",)
    return lens, ()


def _contexts(found: Fitting, number: int, part: FeatureRule) -> list[tuple[Context, ...]]:
    """The strongest token of each of the training texts of the class in which a clause is strongest, by clause."""
    ours = (found.weight("train") > 0) & (found.label == number)
    best: list[Ints] = []
    for clause in part.clauses:
        codes = found.codes[clause.layer]
        column = int(np.searchsorted(codes.features, clause.feature))
        low, high = np.searchsorted(codes.column, [column, column + 1])
        entries = np.arange(low, high)[ours[codes.text[low:high]]]
        best.append(codes.text[entries[np.lexsort((codes.text[entries], -codes.largest[entries]))]][:CONTEXTS])
    texts = np.unique(np.concatenate(best))
    if not len(texts):
        return [() for _ in part.clauses]
    wanted = {n: sorted(c.feature for c in part.clauses if c.layer == n) for n in part.layers}
    block = read_block(found.encoder, wanted, found.texts.rows(texts), "topk", found.limits)
    shown = []
    for clause, rows in zip(part.clauses, best, strict=True):
        codes, column = block.codes[clause.layer], wanted[clause.layer].index(clause.feature)
        of_clause = []
        for text in np.searchsorted(texts, rows).tolist():
            place = int(block.strongest[clause.layer][text, column])
            entry = (codes.text == text) & (codes.features[codes.column] == clause.feature)
            if place >= 0:
                around = token_text(found.encoder.tokenizer, block.texts.ids[text], place)
                of_clause.append(Context(*around, activation=float(codes.largest[entry][0])))
        shown.append(tuple(of_clause))
    return shown


def _meaning(shown: Sequence[Context], lens: Sequence[str]) -> str:
    """In a line: the tokens at which it is strongest, and those that it raises."""
    said = []
    tokens = tuple(dict.fromkeys(context.token.strip() for context in shown if context.token.strip()))
    for what, words in (
        ("strongest at", tokens),
        ("raises", tuple(dict.fromkeys(w.strip() for w in lens if w.strip()))),
    ):
        if words:
            said.append(f"{what} {', '.join(f'“{word}”' for word in words[:5])}")
    return "; ".join(said)


# --- what is said of it ----------------------------------------------------------------------------------


def _sensitivity(found: Fitting, fits: Mapping[int, Fit], chosen: Mapping[int, Candidate]) -> list[SensitivityLine]:
    config, settings = found.config, found.config.settings()
    if found.data.multiclass:
        train, calibration = found.weight("train"), found.weight("calibration")
        return several_classes(
            found.codes, found.label, found.data.names, train, calibration, settings, config.layer, config.count
        )
    return one_class(found.of_class(1), found.data.names[1], settings, fits[1], chosen[1])


def _layers(found: Fitting, fits: Mapping[int, Fit], chosen: Mapping[int, Candidate]) -> tuple[LayerLine, ...]:
    lines = []
    for number, one in fits.items():
        data = found.of_class(number)
        for layer, value in one.top1.items():
            scores = feature_scores(data, layer)
            best = int(np.argmax(scores["rate"])) if len(scores["rate"]) else -1
            sae = found.encoder.saes[layer]
            lines.append(
                LayerLine(
                    of=found.data.names[number],
                    layer=layer,
                    sae=sae.card.source or f"sha256 {sae.weight_hash()[:12]}",
                    top1_difference=value,
                    top1_feature=int(scores["feature"][best]) if best >= 0 else -1,
                    chosen=layer in chosen[number].rule.layers,
                )
            )
    return tuple(lines)


def _notes(found: Fitting, rule: Rule) -> tuple[str, ...]:
    empty = int((found.features.tokens == 0).sum())
    cut = int(found.texts.truncated.sum())
    said = [f"{cut} of {len(found.texts)} texts are longer than {found.config.context_size} tokens"] if cut else []
    said += [f"{empty} texts have no token that counts; nothing fires in them"] if empty else []
    said += [PREACT] if rule.membership == "preact" else []
    if not rule_has_limits(rule):
        said.append("no training text has a token that counts to tell attention sinks by")
    return (*said, *(f"layer {n}: {text}" for n, text in found.encoder.mismatches.items() if text))


def _left_out(found: Fitting, fits: Mapping[int, Fit]) -> list[str]:
    """The K that were to be tried and need more features than there are."""
    said = []
    for number, one in fits.items():
        tried = {candidate.count for candidate in one.candidates if candidate.rule.layers == (one.layer,)}
        missing = [str(k) for k in sorted(set(found.config.settings().counts) - tried)]
        if missing:
            of = found.data.names[number]
            said.append(f"K={', '.join(missing)} not tried: layer {one.layer} has fewer features that speak for {of!r}")
    return said


def rule_has_limits(rule: Rule) -> bool:
    return all(any(name.startswith(LIMIT) for name in (p.chosen.details if p.chosen else {})) for p in of_rules(rule))


def _about(found: Fitting, rule: Rule) -> dict[str, str]:
    encoder, config = found.encoder, found.config
    facts = next(iter(found.features.facts.values()))
    return {
        "classes": ", ".join(found.data.names),
        "ranked by": config.metric,
        "pooling": config.pooling,
        "membership": rule.membership,
        "thresholds": "0" if config.max_fpr is None else f"false-positive rate at most {config.max_fpr:g}",
        "context": f"{config.context_size} tokens{' after a BOS' if config.bos else ''}, the {config.truncate} cut off",
        "tokens": f"{facts.kept:,} of {facts.tokens:,} ({facts.extreme} attention sinks, {facts.nan} NaN left out)",
        "dtype": encoder.dtype,
        "features": encoder.precision,
        "device": encoder.device,
        "seed": str(config.seed),
        "versions": _versions(),
    }


def _versions() -> str:
    return f"qscope {__version__}, torch {torch.__version__}, transformers {metadata.version('transformers')}"


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
