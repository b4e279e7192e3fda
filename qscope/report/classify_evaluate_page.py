"""One page about a classifier: the rule beside every baseline on the same texts, and where it loses. No network."""

import html
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.classification.resampling import Estimate
from qscope.finding.stability import Interval
from qscope.report import classify_evaluate_svg as svg
from qscope.report.evaluate_page import num, share
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.classify_evaluate_result import EMPTY, ClassifyEvaluateResult, MethodRow

NAMES = {
    "f1": "F1",
    "macro_f1": "macro-F1",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "false_positive_rate": "false positives",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier",
    "ece": "ECE",
    "macro_precision": "macro-precision",
    "macro_recall": "macro-recall",
    "macro_auroc": "macro-AUROC",
}
BINARY_COLUMNS = ("f1", "precision", "recall", "auroc", "auprc", "brier", "ece")
CLASS_COLUMNS = ("macro_f1", "accuracy", "macro_precision", "macro_recall", "macro_auroc", "brier", "ece")
FAMILIES = {
    "main": "the rule",
    "rule": "other rules",
    "features": "SAE features",
    "residual": "residual stream",
    "text": "words",
    "none": "chance",
}

FORMULAS = {
    "rule": "positive if any feature of the rule fires above its threshold at any token (Qwen-Scope, section 5).",
    "features of the rule": "largest share of positive training texts in which it fires minus that of negative ones.",
    "layer by top1-diff": "the layer with the largest such difference of one feature, on training texts.",
    "F1": "2 true positives / (2 true positives + false positives + false negatives); macro: mean over the classes.",
    "AUROC": "P(score of a positive text > that of a negative one) + 1/2 P(equal).",
    "AUPRC": "average precision: sum of precision times the step of recall, without interpolation.",
    "Brier": "mean squared distance of the probability from what the text is; summed over classes.",
    "ECE": "mean over the texts of |mean probability - share that is right| in their bin; ten bins of equal mass.",
    "intervals": "95 %, percentile bootstrap over the test texts; nothing is fitted again. Differences: the same "
    "replicates for both methods.",
    "rule wins, rule loses": "the whole interval of the difference is on one side of 0. Nothing is corrected for the "
    "number of methods.",
}


def write(result: ClassifyEvaluateResult) -> Path:
    """Write the page, whole or not at all; its path. Also what `qscope classify evaluate --json` calls."""
    return write_whole(result.page, page(result), "Choose another --out.")


def page(result: ClassifyEvaluateResult) -> str:
    """The page as HTML."""
    return fill("classify_evaluate_page.html", _body(result))


def columns(result: ClassifyEvaluateResult) -> tuple[str, ...]:
    return CLASS_COLUMNS if result.multiclass else BINARY_COLUMNS


def _body(result: ClassifyEvaluateResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="note">{_safe(note)}</p>' for note in result.notes)
    losses = "".join(f"<li>{_safe(line)}</li>" for line in result.loses)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    cost = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in result.seconds.items())
    parts = [
        f'<header><h1><i class="mark"></i>Classifier evaluation <span>{_safe(result.title)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p></header>',
        f'<section><p class="verdict">{_safe(result.verdict)}</p><ul class="loses">{losses}</ul>{notes}'
        f"{_facts(result)}{_overview(result)}</section>",
        f"<section><h2>All methods, the same texts</h2>{_table_of_methods(result)}</section>",
        _section("Layers, amounts of training text, calibration", _curves(result)),
        _section("The rule", _rule(result)),
        _section("Classes", _classes(result)) if result.multiclass else "",
        _section("Groups", _groups(result)),
        _section("Trained on one group, tested on another", _transfers(result)),
        _section("Other settings of the rule", _sensitivity(result)),
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>',
        f"<footer>Made by qscope {__version__}. {_safe(cost)}.</footer>",
    ]
    return "".join(parts)


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{_safe(title)}</h2>{inside}</section>" if inside else ""


# --- the top of the page ---------------------------------------------------------------------------------


def _facts(result: ClassifyEvaluateResult) -> str:
    main = result.main_figure
    rule = next(row for row in result.rows if row.headline)
    others = [(row, row.figures[main].value) for row in result.rows if row.family not in ("rule", "none")]
    best, value = max(
        ((row, value) for row, value in others if value is not None), key=lambda pair: pair[1], default=(None, None)
    )
    curve = "macro_auroc" if result.multiclass else "auroc"
    facts = [
        (f"Rule, {NAMES[main]}", num(rule.figures[main].value, 3), _between(rule.figures[main])),
        (f"Best baseline, {NAMES[main]}", num(value, 3), best.method if best else ""),
        (f"Rule, {NAMES[curve]}", num(rule.figures[curve].value, 3), _between(rule.figures[curve])),
    ]
    sizes = {part: sum(counts.values()) for part, counts in result.counts.items()}
    facts += [("Test texts", f"{sizes['test']:,}", _listed(result.counts["test"]))]
    facts += [("Training texts", f"{sizes['train']:,}", f"and {sizes['calibration']:,} for calibration")]
    inner = "".join(f'<div><dt>{_safe(a)}</dt><dd>{b}</dd><dd class="note">{_safe(c)}</dd></div>' for a, b, c in facts)
    return f'<dl class="facts">{inner}</dl>'


def _listed(counts: dict[str, int]) -> str:
    if len(counts) > 4:
        low, high = min(counts.values()), max(counts.values())
        return f"{len(counts)} classes, {f'{low:,}' if low == high else f'{low:,} to {high:,}'} each"
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def _between(found: Estimate) -> str:
    return "" if found.low is None else f"{num(found.low, 3)} to {num(found.high, 3)}"


def _overview(result: ClassifyEvaluateResult) -> str:
    """A row per method, best first."""
    ordered = sorted(result.rows, key=lambda row: -(row.figures[result.main_figure].value or 0.0))
    bars = [svg.Bar(_named(row), kind_of(row), *_ends(row.figures[result.main_figure])) for row in ordered]
    name = NAMES[result.main_figure]
    picture = svg.rows(bars, f"{name} of every method on the test texts")
    panel = _panel(f"{name} on the test texts, with 95 % intervals", picture, True)
    return f'{_legend(result)}<div class="panels">{panel}</div>'


def kind_of(row: MethodRow) -> str:
    return "main" if row.headline else row.family


def _named(row: MethodRow) -> str:
    return f"{row.method}, layer {row.layer}" if row.layer else row.method


def _ends(found: Estimate) -> tuple[float | None, float | None, float | None]:
    return found.value, found.low, found.high


def _legend(result: ClassifyEvaluateResult) -> str:
    present = {kind_of(row) for row in result.rows}
    keys = [f"<span>{_swatch(kind)}{name}</span>" for kind, name in FAMILIES.items() if kind in present]
    return f'<p class="legend">{"".join(keys)}</p>'


def _swatch(kind: str) -> str:
    return f'<svg viewBox="0 0 26 8"><polyline class="line {kind}" points="0,4 26,4"/></svg>'


def _table_of_methods(result: ClassifyEvaluateResult) -> str:
    shown = columns(result)
    compared = list(next((row.ahead for row in result.rows if row.ahead), {}))
    head = ["method", "layer", *(NAMES[name] for name in shown)]
    head += [f"rule − this<small>{NAMES[name]}</small>" for name in compared] + [""]
    body = []
    for row in result.rows:
        cells = [f"<td>{_safe(row.method)}</td>", f"<td>{_safe(row.layer)}</td>"]
        cells += [f"<td>{_interval(row.figures.get(name, EMPTY))}</td>" for name in shown]
        cells += [f"<td>{_interval(row.ahead.get(name, EMPTY), True) if row.ahead else ''}</td>" for name in compared]
        mark = {"rule wins": "win", "rule loses": "lose"}.get(row.judgement, "")
        cells.append(f'<td class="{mark}">{row.judgement}</td>')
        body.append(f"<tr{' class=main' if row.headline else ''}>{''.join(cells)}</tr>")
    top = "".join(f"<th>{cell}</th>" for cell in head)
    table = f'<table class="dense"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    details = [(_safe(row.method), _safe(row.detail)) for row in result.rows]
    chosen = _table(("method", "what was chosen, and on which texts"), details, text={1})
    return (
        f'<div class="panels">{_panel("", table, True)}</div>'
        f"<details><summary>What every method chose</summary>{chosen}</details>"
    )


# --- curves ----------------------------------------------------------------------------------------------


def _kinds(names: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Method -> class of its line; the second of a family is dashed. names: (method, family), the main rule first."""
    seen: dict[str, int] = {}
    found = {}
    for place, (name, family) in enumerate(dict.fromkeys(names)):
        base = "main" if place == 0 and family == "rule" else family
        seen[base] = seen.get(base, 0) + 1
        found[name] = f"{base} second" if seen[base] > 1 else base
    return found


def _keys(kinds: dict[str, str]) -> str:
    return (
        '<p class="legend">' + "".join(f"<span>{_swatch(kind)}{_safe(n)}</span>" for n, kind in kinds.items()) + "</p>"
    )


def _curves(result: ClassifyEvaluateResult) -> str:
    name = NAMES[result.main_figure]
    panels = []
    if len({line.layer for line in result.layers}) > 1:
        panels.append(_panel(f"{name} by layer", _layers(result)))
    if result.curve:
        panels.append(_panel(f"{name} by share of the training texts", _efficiency(result)))
    calibrated = [(row, row.reliability) for row in result.rows if row.reliability]
    if calibrated:
        panels.append(_panel("Calibration", _reliability(calibrated)))
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _layers(result: ClassifyEvaluateResult) -> str:
    kinds = _kinds([(line.method, line.family) for line in result.layers])
    drawn = []
    for method, kind in kinds.items():
        mine = sorted((line for line in result.layers if line.method == method), key=lambda line: line.layer)
        dots = [
            svg.Dot(line.layer, *_ends(line.f1), f"{method}, layer {line.layer}: {num(line.f1.value, 3)}", line.chosen)
            for line in mine
        ]
        drawn.append(svg.Line(kind, dots))
    layers = sorted({line.layer for line in result.layers})
    differences = {x.layer: x.top1_difference for x in result.layers if x.top1_difference is not None}
    listed = ", ".join(f"{layer}: {num(value, 3)}" for layer, value in sorted(differences.items()))
    picture = svg.lines(drawn[::-1], [(x, str(x)) for x in layers], "layer", "F1 by layer")
    caption = "A ring marks the layer in the table: of the rule by top1-diff of training texts"
    caption += f" ({listed})" if listed else ""
    return f'{_keys(kinds)}{picture}<p class="caption">{caption}; of the others by the calibration texts.</p>'


def _efficiency(result: ClassifyEvaluateResult) -> str:
    kinds = _kinds([(point.method, point.family) for point in result.curve])
    drawn = []
    for method, kind in kinds.items():
        mine = sorted((point for point in result.curve if point.method == method), key=lambda point: point.share)
        dots = [svg.Dot(p.share, *_ends(p.f1), f"{method}, {p.texts:,.0f} texts: {num(p.f1.value, 3)}") for p in mine]
        drawn.append(svg.Line(kind, dots))
    sizes = dict(sorted({point.share: point.texts for point in result.curve}.items()))
    ticks = [(part, f"{100 * part:g} %") for part in sizes]
    picture = svg.lines(drawn[::-1], ticks, "of the training texts", "F1 by share of the training texts", log=True)
    listed = ", ".join(f"{texts:,.0f}" for texts in sizes.values())
    lost = [p for p in result.curve if p.f1.value is None]
    text = f"Texts: {listed}. Bars: lowest and highest of {max(p.draws for p in result.curve)} draws."
    if lost:
        shares = sorted({p.share for p in lost})
        text += f" Too few texts to fit something at {', '.join(f'{100 * part:g} %' for part in shares)}."
    return f'{_keys(kinds)}{picture}<p class="caption">{text}</p>'


def _reliability(calibrated: Sequence[tuple[MethodRow, list[tuple[float, float, int]]]]) -> str:
    ordered = sorted(calibrated, key=lambda pair: not pair[0].headline)
    shown = [pair for pair in ordered if pair[0].headline or pair[0].family in ("residual", "features", "text")][:5]
    kinds = _kinds([(row.method, row.family) for row, _ in shown])
    drawn = [
        svg.Line(
            kinds[row.method],
            [svg.Dot(p, right, None, None, f"{row.method}: {num(p, 3)} → {num(right, 3)}, {n} texts")
             for p, right, n in bins],
        )
        for row, bins in shown
    ]  # fmt: skip
    ticks = [(x / 4, f"{x / 4:g}") for x in range(5)]
    picture = svg.lines(drawn[::-1], ticks, "mean probability of the bin", "Reliability", diagonal=True)
    return f'{_keys(kinds)}{picture}<p class="caption">Height: share of the bin that is so. Dashed: calibrated.</p>'


# --- the rule --------------------------------------------------------------------------------------------


def _rule(result: ClassifyEvaluateResult) -> str:
    several = any(feature.of for feature in result.features)
    head = ["class"] * several + ["layer", "feature", "in the rule", "threshold"]
    head += ["fires in positive", "fires in negative", "chosen in replicates"]
    rows = []
    for f in result.features:
        cells = [_safe(f.of)] * several + [str(f.layer), str(f.feature), "yes" if f.in_rule else ""]
        cells += [num(f.threshold, 3), share(f.rate_positive), share(f.rate_negative)]
        rows.append([*cells, "–" if f.inclusion is None else share(f.inclusion)])
    if not rows:
        return ""
    head_steady = ["class"] * several + ["with all texts", "two replicates", "two halves"]
    steady = [
        [_safe(s.of)] * several + [_spread(s.with_all), _spread(s.between), _spread(s.halves)] for s in result.stability
    ]
    caption = ""
    if steady:
        caption = (
            '<p class="caption">Jaccard overlap of the features that are chosen from '
            f"{result.stability[0].replicates} bootstrap replicates of the training texts with those of all training "
            "texts, of two replicates, and of two halves of the training texts without a text in common.</p>"
        )
    table = _table(head, rows)
    if len(rows) > 24:
        table = f"<details><summary>{len(rows)} features</summary>{table}</details>"
    parts = [f'<div class="wide">{table}</div>' if len(rows) > 24 else _panel("Features", table, True)]
    if steady:
        parts.append(_panel("How stable the choice is", _table(head_steady, steady) + caption, True))
    return f'<div class="panels">{"".join(parts)}</div>'


def _spread(found: Interval) -> str:
    return f"{num(found.value, 3)}<small>{num(found.low, 3)} to {num(found.high, 3)}</small>"


def _classes(result: ClassifyEvaluateResult) -> str:
    parts: list[str] = []
    for row in result.rows:
        total = [max(1, sum(line)) for line in row.confusion]
        shades = [[count / all_ for count in line] for line, all_ in zip(row.confusion, total, strict=True)]
        texts = [[f"{count:,}" if count else "·" for count in line] for line in row.confusion]
        picture = svg.matrix(
            result.classes, result.classes, shades, texts, f"confusion of {row.method}", ("is", "decided")
        )
        if row.headline:
            parts.insert(0, _panel(f"Confusion, {row.method}", picture, True))
        elif row.family != "none" and len(parts) < 3:
            folded = f"<details><summary>Confusion, {_safe(row.method)}</summary>{picture}</details>"
            parts.append(f'<div class="wide">{folded}</div>')
    methods = list(result.per_class)
    cells = [[result.per_class[m].get(c, {}).get("f1") for c in result.classes] for m in methods]
    parts.insert(1, _panel("F1 of each class", _heat(methods, result.classes, cells, "F1 of each class"), True))
    return f'<div class="panels">{"".join(parts)}</div>'


def _groups(result: ClassifyEvaluateResult) -> str:
    with_groups = [row for row in result.rows if row.groups]
    if not with_groups:
        return ""
    names = list(with_groups[0].groups)
    main = result.main_figure
    wide = len(names) > 5 or max(map(len, names)) > 12
    panels = []
    for figure in (main, "macro_auroc" if result.multiclass else "auroc"):
        cells = [[row.groups[name].get(figure) for name in names] for row in with_groups]
        title = f"{NAMES[figure]} by group"
        panels.append(_panel(title, _heat([r.method for r in with_groups], names, cells, title), wide))
    sizes = ", ".join(
        f"{name} {g.get('texts') or 0:,.0f}"
        + ("" if result.multiclass else f" ({g.get('positive') or 0:,.0f} positive)")
        for name, g in with_groups[0].groups.items()
    )
    return f'<div class="panels">{"".join(panels)}</div><p class="caption">Test texts: {_safe(sizes)}.</p>'


def _transfers(result: ClassifyEvaluateResult) -> str:
    panels = []
    seen = [value for found in result.transfers for line in found.f1 for value in line if value is not None]
    for found in result.transfers:
        title = f"{NAMES[result.main_figure]}, {found.method}"
        picture = _heat(found.sources, found.groups, found.f1, title, ("trained on", "tested on"), seen)
        panels.append(_panel(title, picture, max(map(len, found.groups)) > 12))
    if result.feature_overlap and result.transfers:
        groups = result.transfers[0].groups
        title = "Overlap of the features chosen (Jaccard)"
        panels.append(_panel(title, _heat(groups, groups, result.feature_overlap, title)))
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _sensitivity(result: ClassifyEvaluateResult) -> str:
    if not result.sensitivity:
        return ""
    settings = list(result.sensitivity[0].setting)
    name = NAMES[result.main_figure]
    head = [*settings, f"{name}, training", "calibration", "test"]
    body = []
    for row in result.sensitivity:
        cells = [_safe(row.setting[s]) for s in settings]
        cells += [num(row.training_f1, 3), num(row.calibration_f1, 3), num(row.test_f1, 3)]
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f"<tr{' class=main' if row.chosen else ''}>{line}</tr>")
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    caption = '<p class="caption">The shaded line is the rule of the table. Nothing was chosen by the last column.</p>'
    return f"<details><summary>{len(body)} settings</summary>{table}{caption}</details>"


# --- pieces ----------------------------------------------------------------------------------------------


def _heat(
    names: Sequence[str],
    across: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    label: str,
    corner: tuple[str, str] = ("", ""),
    scale: Sequence[float] = (),
) -> str:
    """Shades from the lowest to the highest of `scale` (default: of the cells), at least over a range of 0.2."""
    values = list(scale) or [value for line in cells for value in line if value is not None]
    high = max(values, default=1.0)
    low = min(min(values, default=0.0), high - 0.2)
    shades = [[None if value is None else (value - low) / (high - low) for value in line] for line in cells]
    texts = [["–" if value is None else f"{value:.2f}" for value in line] for line in cells]
    return svg.matrix(names, across, shades, texts, label, corner)


def _interval(found: Estimate, sign: bool = False) -> str:
    """A cell: the value, and its interval below it."""
    if found.value is None:
        return "–"
    text = f"{'+' if sign and found.value > 0 else ''}{num(found.value, 3)}"
    return text if found.low is None else f"{text}<small>{num(found.low, 3)} to {num(found.high, 3)}</small>"


def _panel(title: str, inside: str, wide: bool = False) -> str:
    head = f"<h3>{_safe(title)}</h3>" if title else ""
    return f'<figure class="panel{" wide" if wide else ""}">{head}{inside}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text: set[int] | None = None) -> str:
    """The cells are HTML; `text`: columns of prose."""
    prose = text or set()
    kind = lambda i: ' class="text"' if i in prose else ""  # noqa: E731
    top = "".join(f"<th{kind(i)}>{cell}</th>" for i, cell in enumerate(head))
    body = "".join("<tr>" + "".join(f"<td{kind(i)}>{c}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
