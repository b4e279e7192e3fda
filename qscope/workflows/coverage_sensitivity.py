"""How far the rankings move when a layer, pooling, threshold, top n or SAE is another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qscope.coverage.footprints import FootprintCounts
from qscope.coverage.measures import size_matched_redundancy
from qscope.coverage.suite import Suite
from qscope.finding.pooled import Floats, Pooling
from qscope.workflows.coverage_read import Footprint, Loaded, blocks, with_sae
from qscope.workflows.coverage_result import Moved
from qscope.workflows.encoder import Encoder

if TYPE_CHECKING:
    from qscope.workflows.coverage import CoverageConfig

QUANTILES = (0.25, 0.5, 0.75)
TOPS = (1, 5, 10, 20)


@dataclass(frozen=True)
class Rankings:
    """What a setting orders: benchmarks by redundancy, pairs by overlap."""

    redundancy: Floats
    """[B] R-hat at equal size"""
    pairs: Floats
    """[B (B - 1) / 2] size-matched Jaccard"""
    features: Floats
    """[B]"""


def rankings(counts: Sequence[FootprintCounts], n: int) -> Rankings:
    """Of one count per benchmark; both at n items each, since R-hat grows with N. Undefined figures are nan."""
    suite = Suite.of({str(i): count for i, count in enumerate(counts)})
    return Rankings(
        np.array([size_matched_redundancy(c.counts, c.items, n) for c in counts]),
        suite.size_matched(n).jaccard[np.triu_indices(len(counts), 1)],
        suite.present().sum(axis=1).astype(np.float64),
    )


def sensitivity(config: "CoverageConfig", suite: Loaded, n: int) -> tuple[Moved, ...]:
    """Every other setting beside the report's own, layer by layer, and every layer beside the main one.

    The main layer is the middle one. What was read before is read again from the folder; another SAE runs the model.
    """
    base = Footprint(config.pooling, config.threshold, config.top_n)
    own = {
        layer: rankings([FootprintCounts.of(read.footprints[layer]) for read in suite.benchmarks], n)
        for layer in suite.layers
    }
    names = [read.benchmark.name for read in suite.benchmarks]
    main = suite.layers[len(suite.layers) // 2]
    found = [
        _moved(names, layer, f"layer {layer}", f"layer {main}", own[layer], own[main])
        for layer in suite.layers
        if layer != main
    ]
    if config.sensitivity:
        settings = {layer: _settings(config, suite, layer) for layer in suite.layers}
        counted = _count(suite, suite.encoder, settings, "sensitivity")
        for layer, listed in settings.items():
            found += [
                _moved(names, layer, text, _name(base), rankings(counts, n), own[layer])
                for (text, _), counts in zip(listed, counted[layer], strict=True)
            ]
    for name in config.other_sae:
        assert suite.encoder is not None  # read before, as `load` sees to
        other = with_sae(config, suite.encoder, name)
        counted = _count(suite, other, {layer: [(name, base)] for layer in suite.layers}, "other SAE")
        for layer in suite.layers:
            moved = rankings(counted[layer][0], n)
            found.append(_moved(names, layer, f"SAE {name}", f"SAE {suite.saes[layer].name}", moved, own[layer]))
    return tuple(found)


def _settings(config: "CoverageConfig", suite: Loaded, layer: int) -> list[tuple[str, Footprint]]:
    """The others of one layer, with their names: each differs from the report's own in one thing."""
    pooling, threshold, top_n = config.pooling, config.threshold, config.top_n
    every: tuple[Pooling, ...] = ("last", "any", "mean")
    if threshold == 0 and top_n is None:  # a mean is above 0 where any token is: the same sets
        every = ("any",) if pooling == "last" else ("last",)
    poolings = [p for p in every if p != pooling]
    found = [(f"pooling {p}", Footprint(p, threshold, top_n)) for p in poolings]
    if threshold != 0:
        found.append(("threshold 0", Footprint(pooling, 0.0, top_n)))
    values = np.concatenate([read.values[layer] for read in suite.benchmarks])
    for share in QUANTILES if len(values) else ():
        level = float(np.quantile(values, share))
        found.append((f"threshold {level:.3g} (quantile {share:g})", Footprint(pooling, level, top_n)))
    found += [
        (f"top {top}", Footprint(pooling, threshold, top))
        for top in TOPS
        if top != top_n and (pooling != "last" or top < suite.saes[layer].k)
    ]
    if top_n is not None:
        found.append(("all active", Footprint(pooling, threshold, None)))
    return found


def _count(
    suite: Loaded, encoder: Encoder | None, settings: dict[int, list[tuple[str, Footprint]]], label: str
) -> dict[int, list[list[FootprintCounts]]]:
    """Layer -> setting -> counts of each benchmark. Codes of one block of items are held at a time."""
    sizes = {n: encoder.saes[n].d_sae if encoder is not None else suite.saes[n].d_sae for n in settings}
    counted = {layer: [[FootprintCounts.empty(sizes[layer]) for _ in suite.benchmarks] for _ in listed]
               for layer, listed in settings.items()}  # fmt: skip
    for b, read in enumerate(suite.benchmarks):
        name = f"{label}: {read.benchmark.name}"
        for first, features in blocks(read.benchmark, read.texts, encoder, suite.folder, name):
            usable = read.items[(read.items >= first) & (read.items < first + features.texts)] - first
            for layer, listed in settings.items():
                codes = features.codes(layer)
                for i, (_, setting) in enumerate(listed):
                    footprints = setting.of(codes, sizes[layer]).rows(usable)
                    counted[layer][i][b] = counted[layer][i][b] + FootprintCounts.of(footprints)
    return counted


def _moved(names: Sequence[str], layer: int, setting: str, against: str, now: Rankings, own: Rankings) -> Moved:
    order = np.argsort(-np.nan_to_num(now.redundancy, nan=-np.inf), kind="stable")
    return Moved(
        layer=str(layer),
        setting=setting,
        against=against,
        redundancy_tau=tau(now.redundancy, own.redundancy),
        pairs_tau=tau(now.pairs, own.pairs),
        features=float(now.features.mean()),
        redundancy_order=tuple(names[i] for i in order.tolist()),
    )


def tau(left: Floats, right: Floats) -> float | None:
    """Kendall's tau-b over what both define; None for fewer than two, or where one of them is constant."""
    from scipy.stats import kendalltau

    known = np.isfinite(left) & np.isfinite(right)
    if known.sum() < 2 or np.ptp(left[known]) == 0 or np.ptp(right[known]) == 0:
        return None
    return float(kendalltau(left[known], right[known]).statistic)


def _name(setting: Footprint) -> str:
    top = "all active" if setting.top_n is None else f"top {setting.top_n}"
    return f"pooling {setting.pooling}, threshold {setting.threshold:g}, {top}"
