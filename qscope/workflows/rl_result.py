"""What `qscope rl` found, and the intervals in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qscope.finding.stability import Interval, over
from qscope.workflows.rl_measure import Measures, bits_per_byte

Floats = npt.NDArray[np.float64]
BEFORE = "before"


@dataclass(frozen=True)
class ArmLine:
    """One arm over all its seeds. Intervals: 95 %, bootstrap over seeds and, within them, prompts or texts."""

    arm: str
    what: str
    seeds: int
    endless: Interval
    """Share of the responses that repeat themselves without end"""
    against: Interval | None
    """`endless` minus that of the vanilla arm, the same prompts and seeds drawn for both; None for vanilla itself"""
    repeated: Interval
    """Share of 4-grams said before"""
    length: Interval
    """Tokens of a response"""
    ended: Interval
    bits_per_byte: Interval
    copied: Interval
    each: tuple[float, ...]
    """`endless` of every seed"""


@dataclass(frozen=True)
class Mined:
    """The features that the negatives are steered with."""

    layer: int
    features: tuple[int, ...]
    mined: bool
    """False: named by the user"""
    strength: float
    """Times the typical norm of the residual"""
    norm: float
    rows: tuple[dict[str, float], ...]
    """Per feature: feature, looping, control, t"""
    cause: dict[str, list[dict[str, float]]]
    """amplify, suppress: strength, hits, count"""
    looping: int
    control: int


@dataclass(frozen=True)
class RLResult:
    """All of it. `about` and `notes` are for people."""

    model: str
    about: dict[str, str]
    mined: Mined
    arms: tuple[ArmLine, ...]
    curves: dict[str, list[list[dict[str, float]]]]
    """arm -> for each seed, the logged figures of each step"""
    samples: dict[str, list[str]]
    """arm -> first responses of its first seed"""
    prompts: list[str]
    """That `samples` answer"""
    notes: tuple[str, ...] = ()
    out: str | None = None
    verdicts: tuple[str, ...] = field(default=())


def lines(
    found: Mapping[str, Sequence[Measures]], words: Mapping[str, str], draws: int, seed: int
) -> tuple[ArmLine, ...]:
    """A line for every arm, in the order of `found`: arm -> measures of each seed."""
    made = []
    for arm, runs in found.items():
        reference = found.get("vanilla") if arm not in ("vanilla", BEFORE) else None
        made.append(_line(arm, words.get(arm, ""), runs, reference, draws, seed))
    return tuple(made)


def _line(
    arm: str, what: str, runs: Sequence[Measures], vanilla: Sequence[Measures] | None, draws: int, seed: int
) -> ArmLine:
    def mean(values: Callable[[Measures], Sequence[float]]) -> Interval:
        return resampled([np.asarray([values(run) for run in runs], float)], _mean, draws, seed)

    cost = [np.asarray([run.nats for run in runs]), np.asarray([run.bytes for run in runs], float)]
    against = None
    if vanilla:
        count = min(len(runs), len(vanilla))
        pair = [np.asarray([run.endless for run in side[:count]], float) for side in (runs, vanilla)]
        against = resampled(pair, lambda a, b: float(a.mean() - b.mean()), draws, seed)
    return ArmLine(
        arm, what, len(runs), mean(lambda m: m.endless), against, mean(lambda m: m.repeated),
        mean(lambda m: m.lengths), mean(lambda m: m.ended),
        resampled(cost, lambda n, b: bits_per_byte(float(n.sum()), float(b.sum())), draws, seed),
        mean(lambda m: m.copied), tuple(float(np.mean(run.endless)) for run in runs),
    )  # fmt: skip


def _mean(values: Floats) -> float:
    return float(values.mean())


def resampled(tables: Sequence[Floats], figure: Callable[..., float], draws: int, seed: int) -> Interval:
    """The figure of tables [seeds, items] that share seeds and items, with the quantiles of its bootstrap.

    Each draw takes seeds with replacement, and items with replacement, the same of all tables.
    """
    seeds, items = tables[0].shape
    random = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = random.integers(0, seeds, seeds)
        columns = random.integers(0, items, items)
        values.append(figure(*(table[np.ix_(rows, columns)] for table in tables)))
    return over(values, figure(*tables))


def verdicts(arms: Sequence[ArmLine]) -> tuple[str, ...]:
    """What the table says about SAE-steered negatives, in words, also where it is nothing."""
    by = {line.arm: line for line in arms}
    said = []
    if BEFORE in by and by[BEFORE].endless.high < 0.05:
        said.append(
            f"The model repeats itself in {by[BEFORE].endless.value:.1%} of the held-out responses before training; "
            "there is little to lower."
        )
    sae = by.get("sae")
    if sae is None:
        return tuple(said)
    for name, words in (
        ("vanilla", "plain DAPO"), ("random", "random features"), ("any", "any features"), ("loop", "template loops"),
        ("overlong", "the overlong penalty"), ("kl", "KL"),
    ):  # fmt: skip
        if name in by:
            said.append(f"SAE-steered negatives against {words}: {_compared(sae.endless, by[name].endless)}.")
    return tuple(said)


def _compared(a: Interval, b: Interval) -> str:
    figures = f"{a.value:.1%} against {b.value:.1%} endless"
    if a.high < b.low:
        return f"fewer, {figures}, and the intervals are apart"
    if a.low > b.high:
        return f"more, {figures}, and the intervals are apart"
    return f"no difference that the intervals show, {figures}"


def plain(measures: Any) -> Measures:
    """Measures as the journal keeps them."""
    return Measures(**measures)
