"""Comparing arms at equal side effect: curves, interpolation on them, bootstrap over prompts.

A curve is what an arm gives along its strengths, from no steering on: side effects x and target rates y. Between two
measured points it is taken as straight: an arm applied to a share of the prompts, and the other strength to the rest,
gives exactly the values in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Of all intervals."""
LOSES, WINS, OPEN = "spec loses", "spec wins", "not told apart"


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap percentile interval (95 %)."""

    value: float
    low: float
    high: float


def at_side_effect(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Target rate where the curve first reaches the side effect `level`; None where it never does.

    x, y: along rising strength, the unsteered point first. Linear between the point before and the first one at or
    above the level.
    """
    for i, side in enumerate(x):
        if side < level:
            continue
        if i == 0:
            return float(y[i])
        share = (level - x[i - 1]) / (side - x[i - 1])
        return float(y[i - 1] + share * (y[i] - y[i - 1]))
    return None


def strengths_for(sizes: Sequence[float], x: Sequence[float], levels: Sequence[float]) -> list[float]:
    """Sizes at which a curve measured at `sizes` (rising, above 0) first reaches each side-effect level.

    Linear in the logarithms of size and side effect, which is close to quadratic at small sizes. A level that is never
    reached gives the largest size, one that lies below the first point a smaller size by the square law. Equal sizes
    are named once.
    """
    found = []
    for level in levels:
        i = next((i for i, side in enumerate(x) if side >= level), None)
        if i is None:
            found.append(float(sizes[-1]))
        elif i == 0 or x[i - 1] <= 0:
            found.append(float(sizes[i] * np.sqrt(level / x[i])))
        else:
            share = np.log(level / x[i - 1]) / np.log(x[i] / x[i - 1])
            found.append(float(sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** share))
    return sorted({float(f"{size:.4g}") for size in found})


def resamples(count: int, draws: int, seed: int) -> np.ndarray:
    """[draws, count] indices into `count` items, drawn with replacement; the same for the same seed."""
    return np.random.default_rng(seed).integers(0, count, size=(draws, count))


def interval(statistic: Callable[[np.ndarray], float | None], drawn: np.ndarray) -> Interval | None:
    """The statistic of all items, and the 2.5 and 97.5 % quantiles of its values on the resamples.

    statistic: of item indices [n]. None where it has no value on all items; resamples without one are left out.
    """
    value = statistic(np.arange(drawn.shape[1]))
    if value is None:
        return None
    values = [v for v in (statistic(rows) for rows in drawn) if v is not None]
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if values else (value, value)
    return Interval(float(value), float(low), float(high))


def mean_interval(values: Sequence[float], drawn: np.ndarray, weights: Sequence[float] | None = None) -> Interval:
    """Mean of a value per item (weighted where items differ in size)."""
    v = np.asarray(values, np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, np.float64)
    found = interval(lambda rows: float((v[rows] * w[rows]).sum() / w[rows].sum()), drawn)
    assert found is not None
    return found


@dataclass(frozen=True)
class Curve:
    """One arm: side effects [points] and scores [points, prompts], the unsteered point first."""

    x: tuple[float, ...]
    scores: np.ndarray

    def rate(self, level: float, rows: np.ndarray | None = None) -> float | None:
        """Target rate at the side effect `level`, of the prompts `rows`."""
        scores = self.scores if rows is None else self.scores[:, rows]
        return at_side_effect(self.x, scores.mean(axis=1).tolist(), level)


@dataclass(frozen=True)
class Matched:
    """An arm at the side effect that the spec has at one of its strengths."""

    arm: str
    strength: float
    """The spec's."""
    side_effect: float
    rate: Interval | None
    """Target rate of the arm there, by interpolation; None: it never reaches that side effect."""
    reached: float
    """The largest side effect that the arm reaches."""
    best_below: float
    """The arm's highest measured target rate at no more than this side effect (the unsteered one included)."""
    difference: Interval
    """Target rate of the spec minus `rate`, or minus `best_below` where there is no rate; both of the same prompts."""
    judgement: str
    """LOSES or WINS where the whole interval of the difference is on one side of 0, by more than half a prompt; else
    OPEN. Half a prompt: without it, the sliver that interpolation adds to a rate would decide between equal scores."""


def matched(arm: str, curve: Curve, strength: float, side: float, spec: np.ndarray, drawn: np.ndarray) -> Matched:
    """Compare an arm with the spec's scores [prompts] at one strength, whose side effect is `side`."""
    rates = curve.scores.mean(axis=1)
    below = [i for i, x in enumerate(curve.x) if x <= side] or [0]
    best = max(below, key=lambda i: rates[i])

    def difference(rows: np.ndarray) -> float:
        found = curve.rate(side, rows)
        return float(spec[rows].mean()) - (float(curve.scores[best, rows].mean()) if found is None else found)

    ahead = interval(difference, drawn)
    assert ahead is not None
    half = 0.5 / len(spec)
    return Matched(
        arm=arm,
        strength=strength,
        side_effect=side,
        rate=interval(lambda rows: curve.rate(side, rows), drawn),
        reached=max(curve.x),
        best_below=float(rates[best]),
        difference=ahead,
        judgement=LOSES if ahead.high < -half else WINS if ahead.low > half else OPEN,
    )


def verdict(found: Sequence[Matched]) -> str:
    """One sentence: which arms the spec loses to, beats, cannot be told from, and stands behind undecided, over all
    its strengths."""
    if not found:
        return "There is no arm to compare the spec with."
    lost: dict[str, list[str]] = {}
    won: dict[str, list[str]] = {}
    behind: dict[str, list[str]] = {}
    for item in found:
        if item.judgement == LOSES:
            lost.setdefault(item.arm, []).append(f"{item.strength:g}")
        elif item.judgement == WINS:
            won.setdefault(item.arm, []).append(f"{item.strength:g}")
        elif round(item.difference.value, 2) < 0:  # more than interpolation alone gives
            behind.setdefault(item.arm, []).append(f"{item.strength:g}")
    rest = sorted({item.arm for item in found} - set(lost) - set(won))
    parts = [
        f"loses to {_listed(lost)}" if lost else "loses to none of the arms",
        f"beats {_listed(won)}" if won else "beats none of them",
    ]
    parts += [f"cannot be told from {', '.join(rest)}"] if rest else []
    parts += [f"is behind {_listed(behind)} by less than these prompts can decide"] if behind else []
    return f"At equal side effect the spec {'; it '.join(parts)}."


def _listed(arms: dict[str, list[str]]) -> str:
    return ", ".join(f"{arm} (at strength {', '.join(strengths)})" for arm, strengths in arms.items())
