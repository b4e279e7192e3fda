"""What a run of `qscope synthesize` starts from: model, targets, seed, pool, sources, journal."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qscope import detectors
from qscope.classification.rule import Rule
from qscope.classification.rule_file import load_rule
from qscope.detectors import Detector, yes_or_no
from qscope.endpoint import JUDGE_MODEL, Endpoint, ask
from qscope.errors import InputError
from qscope.explaining.journal import Explanation, load_explanations
from qscope.explaining.local_model import LocalModel
from qscope.model import load_model
from qscope.synthesis import targets as chosen
from qscope.synthesis import templates
from qscope.synthesis.journal import BatchJournal
from qscope.synthesis.sampling import LocalText, Sampling
from qscope.synthesis.sources import (
    NAMES,
    ChatSource,
    ContinueSource,
    EndpointSource,
    FunctionSource,
    Source,
    SteeredSource,
)
from qscope.synthesis.targets import Target
from qscope.workflows.classify_rules import ModelOptions, encoder_for
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, load_encoder
from qscope.workflows.synthesize_loop import Loop, Settings
from qscope.workflows.synthesize_read import Reader, Readings, read_texts

if TYPE_CHECKING:
    from qscope.workflows.synthesize import SynthesizeConfig

_FREE = {"out", "device", "batch_tokens", "timeout"}  # options that may differ when a run goes on
_FORM = "Answer with one word, yes or no."
_ANSWER_TOKENS = 128


@dataclass(frozen=True)
class Prepared:
    """All that the loop and the report need."""

    encoder: Encoder
    loop: Loop
    seed_texts: tuple[str, ...]
    seed: Readings
    pool_texts: tuple[str, ...]
    pool: Readings | None
    endpoint: Endpoint | None
    notes: tuple[str, ...]


@contextmanager
def prepare(config: "SynthesizeConfig") -> Iterator[Prepared]:
    """Read and check everything; the journal is open, and locked, inside the with-block."""
    seed_texts = read_texts(config.texts, config.text_field)
    pool_texts = [t for t in read_texts(config.pool, config.text_field, config.max_pool) if t not in set(seed_texts)]
    words = templates.load(config.templates)
    for style in config.adversarial:
        words.fill("adversarial", style=style)
    rule = load_rule(config.rule) if config.rule is not None else None
    encoder = _encoder(config, rule)
    targets = _targets(config, rule, encoder)
    source = rule.source if rule is not None else None
    context_size = source.context_size if source else config.context_size
    reader = Reader(encoder, targets, context_size, source.truncate if source else config.truncate)
    sources, writer, endpoint = _sources(config, encoder)
    options = _options(config, encoder, targets, seed_texts, pool_texts)
    with BatchJournal(config.out, options) as journal:
        cache = config.out / "texts"
        seed = reader.read(seed_texts, "seed", cache)
        pool = reader.read(pool_texts, "pool", cache) if pool_texts else None
        if pool is not None:
            reader = replace(reader, targets=reader.with_passages(pool_texts, pool.values, config.contexts))
        known = list(dict.fromkeys([*seed_texts, *(p for t in reader.targets for p in t.contexts)]))
        fires = pool.fires if pool is not None else np.zeros((0, len(targets)), np.bool_)
        loop = Loop(
            reader, sources, writer, words, _settings(config), journal, known,
            [_short(text) for text in pool_texts], fires,
        )  # fmt: skip
        notes = _notes(config, reader.targets, seed, pool)
        yield Prepared(encoder, loop, tuple(seed_texts), seed, tuple(pool_texts), pool, endpoint, notes)


def _short(text: str, most: int = 160) -> str:
    """On one line, about as long as a passage around a token."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0]


def _settings(config: "SynthesizeConfig") -> Settings:
    return Settings(
        config.budget, config.support, config.retries, config.batch, config.shots, config.adversarial,
        config.responses, config.refuse, config.about, config.seed, config.same_text, config.same_features,
    )  # fmt: skip


# --- model and targets -----------------------------------------------------------------------------------


def _encoder(config: "SynthesizeConfig", rule: Rule | None) -> Encoder:
    if rule is not None:
        dtype = config.dtype if config.dtype != "auto" else "rule"
        return encoder_for(rule, ModelOptions(config.model, config.sae, dtype, config.device, config.batch_tokens))
    layers = config.layers or tuple(
        sorted({t.layer for t in chosen.listed(config.features)} if config.features else ())
    )
    return load_encoder(
        EncodeConfig(
            text=(), model=config.model, sae=config.sae, layers=layers, k=config.k, context_size=config.context_size,
            bos=config.bos, precision=config.precision, dtype=config.dtype, device=config.device,
            batch_tokens=config.batch_tokens, allow_mismatch=config.allow_mismatch,
        )
    )  # fmt: skip


def _targets(config: "SynthesizeConfig", rule: Rule | None, encoder: Encoder) -> tuple[Target, ...]:
    found: list[Target] = []
    if config.features:
        found += chosen.listed(config.features, label=config.label)
    if rule is not None:
        found += chosen.from_rule(rule, config.rule_thresholds, config.label)
    known: dict[tuple[int, int], Explanation] = {}
    if config.explanations is not None:
        hashes = {layer: sae.weight_hash() for layer, sae in encoder.saes.items()}
        known = load_explanations(config.explanations, hashes)
    if config.relevance is not None:
        texts = {key: one.text for key, one in known.items()}
        found += chosen.relevant(texts, _judge(config, encoder), config.least_relevance, config.label)
    targets = chosen.explained(chosen.distinct(found), {key: one.text for key, one in known.items()})
    return tuple(_with_explanation(t, known.get(t.key), config.contexts) for t in targets)


def _with_explanation(target: Target, one: Explanation | None, most: int) -> Target:
    if one is None or target.contexts:
        return target
    plain = [" ".join(p.text.replace("<<", "").replace(">>", "").split()) for p in one.passages[:most]]
    return replace(target, contexts=tuple(p for p in plain if p), scale=target.scale or one.largest)


def _judge(config: "SynthesizeConfig", encoder: Encoder) -> Detector:
    """Of --relevance. `local:QUESTION` puts the question to the local model."""
    wanted = config.relevance or ""
    kind, _, question = wanted.partition(":")
    if kind != "local":
        return detectors.parse(wanted)
    local = LocalModel(encoder.model, encoder.tokenizer, encoder.model_name)
    asked = "You judge the explanation of a feature. Question: {}\n\nThe explanation: {}\n\n" + _FORM
    return Detector(wanted, lambda text, _: ask(local, asked.format(question, text), yes_or_no, _FORM, max_tokens=8))


# --- sources ---------------------------------------------------------------------------------------------


def _sources(config: "SynthesizeConfig", encoder: Encoder) -> tuple[tuple[Source, ...], Source | None, Endpoint | None]:
    """(sources, who answers, the endpoint where there is one)."""
    sampling = config.sampling()
    own = LocalText(encoder.model, encoder.tokenizer, encoder.model_name)
    local = own
    if config.generator is not None:
        local = LocalText(*load_model(config.generator, device=config.device, dtype=config.dtype), config.generator)
    endpoint = None
    if "endpoint" in config.sources:
        endpoint = Endpoint.from_environment(
            "The source endpoint", timeout=config.timeout, temperature=config.temperature
        )
    found: list[Source] = []
    for name in config.sources:
        if name == "chat":
            local.asked("")  # a tokenizer without a chat template is refused now
            found.append(ChatSource(local, sampling))
        elif name == "continue":
            found.append(ContinueSource(local, sampling))
        elif name == "steered":
            found.append(SteeredSource(own, sampling, encoder.saes, config.steer_strength))
        elif name == "endpoint" and endpoint is not None:
            found.append(EndpointSource(endpoint, sampling))
        elif name.startswith("python:"):
            found.append(FunctionSource.load(name))
        else:
            raise InputError(f"The source {name!r} was given. Accepted: {', '.join(NAMES)}.")
    asking = [source for source in found if source.asks]
    if (config.adversarial or config.responses) and not asking:
        raise InputError(
            f"--adversarial and --responses need a source that can be asked, and --sources are "
            f"{' '.join(config.sources)}. Add chat, endpoint or python:module:function."
        )
    return tuple(found), _writer(asking[0], sampling) if config.responses else None, endpoint


def _writer(source: Source, sampling: Sampling) -> Source:
    """The same with room for an answer of several lines."""
    longer = replace(sampling, max_new_tokens=max(_ANSWER_TOKENS, sampling.max_new_tokens))
    if isinstance(source, ChatSource | EndpointSource):
        return replace(source, sampling=longer, one_line=False)
    return source


# --- what the run is -------------------------------------------------------------------------------------


def _options(
    config: "SynthesizeConfig", encoder: Encoder, targets: Sequence[Target], seed: Sequence[str], pool: Sequence[str]
) -> dict[str, Any]:
    said = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return {
        name: str(value) if not isinstance(value, list | tuple) else list(value) for name, value in said.items()
    } | {
        "model_sha256": encoder.model_sha256,
        "sae_sha256": {str(layer): sae.weight_hash() for layer, sae in encoder.saes.items()},
        "targets": [f"{t.name} {t.threshold:g}" for t in targets],
        "texts_sha256": _digest(seed),
        "pool_sha256": _digest(pool),
        "endpoint_model": os.environ.get(JUDGE_MODEL, "") if "endpoint" in config.sources else "",
    }


def _digest(texts: Sequence[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "replace") + b"\0")
    return found.hexdigest()


def _notes(
    config: "SynthesizeConfig", targets: Sequence[Target], seed: Readings, pool: Readings | None
) -> tuple[str, ...]:
    found = []
    bare = sum(not t.contexts for t in targets)
    if bare:
        where = "no --pool was given" if pool is None else "no text of the pool fires them"
        found.append(
            f"{bare} of {len(targets)} targets have no passage ({where}); `continue` has nothing to go on for them"
        )
    if len(seed.values) and not (seed.fires.sum(axis=0) < config.support).any():
        found.append(f"at least {config.support} seed texts fire every target: nothing is missing")
    return tuple(found)
