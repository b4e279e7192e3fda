"""What `qscope steer eval` found: figures of every arm and strength with intervals, comparisons, samples."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qscope.workflows.steer_eval_arms import UNSTEERED, Point
from qscope.workflows.steer_eval_matching import Curve, Interval, Matched, mean_interval, resamples
from qscope.workflows.steer_eval_measures import distinct, repetition


class Raw(NamedTuple):
    """What was measured at one point, item by item."""

    point: Point
    scores: list[float]
    """Detector, per prompt"""
    texts: list[str]
    tokens: list[list[int]]
    """Generated, per prompt"""
    fired: list[int]
    """Tokens of prompt and answer that were steered, per prompt"""
    cross_entropy: list[float]
    """Sums over the predicted tokens, per neutral text"""
    kl: list[float]
    right: list[bool]
    """Per multiple-choice question"""


@dataclass(frozen=True)
class PointResult:
    """One arm at one strength. Intervals by bootstrap over prompts, neutral texts or questions."""

    arm: str
    strength: float
    size: float | None
    """|change| / typical norm of the residual"""
    instruction: str
    target: Interval
    """Target rate: mean score of the detector"""
    kl: Interval
    """KL(unsteered || this) per token of neutral text, nats"""
    ce_increase: Interval
    """Cross-entropy on neutral text minus that of the unsteered model, nats per token"""
    perplexity: float
    distinct_1: Interval
    distinct_2: Interval
    repetition: Interval
    """seq-rep-4"""
    length: Interval
    """Tokens of the answer"""
    accuracy: Interval | None
    """Multiple choice; None where no question was asked"""
    fired: float
    """Steered tokens per prompt with its answer"""


@dataclass(frozen=True)
class Sample:
    """One prompt, answered without and with the spec."""

    prompt: str
    unsteered: str
    unsteered_score: float
    steered: str
    steered_score: float
    strength: float


@dataclass(frozen=True)
class SteerEvalResult:
    spec: str
    detector: str
    match: str
    """The side effect at which arms are compared: kl or ce"""
    prompts: int
    about: dict[str, str]
    cost: str
    points: list[PointResult]
    matched: list[Matched]
    verdict: str
    directions: dict[str, str]
    """Baseline -> what it was made of"""
    cosines: dict[str, float]
    """Baseline -> cosine to what the spec adds"""
    left_out: dict[str, str]
    """Arm -> why it was not run"""
    notes: list[str]
    samples: list[Sample]
    out: Path
    page: Path
    """The HTML file"""


def side_effect(point: PointResult, match: str) -> float:
    return point.kl.value if match == "kl" else point.ce_increase.value


def measured(raw: Raw, base: Raw, predicted: int, draws: int, seed: int) -> PointResult:
    """Figures of one point. predicted: tokens predicted per neutral text."""
    prompts = resamples(len(raw.scores), draws, seed)
    texts = resamples(len(raw.kl), draws, seed + 1)
    increase = [(a - b) / predicted for a, b in zip(raw.cross_entropy, base.cross_entropy, strict=True)]
    per_text = functools.partial(mean_interval, drawn=prompts)
    accuracy = None
    if raw.right:
        accuracy = mean_interval([float(r) for r in raw.right], resamples(len(raw.right), draws, seed + 2))
    return PointResult(
        arm=raw.point.arm,
        strength=raw.point.strength,
        size=raw.point.size,
        instruction=raw.point.instruction,
        target=per_text(raw.scores),
        kl=mean_interval([kl / predicted for kl in raw.kl], texts),
        ce_increase=mean_interval(increase, texts),
        perplexity=float(np.exp(sum(raw.cross_entropy) / (predicted * len(raw.cross_entropy)))),
        distinct_1=per_text([distinct(t, 1) for t in raw.tokens]),
        distinct_2=per_text([distinct(t, 2) for t in raw.tokens]),
        repetition=per_text([repetition(t) for t in raw.tokens]),
        length=per_text([float(len(t)) for t in raw.tokens]),
        accuracy=accuracy,
        fired=float(np.mean(raw.fired)),
    )


def curves(points: Sequence[PointResult], raws: Sequence[Raw], match: str, by_side_effect: str) -> dict[str, Curve]:
    """A curve per arm, the unsteered point first. Points by strength, those of the arm `by_side_effect` (instructions
    have no strength) by side effect."""
    base = raws[0]
    assert base.point.arm == UNSTEERED
    found = {}
    for arm in dict.fromkeys(point.arm for point in points[1:]):
        mine = [(p, r) for p, r in zip(points, raws, strict=True) if p.arm == arm]
        mine.sort(key=lambda pair: side_effect(pair[0], match) if arm == by_side_effect else pair[0].strength)
        x = (0.0, *(side_effect(p, match) for p, _ in mine))
        found[arm] = Curve(x, np.array([base.scores, *(r.scores for _, r in mine)]))
    return found


def samples_of(prompts: Sequence[str], base: Raw, steered: Sequence[Raw], count: int) -> list[Sample]:
    """The first `count` prompts, not chosen by what came out, at every strength of the spec."""
    return [
        Sample(prompts[i], base.texts[i], base.scores[i], raw.texts[i], raw.scores[i], raw.point.strength)
        for raw in steered
        for i in range(min(count, len(prompts)))
    ]


def as_json(result: Any) -> Any:
    """Plain data, for the file and --json."""
    from dataclasses import asdict

    return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(result).items()}
