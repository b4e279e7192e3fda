"""Scores of models beside the features of benchmarks: do benchmarks that share features also score alike?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qscope.coverage.performance import (
    PerformanceRedundancy,
    pair_agreement,
    partial_correlation,
    performance_redundancy,
    score_similarity,
    spearman,
)
from qscope.coverage.suite import Overlaps
from qscope.errors import InputError
from qscope.finding.pooled import Floats
from qscope.workflows.coverage_inputs import Benchmark, Scores, read_item_scores, read_scores
from qscope.workflows.coverage_result import Agreement, Performance, ScoredPair, TwoRedundancies

if TYPE_CHECKING:
    from qscope.workflows.coverage import CoverageConfig

LEAST_BENCHMARKS = 3


@dataclass(frozen=True)
class Scored:
    """What the tables of scores hold, the same for all layers."""

    table: Scores | None
    items: dict[str, tuple[int, PerformanceRedundancy]]
    """Benchmark -> (models, R)"""
    notes: tuple[str, ...]


def read(config: "CoverageConfig", benchmarks: Sequence[Benchmark]) -> Scored | None:
    """The tables that the config names, checked before the model runs. None: it names none."""
    if config.scores is None and not config.item_scores:
        return None
    by_name = {benchmark.name: benchmark for benchmark in benchmarks}
    notes: list[str] = []
    table = None
    if config.scores is not None:
        table = read_scores(config.scores, tuple(by_name))
        notes += table.notes
        if config.control is not None and config.control not in table.benchmarks:
            raise InputError(
                f"--control {config.control} is no benchmark with scores in {config.scores}; it has "
                f"{', '.join(table.benchmarks)}."
            )
    items = {}
    for text in config.item_scores:
        name, _, path = text.partition("=")
        if name not in by_name or not path:
            raise InputError(
                f"--item-scores {text!r} was given; NAME=TABLE is accepted, with a benchmark's name: "
                f"{', '.join(by_name)}."
            )
        if by_name[name].store is not None:
            raise InputError(f"--item-scores names {name}, a feature store; only benchmarks from files have rows.")
        models, values, said = read_item_scores(Path(path), by_name[name])
        notes += said
        try:
            items[name] = (len(models), performance_redundancy(values, seed=config.seed))
        except InputError as error:
            raise InputError(f"--item-scores {path}, for {name}: {error} Leave it out.") from error
    return Scored(table, items, tuple(notes))


def beside(
    scored: Scored,
    control: str | None,
    names: Sequence[str],
    raw: Overlaps,
    matched: Overlaps,
    redundancy: Sequence[float | None],
    seed: int,
) -> Performance:
    """At one layer. redundancy: R-hat of each benchmark."""
    both = [(name, *scored.items[name]) for name in names if name in scored.items]
    own = dict(zip(names, redundancy, strict=True))
    redundancies = tuple(TwoRedundancies(name, models, r.value, own[name]) for name, models, r in both)
    known = [(t.scores.value, t.features) for t in redundancies if t.features is not None]
    rho = None
    if len(known) >= LEAST_BENCHMARKS:
        rho = known_or_none(spearman(np.array([r for r, _ in known]), np.array([f for _, f in known])).value)
    if scored.table is None:
        return Performance(0, None, (), (), redundancies, rho)
    table = scored.table
    similar = score_similarity(table.values)
    place = [names.index(name) for name in table.benchmarks]
    held = table.benchmarks.index(control) if control is not None else None
    partial = partial_correlation(similar, held) if held is not None else None
    agreements = []
    for title, overlaps in (("all items", raw), ("equal size", matched)):
        overlap = overlaps.overlap_min[np.ix_(place, place)]
        agreements.append(_agreement(title, False, overlap, similar, None, seed))
        if partial is not None:
            agreements.append(_agreement(title, True, overlap, partial, held, seed))
    pairs = tuple(
        ScoredPair(a, b, known_or_none(similar[i, j]), known_or_none(partial[i, j]) if partial is not None else None)
        for i, a in enumerate(table.benchmarks)
        for j, b in enumerate(table.benchmarks)
        if i < j
    )
    return Performance(len(table.models), control, pairs, tuple(agreements), redundancies, rho)


def _agreement(
    title: str, partial: bool, overlap: Floats, similar: Floats, control: int | None, seed: int
) -> Agreement:
    found = pair_agreement(overlap, similar, control, seed=seed)
    figures = (found.pearson, found.pearson_p, found.spearman, found.spearman_p)
    pearson, pearson_p, rho, rho_p = map(known_or_none, figures)
    return Agreement(title, partial, pearson, pearson_p, rho, rho_p, found.pairs)


def known_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
