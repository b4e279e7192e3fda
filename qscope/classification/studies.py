"""What a classifier's figures depend on: how many labelled texts it saw, from which group, and which ones by chance."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from qscope.classification.methods import Method, Problem
from qscope.classification.metrics import Figure, Spread, figures, spread
from qscope.errors import InputError
from qscope.finding.pooled import Floats, Ints
from qscope.finding.stability import Interval, over

SHARES = (0.01, 0.05, 0.1, 0.5, 1.0)
LEAST = 2
"""Texts of each class that every share keeps, where there are as many"""


# --- data efficiency ---------------------------------------------------------------------------------------


def nested_subsets(
    label: Ints, texts: Ints, shares: Sequence[float], seed: int, group: Ints | None = None, least: int = LEAST
) -> list[Ints]:
    """For every share of the texts their numbers, ascending: a smaller share is contained in a larger one.

    Of each class max(least, share x its texts, rounded) are kept, spread evenly over the groups.

    Args:
        label, group: [T]; texts: the numbers to choose from.

    Raises:
        InputError: for a share that is not above 0 and at most 1.
    """
    if any(not 0 < share <= 1 for share in shares):
        raise InputError(f"Shares of the texts are above 0 and at most 1; given: {list(shares)}.")
    generator = np.random.default_rng(seed)
    classes = label[texts]
    groups = np.zeros(len(texts), np.int64) if group is None else group[texts]
    place, tie = np.zeros(len(texts)), generator.random(len(texts))
    for number in np.unique(classes):
        for name in np.unique(groups):
            mine = np.flatnonzero((classes == number) & (groups == name))
            place[mine] = (generator.permutation(len(mine)) + 0.5) / max(1, len(mine))
    found = []
    for share in shares:
        kept = []
        for number in np.unique(classes):
            mine = np.flatnonzero(classes == number)
            order = mine[np.lexsort((tie[mine], place[mine]))]
            kept.append(texts[order[: max(least, round(share * len(mine)))]])
        found.append(np.sort(np.concatenate(kept)))
    return found


@dataclass(frozen=True)
class EfficiencyPoint:
    """A method that has seen a share of the labelled texts."""

    method: str
    share: float
    train: int
    """Training texts at this share"""
    figures: dict[str, Spread]
    """Over the seeds, of the test split"""
    failures: tuple[str, ...]
    """Why, for every seed for which the method could not be fitted"""


def data_efficiency(
    methods: Sequence[Method],
    problem: Problem,
    test: Ints,
    shares: Sequence[float] = SHARES,
    seeds: Sequence[int] = (0, 1, 2),
    group: Ints | None = None,
) -> list[EfficiencyPoint]:
    """Figures of the test split for growing shares of the labelled texts, methods in order, then shares.

    A share is taken of the training and of the calibration split, so that 1 % is 1 % of all labels that are used. Every
    method sees the same subsets. The seeds choose the texts; at a share of 1 they choose the same ones, so that the
    method is fitted once.
    """
    drawn = [
        list(
            zip(
                nested_subsets(problem.label, problem.train, shares, seed, group),
                nested_subsets(problem.label, problem.calibration, shares, seed, group),
                strict=True,
            )
        )
        for seed in seeds
    ]
    found = []
    for method in methods:
        for place, share in enumerate(shares):
            outcomes = []
            for subsets in drawn:
                train, calibration = subsets[place]
                part = replace(problem, train=train, calibration=calibration)
                outcomes.append(_outcome(method, part, [test]))
                if share == 1:
                    break
            values = [tables[0] for tables, _ in outcomes if tables]
            found.append(
                EfficiencyPoint(
                    method=method.name,
                    share=share,
                    train=len(drawn[0][place][0]) if drawn else 0,
                    figures={name: spread([table[name] for table in values]) for name in (values or [{}])[0]},
                    failures=tuple(reason for _, reason in outcomes if reason is not None),
                )
            )
    return found


def _outcome(method: Method, problem: Problem, tests: Sequence[Ints]) -> tuple[list[dict[str, Figure]], str | None]:
    """(figures of each of the test sets, None), or (nothing, why the method could not be fitted)."""
    try:
        prediction = method.fit(problem)
    except InputError as error:
        return [], str(error)
    return [figures(problem.label[test], problem.classes, prediction.take(test)) for test in tests], None


# --- transfer between groups -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """G groups: learned and calibrated on one, tested on another."""

    method: str
    groups: tuple[str, ...]
    sources: tuple[str, ...]
    """The groups, and `all` of them together as the last if it was asked for"""
    cells: tuple[tuple[dict[str, Figure], ...], ...]
    """[source][group] -> figures by name; empty where the method could not be fitted on the source"""
    failures: dict[str, str]
    """source -> why"""

    def matrix(self, name: str) -> Floats:
        """[S, G] of one figure; NaN where it has no value."""
        rows = [[cell[name].value if name in cell else None for cell in row] for row in self.cells]
        return np.array(rows, np.float64).reshape(len(self.sources), len(self.groups))


def transfer(
    methods: Sequence[Method],
    problem: Problem,
    test: Ints,
    group: Ints,
    names: Sequence[str],
    together: bool = True,
) -> list[Transfer]:
    """Each method learned on the texts of one group and tested on those of every group.

    Args:
        problem: its splits are cut down to the group that is learned; test: numbers of the test texts.
        group: [T] places in `names`.
        together: adds a source made of all groups.
    """
    sources = [*names, "all"] if together else list(names)
    tests = [test[group[test] == place] for place in range(len(names))]
    found = []
    for method in methods:
        cells, failures = [], {}
        for place, source in enumerate(sources):
            tables, reason = _of_source(method, problem, tests, group, place if place < len(names) else None)
            if reason is not None:
                failures[source] = reason
            cells.append(tuple(tables or [{} for _ in names]))
        found.append(Transfer(method.name, tuple(names), tuple(sources), tuple(cells), failures))
    return found


def _of_source(
    method: Method, problem: Problem, tests: Sequence[Ints], group: Ints, place: int | None
) -> tuple[list[dict[str, Figure]], str | None]:
    if place is None:
        return _outcome(method, problem, tests)
    train, calibration = (part[group[part] == place] for part in (problem.train, problem.calibration))
    try:
        part = replace(problem, train=train, calibration=calibration)
    except InputError as error:  # the group has one class only
        return [], str(error)
    return _outcome(method, part, tests)


@dataclass(frozen=True)
class SharedFeatures:
    """Of the features chosen in each of G groups."""

    groups: tuple[str, ...]
    jaccard: Floats
    """[G, G]; two empty sets are equal: 1"""
    mean: float | None
    """Over the pairs of different groups; None with fewer than two groups"""
    quartiles: tuple[float, float] | None


def shared_features(chosen: Mapping[str, Sequence[Hashable]]) -> SharedFeatures:
    """Jaccard overlap of the top features between groups (Qwen-Scope 5: top 10 at a fixed layer, per language pair)."""
    sets = [frozenset(features) for features in chosen.values()]
    table = np.array([[jaccard(left, right) for right in sets] for left in sets]).reshape(len(sets), len(sets))
    pairs = table[np.triu_indices(len(sets), 1)]
    if not len(pairs):
        return SharedFeatures(tuple(chosen), table, None, None)
    low, high = np.quantile(pairs, (0.25, 0.75)).tolist()
    return SharedFeatures(tuple(chosen), table, float(pairs.mean()), (low, high))


def jaccard(left: frozenset[Hashable], right: frozenset[Hashable]) -> float:
    return len(left & right) / len(left | right) if left | right else 1.0


# --- stability of the choice -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChoiceStability:
    """How far the chosen features depend on which training texts happened to be there."""

    chosen: tuple[Any, ...]
    """With all training texts, as `choose` orders them"""
    inclusion: dict[Any, float]
    """Feature -> share of the bootstrap splits in which it is chosen; most often first"""
    with_all: Interval
    """Jaccard of a bootstrap split's features with those of all texts; they share most texts, so the upper end"""
    between: Interval
    """Jaccard of the features of two bootstrap splits, over all pairs"""
    halves: Interval
    """Jaccard of the features of two halves without a text in common: the lower end, each has half of the texts"""
    splits: int


def choice_stability(
    choose: Callable[[Ints], Sequence[Any]],
    label: Ints,
    train: Ints,
    splits: int = 100,
    seed: int = 0,
    group: Ints | None = None,
) -> ChoiceStability:
    """Choose features again on bootstrap splits of the training texts, drawn within each class and group.

    Args:
        choose: weights [T] (how often each text counts, 0 outside the split) -> features, best first.
        label, group: [T]; train: numbers of the training texts.

    Raises:
        InputError: for fewer than two splits.
    """
    if splits < 2:
        raise InputError(f"{splits} bootstrap splits tell nothing about stability; give at least 2.")
    generator = np.random.default_rng(seed)
    strata = list(_strata(label, train, group))
    chosen = tuple(choose(np.bincount(train, minlength=len(label))))
    drawn, pairs = [], []
    for _ in range(splits):
        again = [part[generator.integers(len(part), size=len(part))] for part in strata]
        drawn.append(frozenset(choose(np.bincount(np.concatenate(again), minlength=len(label)))))
        # an odd text goes to the first half of one stratum and to the second of the next, so that halves stay equal
        mixed = [generator.permutation(part) for part in strata]
        cuts = [(len(part) + i % 2) // 2 for i, part in enumerate(mixed)]
        sides = [
            np.concatenate([part[:cut] for part, cut in zip(mixed, cuts, strict=True)]),
            np.concatenate([part[cut:] for part, cut in zip(mixed, cuts, strict=True)]),
        ]
        pairs.append([frozenset(choose(np.bincount(side, minlength=len(label)))) for side in sides])
    counts: dict[Any, int] = dict.fromkeys(chosen, 0)
    for features in drawn:
        for feature in features:
            counts[feature] = counts.get(feature, 0) + 1
    place = {feature: i for i, feature in enumerate(chosen)}
    order = sorted(counts, key=lambda feature: (-counts[feature], place.get(feature, len(chosen)), feature))
    return ChoiceStability(
        chosen=chosen,
        inclusion={feature: counts[feature] / splits for feature in order},
        with_all=over([jaccard(frozenset(chosen), features) for features in drawn]),
        between=over([jaccard(left, right) for left, right in combinations(drawn, 2)]),
        halves=over([jaccard(left, right) for left, right in pairs]),
        splits=splits,
    )


def _strata(label: Ints, train: Ints, group: Ints | None) -> Iterator[Ints]:
    for number in np.unique(label[train]):
        own = train[label[train] == number]
        if group is None:
            yield own
            continue
        for name in np.unique(group[own]):
            yield own[group[own] == name]
