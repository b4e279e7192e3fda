"""Lines of standard input decided as they come: each has its line of JSON on standard output, in the same order."""

import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from qscope.classification import load_rule
from qscope.errors import InputError
from qscope.records import Record
from qscope.workflows.classify_inputs import text_maker
from qscope.workflows.classify_output import line
from qscope.workflows.classify_predict import check_copy, plain
from qscope.workflows.classify_predict_result import ClassifyPredictResult
from qscope.workflows.classify_rules import Classifier, Dtype, ModelOptions, Show, class_names, differs, said_of

WAITING = 4096  # lines read ahead at most


@dataclass(frozen=True)
class ClassifyStreamConfig:
    """Decide lines of standard input as they come, by a rule that `qscope classify fit` wrote.

    Example: tail -F chat.log | qscope classify stream rule.json
    """

    rule: Path
    """Rule file of `qscope classify fit`."""
    format: Literal["text", "jsonl"] = "text"
    """text: a line is a text; jsonl: a line is an object with the field --text-field."""
    text_field: str = "text"
    """Field that holds the text, or a template such as "{title} {body}"."""
    copy: tuple[str, ...] = ()
    """Fields of an object to copy into the output, such as an id."""
    evidence: Show = "fired"
    """fired: the features that fire; all: every feature of the rule (of several classes: of the decided one); none."""
    membership: Literal["rule", "topk", "preact"] = "rule"
    """Insist on one: topk by the full encode, preact by the few encoder rows. The other is refused."""
    batch_lines: int = 32
    """Lines decided together at most; fewer when no more are waiting, so that none waits for the next."""
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
        for name in ("batch_lines", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        if self.format == "text" and (self.copy or self.text_field != "text"):
            raise InputError("--copy and --text-field name fields of objects. Say --format jsonl with them.")
        check_copy(self.copy)


def run(
    config: ClassifyStreamConfig, source: BinaryIO | None = None, target: BinaryIO | None = None
) -> ClassifyPredictResult:
    """Decide the lines of `source` (standard input) into `target` (standard output) until it ends.

    A line that is not usable gets a line with its number and an `error`; the others go on, and the exit status is 2.
    """
    rule = load_rule(config.rule)
    if config.membership != "rule":
        rule.check_membership(config.membership)
    options = ModelOptions(config.model, config.sae, config.dtype, config.device, config.batch_tokens)
    classifier = Classifier.load(rule, options)
    for note in differs(rule, classifier.encoder):
        print(f"qscope: {note}", file=sys.stderr)
    given, out = source or sys.stdin.buffer, target or sys.stdout.buffer
    decided: Counter[str] = Counter()
    lines = truncated = empty = tokens = failed = 0
    began = time.perf_counter()
    for batch in waiting(given, config.batch_lines):
        texts, rows = [], []
        for raw in batch:
            lines += 1
            head, text = _read(config, raw, lines)
            rows.append(head)
            texts.append(text)
        usable = [text for text in texts if text is not None]
        part = classifier.tokenize(usable)
        found = iter(classifier.rows(classifier.read(part), config.evidence) if usable else [])
        for head, text in zip(rows, texts, strict=True):
            if text is None:
                failed += 1
            else:
                row = next(found)
                decided[row["class"]] += 1
                truncated, empty = truncated + row["truncated"], empty + (row["tokens"] == 0)
                head |= row
            out.write(line(head))
        out.flush()
        tokens += int(part.lengths.sum())
    seconds = time.perf_counter() - began
    return ClassifyPredictResult(
        model=classifier.encoder.model_name,
        about=said_of(rule, classifier.encoder),
        notes=(),
        texts=lines - failed,
        decided={name: decided[name] for name in class_names(rule)},
        truncated=truncated,
        empty=empty,
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens else 0.0,
        resumed=0,
        out=None,
        failed=failed,
    )


def waiting(source: Iterable[bytes], most: int) -> Iterator[list[bytes]]:
    """The lines that are there, at most so many at once; waits only when there is none."""
    lines: queue.Queue[bytes | BaseException | None] = queue.Queue(WAITING)

    def fill() -> None:
        try:
            for raw in source:
                lines.put(raw)
            lines.put(None)
        except (OSError, ValueError) as error:  # the source was closed or broke; raised where the lines are used
            lines.put(error)

    threading.Thread(target=fill, daemon=True).start()
    ended = False
    while not ended:
        found = [lines.get()]
        while len(found) < most and isinstance(found[-1], bytes):
            try:
                found.append(lines.get_nowait())
            except queue.Empty:
                break
        last = found[-1]
        ended = not isinstance(last, bytes)
        batch = [raw for raw in found if isinstance(raw, bytes)]
        if batch:
            yield batch
        if isinstance(last, BaseException):
            raise InputError(f"Standard input could not be read to its end: {last}.") from last


def _read(config: ClassifyStreamConfig, raw: bytes, number: int) -> tuple[dict[str, Any], str | None]:
    """(what the output begins with, the text); None for a line that cannot be used."""
    head: dict[str, Any] = {"line": number}
    text = raw.decode("utf-8", "replace").rstrip("\r\n")
    if config.format == "text":
        return head, text
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return head | {"error": f"not JSON: {error}"}, None
    if not isinstance(fields, dict):
        return head | {"error": "not a JSON object"}, None
    missing = [name for name in config.copy if name not in fields]
    try:
        made = text_maker(config.text_field)(Record(number, fields))
    except KeyError as error:
        missing.insert(0, str(error.args[0]))
        made = ""
    if missing:
        return head | {"error": f"no field {missing[0]!r}; its fields: {', '.join(map(str, fields)) or 'none'}"}, None
    return head | {name: plain(fields[name]) for name in config.copy}, made
