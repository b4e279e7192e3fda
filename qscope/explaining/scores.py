"""How far an explanation holds: detection and fuzzing (Paulo et al. 2024), with 95 % intervals.

detection    passages in which the feature fires against random ones in which it is silent
near         the same against silent passages that hold one of its leading tokens
fuzzing      firing passages with the right tokens marked against others with as many silent tokens marked
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qscope.explaining.contexts import Evidence, Passage
from qscope.explaining.judges import Judge, Verdict
from qscope.explaining.prompts import firing

Z = 1.959963984540054  # of 95 %
KINDS = ("detection", "near", "fuzzing")


@dataclass(frozen=True)
class Score:
    """What a judge got right. Figures are None where one side has no answered example."""

    positives: int
    """Examples answered to which yes is right"""
    negatives: int
    true_yes: int
    true_no: int
    unanswered: int
    """Examples to which the judge gave no usable answer; in no figure"""
    balanced_accuracy: float | None = None
    """(share of the positives with yes + share of the negatives with no) / 2"""
    balanced_accuracy_interval: tuple[float, float] | None = None
    auroc: float | None = None
    """P(score of a positive above a negative's) + 1/2 P(equal)"""
    auroc_interval: tuple[float, float] | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def score(evidence: Evidence, judge: Judge) -> dict[str, Score]:
    """All three, of one feature; every passage is judged once."""
    fires = [judge.detect(passage) for passage in evidence.positives]
    right, wrong = fuzzing_examples(evidence.positives)
    return {
        "detection": of_verdicts(fires, [judge.detect(passage) for passage in evidence.negatives]),
        "near": of_verdicts(fires, [judge.detect(passage) for passage in evidence.near]),
        "fuzzing": of_verdicts([judge.fuzz(*example) for example in right], [judge.fuzz(*e) for e in wrong]),
    }


Marked = tuple[Passage, list[bool]]


def fuzzing_examples(positives: Sequence[Passage]) -> tuple[list[Marked], list[Marked]]:
    """(rightly marked, wrongly marked): passages by turns, each once.

    Wrong marks: as many tokens as fire, among those with activation 0, evenly spread over them. A passage with too few
    silent tokens for that is passed over.
    """
    right: list[Marked] = []
    wrong: list[Marked] = []
    for passage in positives:
        marks = firing(passage)
        if len(right) <= len(wrong):
            right.append((passage, marks))
            continue
        silent = [i for i, value in enumerate(passage.activations) if value == 0]
        count = sum(marks)
        if count > len(silent):
            continue
        chosen = {silent[(2 * i + 1) * len(silent) // (2 * count)] for i in range(count)}
        wrong.append((passage, [i in chosen for i in range(len(marks))]))
    return right, wrong


def of_verdicts(positives: Sequence[Verdict | None], negatives: Sequence[Verdict | None]) -> Score:
    """The figures of a judge's verdicts on examples to which yes is right, and on others."""
    yes, no = ([verdict for verdict in side if verdict is not None] for side in (positives, negatives))
    true_yes, true_no = sum(v.yes for v in yes), sum(not v.yes for v in no)
    unanswered = len(positives) + len(negatives) - len(yes) - len(no)
    if not yes or not no:
        return Score(len(yes), len(no), true_yes, true_no, unanswered)
    area = auroc([v.score for v in yes], [v.score for v in no])
    return Score(
        positives=len(yes),
        negatives=len(no),
        true_yes=true_yes,
        true_no=true_no,
        unanswered=unanswered,
        balanced_accuracy=(true_yes / len(yes) + true_no / len(no)) / 2,
        balanced_accuracy_interval=balanced_accuracy_interval(true_yes, len(yes), true_no, len(no)),
        auroc=area,
        auroc_interval=auroc_interval(area, len(yes), len(no)),
    )


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """P(positive above negative) + 1/2 P(equal), exact up to one division."""
    above = np.subtract.outer(np.asarray(positives, np.float64), np.asarray(negatives, np.float64))
    return float((2 * (above > 0).sum() + (above == 0).sum()) / (2 * above.size))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, spread = hits / trials, Z * Z / trials
    middle = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / trials + spread / trials / 4)
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (0.0 if hits == 0 else low), (1.0 if hits == trials else high)


def balanced_accuracy_interval(true_yes: int, positives: int, true_no: int, negatives: int) -> tuple[float, float]:
    """95 % interval of the mean of two independent shares, from their Wilson intervals.

    By the square-and-add rule (Newcombe 1998, method 10; Zou and Donner 2008): unlike a bootstrap it does not shrink to
    nothing where all answers are right.
    """
    shares = true_yes / positives, true_no / negatives
    bounds = wilson(true_yes, positives), wilson(true_no, negatives)
    value = sum(shares) / 2
    down, up = (
        math.hypot(*(share - bound[side] for share, bound in zip(shares, bounds, strict=True))) / 2 for side in (0, 1)
    )
    return max(0.0, value - down), min(1.0, value + up)


def auroc_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval of an AUROC from its value and the sizes alone (Newcombe 2006, part 2, method 5).

    The values t with |area - t| <= z sqrt(V(t)), V(t) = t (1 - t) (1 + h (1 - t)/(2 - t) + h t/(1 + t)) / (m n) and
    h = (m + n)/2 - 1.
    """
    half = (positives + negatives) / 2 - 1

    def outside(t: float) -> bool:
        inner = 1 + half * (1 - t) / (2 - t) + half * t / (1 + t)
        return abs(area - t) > Z * math.sqrt(t * (1 - t) * inner / (positives * negatives))

    return _edge(area, 0.0, outside), _edge(area, 1.0, outside)


def _edge(inside: float, far: float, outside: Any) -> float:
    """Where `outside` begins between `inside` and `far`, to 2^-60 of the way."""
    if inside == far:
        return far
    for _ in range(60):
        middle = (inside + far) / 2
        if outside(middle):
            far = middle
        else:
            inside = middle
    return inside
