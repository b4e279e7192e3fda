"""The page of `qscope explain`: every feature with its sentence, scores and passages. One file, no network.

Passages and sentences are hostile input: everything goes through `html.escape`, and the page allows no script.
"""

import html
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.explaining.journal import Explanation, ShownPassage
from qscope.explaining.scores import KINDS, Score
from qscope.report.evaluate_page import num, share
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.explain_result import ExplainResult, MeanScore

FORMULAS = {
    "halves": "a hash divides the documents in two; sentences are made of the first half, scores of the second",
    "detection": "passages in which the feature fires, evenly from fifths of its activation, against random silent "
    "ones: does it fire here? (Paulo et al. 2024)",
    "near": "the same firing passages against silent ones that hold one of the feature's leading tokens",
    "fuzzing": "firing passages with the right tokens marked against others with as many silent tokens marked: are "
    "these the tokens?",
    "balanced accuracy": "(share of yes where yes is right + share of no where no is right) / 2; interval: Wilson's "
    "of the two shares, squared and added (Newcombe 1998)",
    "AUROC": "P(score of a passage where yes is right above one where no is) + ½ P(equal); interval: Newcombe 2006, "
    "method 5",
    "keywords": "the judge that costs nothing: a passage is said to fire if it holds one of the leading tokens",
    "precision": "share of the token's occurrences on which the feature fires, in the first half",
}


def write(result: ExplainResult) -> Path | None:
    """Write the page where the config asked for it. Also what `qscope explain --json` calls."""
    return None if result.html is None else write_whole(result.html, page(result), "Choose another --html path.")


def page(result: ExplainResult) -> str:
    """The page as HTML."""
    return fill("steer_find_page.html", _body(result), "qscope: features explained")


def _body(result: ExplainResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="soft">{_safe(note)}</p>' for note in result.notes)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    several = "s" if len(result.explanations) != 1 else ""
    return (
        f'<header><h1><i class="mark"></i>{len(result.explanations)} feature{several} explained</h1>'
        f'<p class="soft">{_safe(about)}</p>{notes}</header>{_summary(result)}'
        f"<section><h2>Features</h2>{''.join(map(_feature, result.explanations))}</section>"
        f'<section><h2>What the figures mean</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}. Sentences are made of corpus text or by a model: read them as data."
        "</footer>"
    )


def _summary(result: ExplainResult) -> str:
    if not result.scores:
        return ""
    rows = [_mean(kind, found) for kind, found in result.scores.items()]
    head = ("", "features", "balanced accuracy", "95 %", "AUROC", "95 %", "unanswered")
    table = f'<figure class="panel"><h3>Mean over features</h3>{_table(head, rows)}</figure>'
    return f"<section><h2>Scores</h2>{table}</section>"


def _mean(kind: str, found: MeanScore) -> tuple[str, ...]:
    return (
        kind, str(found.features), num(found.balanced_accuracy, 3), _between(found.balanced_accuracy_interval),
        num(found.auroc, 3), _between(found.auroc_interval), str(found.unanswered),
    )  # fmt: skip


def _feature(one: Explanation) -> str:
    problem = f'<p class="soft">{_safe(one.problem)}</p>' if one.problem else ""
    plain = f'<p class="soft">{_safe(one.plain)}</p>' if one.plain != one.text else ""
    tokens = _table(
        ("token", "share of its activation", "fires", "precision"),
        [(t.text, share(t.share), f"{t.count:,}", share(t.precision)) for t in one.tokens],
    )
    scores = _table(
        ("", "balanced accuracy", "95 %", "AUROC", "95 %", "yes right", "no right", "unanswered"),
        [_score(kind, one.scores[kind]) for kind in KINDS if kind in one.scores],
    )
    raised = " ".join(f"<code>{_safe(token)}</code>" for token in one.raised)
    lens = f'<p class="caption">raises {raised}</p>' if raised else ""
    passages = "".join(_passage(passage) for passage in one.passages)
    return (
        f'<figure class="panel feature"><h3>{one.layer}:{one.feature} <span class="soft">fires on {one.count:,} tokens '
        f"({share(one.density)}), at most {num(one.largest, 2)}</span></h3>"
        f'<p class="said">{_safe(one.text)}</p>{plain}{problem}{scores if one.scores else ""}'
        f"<details><summary>tokens and passages</summary>{tokens}{lens}{passages}</details></figure>"
    )


def _score(kind: str, score: Score) -> tuple[str, ...]:
    return (
        kind, _number(score.balanced_accuracy), _between(score.balanced_accuracy_interval), _number(score.auroc),
        _between(score.auroc_interval), f"{score.true_yes} of {score.positives}",
        f"{score.true_no} of {score.negatives}", str(score.unanswered),
    )  # fmt: skip


def _passage(passage: ShownPassage) -> str:
    """Marks are put in after escaping: the text itself holds no << or >>."""
    text = _safe(passage.text).replace("&lt;&lt;", "<mark>").replace("&gt;&gt;", "</mark>")
    return f'<p class="passage">{text} <span class="soft">{num(passage.largest, 2)}</span></p>'


def _number(value: float | None) -> str:
    return "–" if value is None else num(value, 2)


def _between(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
