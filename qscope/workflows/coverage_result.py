"""What `qscope coverage` found. Every figure is explained in docs/coverage.md; None stands for what is undefined."""

from dataclasses import dataclass, field

from qscope.finding.stability import Interval
from qscope.workflows.steer_find_result import TokenFacts


@dataclass(frozen=True)
class BenchmarkFacts:
    """One benchmark as it was read."""

    name: str
    source: str
    rows: int
    items: int
    """N: those with a token that counts"""
    broken: int
    replaced: int
    empty: int
    duplicates: int
    dropped: int
    sampled_from: int | None
    no_tokens: int
    """Items without a token that counts: left out"""
    truncated: int
    longest: int
    """Tokens of the longest item before it was cut; 0 for a feature store, which does not say"""
    tokens: int
    """That count, over all items"""


@dataclass(frozen=True)
class StrongItem:
    """An item at which a feature is strong."""

    row: int
    activation: float
    text: str
    """Its end (pooling last) or its beginning"""


@dataclass(frozen=True)
class ExclusiveFeature:
    """A feature that one benchmark's items fire more often than any other's."""

    feature: int
    rate: float
    """Share of the benchmark's items that fire it"""
    elsewhere: float
    """Largest share in another benchmark"""
    where: str | None
    """That benchmark; None where no other one fires it"""
    lens: tuple[str, ...] = ()
    """Tokens that its decoder row raises most, by the logit lens"""
    items: tuple[StrongItem, ...] = ()


@dataclass(frozen=True)
class BenchmarkFound:
    """One benchmark at one layer."""

    name: str
    items: int
    features: int
    """|F(D)|"""
    mean_size: float
    """Features of an item, on average"""
    silent: int
    """Items that fire nothing"""
    redundancy: float | None
    """R-hat, of all items"""
    saturation_area: float | None
    """AUC(c)"""
    matched_redundancy: float | None
    """R-hat of as many items as benchmarks are compared at"""
    matched_redundancy_interval: Interval | None
    curve: tuple[tuple[int, float], ...]
    """(n, expected share of the features that n random items fire)"""
    matched_features: float
    """Expected features of as many items as benchmarks are compared at"""
    matched_features_interval: Interval | None
    ceiling: float | None
    """Size-matched Jaccard of two samples of this benchmark; None: it has fewer than twice the items"""
    covered: Interval | None
    """Share of an item's features that other items fire too: median over the items, with the quartiles as its ends"""
    subset: int
    """Items of the greedy subset that keeps the wanted share of the features"""
    random_subset: int | None
    """Items of a random subset that is expected to keep it"""
    subset_curve: tuple[tuple[int, float], ...]
    """(items, share of the features) along the greedy order"""
    null_features: float | None
    """`matched_features` of the random text in its place"""
    null_redundancy: float | None
    """`matched_redundancy` of it"""
    exclusive: tuple[ExclusiveFeature, ...]


@dataclass(frozen=True)
class PairFound:
    """Two benchmarks at one layer. None: a benchmark fires nothing."""

    a: str
    b: str
    shared: int
    """Features of both"""
    overlap_ab: float | None
    """Share of a's features that b has"""
    overlap_ba: float | None
    overlap_min: float | None
    jaccard: float | None
    matched_ab: float | None
    matched_ba: float | None
    matched_min: float | None
    matched_jaccard: float | None
    matched_interval: Interval | None
    one_population: float | None
    """Size-matched Jaccard expected if the items of both were shuffled together"""
    relative: float | None
    """matched_jaccard / one_population"""
    p_one_population: float | None
    """Share of the permutations of items between both with a size-matched Jaccard as low as the observed"""
    null_jaccard: float | None
    """Size-matched Jaccard of the random texts in place of both"""
    null_interval: Interval | None
    above_null: Interval | None
    """matched_jaccard - null_jaccard"""
    p_null: float | None
    """Two-sided, of no difference, by half-samples"""
    cross_null: float | None
    """Mean of a with the random text in b's place and of b with that in a's"""
    above_cross: Interval | None
    """matched_jaccard - cross_null"""
    p_cross: float | None


@dataclass(frozen=True)
class Added:
    """One step of adding benchmarks to a suite."""

    name: str
    features: int
    """That it adds"""
    total: int
    """Of the suite after it"""
    share: float
    """`total` over the features of all benchmarks"""
    matched: float
    """Features that as many random items as benchmarks are compared at add to as many of each before it"""


@dataclass(frozen=True)
class Marginal:
    """What one benchmark brings to all the others."""

    name: str
    unique: int
    """Features that no other benchmark has"""
    share: float
    """Of its own features"""
    matched: float
    """Features that it is expected to add to the others with equally many random items of each"""


@dataclass(frozen=True)
class ScoredPair:
    """Two benchmarks that models were scored on."""

    a: str
    b: str
    similarity: float | None
    """Pearson over the models of their scores"""
    partial: float | None
    """With the control benchmark held fixed"""


@dataclass(frozen=True)
class Agreement:
    """How pairs that share features also score alike: over pairs of benchmarks; None: undefined."""

    overlap: str
    """overlap min, of all items or at equal size"""
    partial: bool
    """The control benchmark is held fixed, and its pairs are left out"""
    pearson: float | None
    pearson_p: float | None
    spearman: float | None
    spearman_p: float | None
    """One-sided, by relabelling benchmarks (Mantel 1967)"""
    pairs: int


@dataclass(frozen=True)
class TwoRedundancies:
    """Of one benchmark with a table of item scores."""

    name: str
    models: int
    scores: Interval
    """R; the interval is that of the drawn orders of items"""
    features: float | None
    """R-hat"""


@dataclass(frozen=True)
class Performance:
    """Features beside scores of models, at one layer."""

    models: int
    control: str | None
    pairs: tuple[ScoredPair, ...]
    agreements: tuple[Agreement, ...]
    redundancies: tuple[TwoRedundancies, ...]
    redundancy_spearman: float | None
    """Of R with R-hat; None for fewer than three benchmarks"""


@dataclass(frozen=True)
class Moved:
    """One other setting, and how far it moves the rankings: Kendall's tau-b with the report's own setting."""

    layer: str
    setting: str
    against: str
    redundancy_tau: float | None
    pairs_tau: float | None
    features: float
    """Mean over the benchmarks of |F(D)|"""
    redundancy_order: tuple[str, ...]
    """Most redundant first"""


@dataclass(frozen=True)
class LayerFound:
    """One layer."""

    sae: str
    d_sae: int
    k: int
    tokens: TokenFacts
    """Over all benchmarks"""
    null_tokens: TokenFacts | None
    suite_features: int
    benchmarks: tuple[BenchmarkFound, ...]
    pairs: tuple[PairFound, ...]
    matrix: tuple[tuple[float | None, ...], ...]
    """Size-matched Jaccard"""
    raw: tuple[tuple[float | None, ...], ...]
    """overlap(row, column): share of the row's features that the column has"""
    relative: tuple[tuple[float | None, ...], ...]
    order: tuple[int, ...]
    """Benchmarks as the dendrogram sorts them"""
    merges: tuple[tuple[int, int, float], ...]
    """Average linkage over 1 - size-matched Jaccard; nodes numbered as scipy does"""
    adding: tuple[Added, ...]
    marginal: tuple[Marginal, ...]
    performance: Performance | None
    mismatch: str | None = None


@dataclass(frozen=True)
class CoverageResult:
    """Everything but the tables of items, which lie beside coverage.json."""

    model: str
    about: dict[str, str]
    notes: tuple[str, ...]
    match_items: int
    subset_share: float
    benchmarks: tuple[BenchmarkFacts, ...]
    layers: dict[str, LayerFound]
    sensitivity: tuple[Moved, ...]
    out: str
    html: str | None
    tables: tuple[str, ...] = field(default=())
