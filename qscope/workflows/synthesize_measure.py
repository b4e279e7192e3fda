"""What the attempts of `qscope synthesize` amount to: yields, support, coverage at equal budget."""

from collections.abc import Sequence

import numpy as np

from qscope.finding.pooled import Ints
from qscope.synthesis.coverage import Bools, budget_curve, budgets, ordered_curve
from qscope.synthesis.targets import Target
from qscope.workflows.synthesize_loop import FEATURE, RANDOM, Row
from qscope.workflows.synthesize_result import VERDICTS, Curve, TargetFound, Yield

NATURAL, UNVERIFIED, IN_ORDER = "natural", "feature-driven, unverified", "feature-driven, as made"


def fires_of(rows: Sequence[Row], size: int) -> Bools:
    """[n, T]"""
    found = np.zeros((len(rows), size), np.bool_)
    for i, row in enumerate(rows):
        found[i, row["fires"]] = True
    return found


def yields(arm: str, rows: Sequence[Row]) -> list[Yield]:
    """By source and role."""
    found = []
    for source, role in sorted({(row["source"], row["role"]) for row in rows}):
        mine = [row for row in rows if (row["source"], row["role"]) == (source, role)]
        verdicts = {name: sum(row["verdict"] == name for row in mine) for name in VERDICTS}
        fire = sum(row["target"] in row["fires"] for row in mine)
        found.append(Yield(arm, source, role, len(mine), {k: v for k, v in verdicts.items() if v}, fire))
    return found


def targets_found(
    targets: Sequence[Target], seed: Ints, pool: Ints | None, rows: Sequence[Row], given_up: set[int]
) -> tuple[TargetFound, ...]:
    kept = [row for row in rows if row["verdict"] == "kept"]
    support = seed + fires_of(kept, len(targets)).sum(axis=0)
    found = []
    for place, target in enumerate(targets):
        mine = [row for row in kept if row["target"] == place]
        found.append(
            TargetFound(
                layer=target.layer,
                feature=target.feature,
                meaning=target.meaning,
                label=target.label,
                relevance=target.relevance,
                seed_support=int(seed[place]),
                pool_support=None if pool is None else int(pool[place]),
                attempts=sum(row["target"] == place for row in rows),
                kept=len(mine),
                support=int(support[place]),
                largest=max((row["activation"] for row in mine), default=0.0),
                given_up=place in given_up,
            )
        )
    return tuple(found)


class Comparison:
    """Coverage of the seed with n texts of each kind."""

    def __init__(self, seed: Bools, rows: Sequence[Row], random: Sequence[Row], pool: Bools | None) -> None:
        size = seed.shape[1]
        kept = [row for row in rows if row["verdict"] == "kept"]
        self.seed, self.kept = seed, len(kept)
        self.attempts = len(rows)
        self.added: dict[str, Bools] = {FEATURE: fires_of(kept, size)}
        written = [row for row in rows if row["text"]]
        self.added[UNVERIFIED] = fires_of(written, size)
        if random:
            self.added[RANDOM] = fires_of([row for row in random if row["verdict"] == "kept"], size)
        if pool is not None:
            self.added[NATURAL] = pool
        self.fire = (sum(row["target"] in row["fires"] for row in written) / len(written)) if written else None

    def curves(self) -> tuple[Curve, ...]:
        found = []
        for name, added in self.added.items():
            sizes = budgets(min(len(added), max(self.kept, self.attempts)))
            values = budget_curve(self.seed, added, sizes).tolist()
            found.append(Curve(name, len(added), [(n, v) for n, v in zip(sizes, values, strict=True)]))
        made = ordered_curve(self.seed, self.added[FEATURE])
        sizes = budgets(self.kept)
        return (*found, Curve(IN_ORDER, self.kept, [(n, float(made[n])) for n in sizes]))

    def at(self, n: int, names: Sequence[str]) -> dict[str, float]:
        """Expected coverage with n texts (or all there are, if fewer) of each kind."""
        return {
            name: float(budget_curve(self.seed, self.added[name], [min(n, len(self.added[name]))])[0])
            for name in names
            if name in self.added
        }
