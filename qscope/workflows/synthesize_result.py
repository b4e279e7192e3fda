"""What `qscope synthesize` gives."""

from dataclasses import dataclass, field
from typing import Any

VERDICTS = ("kept", "silent", "empty", "same text", "same features", "over budget")
"""What becomes of an attempt: silent does not fire its target; same text and same features are near-duplicates"""


@dataclass(frozen=True)
class TargetFound:
    """One target feature."""

    layer: int
    feature: int
    meaning: str | None
    label: str | None
    relevance: float | None
    seed_support: int
    """Seed texts that fire it"""
    pool_support: int | None
    """Texts of the pool that do"""
    attempts: int
    kept: int
    """Examples that were made for it, fire it and are kept"""
    support: int
    """Seed texts and kept examples that fire it, whatever they were made for"""
    largest: float
    """Activation of the strongest kept example that was made for it; 0 without any"""
    given_up: bool


@dataclass(frozen=True)
class Yield:
    """Attempts of one source in one arm."""

    arm: str
    source: str
    role: str
    attempts: int
    verdicts: dict[str, int]
    fire: int
    """Attempts that fire their target, near-duplicates included"""


@dataclass(frozen=True)
class Curve:
    """Coverage of the targets by budget: the seed with n texts."""

    name: str
    texts: int
    """That there are"""
    points: list[tuple[int, float]]
    """(n, expected coverage with n random ones of them)"""


@dataclass(frozen=True)
class SynthesizeResult:
    """Targets, yields, coverage, and where the examples are."""

    model: str
    about: dict[str, str]
    notes: tuple[str, ...]
    targets: tuple[TargetFound, ...]
    yields: tuple[Yield, ...]
    seed_texts: int
    pool_texts: int
    budget: int
    kept: int
    attempts: int
    coverage_seed: float
    coverage: dict[str, float]
    """With the seed, at the number of kept examples: feature-driven; expected of random and natural, where compared"""
    coverage_attempts: dict[str, float]
    """At the number of attempts: unverified feature-driven and random, where compared"""
    unverified_fire: float | None
    """Share of the feature-driven attempts with a text that fire their target: what a set without verification holds"""
    curves: tuple[Curve, ...]
    calls: dict[str, int]
    """Requests to an endpoint, in this run only"""
    examples: str
    """File of the kept examples"""
    html: str | None
    seconds: float
    exit_status: int = 0
    shown: tuple[dict[str, Any], ...] = field(default=())
    """Some kept examples"""
