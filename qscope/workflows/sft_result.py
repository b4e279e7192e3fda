"""What `qscope sft` measured, and what it says about the arms."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qscope.post_training.switching import GroupSwitching, Interval, two_way, wilson

BASE, NONE, PENALTY = "base", "none", "penalty"


@dataclass(frozen=True)
class Point:
    """One training run: an arm at a weight, from a seed."""

    arm: str
    weight: float | None
    seed: int

    @property
    def name(self) -> str:
        return arm_name(self.arm, self.weight)

    @property
    def folder(self) -> str:
        weight = "" if self.weight is None else f"-{self.weight:g}"
        return f"{self.arm}{weight}-seed{self.seed}"


def arm_name(arm: str, weight: float | None) -> str:
    return arm if weight is None else f"{arm} {weight:g}"


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy on the answers of held-out examples, nats per token."""

    value: float
    tokens: int


@dataclass(frozen=True)
class PointResult:
    """What one run gave; kept in its folder as result.json."""

    arm: str
    weight: float | None
    seed: int
    examples: int
    """Trained on"""
    steps: int
    seconds: float
    """Of training in this call; a run that was continued does not count what came before"""
    terms: dict[str, Any]
    """What the arm was made of: features, directions, tokens"""
    log: list[dict[str, float]]
    """The trainer's log"""
    clean_loss: dict[str, Loss]
    """group -> on answers free of the target's scripts (of the target: on all)"""
    mixed_loss: dict[str, Loss]
    """group -> on answers that hold them, where there are any"""
    nats: list[float]
    """Loss of each clean held-out example of the other groups, summed over its tokens; the same order in all runs"""
    nat_tokens: list[int]
    switching: GroupSwitching
    by_group: dict[str, GroupSwitching]
    hits: list[float]
    """Switched responses of each prompt"""
    sizes: list[float]
    """Responses of each prompt"""
    length: float
    """Mean characters of a response"""
    samples: list[dict[str, str]]


@dataclass(frozen=True)
class ArmResult:
    """One arm at one weight, over its seeds."""

    arm: str
    weight: float | None
    seeds: tuple[int, ...]
    ratio: Interval
    """Code-switching ratio, mean over seeds; bootstrap over seeds and prompts, or Wilson of the prompts where none or
    all switched"""
    ratios: tuple[float, ...]
    """Of each seed"""
    groups: dict[str, float]
    """group -> ratio, mean over seeds"""
    share: float
    """Mean share of letters in the target's scripts"""
    other_language: float | None
    empty: int
    responses: int
    loss: Interval
    """Clean held-out loss of the other groups; bootstrap over seeds and examples"""
    losses: tuple[float, ...]
    target_loss: float | None
    """Held-out loss of the target group, mean over seeds"""
    length: float
    seconds: float
    """Of training, mean over seeds"""

    @property
    def name(self) -> str:
        return arm_name(self.arm, self.weight)


@dataclass(frozen=True)
class Comparison:
    """A penalty beside another arm, on the same seeds, prompts and examples."""

    penalty: str
    other: str
    ratio: Interval
    """Penalty minus other: below 0, the penalty switches less"""
    loss: Interval
    """Penalty minus other: above 0, the penalty has cost more"""
    judgement: str
    """less, more, or not told apart: of switching"""


@dataclass(frozen=True)
class SFTResult:
    model: str
    target_group: str
    scripts: tuple[str, ...]
    about: dict[str, str]
    notes: tuple[str, ...]
    features: dict[str, tuple[int, ...]]
    """layer -> features that the penalty holds down"""
    nu: dict[str, tuple[float, ...]]
    arms: tuple[ArmResult, ...]
    comparisons: tuple[Comparison, ...]
    verdict: tuple[str, ...]
    """Sentences computed from the comparisons"""
    points: tuple[PointResult, ...]
    out: Path

    @property
    def page(self) -> Path:
        return self.out / "report.html"


LESS, MORE, OPEN = "less", "more", "not told apart"


def summarise(points: list[PointResult], draws: int) -> list[ArmResult]:
    """A row for each arm and weight, in the order of the points."""
    found = []
    for key in dict.fromkeys((p.arm, p.weight) for p in points):
        mine = [p for p in points if (p.arm, p.weight) == key]
        hits = {p.seed: np.array(p.hits) for p in mine}
        nats = {p.seed: np.array(p.nats) for p in mine}
        target = [loss.value for p in mine for group, loss in p.clean_loss.items() if group == p.terms["target_group"]]
        other = [p.switching.other_language.value for p in mine if p.switching.other_language is not None]
        groups = mine[0].by_group
        found.append(
            ArmResult(
                arm=key[0],
                weight=key[1],
                seeds=tuple(p.seed for p in mine),
                ratio=_ratio(hits, np.array(mine[0].sizes), draws),
                ratios=tuple(p.switching.ratio.value for p in mine),
                groups={g: float(np.mean([p.by_group[g].ratio.value for p in mine])) for g in groups},
                share=float(np.mean([p.switching.share for p in mine])),
                other_language=float(np.mean(other)) if other else None,
                empty=sum(p.switching.empty for p in mine),
                responses=sum(p.switching.responses for p in mine),
                loss=two_way(nats, np.array(mine[0].nat_tokens, float), draws),
                losses=tuple(float(sum(p.nats) / max(1, sum(p.nat_tokens))) for p in mine),
                target_loss=float(np.mean(target)) if target else None,
                length=float(np.mean([p.length for p in mine])),
                seconds=float(np.mean([p.seconds for p in mine])),
            )
        )
    return found


def _ratio(hits: dict[int, Any], sizes: Any, draws: int) -> Interval:
    """With its interval; where all answers agree a bootstrap has none, and Wilson's of the prompts stands for it."""
    found = two_way(hits, sizes, draws)
    whole = {float(row.sum() / sizes.sum()) for row in hits.values()}
    return wilson(round(found.value) * len(sizes), len(sizes)) if whole <= {0.0} or whole <= {1.0} else found


def compare(points: list[PointResult], draws: int) -> list[Comparison]:
    """Every weight of the penalty beside every other arm that was trained."""
    keys = list(dict.fromkeys((p.arm, p.weight) for p in points if p.arm != BASE))
    found = []
    for penalty in (key for key in keys if key[0] == PENALTY):
        for other in (key for key in keys if key[0] != PENALTY):
            mine = {p.seed: p for p in points if (p.arm, p.weight) == penalty}
            theirs = {p.seed: p for p in points if (p.arm, p.weight) == other}
            if not set(mine) & set(theirs):
                continue
            first = next(iter(mine.values()))
            ratio, loss = (
                two_way(
                    {s: np.array(getattr(p, name)) for s, p in mine.items()},
                    np.array(getattr(first, sizes), float),
                    draws,
                    0,
                    {s: np.array(getattr(p, name)) for s, p in theirs.items()},
                )
                for name, sizes in (("hits", "sizes"), ("nats", "nat_tokens"))
            )
            judgement = LESS if ratio.high < 0 else MORE if ratio.low > 0 else OPEN
            found.append(Comparison(arm_name(*penalty), arm_name(*other), ratio, loss, judgement))
    return found


def verdict(arms: list[ArmResult], comparisons: list[Comparison]) -> tuple[str, ...]:
    """What the numbers say, a sentence or two for each weight of the penalty."""
    if not any(arm.arm == NONE for arm in arms):
        return ("Plain SFT (the arm none) was not run, so nothing says how much it switches.",)
    plain = next(arm for arm in arms if arm.arm == NONE)
    found = []
    if plain.ratio.value == 0:
        found.append("Plain SFT did not switch once, so there is nothing that an arm could lower.")
    for arm in (a for a in arms if a.arm == PENALTY):
        mine = [c for c in comparisons if c.penalty == arm.name]
        against = next((c for c in mine if c.other == NONE), None)
        text = f"{arm.name}: switching {_percent(arm.ratio.value)}"
        if against is not None:
            how = {LESS: "less than", MORE: "more than", OPEN: "not told apart from"}[against.judgement]
            cost = f"{against.loss.value:+.4f} nats per token [{against.loss.low:+.4f}, {against.loss.high:+.4f}]"
            text += f", {how} {_percent(plain.ratio.value)} of plain SFT; clean held-out loss {cost}."
        found.append(text)
        controls = [c for c in mine if c.other != NONE]
        unbeaten = [f"{c.other} ({_points(c.ratio)})" for c in controls if c.judgement != LESS]
        dearer = [c.other for c in controls if c.judgement == LESS and c.loss.low > 0]
        if unbeaten:
            found.append(
                f"The SAE does not beat these controls (switching, penalty minus control): {'; '.join(unbeaten)}."
            )
        elif controls:
            found.append("It switches less than every control that was run.")
        if dearer:
            found.append(f"It switches less than {', '.join(dearer)}, and its held-out loss is higher.")
    return tuple(found) or ("The penalty was not run.",)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _points(found: Interval) -> str:
    return f"{100 * found.value:+.2f} points [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def as_json(result: Any) -> Any:
    """Plain data, for the files."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(result).items()}


def point_from_json(data: dict[str, Any]) -> PointResult:
    """What `as_json` made of a point; TypeError or KeyError for anything else."""

    def interval(found: dict[str, float] | None) -> Interval | None:
        return None if found is None else Interval(**found)

    def group(found: dict[str, Any]) -> GroupSwitching:
        ratio = interval(found["ratio"])
        assert ratio is not None
        return GroupSwitching(**found | {"ratio": ratio, "other_language": interval(found["other_language"])})

    return PointResult(
        **data
        | {
            "clean_loss": {g: Loss(**x) for g, x in data["clean_loss"].items()},
            "mixed_loss": {g: Loss(**x) for g, x in data["mixed_loss"].items()},
            "switching": group(data["switching"]),
            "by_group": {g: group(x) for g, x in data["by_group"].items()},
        }
    )
