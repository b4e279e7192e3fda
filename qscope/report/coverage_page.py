"""One page about benchmarks seen through features: overlaps, families, saturation, exclusive features. No network."""

import html
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.finding.stability import Interval
from qscope.report import coverage_svg as svg
from qscope.report.evaluate_page import num, share, signed
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.coverage_result import (
    CoverageResult,
    ExclusiveFeature,
    LayerFound,
    Performance,
)

OPEN_PAIRS = 15  # more pairs than this are folded away

FORMULAS = {
    "F(x), F(D)": "features that an item fires; those that at least one item of a benchmark fires (Qwen-Scope, "
    "equations 2 and 3). N items, m of which fire a feature.",
    "c_n": "expected share of F(D) that n random items fire: mean over its features of 1 − C(N − m, n) / C(N, n).",
    "R̂": "(sum over n of c_n) / |F(D)| = (N + 1) / |F(D)|² × sum over features of m / (m + 1). It grows with N, so "
    "benchmarks are compared at n random items of each.",
    "at equal size": "expected figures for n random items of each benchmark, in closed form; Jaccard is the ratio of "
    "the expected intersection to the expected union.",
    "overlap": "|F(A) ∩ F(B)| / |F(A)|; back: / |F(B)|; min: over the smaller of both; Jaccard: over the union.",
    "one population": "size-matched Jaccard that both would have if their items were shuffled together. Share of it: 1 "
    "where the benchmarks cannot be told apart by their features. p: share of the permutations of items between both "
    "that come as low as the observed overlap.",
    "heat map": "coloured from its lowest to its highest value. Pale diagonal: what two samples of n items of the same "
    "benchmark share.",
    "random text": "all tokens of the suite, permuted and dealt out to texts of the same lengths, read by the same "
    "model. Above random texts: the pair's Jaccard less that of the random texts in place of both. Above the other’s: "
    "less the mean of each benchmark with the random text in the other’s place.",
    "intervals, p": "95 %, from half of the items of every benchmark, drawn without replacement (McCarthy 1969); p "
    "two-sided. “Covered” shows quartiles over the items instead.",
    "covered": "share of an item’s features that another item of the benchmark fires too; median over the items.",
    "subset": "items of the greedy order (most new features first) that keep the wanted share of the features; at "
    "random: items of a random subset that is expected to.",
    "exclusive": "rate here − highest rate in another benchmark, a rate being the share of items that fire it.",
}


def write(result: CoverageResult) -> Path | None:
    """Write the page where the config asked for one, whole or not at all; its path.

    Also what `qscope coverage --json` calls.
    """
    return None if result.html is None else write_whole(Path(result.html), page(result), "Choose another --out.")


def page(result: CoverageResult) -> str:
    """The page as HTML."""
    return fill("coverage_page.html", _body(result))


def _body(result: CoverageResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="note">{_safe(note)}</p>' for note in result.notes)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    sections = "".join(_layer(name, found, result) for name, found in result.layers.items())
    return (
        f'<header><h1><i class="mark"></i>Coverage <span>{_safe(result.model)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p>{notes}</header>{sections}{_sensitivity(result)}{_read(result)}'
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}. Tables: {_safe(', '.join(result.tables))}.</footer>"
    )


def _read(result: CoverageResult) -> str:
    head = ("benchmark", "rows", "items", "tokens", "longest", "cut", "duplicates", "empty", "broken", "")
    rows = []
    for b in result.benchmarks:
        said = [f"a sample of {b.sampled_from:,}"] if b.sampled_from else []
        said += [f"{b.dropped:,} duplicates dropped"] if b.dropped else []
        said += [f"{b.no_tokens:,} without a token that counts"] if b.no_tokens else []
        said += [f"{b.replaced:,} characters that were not UTF-8"] if b.replaced else []
        counts = (b.rows, b.items, b.tokens, b.longest, b.truncated, b.duplicates, b.empty, b.broken)
        rows.append((_safe(b.name), *(f"{x:,}" for x in counts), _safe("; ".join(said))))
    return f'<section><h2>What was read</h2><div class="panels">{_panel("", _table(head, rows))}</div></section>'


# --- a layer ---------------------------------------------------------------------------------------------


def _layer(name: str, found: LayerFound, result: CoverageResult) -> str:
    counts = found.tokens
    facts = (
        f"{found.sae} · {found.d_sae:,} features · k = {found.k} · {counts.kept:,} of {counts.tokens:,} tokens count; "
        f"{counts.extreme:,} attention sinks and {counts.nan:,} NaN left out · the suite fires "
        f"{found.suite_features:,} features · compared at {result.match_items:,} items"
    )
    mismatch = f'<p class="note">{_safe(found.mismatch)}</p>' if found.mismatch else ""
    several = len(found.benchmarks) > 1
    parts = [_maps(found, result) if several else "", _pictures(found, several)]
    parts.append(f'<div class="panels">{_panel("Benchmarks", _benchmarks(found, result))}</div>')
    parts += [_pairs(found), _suite(found, result.match_items), _performance(found.performance)] if several else []
    return (
        f'<section><h2>Layer {_safe(name)}</h2><p class="soft">{_safe(facts)}</p>{mismatch}{"".join(parts)}'
        f"{_exclusive(found)}</section>"
    )


def _maps(found: LayerFound, result: CoverageResult) -> str:
    order = found.order
    names = [found.benchmarks[i].name for i in order]
    size = result.match_items
    ceilings = [found.benchmarks[i].ceiling for i in order]

    def tell(text: str) -> svg.Tell:
        return lambda i, j, value: f"{names[i]}, {names[j]}: {text} {value:.3f}"

    def turned(matrix: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
        return [[matrix[i][j] for j in order] for i in order]

    main = svg.heat_map(names, turned(found.matrix), "size-matched Jaccard", tell("size-matched Jaccard"), ceilings)
    relative = svg.heat_map(
        names, turned(found.relative), "share of one population", tell("share of what one population would have")
    )
    raw = svg.heat_map(names, turned(found.raw), "overlap", tell("share of the first one's features in the second:"))
    null = [p.null_jaccard for p in found.pairs if p.null_jaccard is not None]
    note = f" The random texts in their place: {num(min(null), 2)} to {num(max(null), 2)}." if null else ""
    return (
        f'<div class="panels">{_panel(f"Features shared at {size:,} items each: Jaccard.{note}", main)}</div>'
        f"<details><summary>Share of what one population would have (1: cannot be told apart)</summary>{relative}"
        f"</details><details><summary>Overlap of all items: share of the row's features that the column has "
        f"(grows with the column's size)</summary>{raw}</details>"
    )


def _pictures(found: LayerFound, several: bool) -> str:
    tree = ""
    if several:
        names = [b.name for b in found.benchmarks]
        tree = _panel("Families", svg.dendrogram(names, found.merges, found.order, "dendrogram"), wide=False)
    grown = [svg.Curve(b.name, [(n, c * b.features) for n, c in b.curve]) for b in found.benchmarks]
    relative = [svg.Curve(b.name, b.curve) for b in found.benchmarks]
    pictures = _panel("Features of n random items", svg.curves(grown, "features", "items n"), wide=False)
    saturation = _panel("Saturation c_n", svg.curves(relative, "saturation", "items n", share=True), wide=False)
    if several:
        return f'<div class="panels free">{tree}<div class="column">{pictures}{saturation}</div></div>'
    return f'<div class="panels">{pictures}{saturation}</div>'


def _benchmarks(found: LayerFound, result: CoverageResult) -> str:
    n = f"{result.match_items:,}"
    head = ["benchmark", "items", "features", "per item", "R̂", f"features at {n}", f"R̂ at {n}", "covered"]
    head += [f"subset for {100 * result.subset_share:g} %", "at random"]
    null = any(b.null_features is not None for b in found.benchmarks)
    head += ["random text", "its R̂"] if null else []
    rows = []
    for b in found.benchmarks:
        row = [_safe(b.name), f"{b.items:,}", f"{b.features:,}", num(b.mean_size, 1), num(b.redundancy, 3)]
        row.append(_interval(b.matched_features, b.matched_features_interval, 0))
        row.append(_interval(b.matched_redundancy, b.matched_redundancy_interval))
        row.append(_interval(b.covered.value if b.covered else None, b.covered, 2))
        row.append(f"{b.subset:,}<small>{share(b.subset / b.items)}</small>")
        row.append("–" if b.random_subset is None else f"{b.random_subset:,}")
        row += [_figure(b.null_features, 0), num(b.null_redundancy, 3)] if null else []
        rows.append(row)
    return _table(head, rows)


def _pairs(found: LayerFound) -> str:
    head = ["pair", "shared", "overlap", "min", "Jaccard", "at equal size", "one population", "share of it"]
    null = any(p.null_jaccard is not None for p in found.pairs)
    head += ["random texts", "above them", "above the other’s"] if null else []
    rows = []
    for p in sorted(found.pairs, key=lambda p: -(p.matched_jaccard or 0)):
        row = [f"{_safe(p.a)} · {_safe(p.b)}", f"{p.shared:,}"]
        row += [f"{num(p.overlap_ab, 2)}<small>back {num(p.overlap_ba, 2)}</small>", num(p.overlap_min, 2)]
        row += [num(p.jaccard, 2), _interval(p.matched_jaccard, p.matched_interval), num(p.one_population, 3)]
        row.append(f"{num(p.relative, 2)}<small>p {num(p.p_one_population, 3)}</small>")
        if null:
            row += [_interval(p.null_jaccard, p.null_interval), _difference(p.above_null), _difference(p.above_cross)]
        rows.append(row)
    table = _table(head, rows)
    opened = " open" if len(rows) <= OPEN_PAIRS else ""
    return f"<details{opened}><summary>Pairs, most alike first ({len(rows)})</summary>{table}</details>"


def _suite(found: LayerFound, n: int) -> str:
    head = ("benchmark", "adds", "suite", "of all", f"adds at {n:,}")
    rows = [
        (_safe(a.name), f"{a.features:,}", f"{a.total:,}", share(a.share), _figure(a.matched, 0)) for a in found.adding
    ]
    lost = ("benchmark", "features that no other has", "of its own", f"at {n:,}")
    gone = [
        (_safe(m.name), f"{m.unique:,}", share(m.share), _figure(m.matched, 0))
        for m in sorted(found.marginal, key=lambda m: -m.unique)
    ]
    adding = _panel("Adding benchmarks, the one that brings most first", _table(head, rows), wide=False)
    losing = _panel("What the suite loses with each", _table(lost, gone), wide=False)
    return f'<div class="panels">{adding}{losing}</div>'


def _performance(found: Performance | None) -> str:
    if found is None:
        return ""
    parts = []
    if found.agreements:
        head = ("overlap min, with similarity of scores", "Pearson", "p", "Spearman", "p", "pairs")
        rows = []
        for a in found.agreements:
            fixed = f"<small>partial: {_safe(found.control or '')} held fixed</small>" if a.partial else ""
            figures = (a.pearson, a.pearson_p, a.spearman, a.spearman_p)
            rows.append((a.overlap + fixed, *(num(x, 3) for x in figures), str(a.pairs)))
        parts.append(_panel(f"Scores of {found.models} models", _table(head, rows), wide=False))
    if found.redundancies:
        cells = [
            (
                f"{_safe(r.name)}<small>{r.models} models</small>",
                _interval(r.scores.value, r.scores),
                num(r.features, 3),
            )
            for r in found.redundancies
        ]
        cells.append(("Spearman", num(found.redundancy_spearman, 3), ""))
        parts.append(_panel("Redundancy", _table(("benchmark", "of scores, R", "of features, R̂"), cells), wide=False))
    return f'<div class="panels">{"".join(parts)}</div>'


def _exclusive(found: LayerFound) -> str:
    parts = []
    for b in found.benchmarks:
        if not b.exclusive:
            continue
        rows = "".join(_exclusive_row(feature) for feature in b.exclusive)
        head = "<thead><tr><th>feature</th><th>here</th><th>elsewhere</th><th class='text'>raises</th>"
        table = f"<table>{head}<th class='text'>strongest items</th></tr></thead><tbody>{rows}</tbody></table>"
        parts.append(f"<details><summary>{_safe(b.name)}</summary>{table}</details>")
    return f'<h3 class="above">Most exclusive features</h3>{"".join(parts)}' if parts else ""


def _exclusive_row(found: ExclusiveFeature) -> str:
    tokens = " ".join(f"<code>{_safe(token)}</code>" for token in found.lens[:6])
    items = "".join(
        f"<p><b>{num(item.activation, 2)}</b> <small class='in'>row {item.row:,}</small> {_safe(item.text)}</p>"
        for item in found.items
    )
    where = f"<small>{_safe(found.where)}</small>" if found.where else ""
    return (
        f"<tr><td>{found.feature}</td><td>{share(found.rate)}</td><td>{share(found.elsewhere)}{where}</td>"
        f'<td class="text tokens">{tokens}</td><td class="text items">{items}</td></tr>'
    )


# --- sensitivity -----------------------------------------------------------------------------------------


def _sensitivity(result: CoverageResult) -> str:
    if not result.sensitivity:
        return ""
    head = ("layer", "setting", "against", "τ of redundancy", "τ of pairs", "features", "most redundant first")
    rows = [
        (
            _safe(m.layer), _safe(m.setting), _safe(m.against), signed(m.redundancy_tau), signed(m.pairs_tau),
            f"{m.features:,.0f}", _safe(", ".join(m.redundancy_order[:6])),
        )
        for m in result.sensitivity
    ]  # fmt: skip
    note = (
        "Kendall’s τ-b with the setting of this report: of the benchmarks by R̂ at equal size, and of the pairs by "
        "their size-matched Jaccard. 1: the same order."
    )
    table = _panel("", _table(head, rows))
    return f'<section><h2>Sensitivity</h2><p class="soft">{note}</p><div class="panels">{table}</div></section>'


# --- pieces ----------------------------------------------------------------------------------------------


def _interval(value: float | None, found: Interval | None, digits: int = 3) -> str:
    """A cell: the value, and its interval below it."""
    under = f"<small>{_figure(found.low, digits)} to {_figure(found.high, digits)}</small>" if found else ""
    return f"{_figure(value, digits)}{under}"


def _difference(found: Interval | None) -> str:
    """`_interval` with a + before what is above 0."""
    return "–" if found is None else ("+" if found.value > 0 else "") + _interval(found.value, found)


def _figure(value: float | None, digits: int) -> str:
    """`num`, and whole numbers where no digits are wanted."""
    return f"{value:,.0f}" if value is not None and not digits else num(value, digits)


def _panel(title: str, inside: str, wide: bool = True) -> str:
    head = f"<h3>{_safe(title)}</h3>" if title else ""
    return f'<figure class="panel{" wide" if wide else ""}">{head}{inside}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
