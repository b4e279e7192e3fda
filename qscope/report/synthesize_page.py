"""One page about synthesised examples: coverage by budget, yields, targets, examples. No network."""

import html
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.report import coverage_svg as svg
from qscope.report.evaluate_page import num, share
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.synthesize_result import SynthesizeResult

FORMULAS = {
    "T, T_miss": "the target features; those that no seed text fires (Qwen-Scope, equations 18 to 20). A text fires a "
    "feature if its largest activation over the tokens is above the threshold.",
    "coverage": "share of T that at least one text fires (equation 23), always with the seed.",
    "by budget": "expected share with n random ones of the texts: 1 for what the seed fires, else "
    "1 \u2212 C(N \u2212 m, n) / C(N, n), m of N texts firing the target. \u201cAs made\u201d: the first n examples in "
    "their order.",
    "feature-driven": "attempts for a target that fire it when read again, without near-duplicates.",
    "unverified": "all attempts with a text, whether or not they fire their target.",
    "random": "the same sources asked without a feature, as many attempts, without near-duplicates.",
    "natural": "texts of the pool, as they come. The passages that generators are shown are of the same pool.",
    "near-duplicates": "Jaccard similarity of 3-word runs, or of the sets of fired features, at or above the bars; "
    "compared with the seed, the passages shown and all kept examples.",
}


def write(result: SynthesizeResult) -> Path | None:
    """Write the page; its path. Also what `qscope synthesize --json` calls."""
    return None if result.html is None else write_whole(Path(result.html), page(result), "Choose another --out.")


def page(result: SynthesizeResult) -> str:
    """The page as HTML."""
    return fill("coverage_page.html", _body(result), "qscope synthesize")


def _body(result: SynthesizeResult) -> str:
    about = " \u00b7 ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="note">{_safe(note)}</p>' for note in result.notes)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    curves = [svg.Curve(c.name, [(n, v) for n, v in c.points if n]) for c in result.curves if c.texts]
    picture = svg.curves(curves, "coverage by budget", "texts added to the seed", share=True) if curves else ""
    return (
        f'<header><h1><i class="mark"></i>Synthesis <span>{_safe(result.model)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p>{notes}</header>'
        f"<section><h2>Coverage of {len(result.targets)} targets</h2>{_facts(result)}"
        f'<div class="panels"><div class="panel wide narrow"><h3>Coverage by budget</h3>{picture}</div></div></section>'
        f'<section><h2>Yield</h2><div class="panels"><div class="panel wide">{_yields(result)}</div></div></section>'
        f"<section><h2>Targets</h2><details open><summary>Least support first</summary>{_targets(result)}</details>"
        f"</section><section><h2>Examples</h2>{_examples(result)}</section>"
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}. Examples: {_safe(Path(result.examples).name)}. What generators wrote "
        "is not checked for truth or decency.</footer>"
    )


def _facts(result: SynthesizeResult) -> str:
    facts = [("seed alone", share(result.coverage_seed), f"{result.seed_texts:,} texts")]
    facts += [(name, share(value), f"with {result.kept:,} texts") for name, value in result.coverage.items()]
    facts += [
        (name, share(value), f"with {result.attempts:,} texts") for name, value in result.coverage_attempts.items()
    ]
    if result.unverified_fire is not None:
        facts.append(("fire their target", share(result.unverified_fire), "without verification"))
    return '<dl class="facts">' + "".join(
        f'<div><dt>{_safe(name)}</dt><dd>{value}</dd><dd class="note">{_safe(note)}</dd></div>'
        for name, value, note in facts
    ) + "</dl>"  # fmt: skip


def _yields(result: SynthesizeResult) -> str:
    rows = []
    for one in result.yields:
        kept = one.verdicts.get("kept", 0)
        dropped = "; ".join(f"{number} {name}" for name, number in one.verdicts.items() if name != "kept")
        fire = "\u2013" if one.role == "random" else share(one.fire / one.attempts)
        name = f"{one.arm}, {one.source}, {one.role}"
        rows.append((_safe(name), f"{one.attempts:,}", fire, f"{kept:,}", share(kept / one.attempts), _safe(dropped)))
    return _table(("arm, source, role", "tried", "fire", "kept", "yield", "dropped"), rows)


def _targets(result: SynthesizeResult) -> str:
    rows = []
    for t in sorted(result.targets, key=lambda t: (t.support, t.layer, t.feature)):
        name = f"{t.layer}:{t.feature}<small>{_safe(t.meaning or '')}</small>"
        pool = "\u2013" if t.pool_support is None else f"{t.pool_support:,}"
        said = "given up" if t.given_up else ""
        rows.append(
            (
                name, f"{t.seed_support:,}", pool, f"{t.attempts:,}", f"{t.kept:,}", f"{t.support:,}",
                num(t.largest, 2), said,
            )
        )  # fmt: skip
    return _table(("target", "seed", "pool", "tried", "kept", "now", "strongest", ""), rows)


def _examples(result: SynthesizeResult) -> str:
    rows = []
    for record in result.shown:
        source = record["provenance"]
        said = f"{source['layer']}:{source['feature']}<small>{_safe(source['source'])}, {_safe(source['role'])}</small>"
        text = _safe(visible(record["text"]))
        rows.append((said, num(source["activation"], 2), f'<span class="text">{text}</span>'))
    table = _table(("target", "activation", "text"), rows)
    return f"<details><summary>{len(rows)} of {result.kept:,}</summary>{table}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_safe(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _safe(text: str) -> str:
    return html.escape(text)
