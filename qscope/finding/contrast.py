"""Contrastive sets: texts with a property and texts without, and which of their tokens count."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from qscope.data import ReadCounts, TextOptions, find_sources, read_pieces
from qscope.errors import InputError

Unit = Literal["document", "paragraph", "line"]


class ContrastText(NamedTuple):
    text: str
    group: str
    """File, language or topic that it comes from"""
    key: str
    """Texts with one key are kept on one side of the split into training and held-out texts: a translation and its
    original, a text and its copy"""


@dataclass(frozen=True)
class Contrast:
    """Two sets of different texts."""

    name: str
    positive: tuple[ContrastText, ...]
    negative: tuple[ContrastText, ...]
    notes: tuple[str, ...] = ()
    """What was left out, and where built-in text comes from"""
    dropped: int = 0
    """Texts left out: with any, the sets are no longer side by side"""


def read_texts(inputs: Sequence[str], options: TextOptions, unit: Unit) -> tuple[list[ContrastText], int]:
    """(texts of files in order, number of rows without text, which are left out). Every file is a group.

    A text longer than 64 Ki characters is cut there. Raises InputError as `qscope.data.find_sources` and its readers.
    """
    found, counts = [], ReadCounts()
    for path in find_sources(inputs, options):
        pieces = read_pieces([path], options, counts)
        for _, parts in itertools.groupby(pieces, key=lambda piece: piece.document):
            for text in _units(next(parts).text, unit):
                found.append(ContrastText(text, Path(path).name, text))
    return found, counts.empty + counts.skipped


def _units(text: str, unit: Unit) -> list[str]:
    parts = {"document": [text], "paragraph": re.split(r"\n\s*\n", text), "line": text.splitlines()}[unit]
    return [part for part in parts if part.strip()]


def contrast(
    name: str, positive: Iterable[ContrastText], negative: Iterable[ContrastText], notes: Sequence[str] = ()
) -> Contrast:
    """Without texts that occur twice in a set, and without those that are in both (they tell nothing); with notes that
    say how many. Raises InputError where a set is then empty."""
    sets = [list(positive), list(negative)]
    firsts: list[dict[str, ContrastText]] = [{}, {}]
    for texts, first in zip(sets, firsts, strict=True):
        for text in texts:
            first.setdefault(text.text, text)
    both = firsts[0].keys() & firsts[1].keys()
    left = [[text for text in first.values() if text.text not in both] for first in firsts]
    said = list(notes)
    if both:
        said.append(f"{len(both)} texts that are in both sets were left out")
    repeated = sum(len(texts) - len(first) for texts, first in zip(sets, firsts, strict=True))
    if repeated:
        said.append(f"{repeated} repeated texts were left out")
    for texts, what in zip(left, ("positive", "negative"), strict=True):
        if not texts:
            raise InputError(
                f"The {what} set of {name} holds no text of its own: texts that are empty or in both sets do not "
                "count. Give texts with the property in --positive and texts without it in --negative."
            )
    return Contrast(name, tuple(left[0]), tuple(left[1]), tuple(said), sum(map(len, sets)) - sum(map(len, left)))


def held_out(sets: Sequence[Sequence[ContrastText]], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """[T] which texts of the sets, one after the other, are kept for the test.

    Of each set's keys in the order of a hash with `seed` the first `share`; a key that one set keeps is kept in all, so
    sets that share only some of their keys keep a few more.
    """
    chosen: set[str] = set()
    for texts in sets:
        keys = sorted({t.key for t in texts}, key=lambda key: _digest(f"test {key}", seed))  # not the order of `sample`
        chosen |= set(keys[: round(share * len(keys))])
    return np.array([t.key in chosen for texts in sets for t in texts], bool)


def sample(texts: Iterable[ContrastText], count: int, seed: int) -> list[ContrastText]:
    """`count` texts (or all), chosen by a hash of their keys with `seed`; translations of one text go together."""
    return sorted(texts, key=lambda t: (_digest(t.key, seed), t.text))[:count]


def _digest(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "replace")).digest()


# --- tokens that count -----------------------------------------------------------------------------------


@dataclass
class TokenLists:
    """Token ids of the positive and of the negative texts."""

    positive: list[list[int]] = field(default_factory=list)
    negative: list[list[int]] = field(default_factory=list)

    def pairs(self, option: str) -> list[tuple[list[int], list[int]]]:
        if len(self.positive) != len(self.negative):
            raise InputError(
                f"{option} pair compares each positive text with the negative one in the same place, and there are "
                f"{len(self.positive)} and {len(self.negative)} texts (without repeated ones). Give as many of both, "
                f"or say {option} set."
            )
        return list(zip(self.positive, self.negative, strict=True))


Scope = Literal["no", "pair", "set"]


def shared_tokens(lists: TokenLists, scope: Scope) -> tuple[list[set[int]], list[set[int]]]:
    """Per positive and per negative text the token ids to leave out: those in both of its pair, or in both sets."""
    if scope == "pair":
        both = [set(a) & set(b) for a, b in lists.pairs("--drop-shared")]
        return both, both
    sides = [set(itertools.chain(*texts)) for texts in (lists.positive, lists.negative)]
    common = sides[0] & sides[1] if scope == "set" else set()
    return [common] * len(lists.positive), [common] * len(lists.negative)


def common_prefix(lists: TokenLists, scope: Scope) -> tuple[list[int], list[int]]:
    """Per text the number of first tokens to leave out: those that both texts of its pair, or all texts, begin with."""
    if scope == "pair":
        sizes = [_prefix([a, b]) for a, b in lists.pairs("--drop-prefix")]
        return sizes, sizes
    size = _prefix(lists.positive + lists.negative) if scope == "set" else 0
    return [size] * len(lists.positive), [size] * len(lists.negative)


def _prefix(texts: Sequence[Sequence[int]]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False)))
