"""One page about a steering evaluation: effect against side effect, comparisons, samples. No network, no script."""

import html
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.report import steer_eval_svg as svg
from qscope.report.evaluate_page import num
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.steer_eval_arms import FLIPPED, PROMPT, SPEC, UNSTEERED
from qscope.workflows.steer_eval_matching import Interval, Matched
from qscope.workflows.steer_eval_result import PointResult, SteerEvalResult, side_effect

SIDE_NAMES = {"kl": "KL to the unsteered model, nats per token", "ce": "increase of the cross-entropy, nats per token"}
_COLOURS = {
    SPEC: "main",
    FLIPPED: "flip",
    PROMPT: "prompt",
    "difference of means": "a",
    "PCA": "b",
    "linear probe": "c",
}

FORMULAS = {
    "target rate": "mean score of the detector over the prompts.",
    "KL": "mean over tokens of sum p ln(p / q), p unsteered, q steered, on the same tokens of neutral text, teacher "
    "forced; the first half of each text stands as the prompt, the second half is counted as generated.",
    "perplexity": "exp of the mean cross-entropy on the same tokens.",
    "size": "|change of the residual| / median norm of the residual at that layer (without first tokens and attention "
    "sinks).",
    "distinct-n": "different n-grams of tokens over n-grams, mean over answers (Li et al. 2016).",
    "repetition": "1 - distinct-4, mean over answers (seq-rep-4, Welleck et al. 2020).",
    "length, steered": "tokens of the answer; tokens of prompt and answer on which an edit acted; means over prompts.",
    "accuracy": "share of questions whose right choice has the highest log-probability per character.",
    "at equal side effect": "target rate where an arm's curve, straight between measured points, first reaches the "
    "spec's side effect; where it never does, its best rate at less.",
    "intervals": "95 %, percentile bootstrap over prompts (differences: the same prompts for both arms), neutral texts "
    "or questions; side effects are held fixed when target rates are compared.",
    "spec wins, spec loses": "the whole interval of the difference is on one side of 0, by more than half a prompt.",
}


def write(result: SteerEvalResult) -> Path:
    """Write the page, whole or not at all; its path. Also what `qscope steer eval --json` calls."""
    return write_whole(result.page, page(result), "Choose another --out.")


def page(result: SteerEvalResult) -> str:
    """The page as HTML."""
    return fill("steer_eval_page.html", _body(result))


def _body(result: SteerEvalResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="note">{_safe(note)}</p>' for note in result.notes)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    what = f"{Path(result.spec).name} · {result.detector}"
    return (
        f'<header><h1><i class="mark"></i>Steering evaluation <span>{_safe(what)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p></header>'
        f'<section><p class="verdict">{_safe(result.verdict)}</p>{notes}{_facts(result)}{_pictures(result)}</section>'
        f"<section><h2>At equal side effect</h2>{_matched(result)}</section>"
        f"<section><h2>Every setting</h2>{_points(result)}{_directions(result)}</section>"
        f"<section><h2>Samples</h2>{_samples(result)}</section>"
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}. {_safe(result.cost)}.</footer>"
    )


def _facts(result: SteerEvalResult) -> str:
    base = result.points[0]
    spec = [point for point in result.points if point.arm == SPEC]
    best = max(spec, key=lambda point: point.target.value)
    facts = [
        ("Unsteered", num(base.target.value, 3), "target rate"),
        ("Spec", num(best.target.value, 3), f"highest, at strength {best.strength:g}"),
        ("There, KL", num(best.kl.value, 3), f"perplexity {num(base.perplexity, 2)} → {num(best.perplexity, 2)}"),
        ("Repetition", num(best.repetition.value, 3), f"unsteered {num(base.repetition.value, 3)}"),
    ]
    if best.accuracy and base.accuracy:
        facts.append(("Accuracy", num(best.accuracy.value, 3), f"unsteered {num(base.accuracy.value, 3)}"))
    inner = "".join(f'<div><dt>{a}</dt><dd>{b}</dd><dd class="note">{c}</dd></div>' for a, b, c in facts)
    return f'<dl class="facts">{inner}</dl>'


# --- pictures --------------------------------------------------------------------------------------------


def _pictures(result: SteerEvalResult) -> str:
    match = result.match
    views = [(SIDE_NAMES[match], [(p, side_effect(p, match)) for p in result.points], True)]
    views.append(("repetition of the answers", [(p, p.repetition.value) for p in result.points], False))
    if result.points[0].accuracy:
        right = [(p, p.accuracy.value) for p in result.points if p.accuracy]
        views.append(("accuracy on multiple choice", right, False))
    sized = [(p, p.size) for p in result.points if p.size is not None and p.arm != UNSTEERED]
    views.append(("size: |change| / typical norm", [(p, s) for p, s in sized if s is not None], True))
    unsteered = result.points[0].target.value
    panels = "".join(
        _panel(f"Target rate against {name}", svg.scatter(_lines(found, match), unsteered, name, name, log))
        for name, found, log in views
    )
    return f'{_legend(result)}<div class="panels">{panels}</div>'


def _lines(points: Sequence[tuple[PointResult, float]], match: str) -> list[svg.Line]:
    """A line per arm, the spec last so that it lies on top."""
    names = sorted({p.arm for p, _ in points} - {UNSTEERED}, key=lambda arm: (arm == SPEC, arm in _COLOURS, arm))
    lines = []
    for arm in names:
        mine = [(p, x) for p, x in points if p.arm == arm]
        mine.sort(key=lambda pair: side_effect(pair[0], match) if arm == PROMPT else pair[0].strength)
        dots = [svg.Dot(x, p.target.value, p.target.low, p.target.high, _what(p)) for p, x in mine]
        lines.append(svg.Line(_colour(arm), dots))
    return lines


def _what(point: PointResult) -> str:
    return f"{_setting(point)}: target rate {point.target.value:.3f}, KL {point.kl.value:.3g}"


def _colour(arm: str) -> str:
    return _COLOURS.get(arm, "quiet")


def _legend(result: SteerEvalResult) -> str:
    names = list(dict.fromkeys(point.arm for point in result.points if point.arm != UNSTEERED))
    plain = [name for name in names if name in _COLOURS]
    keys = [(name, _colour(name)) for name in plain]
    if len(plain) < len(names):
        keys.append(("random features and directions", "quiet"))
    return "".join(
        [
            '<p class="legend">',
            *(f'<span><i class="key {kind}"></i>{_safe(name)}</span>' for name, kind in keys),
            "</p>",
        ]
    )


# --- tables ----------------------------------------------------------------------------------------------


def _matched(result: SteerEvalResult) -> str:
    panels = []
    spec = {point.strength: point for point in result.points if point.arm == SPEC}
    for strength in dict.fromkeys(item.strength for item in result.matched):
        mine = [item for item in result.matched if item.strength == strength]
        own = spec[strength]
        rows = [("spec", _interval(own.target), "–", "")]
        rows += [(_safe(item.arm), _rate(item), _interval(item.difference, sign=True), item.judgement) for item in mine]
        head = ("arm", "target rate there", "spec minus arm", "")
        title = f"Strength {strength:g}: {SIDE_NAMES[result.match]} {num(mine[0].side_effect, 3)}"
        panels.append(_panel(title, _table(head, rows)))
    left = "".join(f"<li>{_safe(arm)}: {_safe(why)}</li>" for arm, why in result.left_out.items())
    foot = f'<p class="caption">Not run:</p><ul class="caption">{left}</ul>' if left else ""
    return f'<div class="panels">{"".join(panels)}</div>{foot}'


def _rate(item: Matched) -> str:
    if item.rate is not None:
        return _interval(item.rate)
    return f"{num(item.best_below, 3)} at less<small>never gets there, at most {num(item.reached, 3)}</small>"


def _points(result: SteerEvalResult) -> str:
    head = ["setting", "size", "target rate", "KL", "CE increase", "perplexity", "distinct-1", "distinct-2"]
    head += ["repetition", "length", "steered", "accuracy"]
    rows = []
    for p in result.points:
        texts = (p.distinct_1, p.distinct_2, p.repetition)
        row = [_safe(_setting(p)), num(p.size, 3), _interval(p.target), _interval(p.kl)]
        row += [_interval(p.ce_increase, sign=True), num(p.perplexity, 2), *map(_interval, texts)]
        row += [_interval(p.length, 1), num(p.fired, 1), "–" if p.accuracy is None else _interval(p.accuracy)]
        rows.append(row)
    return f'<div class="panels">{_panel("", _table(head, rows), wide=True)}</div>'


def _setting(point: PointResult) -> str:
    if point.arm == UNSTEERED:
        return UNSTEERED
    if point.instruction:
        return f"{point.arm}: “{point.instruction}”"
    sign = "−" if point.arm == FLIPPED else ""
    return f"{point.arm}, {sign}{point.strength:.3g}"


def _directions(result: SteerEvalResult) -> str:
    rows = [(_safe(name), _safe(note), num(result.cosines.get(name), 3)) for name, note in result.directions.items()]
    if not rows:
        return ""
    table = _table(("direction", "made of", "cosine to what the spec adds"), rows)
    return f'<div class="panels">{_panel("Baseline directions", table, wide=True)}</div>'


def _samples(result: SteerEvalResult) -> str:
    parts = [
        '<p class="soft">The first prompts of the file, whatever came out. In front of an answer stands its score.</p>'
    ]
    for strength in dict.fromkeys(sample.strength for sample in result.samples):
        rows = "".join(
            f'<tr><td class="text">{_safe(s.prompt)}</td>'
            f'<td class="text"><b>{num(s.unsteered_score, 2)}</b> {_safe(s.unsteered)}</td>'
            f'<td class="text"><b>{num(s.steered_score, 2)}</b> {_safe(s.steered)}</td></tr>'
            for s in result.samples
            if s.strength == strength
        )
        head = "<thead><tr><th>prompt</th><th>unsteered</th><th>steered</th></tr></thead>"
        table = f'<table class="pairs">{head}<tbody>{rows}</tbody></table>'
        parts.append(f"<details open><summary>Strength {strength:g}</summary>{table}</details>")
    return "".join(parts)


# --- pieces ----------------------------------------------------------------------------------------------


def _interval(found: Interval, digits: int = 3, sign: bool = False) -> str:
    """A cell: the value, and its interval below it."""
    text = f"{'+' if found.value > 0 else ''}{num(found.value, digits)}" if sign else num(found.value, digits)
    return f"{text}<small>{num(found.low, digits)} to {num(found.high, digits)}</small>"


def _panel(title: str, inside: str, wide: bool = False) -> str:
    head = f"<h3>{_safe(title)}</h3>" if title else ""
    return f'<figure class="panel{" wide" if wide else ""}">{head}{inside}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
