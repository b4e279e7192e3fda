"""Benchmarks through the model: footprints of all items at all layers, and of random text of the same tokens."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qscope.coverage.footprints import Footprints
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints, PooledCodes, Pooling
from qscope.store import FeatureStore
from qscope.workflows.coverage_inputs import Benchmark
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, check_fit, load_encoder, load_saes
from qscope.workflows.steer_find_result import TokenFacts
from qscope.workflows.text_features import TextFeatures, TokenTexts, read_features, store_features, tokenize_texts

if TYPE_CHECKING:
    from qscope.workflows.coverage import CoverageConfig

BLOCK_TOKENS = 1 << 18  # codes of so many tokens are held at once: at K = 50 some 150 MB a layer
SAMPLE = 1 << 13  # activations of a block and layer that quantiles are taken of


@dataclass(frozen=True)
class Footprint:
    """How an item's set of features is made."""

    pooling: Pooling
    threshold: float
    top_n: int | None

    def of(self, codes: PooledCodes, d_sae: int) -> Footprints:
        return Footprints.from_codes(codes, d_sae, self.pooling, self.threshold, self.top_n)


@dataclass(frozen=True)
class Read:
    """One benchmark, or its random text, at all layers."""

    benchmark: Benchmark
    texts: TokenTexts | None
    """None: a feature store"""
    items: Ints
    """[N] places of the items that have a token that counts, among all"""
    footprints: dict[int, Footprints]
    """Layer -> N footprints"""
    facts: dict[int, TokenFacts]
    values: dict[int, Floats]
    """Layer -> a sample of the activations above 0, as the pooling gives them, for quantiles"""
    tokens: int

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class SAEFacts:
    """The SAE of one layer."""

    name: str
    d_sae: int
    k: int
    mismatch: str | None


@dataclass(frozen=True)
class Loaded:
    """What was read: everything that measuring needs."""

    encoder: Encoder | None
    """None: all benchmarks are feature stores, and no random text was asked for"""
    layers: tuple[int, ...]
    saes: dict[int, SAEFacts]
    benchmarks: tuple[Read, ...]
    null: tuple[Read, ...]
    """Random text in the place of each benchmark, or empty"""
    folder: Path


def load(config: "CoverageConfig", benchmarks: Sequence[Benchmark]) -> Loaded:
    """Read all benchmarks and, unless that is switched off, random text of the same tokens."""
    stores = [b for b in benchmarks if b.store is not None]
    encoder = None
    if len(stores) < len(benchmarks) or config.null or config.other_sae:
        encoder = load_encoder(encode_config(config))
    layers = encoder.layers if encoder is not None else _layers(config, stores[0])
    for benchmark in stores:
        _check_store(benchmark, layers, encoder, stores[0])
    folder = config.out / "texts"
    setting = Footprint(config.pooling, config.threshold, config.top_n)
    tokens = [_tokens(config, benchmark, encoder) for benchmark in benchmarks]
    total = len(benchmarks) * (1 + config.null)
    found = tuple(
        _read(benchmark, texts, encoder, layers, folder, setting, f"{benchmark.name} ({i} of {total})")
        for i, (benchmark, texts) in enumerate(zip(benchmarks, tokens, strict=True), 1)
    )
    null: tuple[Read, ...] = ()
    if config.null and encoder is not None:
        shuffled = random_text(_own_tokens(found, config.context_size), config.seed)
        null = tuple(
            _read(replace(b, store=None), texts, encoder, layers, folder, setting, f"random text ({i} of {total})")
            for i, (b, texts) in enumerate(zip(benchmarks, shuffled, strict=True), len(benchmarks) + 1)
        )
    return Loaded(encoder, layers, _saes(encoder, stores), found, null, folder)


def encode_config(config: "CoverageConfig") -> EncodeConfig:
    return EncodeConfig(
        text=(), model=config.model, sae=config.sae, layers=config.layers, k=config.k,
        context_size=config.context_size, bos=config.bos, precision=config.precision, dtype=config.dtype,
        device=config.device, batch_tokens=config.batch_tokens, allow_mismatch=config.allow_mismatch,
    )  # fmt: skip


def with_sae(config: "CoverageConfig", encoder: Encoder, name: str) -> Encoder:
    """The same model with another SAE at the same layers."""
    device = str(next(encoder.model.parameters()).device)
    saes = load_saes(replace(encode_config(config), sae=(name,), layers=encoder.layers), device)
    local = config.model is None or Path(config.model).exists()
    for layer, sae in saes.items():
        check_fit(encoder.model, encoder.model_name, encoder.model_sha256, local, layer, sae, config.allow_mismatch)
    return replace(encoder, saes=saes)


# --- reading ---------------------------------------------------------------------------------------------


def blocks(
    benchmark: Benchmark, texts: TokenTexts | None, encoder: Encoder | None, folder: Path | None, label: str
) -> Iterator[tuple[int, TextFeatures]]:
    """(number of its first item, features) of runs of items. What was read before comes from the folder."""
    if benchmark.store is not None:
        yield 0, store_features(benchmark.store)
        return
    assert texts is not None and encoder is not None
    ends = np.cumsum(texts.lengths)
    cuts = np.flatnonzero(np.diff(ends // BLOCK_TOKENS, prepend=0) > 0).tolist()
    for low, high in itertools.pairwise(sorted({0, *cuts, len(texts)})):
        yield low, read_features(encoder, texts.rows(np.arange(low, high)), folder, label=label)


def _read(
    benchmark: Benchmark,
    texts: TokenTexts | None,
    encoder: Encoder | None,
    layers: tuple[int, ...],
    folder: Path,
    setting: Footprint,
    label: str,
) -> Read:
    parts: dict[int, list[Footprints]] = {layer: [] for layer in layers}
    facts: dict[int, list[TokenFacts]] = {layer: [] for layer in layers}
    values: dict[int, list[Floats]] = {layer: [] for layer in layers}
    items, tokens = [], 0
    for first, features in blocks(benchmark, texts, encoder, folder, label):
        usable = np.flatnonzero(features.tokens > 0)
        items.append(first + usable)
        tokens += int(features.tokens.sum())
        for layer in layers:
            codes = features.codes(layer)
            parts[layer].append(setting.of(codes, features.d_sae(layer)).rows(usable))
            active = codes.values(setting.pooling)[0]
            active = active[active > 0]
            values[layer].append(active[:: 1 + len(active) // SAMPLE])
            facts[layer].append(features.facts[layer])
    found = np.concatenate(items)
    if not len(found):
        raise InputError(
            f"The benchmark {benchmark.name} ({benchmark.source}) is empty: no item has a token besides its first one "
            "and special tokens. Give longer items, or --bos, with which first tokens count."
        )
    return Read(
        benchmark, texts, found, {layer: Footprints.concatenate(parts[layer]) for layer in layers},
        {layer: total_facts(facts[layer]) for layer in layers},
        {layer: np.concatenate(values[layer]) for layer in layers}, tokens,
    )  # fmt: skip


def total_facts(facts: Sequence[TokenFacts]) -> TokenFacts:
    columns = zip(*((f.texts, f.tokens, f.kept, f.extreme, f.nan) for f in facts), strict=True)
    return TokenFacts(*map(sum, columns))


def _tokens(config: "CoverageConfig", benchmark: Benchmark, encoder: Encoder | None) -> TokenTexts | None:
    if benchmark.store is not None or encoder is None:
        return None
    texts = [item.text for item in benchmark.items]
    return tokenize_texts(encoder.tokenizer, texts, config.context_size, config.truncate)


# --- random text -----------------------------------------------------------------------------------------


def random_text(suites: Sequence[Sequence[npt.NDArray[np.int64]]], seed: int) -> list[TokenTexts]:
    """All tokens of all benchmarks, permuted and dealt out to texts of the same lengths.

    What is left of a benchmark is how often each token occurs in the suite, and how long its items are.
    """
    flat = [ids for items in suites for ids in items]
    tokens = np.random.default_rng(seed).permutation(np.concatenate(flat))
    ends = iter(np.cumsum([len(ids) for ids in flat]).tolist())
    dealt, start = [], 0
    for items in suites:
        texts = []
        for _ in items:
            end = next(ends)
            texts.append(tokens[start:end])
            start = end
        dealt.append(TokenTexts(tuple(texts), np.array([len(ids) for ids in texts], np.int64)))
    return dealt


def _own_tokens(found: Sequence[Read], context_size: int) -> list[list[npt.NDArray[np.int64]]]:
    return [
        list(read.texts.ids) if read.texts is not None else _stored_tokens(read.benchmark.store, context_size)
        for read in found
    ]


def _stored_tokens(store: FeatureStore | None, context_size: int) -> list[npt.NDArray[np.int64]]:
    """Of each document the first `context_size` tokens, so that the random text is one window."""
    assert store is not None
    document, token = store.column("doc"), store.column("token").astype(np.int64)
    bounds = np.searchsorted(document, np.arange(store.num_documents + 1)).tolist()
    return [token[low : min(high, low + context_size)] for low, high in itertools.pairwise(bounds)]


# --- what was read ---------------------------------------------------------------------------------------


def _layers(config: "CoverageConfig", benchmark: Benchmark) -> tuple[int, ...]:
    assert benchmark.store is not None
    return tuple(sorted(config.layers)) or benchmark.store.layers


def _check_store(benchmark: Benchmark, layers: tuple[int, ...], encoder: Encoder | None, first: Benchmark) -> None:
    """Refuse a store that lacks a layer, or was made by another model or SAE than the rest of the suite."""
    store, other = benchmark.store, first.store
    assert store is not None and other is not None
    absent = [layer for layer in layers if layer not in store.layers]
    if absent:
        raise InputError(
            f"The feature store {benchmark.source} has no layer {absent[0]}; it has "
            f"{', '.join(map(str, store.layers))}. Name layers that all benchmarks have with --layers."
        )
    model = encoder.model_sha256 if encoder else other.settings.model.sha256
    hashes = {
        layer: encoder.saes[layer].weight_hash() if encoder else other.settings.sae(layer).sha256 for layer in layers
    }
    wrong = [layer for layer in layers if store.settings.sae(layer).sha256 != hashes[layer]]
    if store.settings.model.sha256 != model or wrong:
        what = f"the SAE of layer {wrong[0]}" if wrong else "the model"
        advice = (
            "Name the store's own with --model and --sae, or give --no-null, with which no model is needed where all "
            "benchmarks are stores."
            if encoder
            else f"Encode both with the same ({first.source} differs)."
        )
        raise InputError(f"The feature store {benchmark.source} was written with other weights of {what}. {advice}")


def _saes(encoder: Encoder | None, stores: Sequence[Benchmark]) -> dict[int, SAEFacts]:
    if encoder is not None:
        return {
            layer: SAEFacts(
                sae.card.source or f"sha256 {sae.weight_hash()[:12]}", sae.d_sae, sae.k, encoder.mismatches.get(layer)
            )
            for layer, sae in encoder.saes.items()
        }
    store = stores[0].store
    assert store is not None
    known = {layer: store.settings.sae(layer) for layer in store.layers}
    return {n: SAEFacts(s.source or f"sha256 {s.sha256[:12]}", s.d_sae, s.k, s.mismatch) for n, s in known.items()}
