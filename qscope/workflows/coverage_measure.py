"""Footprints to figures: every benchmark, every pair and the suite as a whole, layer by layer."""

from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np
import torch

from qscope._version import __version__
from qscope.coverage.footprints import Footprints
from qscope.coverage.measures import (
    curve_sizes,
    item_redundancy,
    items_for_share,
    redundancy,
    saturation,
    saturation_area,
)
from qscope.coverage.resampling import permutation_test
from qscope.coverage.subset import Cover, smallest_cover
from qscope.coverage.suite import Overlaps, Suite, linkage
from qscope.finding.pooled import Floats
from qscope.finding.stability import Interval
from qscope.workflows.coverage_exclusive import most_exclusive, with_items, with_lens
from qscope.workflows.coverage_inputs import too_many
from qscope.workflows.coverage_performance import Scored, beside, known_or_none
from qscope.workflows.coverage_read import Loaded, Read, total_facts
from qscope.workflows.coverage_resampling import Measured, resampled
from qscope.workflows.coverage_result import (
    Added,
    BenchmarkFacts,
    BenchmarkFound,
    CoverageResult,
    ExclusiveFeature,
    LayerFound,
    Marginal,
    PairFound,
)
from qscope.workflows.coverage_sensitivity import sensitivity
from qscope.workflows.coverage_tables import Detail

if TYPE_CHECKING:
    from qscope.workflows.coverage import CoverageConfig

CURVE_POINTS = 48
_WHERE = {"last": "the last token", "any": "any token", "mean": "the mean over tokens"}


def measure(
    config: "CoverageConfig", loaded: Loaded, scored: Scored | None
) -> tuple[CoverageResult, dict[str, dict[str, Detail]]]:
    """The result without its files, and what the tables of items and features are made of."""
    smallest = min(loaded.benchmarks, key=len)
    if config.match_items is not None and config.match_items > len(smallest):
        raise too_many(config.match_items, smallest.benchmark.name, len(smallest))
    n = config.match_items or max(1, len(smallest) // 2)
    exclusive, notes = _exclusive(config, loaded)
    layers, details = {}, {}
    for layer in loaded.layers:
        layers[str(layer)], details[str(layer)] = _layer(config, loaded, layer, n, exclusive[layer], scored)
    several = len(loaded.benchmarks) > 1
    result = CoverageResult(
        model=_model(loaded),
        about=_about(config, loaded, n),
        notes=(*_notes(config, loaded, n), *notes, *(scored.notes if scored else ())),
        match_items=n,
        subset_share=config.subset,
        benchmarks=tuple(_facts(config, read) for read in loaded.benchmarks),
        layers=layers,
        sensitivity=sensitivity(config, loaded, n) if several else (),
        out=str(config.out),
        html=str(config.out / "coverage.html") if config.html else None,
    )
    return result, details


# --- a layer ---------------------------------------------------------------------------------------------


def _layer(
    config: "CoverageConfig",
    loaded: Loaded,
    layer: int,
    n: int,
    exclusive: Sequence[tuple[ExclusiveFeature, ...]],
    scored: Scored | None,
) -> tuple[LayerFound, dict[str, Detail]]:
    names = [read.benchmark.name for read in loaded.benchmarks]
    footprints = [read.footprints[layer] for read in loaded.benchmarks]
    suite = Suite.of(dict(zip(names, footprints, strict=True)))
    measured = resampled(footprints, [read.footprints[layer] for read in loaded.null], n, config.resamples, config.seed)
    covers = [smallest_cover(part, config.subset) for part in footprints]
    found = [
        _benchmark(config, suite, i, part, cover, measured, exclusive[i], n, names[i])
        for i, (part, cover) in enumerate(zip(footprints, covers, strict=True))
    ]
    raw, matched, mixed = suite.overlaps(), suite.size_matched(n), suite.one_population(n)
    tree, order = linkage(matched.jaccard) if len(names) > 1 else (np.zeros((0, 4)), np.zeros(1, np.int64))
    performance = None
    if scored is not None:
        hats = [b.redundancy for b in found]
        performance = beside(scored, config.control, names, raw, matched, hats, config.seed)
    sae = loaded.saes[layer]
    layer_found = LayerFound(
        sae=sae.name,
        d_sae=sae.d_sae,
        k=sae.k,
        tokens=total_facts([read.facts[layer] for read in loaded.benchmarks]),
        null_tokens=total_facts([read.facts[layer] for read in loaded.null]) if loaded.null else None,
        suite_features=int(suite.union().sum()),
        benchmarks=tuple(found),
        pairs=_pairs(config, footprints, names, (raw, matched, mixed), measured, n),
        matrix=_plain(matched.jaccard),
        raw=_plain(raw.overlap),
        relative=_plain(_relative(matched, mixed)),
        order=tuple(order.tolist()),
        merges=tuple((int(a), int(b), float(height)) for a, b, height, _ in tree),
        adding=_adding(suite, names, n),
        marginal=_marginal(suite, names, n),
        performance=performance,
        mismatch=sae.mismatch,
    )
    return layer_found, {
        name: _detail(read, part, cover, suite.counts[i])
        for i, (name, read, part, cover) in enumerate(zip(names, loaded.benchmarks, footprints, covers, strict=True))
    }


def _benchmark(
    config: "CoverageConfig",
    suite: Suite,
    i: int,
    footprints: Footprints,
    cover: Cover,
    measured: Measured,
    exclusive: tuple[ExclusiveFeature, ...],
    n: int,
    name: str,
) -> BenchmarkFound:
    m, N = suite.counts[i], int(suite.items[i])
    sizes = curve_sizes(N, CURVE_POINTS)
    curve = saturation(m, N, sizes) if cover.features else np.zeros(len(sizes))
    features, features_interval = measured.features(i)
    matched, matched_interval = measured.redundancy(i)
    steps = np.unique(np.rint(np.linspace(1, len(cover.items), min(CURVE_POINTS, len(cover.items)))).astype(np.int64))
    null = len(suite) + i if measured.null else None
    return BenchmarkFound(
        name=name,
        items=N,
        features=cover.features,
        mean_size=float(footprints.sizes.mean()),
        silent=int((footprints.sizes == 0).sum()),
        redundancy=known_or_none(redundancy(m, N)),
        saturation_area=known_or_none(saturation_area(m, N)),
        matched_redundancy=matched,
        matched_redundancy_interval=matched_interval,
        curve=tuple(zip(sizes.tolist(), curve.tolist(), strict=True)),
        matched_features=features or 0.0,
        matched_features_interval=features_interval,
        ceiling=known_or_none(float(suite.ceiling(n)[i])),
        covered=_quartiles(item_redundancy(footprints).covered),
        subset=len(cover.items),
        random_subset=items_for_share(m, N, config.subset) if cover.features else None,
        subset_curve=tuple((int(b), float(cover.covered[b - 1] / cover.features)) for b in steps.tolist()),
        null_features=None if null is None else measured.features(null)[0],
        null_redundancy=None if null is None else measured.redundancy(null)[0],
        exclusive=exclusive,
    )


def _quartiles(values: Floats) -> Interval | None:
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, middle, high = np.quantile(known, (0.25, 0.5, 0.75))
    return Interval(float(middle), float(low), float(high))


def _pairs(
    config: "CoverageConfig",
    footprints: Sequence[Footprints],
    names: Sequence[str],
    overlaps: tuple[Overlaps, Overlaps, Overlaps],
    measured: Measured,
    n: int,
) -> tuple[PairFound, ...]:
    from tqdm import tqdm

    raw, matched, mixed = overlaps
    relative = _relative(matched, mixed)
    places = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    found = []
    bar = {"desc": "pairs", "unit": "pair", "dynamic_ncols": True, "mininterval": 0.5, "disable": not places}
    for a, b in tqdm(places, **bar):
        p = None
        if config.permutations and np.isfinite(matched.jaccard[a, b]):
            test = permutation_test(footprints[a], footprints[b], n, permutations=config.permutations, seed=config.seed)
            p = test.p_value
        value, interval = measured.jaccard(a, b)
        null, cross = _null(measured, a, b)
        at = lambda matrix, a=a, b=b: known_or_none(float(matrix[a, b]))  # noqa: E731
        found.append(
            PairFound(
                names[a], names[b], int(raw.common[a, b]), at(raw.overlap), at(raw.overlap.T), at(raw.overlap_min),
                at(raw.jaccard), at(matched.overlap), at(matched.overlap.T), at(matched.overlap_min), value, interval,
                at(mixed.jaccard), at(relative), p, *null, *cross,
            )
        )  # fmt: skip
    return tuple(found)


def _null(
    measured: Measured, a: int, b: int
) -> tuple[
    tuple[float | None, Interval | None, Interval | None, float | None],
    tuple[float | None, Interval | None, float | None],
]:
    """(null text beside null text), (each benchmark beside the null text of the other): as `PairFound` has them."""
    if not measured.null:
        return (None, None, None, None), (None, None, None)
    size = measured.benchmarks
    cross = known_or_none(measured.cross(measured.value, a, b))
    return (*measured.jaccard(size + a, size + b), *measured.above_null(a, b)), (cross, *measured.above_cross(a, b))


def _relative(matched: Overlaps, mixed: Overlaps) -> Floats:
    """[B, B] share of what one population would have; 1 on the diagonal."""
    whole = mixed.jaccard
    found = np.divide(matched.jaccard, whole, out=np.full_like(whole, np.nan), where=whole > 0)
    np.fill_diagonal(found, 1.0)
    return found


def _adding(suite: Suite, names: Sequence[str], n: int) -> tuple[Added, ...]:
    by_set, drawn = suite.order(), suite.probabilities(n)
    total = float(by_set.covered[-1])
    missed = np.ones(drawn.shape[1])
    found = []
    for place, gain, covered in zip(by_set.order.tolist(), by_set.gains, by_set.covered, strict=True):
        matched = float((drawn[place] * missed).sum())
        missed *= 1 - drawn[place]
        found.append(Added(names[place], int(gain), int(covered), covered / total if total else 0.0, matched))
    return tuple(found)


def _marginal(suite: Suite, names: Sequence[str], n: int) -> tuple[Marginal, ...]:
    alone, drawn, own = suite.marginal(), suite.marginal(n), suite.present().sum(axis=1)
    return tuple(
        Marginal(name, round(a), float(a / size) if size else 0.0, float(d))
        for name, a, d, size in zip(names, alone.tolist(), drawn.tolist(), own.tolist(), strict=True)
    )


def _plain(matrix: Floats) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(known_or_none(x) for x in row) for row in matrix.tolist())


def _detail(read: Read, footprints: Footprints, cover: Cover, counts: np.ndarray) -> Detail:
    items = item_redundancy(footprints)
    rows = [item.row for item in read.benchmark.items]
    return Detail(
        rows=read.items if read.benchmark.store is not None else np.array(rows, np.int64)[read.items],
        sizes=footprints.sizes,
        covered=items.covered,
        exclusive=items.exclusive,
        worth=items.worth,
        order=cover.items,
        subset=len(cover.items),
        counts=counts,
    )


# --- exclusive features ----------------------------------------------------------------------------------


def _exclusive(
    config: "CoverageConfig", loaded: Loaded
) -> tuple[dict[int, list[tuple[ExclusiveFeature, ...]]], list[str]]:
    """Layer -> the features of each benchmark, with tokens and strongest items; and notes."""
    names = [read.benchmark.name for read in loaded.benchmarks]
    found, notes = {}, []
    for layer in loaded.layers:
        rates = np.stack([read.footprints[layer].counts() / len(read) for read in loaded.benchmarks])
        found[layer], note = with_lens(loaded, layer, most_exclusive(names, rates, config.exclusive))
        notes += [note] if note and note not in notes else []
    for b, read in enumerate(loaded.benchmarks):
        shown = with_items(loaded, read, {layer: found[layer][b] for layer in loaded.layers}, config.pooling)
        for layer in loaded.layers:
            found[layer][b] = shown[layer]
    return found, notes


# --- what was read ---------------------------------------------------------------------------------------


def _facts(config: "CoverageConfig", read: Read) -> BenchmarkFacts:
    b = read.benchmark
    every = b.rows if b.store is not None else len(b.items)
    return BenchmarkFacts(
        b.name, b.source, b.rows, len(read), b.broken, b.replaced, b.empty, b.duplicates, b.dropped, b.sampled_from,
        every - len(read), int(read.texts.truncated.sum()) if read.texts is not None else 0,
        int(read.texts.full_length.max()) if read.texts is not None else 0, read.tokens,
    )  # fmt: skip


def _model(loaded: Loaded) -> str:
    if loaded.encoder is not None:
        return loaded.encoder.model_name
    store = loaded.benchmarks[0].benchmark.store
    assert store is not None
    return store.settings.model.name


def _about(config: "CoverageConfig", loaded: Loaded, n: int) -> dict[str, str]:
    said = {
        "footprint": f"features active at {_WHERE[config.pooling]}"
        + (f", above {config.threshold:g}" if config.threshold else "")
        + (f", the {config.top_n} strongest" if config.top_n else ""),
        "items": "the template " + repr(config.template) if config.template else f"the field {config.field!r}",
        "answer": f"the field {config.answer_field!r}" if config.answer_field else "not given",
        "prefix": config.prefix_file.name if config.prefix_file else "none",
        "context": f"{config.context_size} tokens{' after a BOS' if config.bos else ''}, the "
        f"{'end' if config.truncate == 'left' else 'start'} kept",
        "compared at": f"{n:,} items",
        "seed": str(config.seed),
    }
    if loaded.encoder is not None:
        said |= {"dtype": loaded.encoder.dtype, "precision": loaded.encoder.precision, "device": loaded.encoder.device}
    said["versions"] = (
        f"qscope {__version__}, torch {torch.__version__}, transformers {metadata.version('transformers')}"
    )
    return said


def _notes(config: "CoverageConfig", loaded: Loaded, n: int) -> list[str]:
    notes = []
    reads = loaded.benchmarks
    own = [f"{text.partition('=')[0]} {text.partition('=')[2]!r}" for text in (*config.field_of, *config.template_of)]
    notes += [f"other fields or templates: {', '.join(own)}"] if own else []
    least = min(map(len, reads))
    if 2 * n > least and config.resamples:
        notes.append(
            f"no intervals: they need half of the smallest benchmark ({least} items) to have the {n} items at which "
            "benchmarks are compared"
        )
    if len(reads) == 1 and (config.sensitivity or config.other_sae):
        notes.append("no sensitivity: rankings need two benchmarks")
    stores = [r.benchmark.name for r in reads if r.benchmark.store is not None]
    if stores and loaded.null:
        notes.append(f"random text in place of {', '.join(stores)}: at most {config.context_size} tokens per document")
    if stores and len(stores) < len(reads):
        notes.append(
            f"{', '.join(stores)} come from feature stores: template, prefix, answer and context size are those of "
            "`qscope encode`"
        )
    sampled = [r.benchmark.name for r in reads if r.benchmark.sampled_from]
    if sampled:
        notes.append(f"at most {config.max_items} items, chosen by a hash of text and seed: {', '.join(sampled)}")
    return notes
