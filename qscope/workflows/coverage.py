"""Benchmarks seen through features: what each covers, how much it repeats itself, what it shares with the others.

The model runs once over every item, for all layers; measures are closed forms over the sets of features that items fire
(`qscope.coverage`). Formulas, sources and the meaning of every column: docs/coverage.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from qscope.errors import InputError
from qscope.files import acquire_lock, storage_error
from qscope.finding.pooled import Pooling
from qscope.workflows.coverage_inputs import gather
from qscope.workflows.coverage_measure import measure
from qscope.workflows.coverage_performance import read
from qscope.workflows.coverage_read import load
from qscope.workflows.coverage_result import CoverageResult
from qscope.workflows.coverage_tables import write_tables
from qscope.workflows.text_features import Truncate


@dataclass(frozen=True)
class CoverageConfig:
    """Compare benchmarks by the SAE features that their items fire: redundancy, overlap, what each adds to the suite.

    Example: qscope coverage gsm8k.jsonl math=hendrycks.jsonl --field question --layers 7 15 23 --out coverage
    """

    benchmarks: tuple[str, ...]
    """Files (.jsonl, .jsonl.gz, .csv, .parquet) with a row per item, or feature stores with a document per item; as
    PATH or NAME=PATH."""
    out: Path = Path("coverage")
    """Folder for everything: coverage.html, coverage.json, tables, texts/ (what was read, so that the same command goes
    on where one was stopped)."""
    html: bool = True
    """--no-html: tables only."""
    field: str = "prompt"
    """Field that holds the item as the model reads it."""
    template: str | None = None
    """Instead: text with field names in braces, such as "Question: {question}\\n{choices}\\nAnswer:"."""
    field_of: tuple[str, ...] = ()
    """NAME=FIELD for benchmarks with another field."""
    template_of: tuple[str, ...] = ()
    """NAME=TEMPLATE for benchmarks with a template of their own."""
    prefix_file: Path | None = None
    """Text in front of every item, such as few-shot examples."""
    answer_field: str | None = None
    """Put this field behind every item, after a space unless one is there. Default: items end where the answer would
    begin."""
    drop_duplicates: bool = False
    """Keep one of the items of a benchmark with the same text; they are counted either way."""
    max_items: int | None = None
    """Of each file, at most so many items, chosen by a hash of their text and the seed."""
    truncate: Truncate = "left"
    """Where items longer than the context are cut: left keeps the end, which the last token needs; right the start."""
    pooling: Pooling = "last"
    """A feature counts for an item if it is active at the last token, at any token, or in the mean over tokens."""
    threshold: float = 0.0
    """Activations (their mean, with --pooling mean) above this count."""
    top_n: int | None = None
    """Only the strongest features of each item count. Default: all of the active ones."""
    layers: tuple[int, ...] = ()
    """Decoder blocks, from 0; all in one run of the model. Default: the layer that the SAE was made for."""
    match_items: int | None = None
    """Items at which benchmarks are compared at equal size. Default: half of the smallest benchmark's, the most for
    which there are intervals."""
    null: bool = True
    """--no-null: do not read the random text of the same tokens and lengths, which costs as much as the items do."""
    control: str | None = None
    """Benchmark whose scores are held fixed in the partial correlations of --scores."""
    scores: Path | None = None
    """Table with a row per model and a column per benchmark (first column: the model)."""
    item_scores: tuple[str, ...] = ()
    """NAME=TABLE with a row per row of the benchmark and a column per model, for its performance redundancy."""
    subset: float = 0.9
    """Find the smallest subset of each benchmark that keeps this share of its features."""
    sensitivity: bool = False
    """Also with other poolings, thresholds and top n, and between layers: how far the rankings move."""
    other_sae: tuple[str, ...] = ()
    """Further SAEs for the same layers, compared in the sensitivity table; each runs the model once more. Not with
    feature stores."""
    exclusive: int = 8
    """Features listed for each benchmark as most exclusive to it."""
    resamples: int = 200
    """Half-samples of the items behind intervals; 0: none."""
    permutations: int = 99
    """Of the items of each pair of benchmarks, behind the p-value of one population; 0: none."""
    seed: int = 0
    """Of samples, random text and replicates."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer. Default: the embedded."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    context_size: int = 512
    """Tokens read of each item."""
    bos: bool = False
    """Put the tokenizer's BOS token before every item."""
    precision: Literal["exact", "bf16"] = "exact"
    """Of the features."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    batch_tokens: int | None = None
    """Tokens per forward pass, padding included. Default: 1024 on a CPU, 8192 on a GPU."""
    allow_mismatch: bool = False
    """Go on although the SAE was made for another model or layer."""

    def __post_init__(self) -> None:
        if not self.benchmarks:
            raise InputError(
                "No benchmark was given. Name files (.jsonl, .jsonl.gz, .csv, .parquet) or feature stores."
            )
        least = {"max_items": 1, "top_n": 1, "match_items": 1, "exclusive": 0, "resamples": 0, "permutations": 0}
        least |= {"context_size": 2, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}.")
        if not 0 < self.subset <= 1:
            raise InputError(f"--subset is {self.subset}; a share above 0 and up to 1 is accepted.")
        if not (np.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"--threshold is {self.threshold}; a finite number from 0 on is accepted.")
        if self.control is not None and self.scores is None:
            raise InputError("--control was given without --scores, whose correlations it is for. Give both.")


def run(config: CoverageConfig) -> CoverageResult:
    """Read the benchmarks, measure them, and write the tables. Raises QscopeError for what a user can mend.

    A second run in the same folder is refused as long as the first one is at work.
    """
    benchmarks = gather(config)
    scored = read(config, benchmarks)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, config.out) from error
    lock = acquire_lock(config.out)
    try:
        return write_tables(*measure(config, load(config, benchmarks), scored))
    finally:
        lock.release()
