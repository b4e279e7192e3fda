"""Texts of `qscope synthesize` through the model: which targets they fire, and the passages in which they do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qscope.classification.rule import pooled_values
from qscope.errors import InputError
from qscope.finding.pooled import Floats
from qscope.records import RecordCounts, TextMaker, check_fields, read_records, require
from qscope.synthesis.coverage import Bools
from qscope.synthesis.duplicates import Features, feature_key
from qscope.synthesis.targets import Target
from qscope.workflows.classify_read import read_block
from qscope.workflows.encoder import Encoder
from qscope.workflows.text_features import TextFeatures, TokenTexts, Truncate, read_features, tokenize_texts

BEFORE, BEHIND = 24, 8  # tokens of a passage around the strongest one


def read_texts(files: Sequence[str], text_field: str, most: int | None = None) -> list[str]:
    """Texts of .jsonl, .jsonl.gz, .csv and .parquet files, each once and without empty ones; the first `most`."""
    found: dict[str, None] = {}
    for name in files:
        path, maker = Path(name), TextMaker(text_field, text_field if "{" in text_field else None)
        records = read_records(path, RecordCounts())
        check_fields(path, records, maker.fields, "--text-field")
        for record in records:
            text = require(path, record, maker).strip()
            if text:
                found.setdefault(text)
    texts = list(found)
    if files and not texts:
        raise InputError(f"{', '.join(files)} hold no text: every row is empty. Name another field with --text-field.")
    return texts[:most]


@dataclass(frozen=True)
class Readings:
    """What n texts do."""

    values: Floats
    """[n, T] largest activation of each target"""
    fires: Bools
    """[n, T]"""
    features: tuple[Features, ...]
    """All fired features of each text"""


@dataclass(frozen=True)
class Reader:
    """The model and SAEs, and the targets that are looked for."""

    encoder: Encoder
    targets: tuple[Target, ...]
    context_size: int
    truncate: Truncate

    def __post_init__(self) -> None:
        for target in self.targets:
            sae = self.encoder.saes.get(target.layer)
            if sae is None or target.feature >= sae.d_sae:
                layers = ", ".join(f"{layer} ({sae.d_sae} features)" for layer, sae in self.encoder.saes.items())
                raise InputError(f"The target {target.name} was given; there are SAEs of the layers {layers}.")

    def tokens(self, texts: Sequence[str]) -> TokenTexts:
        return tokenize_texts(self.encoder.tokenizer, texts, self.context_size, self.truncate)

    def read(self, texts: Sequence[str], label: str, folder: Path | None = None) -> Readings:
        """By re-encoding. No text gives empty arrays."""
        size = len(self.targets)
        if not texts:
            return Readings(np.zeros((0, size)), np.zeros((0, size), np.bool_), ())
        found = read_features(self.encoder, self.tokens(texts), folder, label=label)
        values = pooled_values({layer: found.codes(layer) for layer in found.layers}, [t.key for t in self.targets])
        fires = values > np.array([t.threshold for t in self.targets])
        return Readings(values, np.asarray(fires, np.bool_), _sets(found))

    def with_passages(self, texts: Sequence[str], values: Floats, most: int) -> tuple[Target, ...]:
        """The targets with the passages around their strongest tokens in the texts, [N, T] values, at most `most`."""
        best = [_strongest(values[:, place], most) for place in range(len(self.targets))]
        used = sorted({i for found in best for i in found})
        if not used:
            return self.targets
        features = {
            layer: sorted({t.feature for t in self.targets if t.layer == layer})
            for layer in sorted({t.layer for t in self.targets})
        }
        block = read_block(self.encoder, features, self.tokens([texts[i] for i in used]), "topk", {})
        row = {text: i for i, text in enumerate(used)}
        done = []
        for place, (target, found) in enumerate(zip(self.targets, best, strict=True)):
            column = features[target.layer].index(target.feature)
            at = [int(block.strongest[target.layer][row[i], column]) for i in found]
            passages = [
                self._passage(block.texts.ids[row[i]], token) for i, token in zip(found, at, strict=True) if token >= 0
            ]
            contexts = tuple(dict.fromkeys(p for p in passages if p)) or target.contexts
            done.append(
                replace(target, contexts=contexts, scale=float(values[found, place].max()) if found else target.scale)
            )
        return tuple(done)

    def _passage(self, ids: Any, place: int) -> str:
        low, high = max(0, place - BEFORE), place + BEHIND + 1
        text = self.encoder.tokenizer.decode(ids[low:high].tolist(), skip_special_tokens=True)
        return " ".join(text.replace("\ufffd", "").split())


def _strongest(values: Floats, most: int) -> list[int]:
    """Texts with the largest value above 0, the first of equals."""
    order = np.argsort(-values, kind="stable")[:most]
    return [int(i) for i in order.tolist() if values[i] > 0]


def _sets(found: TextFeatures) -> tuple[Features, ...]:
    sets: list[set[int]] = [set() for _ in range(found.texts)]
    for layer in found.layers:
        codes = found.codes(layer)
        ids = codes.features[codes.column]
        for text, feature in zip(codes.text.tolist(), ids.tolist(), strict=True):
            sets[text].add(feature_key(layer, feature))
    return tuple(frozenset(one) for one in sets)
