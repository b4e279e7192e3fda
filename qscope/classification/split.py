"""Which texts are learned from, which thresholds are chosen on, and which are only looked at in the end."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.finding.pooled import Ints

Mask = npt.NDArray[np.bool_]
SHARES = (0.6, 0.2, 0.2)
"""Of training, calibration and test"""
LEAST = 2
"""Texts of each class that training and calibration need"""


@dataclass(frozen=True)
class Split:
    """T texts in three parts, of which every text is in one. Texts that are equal are in the same."""

    train: Mask
    """[T]"""
    calibration: Mask
    """[T]"""
    test: Mask
    """[T]"""

    def __post_init__(self) -> None:
        parts = (self.train, self.calibration, self.test)
        if len({len(part) for part in parts}) > 1 or not (np.sum(parts, axis=0) == 1).all():
            raise InputError(
                f"The parts of a split hold {', '.join(str(int(np.sum(part))) for part in parts)} texts, and a text "
                "is in two of them or in none. Give three masks of equal length, one of which is true for each text."
            )

    def __len__(self) -> int:
        return len(self.train)

    def counts(self, label: Ints, names: Sequence[str]) -> dict[str, dict[str, int]]:
        """Part -> class -> texts. label: [T] places in `names`."""
        found = {}
        for part in ("train", "calibration", "test"):
            sizes = np.bincount(label[getattr(self, part)], minlength=len(names)).tolist()
            found[part] = dict(zip(names, sizes, strict=True))
        return found

    def check(self, label: Ints, names: Sequence[str]) -> None:
        """Raises InputError where training or calibration has fewer than two texts of a class."""
        for part, sizes in self.counts(label, names).items():
            for name, size in sizes.items():
                if part != "test" and size < LEAST:
                    raise InputError(
                        f"The {part} part has {size} {_texts(size)} of the class {name!r}; at least {LEAST} are "
                        "needed. Give more texts of that class, or make the part larger."
                    )


def make_split(
    texts: Sequence[str],
    label: Ints,
    group: Ints | None = None,
    shares: tuple[float, float, float] = SHARES,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Split:
    """A split by a hash of seed and text, stratified by label and group.

    Of the different texts of each class, and of each group in it, each part gets its share, rounded up or down. A text
    that occurs more than once counts once, with its first label and group. The order of the texts makes no difference
    as long as no text occurs with two labels or groups.

    Args:
        label, group: [T].
        shares: of training, calibration and test; they add up to 1, training and calibration are above 0.
        names: of the classes, for messages.

    Raises:
        InputError: for shares that do not add up, and where training or calibration has fewer than two of a class.
    """
    if not (abs(sum(shares) - 1) <= 1e-9 and min(shares) >= 0 and min(shares[:2]) > 0):  # NaN is refused too
        raise InputError(
            f"The shares of training, calibration and test are {', '.join(map(str, shares))}; they must add up to 1, "
            "and training and calibration must be above 0."
        )
    groups = np.zeros(len(texts), np.int64) if group is None else group
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(text, i)
    strata: dict[int, dict[int, list[int]]] = {}
    for i in first.values():
        strata.setdefault(int(label[i]), {}).setdefault(int(groups[i]), []).append(i)
    part = np.zeros(len(texts), np.int64)
    for name, of_class in sorted(strata.items()):
        seen = rest = 0
        for number in sorted(of_class, key=lambda number: _digest(seed, name, number)):
            members = sorted(of_class[number], key=lambda i: _digest(seed, texts[i]))
            test = _taken(shares[2], seen, len(members))
            seen += len(members)
            chosen = _taken(shares[1] / (shares[0] + shares[1]), rest, len(members) - test)
            rest += len(members) - test
            part[members[:test]], part[members[test : test + chosen]] = 2, 1
    part = part[[first[text] for text in texts]]
    split = Split(part == 0, part == 1, part == 2)
    present = np.unique(label)
    split.check(label, names or [str(i) for i in range(int(present[-1]) + 1 if len(present) else 0)])
    return split


def _taken(share: float, before: int, more: int) -> int:
    """How many of the next `more` so that of all until then the share is taken, rounded."""
    return int(share * (before + more) + 0.5) - int(share * before + 0.5)


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "replace")).digest()


def _texts(count: int) -> str:
    return "text" if count == 1 else "texts"
