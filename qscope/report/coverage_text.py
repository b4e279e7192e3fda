"""What `qscope coverage` prints."""

from qscope.report.coverage_page import write
from qscope.report.evaluate_page import num, share, signed
from qscope.report.steer_find_text import table
from qscope.workflows.coverage_result import CoverageResult, LayerFound

MOST_PAIRS = 12


def render(result: CoverageResult) -> str:
    """Benchmarks, closest and farthest pairs and the order of adding, layer by layer; writes the page."""
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    for b in result.benchmarks:
        said = [f"{b.items:,} items", f"{b.tokens:,} tokens"]
        for count, word in (
            (b.truncated, "cut"), (b.duplicates, "duplicates"), (b.dropped, "of them dropped"), (b.empty, "empty"),
            (b.broken, "broken"), (b.no_tokens, "without a token that counts"),
        ):  # fmt: skip
            said += [f"{count:,} {word}"] if count else []
        said += [f"a sample of {b.sampled_from:,}"] if b.sampled_from else []
        lines.append(f"  {b.name}: {', '.join(said)}")
    for name, found in result.layers.items():
        lines += ["", *_layer(name, found, result)]
    if result.sensitivity:
        lines += ["", "sensitivity: Kendall's tau-b with the setting of this report"]
        rows = [("layer", "redundancy", "pairs", "features", "setting")]
        rows += [
            (m.layer, signed(m.redundancy_tau), signed(m.pairs_tau), f"{m.features:,.0f}", f"{m.setting} / {m.against}")
            for m in result.sensitivity
        ]
        lines += table(rows)
    page = write(result)
    written = [f"{result.out}/{name}" for name in result.tables] + ([str(page)] if page else [])
    return "\n".join([*lines, "", *(f"wrote {path}" for path in written)])


def _layer(name: str, found: LayerFound, result: CoverageResult) -> list[str]:
    counts = found.tokens
    lines = [
        f"layer {name}: {found.sae}; k = {found.k} of {found.d_sae:,} features; {counts.kept:,} of {counts.tokens:,} "
        f"tokens ({counts.extreme} attention sinks, {counts.nan} NaN left out); {found.suite_features:,} features fire"
    ]
    unique = {m.name: m for m in found.marginal}
    rows = [("items", "features", f"at {result.match_items}", "R-hat", "subset", "unique", "")]
    for b in found.benchmarks:
        alone = unique.get(b.name)
        rows.append(
            (
                f"{b.items:,}", f"{b.features:,}", f"{b.matched_features:,.0f}", num(b.matched_redundancy, 3),
                f"{b.subset:,}", f"{alone.unique:,}" if alone else "–", b.name,
            )
        )  # fmt: skip
    lines += table(rows)
    if not found.pairs:
        return lines
    ordered = sorted(found.pairs, key=lambda p: -(p.matched_jaccard or 0))
    cut = len(ordered) > MOST_PAIRS
    shown = ordered[: MOST_PAIRS // 2] + ordered[-MOST_PAIRS // 2 :] if cut else ordered
    table_rows: list[tuple[str, ...]] = [
        ("Jaccard", "one population", "share", "random texts", "overlap", "reverse", "pair")
    ]
    for p in shown:
        figures = (p.matched_jaccard, p.one_population, p.relative, p.null_jaccard, p.overlap_ab, p.overlap_ba)
        table_rows.append((*(num(x, 2) for x in figures), f"{p.a}, {p.b}"))
    what = f"the closest and the farthest of {len(ordered)} pairs" if cut else "pairs"
    lines += [f"  {what}, Jaccard at {result.match_items} items each:", *table(table_rows)]
    steps = ", ".join(f"{a.name} +{a.features:,} ({share(a.share)})" for a in found.adding)
    return [*lines, f"  adding the one that brings most: {steps}"]
