"""The texts that `qscope steer find` compares, and which of them train, test or repeat."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qscope.data import TextOptions
from qscope.errors import InputError
from qscope.finding.builtin import generate
from qscope.finding.contrast import Contrast, ContrastText, contrast, held_out, read_texts

if TYPE_CHECKING:
    from qscope.workflows.steer_find import SteerFindConfig

TRAIN, TEST, PARAPHRASE = 0, 1, 2


@dataclass(frozen=True)
class Texts:
    """T texts: the positive ones, the negative ones, then those in other words. A bad case: the response, the pool."""

    all: tuple[ContrastText, ...]
    positive: npt.NDArray[np.bool_]
    """[T]"""
    group: npt.NDArray[np.int64]
    """[T] number of the negative text's group; of positive texts 0"""
    part: npt.NDArray[np.int64]
    """[T] TRAIN, TEST or PARAPHRASE"""
    groups: tuple[str, ...]
    name: str
    notes: tuple[str, ...]

    def count(self, part: int, positive: bool) -> int:
        return int(((self.part == part) & (self.positive == positive)).sum())


def gather(config: "SteerFindConfig") -> Texts:
    """Read or generate the texts that the config names."""
    if config.response is not None:
        return _join([_bad_case(config, config.response)], 0.0, config.seed)
    if config.builtin is not None:
        sets = [generate(config.builtin, config.count, config.seed)]
    else:
        sets = [_files(config, "the given files", config.positive, config.negative)]
    if config.paraphrase_positive:
        sets.append(_files(config, "paraphrases", config.paraphrase_positive, config.paraphrase_negative))
    texts = _join(sets, config.test, config.seed)
    if 0 in (texts.count(TRAIN, True), texts.count(TRAIN, False)):
        raise InputError(
            f"With --test {config.test}, no positive or no negative text of {texts.name} is left to train on. Give "
            "more texts or a smaller --test."
        )
    return texts


def _files(config: "SteerFindConfig", name: str, positive: tuple[str, ...], negative: tuple[str, ...]) -> Contrast:
    options = TextOptions(field=config.field)
    (left, empty), (right, none) = (read_texts(side, options, config.unit) for side in (positive, negative))
    notes = [f"{empty + none} rows without text were left out"] if empty + none else []
    found = contrast(name, left, right, notes)
    if "pair" in (config.drop_shared, config.drop_prefix) and (found.dropped or notes):
        raise InputError(
            f"Of {name}, {found.dropped + empty + none} texts were left out (empty, repeated or in both sets), so the "
            "texts no longer stand in pairs as --drop-shared pair and --drop-prefix pair need. Take them out of both "
            "files, or say set."
        )
    return found


def _bad_case(config: "SteerFindConfig", response: str) -> Contrast:
    options = TextOptions(field=config.field)
    if _is_file(response):
        texts, _ = read_texts([response], options, "document")
        if len(texts) != 1:
            raise InputError(f"--response {response} holds {len(texts)} texts; one response is diagnosed at a time.")
        response = texts[0].text
    neutral, _ = read_texts(config.neutral, options, config.unit)
    found = contrast("a response", [ContrastText(response, "response", response)], neutral)
    if len(found.negative) < 2:
        raise InputError("--neutral holds one text; a pool of at least 2, better of 50, tells what is usual.")
    return found


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # a long text is no name
        return False


def _join(sets: list[Contrast], share: float, seed: int) -> Texts:
    texts = [text for c in sets for text in (*c.positive, *c.negative)]
    positive = [side for c in sets for side, part in ((True, c.positive), (False, c.negative)) for _ in part]
    groups = tuple(dict.fromkeys(text.group for c in sets for text in c.negative))
    number = {name: i for i, name in enumerate(groups)}
    test = held_out((sets[0].positive, sets[0].negative), share, seed)
    part = np.full(len(texts), PARAPHRASE, np.int64)
    part[: len(test)] = np.where(test, TEST, TRAIN)
    return Texts(
        all=tuple(texts),
        positive=np.array(positive, bool),
        group=np.array([0 if p else number[t.group] for t, p in zip(texts, positive, strict=True)], np.int64),
        part=part,
        groups=groups,
        name=sets[0].name,
        notes=tuple(note for c in sets for note in c.notes),
    )
