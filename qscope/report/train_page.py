"""The page of a training run: figures, curves, what was read and left out. One file, no network, no script."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qscope._version import __version__
from qscope.report.evaluate_page import num, share
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.report.train_svg import Curve, curves
from qscope.workflows.train import TrainResult
from qscope.workflows.train_log import read

COLOURS = 6
"""SAEs that get a colour of their own; of more, the best and the worst are coloured."""

Lines = dict[str, list[dict[str, Any]]]
"""SAE -> its lines of the log"""


def write(result: TrainResult) -> Path:
    """Write the page where the result says, whole or not at all; its path. Also what `qscope train --json` calls."""
    return write_whole(Path(result.report), page(result), "The SAEs are finished; make room.")


def page(result: TrainResult) -> str:
    """The page as HTML."""
    return fill("train_page.html", _body(result))


def _body(result: TrainResult) -> str:
    lines: Lines = {name: [] for name in result.saes}
    for line in read(Path(result.out)):
        if line["sae"] in lines:
            lines[line["sae"]].append(line)
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    state = "" if result.complete else '<p class="warn">Stopped early: not all tokens were trained on.</p>'
    return (
        f'<header><h1><i class="mark"></i>SAE training <span>{_safe(result.model)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p>{state}</header>'
        f"<section>{_facts(result, lines)}{_table(result)}</section>"
        f"<section><h2>Curves</h2>{_curves(lines)}</section>"
        f"<section><h2>Tokens</h2>{_counts(result)}</section>"
        f"<footer>Figures of training batches, before each update; FVU = Σ‖x − x̂‖² / Σ‖x − mean‖² of the batch. On "
        f"held-out text: qscope evaluate. Made by qscope {__version__}.</footer>"
    )


def _facts(result: TrainResult, lines: Lines) -> str:
    last = next((found[-1] for found in lines.values() if found), None)
    fvus = [sae.figures["fvu"] for sae in result.saes.values() if "fvu" in sae.figures]
    facts = [
        ("SAEs", f"{len(result.saes)}", "from one stream"),
        ("Tokens", f"{result.tokens:,}", f"{result.steps:,} steps"),
    ]
    if last is not None and last["seconds"]:
        speed, spent = last["tokens"] / last["seconds"], _duration(last["seconds"])
        facts.append(("Tokens per second", f"{speed:,.0f}", f"all of {spent}, model included"))
    if fvus:
        span = num(min(fvus), 3) if len(fvus) == 1 else f"{num(min(fvus), 3)} – {num(max(fvus), 3)}"
        facts.append(("FVU", span, "mean over the last tenth of the steps"))
    inner = "".join(f'<div><dt>{a}</dt><dd>{b}</dd><dd class="note">{c}</dd></div>' for a, b, c in facts)
    return f'<dl class="facts">{inner}</dl>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _table(result: TrainResult) -> str:
    head = ("SAE", "width", "features", "k", "seed", "FVU", "loss", "L0", "dead", "gradient norm")
    rows = []
    for name, sae in result.saes.items():
        found = sae.figures
        figures = [num(found.get("fvu")), num(found.get("loss")), num(found.get("l0"), 1)]
        figures += [share(found["dead_share"]) if "dead_share" in found else "–", num(found.get("grad_norm"), 3)]
        rows.append((name, f"{sae.d_in:,}", f"{sae.d_sae:,}", str(sae.k), str(sae.seed), *figures))
    notes = []
    for name, sae in result.saes.items():
        for figure, meaning in (
            ("overflow", "tokens lost features to the limit per token"),
            ("skipped", "decoder rows were not updated because a batch was not finite"),
        ):
            if sae.figures.get(figure):
                notes.append(f"{name}: {sae.figures[figure]:,.0f} {meaning}.")
    return _panel("At the end of training", _grid(head, rows), " ".join(notes))


# --- curves ----------------------------------------------------------------------------------------------


def _curves(lines: Lines) -> str:
    kinds = _kinds(lines)
    panels = [
        ("FVU, log scale", "fvu", {"log": True}),
        ("Loss, AuxK and penalty included, log scale", "loss", {"log": True}),
        ("Dead features", "dead_share", {"percent": True}),
        ("L0, active features per token", "l0", {}),
        ("Norm of the gradient before clipping, log scale", "grad_norm", {"log": True}),
        ("Learning rate", "lr", {}),
    ]
    if any(line["aux"] for found in lines.values() for line in found):
        panels.append(("AuxK loss, weighted", "aux", {}))
    drawn = [_panel(title, curves(_series(lines, figure, kinds), title, **form)) for title, figure, form in panels]
    one = dict([next(iter(lines.items()))]) if lines else {}
    speed = [c._replace(name="all", kind="same") for c in _series(one, "tokens_per_second", kinds)]
    drawn.append(_panel("Tokens per second between two lines of the log", curves(speed, "Tokens per second")))
    legend = "".join(f'<li class="{kind}">{_safe(name)}</li>' for name, kind in kinds.items() if kind != "quiet")
    rest = sum(kind == "quiet" for kind in kinds.values())
    legend += f'<li class="quiet">{rest} more</li>' if rest else ""
    return f'<ul class="legend">{legend}</ul><div class="panels">{"".join(drawn)}</div>'


def _kinds(lines: Lines) -> dict[str, str]:
    """SAE -> class of its lines."""
    if len(lines) <= COLOURS:
        return {name: f"s{i}" for i, name in enumerate(lines)}
    last = {name: found[-1]["fvu"] for name, found in lines.items() if found and found[-1]["fvu"] is not None}
    kinds = dict.fromkeys(lines, "quiet")
    if last:
        kinds[max(last, key=lambda name: last[name])] = "s1"
        kinds[min(last, key=lambda name: last[name])] = "s0"
    return kinds


def _series(lines: Lines, figure: str, kinds: dict[str, str]) -> list[Curve]:
    """A curve per SAE; one for all where they are the same, as learning rates are."""
    drawn = [
        Curve(name, [(line["tokens"], line[figure]) for line in found if line[figure] is not None], kinds[name])
        for name, found in lines.items()
    ]
    same = len(drawn) > 1 and all(curve.points == drawn[0].points for curve in drawn)
    return [drawn[0]._replace(name="all", kind="same")] if same else drawn


# --- pieces ----------------------------------------------------------------------------------------------


def _counts(result: TrainResult) -> str:
    found = result.counts
    rows = [("trained on", f"{result.tokens:,}")]
    for key, name in {
        "tokens": "read, in windows",
        "dropped_first": "left out: first of a window, or a separator",
        "judged": "judged by the norm filter",
        "kept": "kept by it",
        "epoch": "times the text was begun again",
    }.items():
        if key in found:
            rows.append((name, f"{found[key]:,}"))
    for key, name in {"nonfinite": "left out: NaN or infinite", "extreme_norm": "left out: extreme norm"}.items():
        rows += [(f"{name} at {point}", f"{n:,}") for point, n in found.get(key, {}).items()]
    text = [(name.replace("_", " "), f"{n:,}") for name, n in found.get("rows", {}).items()]
    times = [(stage, f"{seconds:,.1f} s") for stage, seconds in result.seconds.items()]
    buffer = f"The shuffle buffer takes {result.buffer_bytes / 1e6:,.0f} MB."
    left = _panel(
        "Read and left out", _grid(("", "tokens"), rows) + (_grid(("text", ""), text) if text else ""), buffer
    )
    right = _panel("Time of the last run, host", _grid(("", ""), times))
    return f'<div class="panels">{left}{right}</div>'


def _panel(title: str, inside: str, caption: str = "") -> str:
    foot = f'<p class="caption">{_safe(caption)}</p>' if caption else ""
    return f'<figure class="panel"><h3>{_safe(title)}</h3>{inside}{foot}</figure>'


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
