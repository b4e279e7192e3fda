"""Texts decided by a rule: a line of JSON for each, with the features, tokens and activations that made it."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qscope.classification import load_rule
from qscope.errors import InputError
from qscope.records import RecordCounts, check_fields, read_records, require
from qscope.workflows.classify_inputs import text_maker
from qscope.workflows.classify_output import BlockFile
from qscope.workflows.classify_predict_result import ClassifyPredictResult
from qscope.workflows.classify_read import block_rows
from qscope.workflows.classify_rules import Classifier, Dtype, ModelOptions, Show, class_names, differs, said_of


@dataclass(frozen=True)
class ClassifyPredictConfig:
    """Decide texts by a rule that `qscope classify fit` wrote. Killed and started again, it goes on where it was.

    Example: qscope classify predict rule.json comments.jsonl --out decided.jsonl --copy id
    """

    rule: Path
    """Rule file of `qscope classify fit`."""
    texts: tuple[str, ...]
    """Files of texts: .jsonl, .jsonl.gz, .csv or .parquet."""
    out: Path = Path("predictions.jsonl")
    """A line of JSON for each row: class, score, evidence, tokens, truncated."""
    text_field: str = "text"
    """Field that holds the text, or a template such as "{title} {body}"."""
    copy: tuple[str, ...] = ()
    """Fields to copy into the output, such as an id."""
    evidence: Show = "fired"
    """fired: the features that fire; all: every feature of the rule (of several classes: of the decided one); none."""
    membership: Literal["rule", "topk", "preact"] = "rule"
    """Insist on one: topk by the full encode, preact by the few encoder rows. The other is refused."""
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
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"--batch-tokens is {self.batch_tokens}; it must be at least 1.")
        if not self.texts:
            raise InputError("No file with texts was given. Give at least one (.jsonl, .csv or .parquet).")


class Item(NamedTuple):
    """A row to decide."""

    head: dict[str, Any]
    """Its row number, its file where there are several, and the fields to copy"""
    text: str


def run(config: ClassifyPredictConfig) -> ClassifyPredictResult:
    """Decide all rows. Raises QscopeError for what a user can mend."""
    from tqdm import tqdm

    rule = load_rule(config.rule)
    if config.membership != "rule":
        rule.check_membership(config.membership)
    items, counts = read_items(config.texts, config.text_field, config.copy)
    options = ModelOptions(config.model, config.sae, config.dtype, config.device, config.batch_tokens)
    classifier = Classifier.load(rule, options)
    encoder = classifier.encoder
    tokens = classifier.tokenize([item.text for item in items])
    blocks = block_rows(tokens.lengths)
    began, read = time.perf_counter(), 0
    file = BlockFile(config.out, asked(config, classifier, items), [b.stop - b.start for b in blocks])
    try:
        done = file.done
        with tqdm(total=int(tokens.lengths.sum()), unit="tok", unit_scale=True, desc="predict", mininterval=0.5) as bar:
            for number, rows in enumerate(blocks):
                part = tokens.rows(range(rows.start, rows.stop))
                size = int(part.lengths.sum())
                if number >= done:
                    found = classifier.rows(classifier.read(part), config.evidence)
                    file.put([item.head | row for item, row in zip(items[rows], found, strict=True)])
                    read += size
                bar.update(size)
        seconds = time.perf_counter() - began
        decided: Counter[str] = Counter()
        empty = 0
        for row in file.finished():
            decided[row["class"]] += 1
            empty += row["tokens"] == 0
        file.finish()
    finally:
        file.close()
    notes = differs(rule, encoder)
    notes += (f"{counts.broken} of {counts.rows} rows could not be read and are left out",) if counts.broken else ()
    return ClassifyPredictResult(
        model=encoder.model_name,
        about=said_of(rule, encoder),
        notes=notes,
        texts=len(items),
        decided={name: decided[name] for name in class_names(rule)},
        truncated=int(tokens.truncated.sum()),
        empty=empty,
        tokens=read,
        tokens_per_second=read / seconds if read else 0.0,
        resumed=blocks[done - 1].stop if done else 0,
        out=config.out,
    )


def read_items(files: Sequence[str], text_field: str, copy: Sequence[str]) -> tuple[list[Item], RecordCounts]:
    """Rows of all files, those without text included. Raises InputError for unknown fields."""
    maker, counts, found = text_maker(text_field), RecordCounts(), []
    check_copy(copy)
    for name in files:
        path = Path(name)
        records = read_records(path, counts)
        check_fields(path, records, maker.fields, "--text-field")
        check_fields(path, records, copy, "--copy")
        for record in records:
            head: dict[str, Any] = {"row": record.number} | ({"file": name} if len(files) > 1 else {})
            head |= {field: plain(record.fields.get(field)) for field in copy}
            found.append(Item(head, require(path, record, maker)))
    return found, counts


def check_copy(copy: Sequence[str]) -> None:
    """Raises InputError for fields that the output of predict or stream has already."""
    ours = {"row", "file", "line", "error", "class", "positive", "score", "scores", "evidence", "tokens", "truncated"}
    if taken := ours & set(copy):
        raise InputError(f"--copy {min(taken)} has the name of a field of the output. Rename it in the input.")


def plain(value: Any) -> Any:
    """A field's value as JSON can hold it: NaN and infinities as null, what JSON does not know as text."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


def asked(config: ClassifyPredictConfig, classifier: Classifier, items: Sequence[Item]) -> dict[str, Any]:
    """All that the output depends on."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.head, item.text]).encode())
    encoder, rule = classifier.encoder, config.rule.read_bytes()
    return {
        "rule": hashlib.sha256(rule).hexdigest(),
        "texts": digest.hexdigest(),
        "evidence": config.evidence,
        "dtype": encoder.dtype,
        "device": encoder.device,
        "batch_tokens": encoder.batch_tokens,
    }
