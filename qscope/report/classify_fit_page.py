"""One page about the rule that `qscope classify fit` made, and the same as JSON: single files, no script."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.report.evaluate_page import num, share, signed
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.classify_fit_result import ClassifyFitResult, ClauseFound, LayerLine, SensitivityLine
from qscope.workflows.steer_find_result import Context

FORMULAS = {
    "fires": "the largest activation of the feature over the text's tokens that count is above the threshold "
    "(Qwen-Scope section 6, equation 15); another pooling is named where it is used",
    "active in": "share of the positive / negative training texts with an activation above 0",
    "rate difference": "share of the positive training texts in which it fires (threshold 0) − share of the negative "
    "ones (equation 14)",
    "top1 difference": "largest rate difference of a feature of the layer; the layer with the largest is chosen "
    "(equation 16)",
    "log-odds": "log of the odds ratio of firing, with ½ added to every cell (Haldane); z: over its standard error; q: "
    "Benjamini–Hochberg over the ranked features",
    "AUROC": "P(positive text above negative) + ½ P(equal), of the pooled activation; silent texts are ties at 0",
    "false-positive rate": "share of the negative texts in which the rule fires",
    "raised tokens": "those that the decoder row raises most through the unembedding (logit lens)",
}


def write(result: ClassifyFitResult) -> list[Path]:
    """Write the page and the JSON where the config asked for them, each whole or not at all; their paths.

    Also what `qscope classify fit --json` calls.
    """
    from qscope.cli import to_json

    written = []
    if result.html is not None:
        written.append(write_whole(Path(result.html), page(result), "Choose another --html path."))
    if result.out is not None:
        text = json.dumps(to_json(result), indent=1, allow_nan=False) + "\n"
        written.append(write_whole(Path(result.out), text, "Choose another --out path."))
    return written


def page(result: ClassifyFitResult) -> str:
    """The page as HTML."""
    return fill("steer_find_page.html", _body(result), "qscope: a rule to classify by")


def _body(result: ClassifyFitResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="soft">{_safe(note)}</p>' for note in result.notes)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    return (
        f'<header><h1><i class="mark"></i>A rule of {len(result.clauses)} '
        f"feature{'s' if len(result.clauses) > 1 else ''} <span>{_safe(result.model)}</span></h1>"
        f'<p class="soft">{_safe(about)}</p>{notes}</header>{_rule(result)}{_choice(result)}'
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}. No test text was looked at.</footer>"
    )


# --- the rule --------------------------------------------------------------------------------------------


def _rule(result: ClassifyFitResult) -> str:
    several = len({clause.of for clause in result.clauses}) > 1
    names = ("layer", "feature", "fires above", "active in", "rate difference", "AUROC", "log-odds", "z", "q")
    head = ("class",) * several + names
    rows = [(c.of,) * several + _figures(c) for c in result.clauses]
    sizes = _panel("Texts", _table(("", *result.classes), [_part(result, name) for name in result.counts]))
    meanings = "".join(_meaning(clause, several) for clause in result.clauses)
    chosen = [line for line in result.sensitivity if line.chosen]
    facts = "" if several or not chosen else _facts(chosen[0])
    said = "the class whose rule has the largest score" if several else f"{result.classes[-1]} if any of these fires"
    return (
        f'<section><h2>The rule</h2><p class="soft">A text is {_safe(said)}.</p>{facts}<div class="stack">'
        f"{_panel('Features, on the training texts', _table(head, rows))}"
        f"{_panel('What they are', f'<dl class=contexts>{meanings}</dl>')}{sizes}</div></section>"
    )


def _facts(line: SensitivityLine) -> str:
    figures = line.calibration
    facts = [
        ("F1", num(figures.get("f1"), 3)),
        ("Precision", part(figures.get("precision"))),
        ("Recall", part(figures.get("recall"))),
        ("False positives", part(figures.get("false_positive_rate"))),
    ]
    inner = "".join(f"<div><dt>{a}</dt><dd>{_safe(b)}</dd></div>" for a, b in facts)
    note = "On the calibration texts, which chose the rule: new texts may do worse (qscope classify evaluate)."
    return f'<dl class="facts">{inner}</dl><p class="soft">{note}</p>'


def _figures(c: ClauseFound) -> tuple[str, ...]:
    return (
        str(c.layer),
        str(c.feature),
        num(c.threshold, 3),
        f"{share(c.rate_positive)} / {share(c.rate_negative)}",
        signed(c.rate_difference),
        num(c.auroc, 3),
        signed(c.log_odds),
        num(c.z, 1),
        f"{c.q:.1e}",
    )


def _meaning(clause: ClauseFound, several: bool) -> str:
    of = f"{clause.of}: " if several else ""
    raised = " ".join(f"<code>{_safe(token)}</code>" for token in clause.lens[:8])
    where = "".join(_context(context) for context in clause.contexts)
    return (
        f'<dt>{_safe(of)}{clause.layer}:{clause.feature}</dt><dd>{where}<p class="soft">raised tokens {raised}</p></dd>'
    )


def _part(result: ClassifyFitResult, name: str) -> tuple[str, ...]:
    return (name, *(f"{result.counts[name][label]:,}" for label in result.classes))


SETTINGS = (
    "layers", "K", "pooling", "threshold", "F1 training", "F1 calibration", "precision", "recall", "false positives",
)  # fmt: skip


# --- what else could have been chosen --------------------------------------------------------------------


def _choice(result: ClassifyFitResult) -> str:
    several = len({line.of for line in result.layers}) > 1
    layers = [(line.of,) * several + _layer(line) for line in result.layers]
    head = ("class",) * several + ("layer", "top1 difference", "of feature", "SAE")
    shown = near(result)
    tables = _panel("Layers", _table(head, layers))
    if shown:
        caption = (
            "Precision, recall and false positives are of the calibration texts. The row with a star is the rule; "
            "nothing was chosen by these rows but what the options say."
        )
        tables += _panel("One thing different", _table(SETTINGS, [_setting(line) for line in shown]), caption)
    rest = [line for line in result.sensitivity if line not in shown]
    if rest:
        inner = _table(SETTINGS, [_setting(line) for line in rest])
        tables += _panel("More things different", f"<details><summary>{len(rest)} rules</summary>{inner}</details>")
    return f'<section><h2>What else could have been chosen</h2><div class="stack">{tables}</div></section>'


def _layer(line: LayerLine) -> tuple[str, ...]:
    mark = "★ " if line.chosen else ""
    return (f"{mark}{line.layer}", signed(line.top1_difference), str(line.top1_feature), line.sae)


def _setting(line: SensitivityLine) -> tuple[str, ...]:
    held = line.calibration
    return (
        f"{'★ ' if line.chosen else ''}{line.layers}",
        str(line.k),
        line.pooling,
        line.threshold,
        num(line.training.get("f1"), 3),
        num(held.get("f1"), 3),
        part(held.get("precision")),
        part(held.get("recall")),
        part(held.get("false_positive_rate")),
    )


def part(value: float | None) -> str:
    """A share; – for None."""
    return "–" if value is None else share(value)


def near(result: ClassifyFitResult) -> list[SensitivityLine]:
    """The rule, and those that differ from it in one setting."""
    chosen = next((line for line in result.sensitivity if line.chosen), None)
    return [line for line in result.sensitivity if chosen is not None and _apart(line, chosen) <= 1]


def _apart(line: SensitivityLine, other: SensitivityLine) -> int:
    return sum(getattr(line, name) != getattr(other, name) for name in ("layers", "k", "pooling", "threshold"))


# --- pieces ----------------------------------------------------------------------------------------------


def _context(c: Context) -> str:
    return (
        f"<p>{_safe(c.before)}<mark>{_safe(c.token)}</mark>{_safe(c.after)} "
        f'<span class="soft">{num(c.activation, 2)}</span></p>'
    )


def _panel(title: str, inside: str, caption: str = "") -> str:
    foot = f'<p class="caption">{_safe(caption)}</p>' if caption else ""
    return f'<figure class="panel"><h3>{_safe(title)}</h3>{inside}{foot}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
