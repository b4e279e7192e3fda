"""How the figures depend on the amount of training text, on its group, and on chance: the studies as plain results."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qscope.classification import studies
from qscope.classification.resampling import Estimate
from qscope.finding.pooled import Ints
from qscope.workflows.classify_evaluate_methods import Data, Entry
from qscope.workflows.classify_evaluate_result import CurvePoint, Transfer

MOST_GROUPS = 16  # of the transfer matrix


def efficiency(
    data: Data, entries: Sequence[Entry], shares: Sequence[float], draws: int, seed: int, step: Callable[[str], None]
) -> list[CurvePoint]:
    """Every method fitted on shares of the training and calibration texts, as it stands in the table: at its layer.

    All of the texts are drawn once only.
    """
    group = data.labelled.group if len(data.labelled.groups) > 1 else None
    parts = [(tuple(s for s in shares if s < 1), tuple(range(seed, seed + draws)))]
    parts += [((1.0,), (seed,))] if 1.0 in shares else []
    found = []
    for entry in entries:
        for some, seeds in parts:
            for point in studies.data_efficiency([entry.method], data.problem, data.test, some, seeds, group):
                found.append(_curve_point(entry, point, data.main, len(seeds)))
        step(f"{entry.name}, fewer texts")
    return found


def _curve_point(entry: Entry, point: studies.EfficiencyPoint, main: str, draws: int) -> CurvePoint:
    spread = point.figures.get(main)
    if spread is None or spread.mean is None:
        reason = point.failures[0] if point.failures else "undefined"
        return CurvePoint(entry.name, entry.family, point.share, point.train, Estimate(None, None, None, reason), draws)
    figure = Estimate(spread.mean, spread.lowest, spread.highest, undefined=draws - spread.values)
    return CurvePoint(entry.name, entry.family, point.share, point.train, figure, draws)


def transfers(data: Data, entries: Sequence[Entry], step: Callable[[str], None]) -> list[Transfer]:
    """The methods learned on each group and tested on each; nothing without two groups, or with too many."""
    names, group = data.labelled.groups, data.labelled.group
    if not 2 <= len(names) <= MOST_GROUPS:
        return []
    found = []
    for entry in entries:
        (study,) = studies.transfer([entry.method], data.problem, data.test, group, names)
        matrix = study.matrix(data.main)
        cells = [[None if np.isnan(value) else float(value) for value in row] for row in matrix]
        found.append(Transfer(entry.name, entry.family, list(names), list(study.sources), cells))
        step(f"{entry.name}, group by group")
    return found


def feature_overlap(data: Data, choose: Callable[[Ints], Sequence[Any]]) -> list[list[float | None]]:
    """Jaccard overlap of the features that the training texts of each group choose on their own.

    choose: weights [T] -> features. None for a group with training texts of one class only.
    """
    names, group, train = data.labelled.groups, data.labelled.group, data.problem.train
    chosen: dict[str, Sequence[Any]] = {}
    for number, name in enumerate(names):
        mine = train[group[train] == number]
        if len(np.unique(data.problem.label[mine])) == data.classes:
            chosen[name] = choose(np.bincount(mine, minlength=len(data.problem.label)))
    found = studies.shared_features(chosen)
    place = {name: i for i, name in enumerate(chosen)}
    return [
        [float(found.jaccard[place[a], place[b]]) if a in place and b in place else None for b in names] for a in names
    ]
