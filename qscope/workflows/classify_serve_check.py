"""What a rule costs when it is served: the model to the deepest layer, alone and with the exported rule behind it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from qscope.classification import RuleModule, load_rule
from qscope.data import Windows, batches
from qscope.errors import InputError
from qscope.finding.pooled import Ints
from qscope.model import residuals
from qscope.workflows.classify_predict import read_items
from qscope.workflows.classify_read import counted
from qscope.workflows.classify_rules import Classifier, Dtype, ModelOptions, decisions, differs, of_rules
from qscope.workflows.classify_rules import said_of as described
from qscope.workflows.text_features import TokenTexts, windows_of

BAR = 0.10
"""Share of the model's own time that a rule may cost"""


@dataclass(frozen=True)
class ClassifyServeCheckConfig:
    """Export a rule as a small torch module and measure it beside the model's own forward pass.

    Example: qscope classify serve-check rule.json comments.jsonl --export rule.safetensors
    """

    rule: Path
    """Rule file of `qscope classify fit --membership preact`; TopK membership needs the whole SAE."""
    texts: tuple[str, ...]
    """Files of texts to measure with: .jsonl, .jsonl.gz, .csv or .parquet."""
    text_field: str = "text"
    """Field that holds the text, or a template such as "{title} {body}"."""
    max_tokens: int = 8192
    """Tokens of the texts to use."""
    rounds: int = 5
    """Times that model and model with rule are measured, turn about."""
    export: Path | None = None
    """Keep the exported module in this file (.safetensors)."""
    model: str | None = None
    """Where the rule's model is found. Default: as the rule says."""
    sae: tuple[str, ...] = ()
    """Where its SAEs are found: one name for all its layers, or one per layer. Default: as the rule says."""
    dtype: Dtype = "rule"
    """Of the model; rule: that of fitting."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    batch_tokens: int | None = None
    """Tokens per forward pass, padding included. Default: 1024 on a CPU, 8192 on a GPU."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "rounds", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class ServeCheckResult:
    model: str
    about: dict[str, str]
    notes: tuple[str, ...]
    deepest: int
    """Layer at which the model stops"""
    texts: int
    tokens: int
    rounds: int
    model_tokens_per_second: float
    """Median over the rounds"""
    rule_tokens_per_second: float
    """Model and rule"""
    cost: float
    """Median over the rounds of (model and rule - model) / model"""
    bar: float
    agreeing: int
    """Texts that the exported module and `qscope classify predict` decide alike"""
    exported_bytes: int
    exported: Path | None

    @property
    def within(self) -> bool:
        return self.cost <= self.bar

    @property
    def exit_status(self) -> int:
        return 0 if self.within and self.agreeing == self.texts else 1


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    """[B, S], with the BOS where the rule has one"""
    mask: Tensor
    """[B, S] tokens that count"""
    rows: np.ndarray
    """[B] windows"""


def run(config: ClassifyServeCheckConfig) -> ServeCheckResult:
    """Measure. Raises QscopeError for what a user can mend."""
    rule = load_rule(config.rule)
    rule.check_membership("preact")
    items, _ = read_items(config.texts, config.text_field, ())
    options = ModelOptions(config.model, config.sae, config.dtype, config.device, config.batch_tokens)
    classifier = Classifier.load(rule, options)
    encoder = classifier.encoder
    tokens = classifier.tokenize([item.text for item in items])
    most = int(np.searchsorted(np.cumsum(tokens.lengths), config.max_tokens)) + 1
    tokens = tokens.rows(np.flatnonzero(tokens.lengths[:most] > 0))
    if not len(tokens):
        raise InputError("The texts hold no token to measure with. Give other texts.")
    module, size, notes = _exported(config, classifier)
    alone, served, decided = serving(classifier, module, tokens)
    pairs = _measure(alone, served, config.rounds)
    block = classifier.read(tokens)
    values = [part.values(block.codes, "preact") for part in of_rules(rule)]
    agreeing = int((decided == decisions(rule, values)).sum())
    count = int(tokens.lengths.sum())
    return ServeCheckResult(
        model=encoder.model_name,
        about={
            **described(rule, encoder),
            "exported": f"{size:,} bytes",
            "texts": f"{len(tokens):,} ({count:,} tokens)",
        },
        notes=(*differs(rule, encoder), *notes),
        deepest=rule.layers[-1],
        texts=len(tokens),
        tokens=count,
        rounds=config.rounds,
        model_tokens_per_second=count / statistics.median(left for left, _ in pairs),
        rule_tokens_per_second=count / statistics.median(right for _, right in pairs),
        cost=statistics.median(right / left - 1 for left, right in pairs),
        bar=BAR,
        agreeing=agreeing,
        exported_bytes=size,
        exported=config.export,
    )


def serving(
    classifier: Classifier, module: RuleModule, texts: TokenTexts
) -> tuple[Callable[[], None], Callable[[], None], Ints]:
    """(the model alone over the texts, the model with the module behind it, what that decides: [T], filled by it).

    texts: T, each with at least one token, as only those have a place in a batch.
    """
    model, layers, windows = classifier.encoder.model, classifier.rule.layers, windows_of(texts)
    batched, decided = _batches(classifier, windows), np.zeros(len(texts), np.int64)

    def alone() -> None:
        for batch in batched:
            residuals(model, batch.ids, layers[-1:])

    def served() -> None:
        for batch in batched:
            found = residuals(model, batch.ids, layers)
            mask = batch.mask
            for layer, limit in classifier.limits.items():  # attention sinks do not count
                mask = mask & (torch.linalg.vector_norm(found[layer], dim=-1, dtype=torch.float32) <= limit)
            decided[batch.rows] = module(found, mask).decisions.long().cpu().numpy()

    return alone, served, decided


def _exported(config: ClassifyServeCheckConfig, classifier: Classifier) -> tuple[RuleModule, int, tuple[str, ...]]:
    """The rule as it comes back from a file, the file's size, and what to note."""
    made = RuleModule.from_saes(classifier.rule, classifier.encoder.saes, check=False)  # checked when it was loaded
    device = next(classifier.encoder.model.parameters()).device
    with TemporaryDirectory() as scratch:
        path = made.save(config.export or Path(scratch) / "rule.safetensors")
        size = path.stat().st_size
        module = RuleModule.load(path, device)
    unlimited = () if classifier.limits else ("the rule names no residual norm to tell attention sinks by",)
    return module, size, unlimited


def _batches(classifier: Classifier, windows: Windows) -> list[Batch]:
    """The batches that predict would make."""
    encoder, keep, found = classifier.encoder, counted(classifier.encoder, windows), []
    for rows in batches(windows.starts, encoder.batch_tokens):
        ids, real, places = encoder.pad(windows, rows)
        mask = torch.zeros(real.shape, dtype=torch.bool)
        mask[real.cpu()] = torch.from_numpy(keep[places])
        if encoder.bos is not None:
            mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], dim=1)
        found.append(Batch(ids, mask.to(ids.device), rows))
    return found


def _measure(alone: Callable[[], None], served: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """Seconds of both, round by round; which comes first changes from round to round."""
    alone()
    served()  # what is made on the first call is made here
    pairs = []
    for number in range(rounds):
        taken = {}
        for name, work in [("alone", alone), ("served", served)][:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name] = time.perf_counter() - began
        pairs.append((taken["alone"], taken["served"]))
    return pairs
