"""A rule with its model: texts to decisions, each with the features, tokens and activations that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from qscope import embedded
from qscope.classification.rule import FeatureRule, MulticlassRule, Rule, RuleSAE, Source, largest_firing
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints
from qscope.workflows.classify_read import Block, read_block, token_text
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, load_encoder
from qscope.workflows.text_features import TokenTexts, Truncate, tokenize_texts

Dtype = Literal["rule", "auto", "bfloat16", "float16", "float32"]
Show = Literal["fired", "all", "none"]
LIMIT = "residual norm limit of layer "
"""Key of a rule's details: tokens with a larger norm are attention sinks and do not count"""
PREACT = (
    "membership preact: a feature fires wherever its pre-activation is above the threshold, also where it is not "
    "among the K largest of the token, so this is not TopK membership; thresholds were fitted for it"
)


@dataclass(frozen=True)
class ModelOptions:
    """What may differ from the rule's own: where the model is found, and how it runs."""

    model: str | None = None
    sae: tuple[str, ...] = ()
    dtype: Dtype = "rule"
    device: str = "auto"
    batch_tokens: int | None = None


def of_rules(rule: Rule) -> tuple[FeatureRule, ...]:
    return (rule,) if isinstance(rule, FeatureRule) else rule.rules


def class_names(rule: Rule) -> tuple[str, ...]:
    """Two classes: the negative one, the positive one."""
    return rule.classes[::-1] if isinstance(rule, FeatureRule) else rule.classes


def limits(rule: Rule) -> dict[int, float]:
    """Layer -> residual norm above which tokens do not count, as the rule says. InputError for what is no norm."""
    found: dict[int, float] = {}
    for part in of_rules(rule):
        for name, value in (part.chosen.details if part.chosen else {}).items():
            if name.startswith(LIMIT):
                try:
                    layer, norm = int(name.removeprefix(LIMIT)), float(value)
                except ValueError:
                    layer, norm = -1, np.nan
                if not norm > 0:
                    raise InputError(
                        f"The rule's detail {name!r} is {value!r}; a layer and a number above 0 are expected. Give the "
                        "rule as `qscope classify fit` wrote it."
                    )
                found[layer] = norm
    return found


def limit_details(found: Mapping[int, float]) -> dict[str, str]:
    """What `limits` reads. found: layer -> norm, infinite where no token told one."""
    return {f"{LIMIT}{layer}": repr(norm) for layer, norm in sorted(found.items()) if np.isfinite(norm)}


def source_of(encoder: Encoder, model: str | None, sae: Sequence[str], context_size: int, truncate: Truncate) -> Source:
    """What a rule was made with, so that `encoder_for` finds it again.

    model, sae: names as they were given; none: the embedded ones.
    """
    names = tuple(sae) or (embedded.SAES,)
    each = names * len(encoder.saes) if len(names) == 1 else names
    saes = zip(encoder.saes.items(), each, strict=True)
    return Source(
        model=model or embedded.DEFAULT_MODEL_NAME,
        model_sha256=encoder.model_sha256,
        tokenizer_sha256=encoder.tokenizer_sha256,
        saes=tuple(
            sorted(
                (RuleSAE(layer, found.weight_hash(), found.d_sae, found.k, name) for (layer, found), name in saes),
                key=lambda found: found.layer,
            )
        ),
        context_size=context_size,
        truncate=truncate,
        bos=encoder.bos is not None,
        dtype=encoder.dtype,
        precision=encoder.precision,
    )


def with_details(rule: FeatureRule, details: Mapping[str, str]) -> FeatureRule:
    if rule.chosen is None:
        raise InputError("The rule does not say how it was chosen, so nothing can be added to that.")
    return replace(rule, chosen=replace(rule.chosen, details={**rule.chosen.details, **details}))


class Classifier:
    """A rule, and the model and SAEs that it was fitted with."""

    def __init__(self, rule: Rule, encoder: Encoder) -> None:
        self.rule, self.encoder, self.limits = rule, encoder, limits(rule)
        self.features: dict[int, list[int]] = {}
        for part in of_rules(rule):
            for clause in part.clauses:
                self.features.setdefault(clause.layer, []).append(clause.feature)
        self.features = {layer: sorted(set(ids)) for layer, ids in sorted(self.features.items())}

    @classmethod
    def load(cls, rule: Rule, options: ModelOptions) -> "Classifier":
        """Raises InputError for another model or SAE than the rule's, ModelError for one that cannot be loaded."""
        return cls(rule, encoder_for(rule, options))

    def tokenize(self, texts: Sequence[str]) -> TokenTexts:
        source = self.rule.source
        return tokenize_texts(self.encoder.tokenizer, texts, source.context_size, source.truncate)

    def read(self, tokens: TokenTexts) -> Block:
        return read_block(self.encoder, self.features, tokens, self.rule.membership, self.limits)

    def rows(self, block: Block, show: Show = "fired") -> list[dict[str, Any]]:
        """What is said of every text of the block, as JSON: class, score, evidence."""
        rules, names = of_rules(self.rule), class_names(self.rule)
        values = [part.values(block.codes, self.rule.membership) for part in rules]
        scores = np.stack([part.score_values(v) for part, v in zip(rules, values, strict=True)], axis=1)
        decided = decisions(self.rule, values)
        found = []
        for text, number in enumerate(decided.tolist()):
            row: dict[str, Any] = {"class": names[number]}
            if isinstance(self.rule, MulticlassRule):
                row["score"] = digits(scores[text, number])
                row["scores"] = {name: digits(score) for name, score in zip(names, scores[text], strict=True)}
                said = number
            else:
                row["positive"], row["score"], said = bool(number), digits(scores[text, 0]), 0
            if show != "none":
                row["evidence"] = self._evidence(block, text, rules[said], values[said][text], show)
            row["tokens"] = int(block.tokens[text])
            row["truncated"] = bool(block.texts.truncated[text])
            found.append(row)
        return found

    def _evidence(self, block: Block, text: int, rule: FeatureRule, values: Floats, show: Show) -> list[dict[str, Any]]:
        """The clauses that fire (or all), largest activation over scale first."""
        wanted = np.flatnonzero(values > rule.thresholds if show == "fired" else np.ones(len(values), bool))
        ids = block.texts.ids[text]
        cut = int(block.texts.full_length[text]) - len(ids) if rule.source.truncate == "left" else 0
        found = []
        for i in wanted[np.argsort(-values[wanted] / rule.scales[wanted], kind="stable")].tolist():
            clause, value = rule.clauses[i], float(values[i])
            column = self.features[clause.layer].index(clause.feature)
            of_any = block.strongest[clause.layer][text, column]
            place = int(block.last[text] if rule.pooling == "last" else of_any)
            row: dict[str, Any] = {"layer": clause.layer, "feature": clause.feature, "activation": digits(value)}
            row |= {"threshold": digits(clause.threshold), "fires": bool(value > clause.threshold)}
            if place >= 0:
                before, token, after = token_text(self.encoder.tokenizer, ids, place)
                row |= {"token": token, "position": place + cut, "before": before, "after": after}
            found.append(row | {"meaning": clause.meaning})
        return found


def decisions(rule: Rule, values: Sequence[Floats]) -> Ints:
    """[T] places in `class_names`, from the pooled activations [T, C] of each of the rules."""
    rules = of_rules(rule)
    fires = np.stack([part.decide_values(v) for part, v in zip(rules, values, strict=True)], axis=1)
    if isinstance(rule, FeatureRule):
        return fires[:, 0].astype(np.int64)
    scores = np.stack([part.score_values(v) for part, v in zip(rules, values, strict=True)], axis=1)
    return largest_firing(scores, fires, rule.majority)


def digits(value: float) -> float:
    """Six significant ones: what a float32 activation means."""
    return float(f"{value:.6g}")


def encoder_for(rule: Rule, options: ModelOptions) -> Encoder:
    """The model to the rule's deepest layer with the SAEs of its layers, by their hashes those of the rule."""
    source, layers = rule.source, rule.layers
    names = options.sae or tuple(source.sae(layer).source or "" for layer in layers)
    if "" in names:
        raise InputError(
            f"The rule does not say where the SAE of layer {layers[names.index('')]} is found. Name it with --sae."
        )
    model = options.model or (None if source.model == embedded.DEFAULT_MODEL_NAME else source.model)
    ks = {source.sae(layer).k for layer in layers}
    encoder = load_encoder(
        EncodeConfig(
            text=(), model=model, sae=names, layers=layers, k=ks.pop() if len(ks) == 1 else None,  # else by their cards
            context_size=source.context_size, bos=source.bos, precision=known_precision(source.precision),
            dtype=known_dtype(source.dtype if options.dtype == "rule" else options.dtype), device=options.device,
            batch_tokens=options.batch_tokens, allow_mismatch=True,
        )
    )  # fmt: skip
    source.check_model(encoder.model_name, encoder.model_sha256, encoder.tokenizer_sha256)
    for layer, sae in encoder.saes.items():
        source.check_sae(layer, sae.weight_hash())
        said = source.sae(layer)
        if (said.d_sae, said.k) != (sae.d_sae, sae.k):
            raise InputError(
                f"The rule says that the SAE of layer {layer} has {said.d_sae} features of which {said.k} are active, "
                f"and it has {sae.d_sae} and {sae.k}. Give the rule as `qscope classify fit` wrote it."
            )
    return encoder


def known_precision(name: str) -> Any:
    if name not in ("exact", "bf16"):
        raise InputError(f"The rule was fitted with the precision {name!r}; 'exact' and 'bf16' are known.")
    return name


def known_dtype(name: str) -> Any:
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise InputError(f"The rule was fitted with the dtype {name!r}; bfloat16, float16 and float32 are known.")
    return name


def said_of(rule: Rule, encoder: Encoder) -> dict[str, str]:
    """What the reports say of a rule and of how it runs here."""
    source, rules = rule.source, of_rules(rule)
    features = ", ".join(f"{c.layer}:{c.feature}" for part in rules[:3] for c in part.clauses[:5])
    return {
        "rule": f"{sum(len(part.clauses) for part in rules)} features ({features}{', ...' if len(rules) > 3 else ''})",
        "classes": ", ".join(class_names(rule)),
        "pooling": rules[0].pooling,
        "membership": rule.membership,
        "context": f"{source.context_size} tokens{' after a BOS' if source.bos else ''}, the {source.truncate} cut off",
        "dtype": encoder.dtype,
        "device": encoder.device,
    }


def differs(rule: Rule, encoder: Encoder) -> tuple[str, ...]:
    """Notes for what is not as it was when the rule was fitted, and for what a reader may misunderstand."""
    said: tuple[str, ...] = (PREACT,) if rule.membership == "preact" else ()
    if encoder.dtype != rule.source.dtype:
        said += (
            f"the rule was fitted with the model in {rule.source.dtype}, and it runs in {encoder.dtype}: activations "
            "near a threshold may fall on its other side",
        )
    return said
