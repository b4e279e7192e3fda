"""One page about the features that `qscope steer find` found, and the same as JSON: single files, no script."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.finding.stability import Agreement, Interval
from qscope.report.evaluate_page import num, share, signed
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.steer_find_result import (
    Context,
    FeatureFound,
    LayerDiagnosis,
    LayerFound,
    SteerFindResult,
    UnusualFeature,
)

FORMULAS = {
    "mean difference": "mean over the positive training texts − over the negative ones, of a text's pooled activation",
    "rate difference": "the same of firing (activation above 0)",
    "AUROC": "P(positive text above negative) + ½ P(equal), of the pooled activation; silent texts are ties at 0",
    "t, q": "Welch's t; two-sided p adjusted by Benjamini–Hochberg over all ranked features of all layers",
    "ν": "mean over positive tokens − mean over negative groups of the mean over their tokens (Deng et al. 2025)",
    "top1 difference": "largest rate difference of a feature with pooling any; its interval is of the maximum",
    "output score": "(1 − lowest rank / V) × highest probability of the feature's 20 logit-lens tokens, after adding "
    "it at the last token of neutral prompts (Arad et al. 2025)",
    "target change": "change of log P(a target token) when the feature moves the residual there by 0.3 of its median "
    "norm",
    "q99": "0.99 quantile of the feature's activation over the positive training tokens at which it fires",
    "dense": "fires at more than 10 % of the negative tokens",
    "z": "(activation − mean) / deviation over the pool and the response together",
}


def write(result: SteerFindResult) -> list[Path]:
    """Write the page and the JSON where the config asked for them, each whole or not at all; their paths.

    Also what `qscope steer find --json` calls.
    """
    from qscope.cli import to_json

    written = []
    if result.html is not None:
        written.append(write_whole(Path(result.html), page(result), "Choose another --html path."))
    if result.out is not None:
        text = json.dumps(to_json(result), indent=1, allow_nan=False) + "\n"
        written.append(write_whole(Path(result.out), text, "Choose another --out path."))
    return written


def page(result: SteerFindResult) -> str:
    """The page as HTML."""
    return fill("steer_find_page.html", _body(result))


def _body(result: SteerFindResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="soft">{_safe(note)}</p>' for note in result.notes)
    sections = [_layer(name, found, result) for name, found in result.layers.items()]
    sections += [_case(name, found, result) for name, found in result.diagnosis.items()]
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    return (
        f'<header><h1><i class="mark"></i>Features found <span>{_safe(result.model)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p>{notes}</header>{_choice(result)}{"".join(sections)}'
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}.</footer>"
    )


def _choice(result: SteerFindResult) -> str:
    facts = [("Layer", str(result.layer), ""), ("Feature", ", ".join(map(str, result.chosen)), "")]
    inner = "".join(f"<div><dt>{a}</dt><dd>{_safe(b)}</dd></div>" for a, b, _ in facts)
    targets = (
        '<p class="soft">Target tokens: ' + " ".join(f"<code>{_safe(t)}</code>" for t in result.targets) + "</p>"
        if result.targets
        else ""
    )
    layers = ""
    if len(result.layers) > 1:
        head = ("layer", "top1 difference", "largest in", "ranked", "significant", "best feature")
        rows = [
            (
                name,
                _interval(x.top1.difference),
                share(x.top1.chosen),
                f"{x.ranked:,}",
                f"{x.significant:,}",
                str(x.features[0].feature),
            )
            for name, x in result.layers.items()
        ]
        layers = _panel("Layers", _table(head, rows))
    spec = json.dumps(result.spec, indent=1, ensure_ascii=False)
    return (
        f'<section><h2>Choice</h2><p class="soft">{_safe(result.reason)}.</p><dl class="facts">{inner}</dl>{targets}'
        f'<div class="stack">{layers}{_panel("Steering spec", f"<pre>{html.escape(spec)}</pre>")}</div></section>'
    )


# --- a layer ---------------------------------------------------------------------------------------------


def _layer(name: str, found: LayerFound, result: SteerFindResult) -> str:
    counts = found.tokens
    facts = (
        f"{found.sae} · {found.d_sae:,} features · k = {found.k} · {counts.kept:,} of {counts.tokens:,} tokens of "
        f"{counts.texts:,} texts; {counts.extreme:,} attention sinks and {counts.nan:,} NaN left out · median residual "
        f"norm {num(found.residual_norm, 1)}"
    )
    head = ("feature", "mean difference", "rate difference", "AUROC", "t", "q", "ν", "density", "q99")
    rows = [_scores(f, f.feature in result.chosen and name == str(result.layer)) for f in found.features]
    scores = _panel("Scores on the training texts", _table(head, rows))
    effects = ("feature", "in the top", "held-out AUROC", "held-out difference", "output", "target", "raised tokens")
    checks = _panel("Do they hold, and what do they do", _table(effects, [_checks(f) for f in found.features]))
    agreed = [
        (title, f"{a.pairs}", _interval(a.jaccard), _interval(a.rank_correlation)) for title, a in _agreements(found)
    ]
    stable = ""
    if agreed:
        stable = _panel(
            f"Stability of the top {len(found.features)}",
            _table(("", "pairs", "Jaccard", "rank correlation"), agreed),
            "Bootstrap replicates share most texts with the full set, so they agree more than new texts would; random "
            "halves share none, and are half as large.",
        )
    panels = scores + checks + stable + _contexts(found.features)
    mismatch = f'<p class="soft">Made for something else: {_safe(found.mismatch)}</p>' if found.mismatch else ""
    return (
        f'<section id="layer-{_safe(name)}"><h2>Layer {_safe(name)}</h2><p class="soft">{_safe(facts)}</p>{mismatch}'
        f'<p class="soft">{found.ranked:,} features ranked, {found.significant:,} of them significant; top1 difference '
        f'{_interval(found.top1.difference)}</p><div class="stack">{panels}</div></section>'
    )


def _agreements(found: LayerFound) -> list[tuple[str, Agreement]]:
    every = (
        ("bootstrap against all texts", found.bootstrap),
        ("random halves", found.halves),
        ("paraphrases", found.paraphrase),
    )
    return [(title, a) for title, a in every if a is not None]


def _scores(f: FeatureFound, chosen: bool) -> tuple[str, ...]:
    return (
        f"{'★ ' if chosen else ''}{f.feature}{' (dense)' if f.dense else ''}",
        f"{signed(f.mean_difference)} = {num(f.mean_positive)} − {num(f.mean_negative)}",
        signed(f.rate_difference),
        num(f.auroc),
        num(f.t, 1),
        f"{f.q:.1e}",
        signed(f.nu),
        f"{share(f.density_positive)} / {share(f.density_negative)}",
        num(f.scale, 2),
    )


def _checks(f: FeatureFound) -> tuple[str, ...]:
    return (
        str(f.feature),
        "–" if f.inclusion is None else share(f.inclusion),
        num(f.held_out.auroc if f.held_out else None),
        signed(f.held_out.mean_difference if f.held_out else None),
        num(f.output_score),
        signed(f.target_change),
        " ".join(f"“{token}”" for token in f.lens[:6]),
    )


def _case(name: str, found: LayerDiagnosis, result: SteerFindResult) -> str:
    head = ("feature", "z", "activation", "pool mean", "fires", "pool fires", "p", "q99", "raised tokens")
    rows = [
        (
            f"{'★ ' if f.feature in result.chosen and name == str(result.layer) else ''}{f.feature}"
            f"{' (dense)' if f.dense else ''}",
            num(f.z, 2),
            num(f.activation),
            num(f.pool_mean),
            share(f.firing),
            share(f.pool_rate),
            num(f.exceed, 3),
            num(f.scale, 2),
            " ".join(f"“{token}”" for token in f.lens[:5]),
        )
        for f in found.features
    ]
    table = _panel("Features of the response, most unusual first", _table(head, rows))
    facts = f"{found.sae} · {found.d_sae:,} features · median residual norm {num(found.residual_norm, 1)}"
    return (
        f'<section id="layer-{_safe(name)}"><h2>Layer {_safe(name)}</h2><p class="soft">{_safe(facts)}</p>'
        f'<div class="stack">{table}{_contexts(found.features)}</div></section>'
    )


# --- pieces ----------------------------------------------------------------------------------------------


def _contexts(features: Sequence[FeatureFound] | Sequence[UnusualFeature]) -> str:
    rows = "".join(
        f"<dt>{f.feature}</dt><dd>{''.join(_context(c) for c in f.contexts)}</dd>" for f in features if f.contexts
    )
    return _panel("Where they fire most", f'<dl class="contexts">{rows}</dl>') if rows else ""


def _context(c: Context) -> str:
    return (
        f"<p>{_safe(c.before)}<mark>{_safe(c.token)}</mark>{_safe(c.after)} "
        f'<span class="soft">{num(c.activation, 2)}</span></p>'
    )


def _interval(found: Interval) -> str:
    return f"{num(found.value, 3)} [{num(found.low, 3)}, {num(found.high, 3)}]"


def _panel(title: str, inside: str, caption: str = "") -> str:
    foot = f'<p class="caption">{_safe(caption)}</p>' if caption else ""
    return f'<figure class="panel"><h3>{_safe(title)}</h3>{inside}{foot}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
