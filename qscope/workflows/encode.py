"""Text to sparse features: tokens -> model -> residuals -> SAEs -> a feature store on disk."""

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qscope._version import __version__
from qscope.activation_store import ActivationRecord, ActivationWriter
from qscope.data import (
    ReadCounts,
    TextOptions,
    TextShard,
    Windows,
    find_sources,
    places_of,
    read_pieces,
    text_shards,
    tokenize,
)
from qscope.errors import InputError, StoreError
from qscope.model import residual_width
from qscope.store_format import ModelIdentity, SAEIdentity, ShardRecord, StoreSettings
from qscope.store_format import TextOptions as StoredTextOptions
from qscope.store_packing import shard_arrays
from qscope.store_writer import StoreWriter
from qscope.workflows.encoder import Encoded, Encoder, load_encoder


@dataclass(frozen=True)
class EncodeConfig:
    """Encode text into SAE features. Killed and started again with the same options, it goes on where it was.

    Example: qscope encode corpus.jsonl --out codes --max-tokens 1000000
    """

    text: tuple[str, ...]
    """Files (.txt, .md, .jsonl, .jsonl.gz, .parquet), folders of them, or - for standard input."""
    out: Path = Path("codes")
    """Folder of the feature store; made, or continued if it was begun with the same options."""
    features: bool = True
    """--no-features writes only the --activations of the --layers; no SAE is needed."""
    activations: Path | None = None
    """Folder to write the residuals of the layers to as well, to train SAEs from. Host memory: one shard of them."""
    activations_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of stored residuals; auto is the model's. A float16 shard that would make one infinite is kept in float32."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer. Default: the embedded."""
    layers: tuple[int, ...] = ()
    """Decoder blocks whose output is encoded, from 0. Default: the layer that the SAE was made for."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    field: str = "text"
    """Field of JSON Lines or Parquet that holds the text."""
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    """txt, jsonl or parquet, for input whose name does not tell."""
    max_tokens: int | None = None
    """Stop after this many tokens."""
    context_size: int = 512
    """Tokens that the model sees at once; a longer document is cut into windows of this size."""
    bos: bool = False
    """Put the tokenizer's BOS token before every window; its own features are not stored."""
    precision: Literal["exact", "bf16"] = "exact"
    """exact: top-k of the float32 pre-activations; bf16: of a bfloat16 product, faster where that is native."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model: bfloat16, float16, float32, or auto (bfloat16 where the device computes in it)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    batch_tokens: int | None = None
    """Tokens per forward pass, padding included. Default: 1024 on a CPU, 8192 on a GPU."""
    shard_bytes: int = 1 << 18
    """Bytes of text per shard of the store: a killed run loses at most one shard's work."""
    strict: bool = False
    """Refuse invalid UTF-8, unusable rows and NaN activations instead of counting them."""
    allow_mismatch: bool = False
    """Encode although the SAE was made for another model or layer; the store records that."""

    def __post_init__(self) -> None:
        if self.model == "":
            raise InputError("--model is empty. Name a Hugging Face model, or leave --model out for the embedded one.")
        if not self.features and (self.activations is None or not self.layers or self.sae):
            raise InputError(
                "--no-features was given, which writes activations only. Say where with --activations and of which "
                "blocks with --layers, and leave --sae out."
            )
        if self.activations is not None and self.features and self.activations.resolve() == self.out.resolve():
            raise InputError(f"--activations and --out are both {self.out}. Give each a folder of its own.")
        for name in ("context_size", "batch_tokens", "shard_bytes", "max_tokens", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class EncodeResult:
    """What a run did: `run_*`, `seconds` (per stage) and `tokens_per_second` of this run, the rest of the store."""

    store: str | None
    """Of the features; None with --no-features."""
    tokens: int
    documents: int
    shards: int
    counts: dict[str, int]
    layers: dict[str, dict[str, float | None]]
    resumed_shards: int
    run_tokens: int
    run_seconds: float
    tokens_per_second: float
    seconds: dict[str, float]
    activations: str | None = None


class Clock:
    """Seconds spent per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def run(config: EncodeConfig) -> EncodeResult:
    """Encode `config.text` into `config.out`. Raises QscopeError for everything that a user can mend."""
    options = TextOptions(config.format, config.field, config.strict)
    sources = find_sources(config.text, options)
    counts = ReadCounts()
    shards = text_shards(read_pieces(sources, options, counts), config.shard_bytes)
    first = next(shards, None)
    if first is None:
        raise InputError(
            f"{', '.join(config.text)} holds no text: {counts.documents} documents, {counts.empty} of them empty, "
            f"{counts.skipped} unusable. Give text that is not empty; for another field than {config.field!r}, --field."
        )
    clock = Clock()
    with clock("load"):
        encoder = load_encoder(config)
    with ExitStack() as stack:
        writers = open_writers(config, encoder, sources)
        for writer in writers:
            stack.enter_context(writer)
            if writer.repaired:
                print(f"qscope: {writer.repaired}; encoding again from there", file=sys.stderr)
            if isinstance(writer, StoreWriter):
                writer.save_tokenizer(encoder.tokenizer)
        job = Job(config, encoder, writers, clock, counts)
        start = time.perf_counter()
        with progress(config, sources) as bar:
            job.encode_all(itertools.chain([first], shards), bar)
        for writer in writers:
            writer.complete(job.totals())
        return job.result(time.perf_counter() - start)


Writer: TypeAlias = StoreWriter | ActivationWriter
Record: TypeAlias = ShardRecord | ActivationRecord


def open_writers(config: EncodeConfig, encoder: Encoder, sources: list[Path]) -> list[Writer]:
    """The stores to write; the first one's records say how far the run has come."""
    writers: list[Writer] = []
    try:
        if config.features:
            writers.append(StoreWriter.open(config.out, store_settings(config, encoder, sources), repair=True))
        if config.activations is not None:
            settings = activation_settings(config, encoder, sources)
            writers.append(ActivationWriter.open(config.activations, settings, repair=True))
    except BaseException:
        for writer in writers:
            writer.close()
        raise
    return writers


def store_settings(config: EncodeConfig, encoder: Encoder, sources: list[Path]) -> StoreSettings:
    """Everything that the stored features depend on, besides the text itself (which each shard's key covers)."""
    return StoreSettings(
        qscope_version=__version__,
        model=ModelIdentity(name=encoder.model_name, sha256=encoder.model_sha256),
        tokenizer_sha256=encoder.tokenizer_sha256,
        versions={name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        device=encoder.device,
        saes=[
            SAEIdentity(
                layer=layer,
                sha256=sae.weight_hash(),
                d_sae=sae.d_sae,
                k=sae.k,
                source=sae.card.source,
                mismatch=encoder.mismatches[layer],
            )
            for layer, sae in sorted(encoder.saes.items())
        ],
        dtype=encoder.dtype,
        precision=config.precision,
        context_size=config.context_size,
        bos=config.bos,
        batch_tokens=encoder.batch_tokens,
        max_tokens=config.max_tokens,
        shard_bytes=config.shard_bytes,
        text=StoredTextOptions(field=config.field, format=config.format, strict=config.strict),
        sources=[path.name for path in sources],
    )


def activation_settings(config: EncodeConfig, encoder: Encoder, sources: list[Path]) -> dict[str, Any]:
    """Everything that the stored activations depend on, besides the text itself."""
    width = residual_width(encoder.model)
    return {
        "qscope_version": __version__,
        "model": {"name": encoder.model_name, "sha256": encoder.model_sha256},
        "tokenizer_sha256": encoder.tokenizer_sha256,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        "device": encoder.device,
        "layers": list(encoder.layers),
        "widths": {str(layer): width for layer in encoder.layers},
        "model_dtype": encoder.dtype,
        "dtype": encoder.dtype if config.activations_dtype == "auto" else config.activations_dtype,
        "context_size": config.context_size,
        "bos": config.bos,
        "batch_tokens": encoder.batch_tokens,
        "max_tokens": config.max_tokens,
        "shard_bytes": config.shard_bytes,
        "text": {"field": config.field, "format": config.format, "strict": config.strict},
        "sources": [path.name for path in sources],
    }


class Job:
    """One run over one store, or two: what is finished is checked and skipped, the rest is encoded."""

    def __init__(
        self, config: EncodeConfig, encoder: Encoder, writers: list[Writer], clock: Clock, counts: ReadCounts
    ) -> None:
        self.config, self.encoder, self.writers, self.clock, self.counts = config, encoder, writers, clock, counts
        self.records: list[list[Record]] = [list(writer.finished) for writer in writers]
        """Per store."""
        self.tokens = self.run_tokens = self.resumed = 0
        self.cut = False
        self.carry = (0, 0)
        """Document in which the next shard begins and how many of its tokens are stored: a long one may span shards."""

    def encode_all(self, shards: Iterator[TextShard], bar: Any) -> None:
        count = 0
        for shard in shards:
            found = [self.finished(which, shard) for which in range(len(self.writers))]
            if None in found:
                record = self.encode_shard(shard, bar)
            else:
                record = self.records[0][shard.index]
                self.resumed += 1
                bar.skip(record.tokens)
            self.tokens += record.tokens
            document, position = record.meta["carry"]
            self.carry = (document, position)
            count = shard.index + 1
            self.cut = self.config.max_tokens is not None and self.tokens >= self.config.max_tokens
            if self.cut:
                break
            bar.expect(shard)
        for which in range(len(self.writers)):
            self.drop_from(which, count)

    def finished(self, which: int, shard: TextShard) -> Record | None:
        """The shard's record in one store, if it was finished from the same text with the same settings."""
        writer, records = self.writers[which], self.records[which]
        if shard.index >= len(records):
            return None
        if records[shard.index].key == self.shard_key(writer, shard):
            return records[shard.index]
        if shard.index == 0:
            what = "activations" if isinstance(writer, ActivationWriter) else "features"
            raise StoreError(
                f"{writer.path} holds the {what} of other text. Give a new folder, or delete this one first."
            )
        print(f"qscope: the text of shard {shard.index} changed; encoding again from there", file=sys.stderr)
        self.drop_from(which, shard.index)
        return None

    def drop_from(self, which: int, index: int) -> None:
        self.writers[which].truncate_from(index)
        del self.records[which][index:]

    def shard_key(self, writer: Writer, shard: TextShard) -> str:
        """sha256 over the settings, the shard's text, and what came before it that matters."""
        parts = [writer.settings_key, shard.key(), shard.index, self.carry]
        if self.config.max_tokens is not None:
            parts.append(self.tokens)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode_shard(self, shard: TextShard, bar: Any) -> Record:
        left = None if self.config.max_tokens is None else self.config.max_tokens - self.tokens
        with self.clock("tokenize"):
            windows = tokenize(self.encoder.tokenizer, shard.pieces, self.config.context_size, self.carry, left)
        keep = self.config.activations is not None
        encoded = self.encoder.encode(windows, self.clock, bar, keep_residuals=keep)
        count = len(windows.token)
        carry = (int(windows.document[-1]), int(windows.position[-1]) + 1) if count else self.carry
        with self.clock("write"):
            for writer, records in zip(self.writers, self.records, strict=True):
                record = self.write(writer, shard, windows, encoded, carry)
                if shard.index == len(records):
                    records.append(record)
        self.run_tokens += count
        return self.records[0][shard.index]

    def write(
        self, writer: Writer, shard: TextShard, windows: Windows, encoded: Encoded, carry: tuple[int, int]
    ) -> Record:
        """The shard into one store; one that has it already keeps what it has."""
        key = self.shard_key(writer, shard)
        if isinstance(writer, ActivationWriter):
            columns = {"doc": windows.document, "position": windows.position, "token": windows.token}
            columns["place"] = places_of(windows) + self.config.bos
            return writer.add(shard.index, key, columns, encoded.residuals, {"carry": carry})
        layers = encoded.layers
        fit = {str(n): [found.squared_error, found.squared_deviation] for n, found in layers.items()}
        packed = {layer: found.packed for layer, found in layers.items()}
        arrays = shard_arrays(windows.document, windows.position, windows.token, packed)
        return writer.add(shard.index, key, arrays, {"carry": carry, "fit": fit})

    def totals(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "shards": len(self.records[0]), "rows": self.rows()}

    def rows(self) -> dict[str, int]:
        """What became of the input rows. A run that stopped at `max_tokens` has read ahead: only rows that it used."""
        if not self.cut:
            return self.counts.as_dict()
        last = self.records[0][-1].last_doc
        return {"documents": 0 if last is None else last + 1}

    def result(self, seconds: float) -> EncodeResult:
        return EncodeResult(
            store=str(self.config.out) if self.config.features else None,
            tokens=self.tokens,
            documents=self.rows()["documents"],
            shards=len(self.records[0]),
            counts=self.rows(),
            layers={str(layer): summarise(self.feature_records(), layer) for layer in sorted(self.encoder.saes)},
            resumed_shards=self.resumed,
            run_tokens=self.run_tokens,
            run_seconds=round(seconds, 3),
            tokens_per_second=round(self.run_tokens / seconds, 1),
            seconds={stage: round(value, 3) for stage, value in self.clock.seconds.items()},
            activations=None if self.config.activations is None else str(self.config.activations),
        )

    def feature_records(self) -> list[ShardRecord]:
        return [record for record in self.records[0] if isinstance(record, ShardRecord)]


def summarise(finished: list[ShardRecord], layer: int) -> dict[str, float | None]:
    """Sums over shards of one layer; `fvu` = squared error over variance on each shard's sample of tokens."""
    records = [record.layers[layer] for record in finished]
    error, variance = (sum(record.meta["fit"][str(layer)][i] for record in finished) for i in (0, 1))
    return {
        "nnz": sum(record.nnz for record in records),
        "nan_rows": sum(record.nan_rows for record in records),
        "extreme_rows": sum(record.extreme_rows for record in records),
        "fvu": error / variance if variance else None,
    }


# --- progress --------------------------------------------------------------------------------------------


class Bar:
    """Tokens done, tokens per second and, where the amount of text is known, the time that is left."""

    def __init__(self, bar: Any, total_bytes: int | None) -> None:
        self.bar, self.total_bytes, self.bytes = bar, total_bytes, 0

    def update(self, tokens: int) -> None:
        self.bar.update(tokens)

    def skip(self, tokens: int) -> None:
        """Tokens of an earlier run: they count, and not as speed."""
        self.bar.initial += tokens
        self.bar.n += tokens

    def expect(self, shard: TextShard) -> None:
        """After a shard: the rest of the text is taken to hold as many tokens per byte as what was read."""
        if self.total_bytes is None:
            return
        self.bytes += sum(len(piece.text.encode()) for piece in shard.pieces)
        self.bar.total = max(self.bar.n, round(self.bar.n * self.total_bytes / max(1, self.bytes)))


@contextmanager
def progress(config: EncodeConfig, sources: list[Path]) -> Iterator[Bar]:
    from tqdm import tqdm

    plain = all(path.suffix in (".txt", ".md", ".jsonl") for path in sources)
    size = sum(path.stat().st_size for path in sources) if plain and config.max_tokens is None else None
    bar = tqdm(
        total=config.max_tokens,
        unit="tok",
        unit_scale=True,
        desc="encode",
        dynamic_ncols=True,
        mininterval=0.5,
    )
    with bar:
        yield Bar(bar, size)
