"""One page about a fine-tuning with a feature penalty and its controls. No network, no script."""

import html
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.post_training.switching import Interval
from qscope.report import sft_svg as svg
from qscope.report.evaluate_page import num
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.sft_arms import MEANING
from qscope.workflows.sft_result import BASE, PENALTY, ArmResult, SFTResult

_KINDS = {
    "penalty": "main", "none": "prompt", "random": "a", "difference": "b", "kl": "c", "entropy": "c", "token": "flip",
    "filter": "quiet", "base": "quiet",
}  # fmt: skip

FORMULAS = {
    "switching": "share of the answers that hold any character of the target's scripts (Qwen-Scope equation 24); all "
    "prompt languages together; empty answers count as not switched.",
    "its interval": "95 %, percentile bootstrap over training seeds and prompts, both drawn (where none or all "
    "switched: Wilson, of the prompts); for differences the same "
    "seeds and prompts in both arms. With few seeds it is too narrow.",
    "clean held-out loss": "cross-entropy on held-out answers of the other groups that hold no target script, nats per "
    "token; bootstrap over seeds and examples.",
    "target loss": "the same on held-out answers of the target group itself.",
    "penalty": "per layer, weight times the mean over response tokens and features of ReLU(pre-activation - "
    "alpha[group, feature]) on tokens of other groups (SASFT, arXiv 2507.14894), summed over layers.",
    "does not beat": "the interval of the difference in switching, penalty minus control, is not wholly below 0.",
}


def write(result: SFTResult) -> Path:
    """Write the page, whole or not at all; its path. Also what `qscope sft --json` calls."""
    return write_whole(result.page, page(result), "Choose another --out.")


def page(result: SFTResult) -> str:
    """The page as HTML."""
    return fill("steer_eval_page.html", _body(result), "qscope SFT")


def _body(result: SFTResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="note">{_safe(note)}</p>' for note in result.notes)
    said = "".join(f'<p class="verdict">{_safe(text)}</p>' for text in result.verdict)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    what = f"{result.model} · answers that switch into {result.target_group} ({', '.join(result.scripts)})"
    return (
        f'<header><h1><i class="mark"></i>Fine-tuning with a feature penalty <span>{_safe(what)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p></header>'
        f"<section>{said}{notes}</section>"
        f"<section><h2>By arm</h2>{_pictures(result)}{_table(arm_rows(result.arms))}{_meanings(result)}</section>"
        f"<section><h2>Penalty minus control</h2>{_compared(result)}</section>"
        f"<section><h2>Training</h2>{_curves(result)}</section>"
        f"<section><h2>Features</h2>{_features(result)}</section>"
        f"<section><h2>Samples</h2>{_samples(result)}</section>"
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}.</footer>"
    )


def _pictures(result: SFTResult) -> str:
    def rows(of: str, seeds: str, shown: float, unit: str) -> list[svg.Row]:
        found = []
        for arm in result.arms:
            one: Interval = getattr(arm, of)
            text = f"{shown * one.value:.4g}{unit} [{shown * one.low:.4g}, {shown * one.high:.4g}]"
            found.append(svg.Row(arm.name, one.value, one.low, one.high, getattr(arm, seeds), text, _kind(arm)))
        return found

    switching = svg.intervals(rows("ratio", "ratios", 100, " %"), "switching by arm", True)
    loss = svg.intervals(rows("loss", "losses", 1, ""), "clean held-out loss by arm", False)
    caption = "Dot: mean over seeds; line: 95 % interval; small marks: the seeds."
    return (
        f'<div class="panels">{_panel("Switching ratio", switching, caption)}'
        f"{_panel('Clean held-out loss, nats per token', loss)}</div>"
    )


def _kind(arm: ArmResult) -> str:
    return _KINDS[arm.arm]


def _curves(result: SFTResult) -> str:
    """The arms' logs, mean over seeds; the terms of the losses in panels of their own."""
    panels = [_panel("Cross-entropy, without the terms", svg.curves(_logged(result, "loss"), "training loss"))]
    for name in dict.fromkeys(arm.arm for arm in result.arms):
        found = _logged(result, f"term/{name}")
        if found:
            panels.append(_panel(f"Term of {name}, weight included", svg.curves(found, f"term of {name}")))
    return f'<div class="panels">{"".join(panels)}</div>'


def _logged(result: SFTResult, key: str) -> list[svg.Curve]:
    found = []
    for arm in result.arms:
        logs = [p.log for p in result.points if (p.arm, p.weight) == (arm.arm, arm.weight)]
        steps: dict[float, list[float]] = {}
        for row in (row for log in logs for row in log if key in row):
            own = sum(value for name, value in row.items() if name.startswith("term/")) if key == "loss" else 0.0
            steps.setdefault(row["step"], []).append(row[key] - own)
        if steps:
            points = [(step, sum(values) / len(values)) for step, values in sorted(steps.items())]
            found.append(svg.Curve(arm.name, points, _kind(arm)))
    return found


def _meanings(result: SFTResult) -> str:
    names = dict.fromkeys(arm.arm for arm in result.arms)
    return '<dl class="formulas">' + "".join(f"<dt>{n}</dt><dd>{_safe(MEANING[n])}</dd>" for n in names) + "</dl>"


def _compared(result: SFTResult) -> str:
    rows: list[Sequence[str]] = [("penalty minus", "switching, points", "clean held-out loss", "switches")]
    rows += [(f"{c.penalty} - {c.other}", points(c.ratio), change(c.loss), c.judgement) for c in result.comparisons]
    return _table(rows) if result.comparisons else '<p class="soft">The penalty was not run beside another arm.</p>'


def _features(result: SFTResult) -> str:
    rows: list[Sequence[str]] = [("layer", "features", "nu")]
    for layer, ids in result.features.items():
        values = " ".join(num(v, 3) for v in result.nu[layer]) or "given, not mined"
        rows.append((layer, " ".join(map(str, ids)), values))
    return _table(rows)


def _samples(result: SFTResult) -> str:
    parts = ['<p class="soft">Of the first seed of each arm: answers that switched, up to half, then others.</p>']
    for arm in result.arms:
        point = next(p for p in result.points if (p.arm, p.weight) == (arm.arm, arm.weight))
        rows = "".join(
            f'<tr><td class="text">{_safe(s["group"])}: {_safe(s["prompt"])}</td><td class="text">'
            f"{_safe(s['response'])}</td><td>{_safe(s['switched'])}</td></tr>"
            for s in point.samples
        )
        head = "<thead><tr><th>prompt</th><th>answer</th><th>switched</th></tr></thead>"
        opened = " open" if arm.arm in (PENALTY, "none") and arm.arm != BASE else ""
        table = f'<table class="pairs">{head}<tbody>{rows}</tbody></table>'
        parts.append(f"<details{opened}><summary>{_safe(arm.name)}</summary>{table}</details>")
    return "".join(parts)


# --- tables, also for the terminal ---------------------------------------------------------------------------


def arm_rows(arms: Sequence[ArmResult]) -> list[Sequence[str]]:
    """The head, and a row for each arm."""
    rows: list[Sequence[str]] = [
        ("arm", "switching", "95 %", "by seed", "empty", "clean loss", "95 %", "target loss", "length", "seconds")
    ]
    for a in arms:
        rows.append(
            (
                a.name, percent(a.ratio.value), f"{percent(a.ratio.low)} to {percent(a.ratio.high)}",
                " ".join(percent(x) for x in a.ratios), f"{a.empty}/{a.responses}", num(a.loss.value, 4),
                f"{num(a.loss.low, 4)} to {num(a.loss.high, 4)}", num(a.target_loss, 4), num(a.length, 1),
                num(a.seconds, 1),
            )
        )  # fmt: skip
    return rows


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def points(found: Interval) -> str:
    """A difference of ratios in percentage points, with its interval."""
    return f"{100 * found.value:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def change(found: Interval) -> str:
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<figure class="panel wide"><table><tr>{head}</tr>{body}</table></figure>'


def _panel(title: str, inside: str, caption: str = "") -> str:
    below = f'<p class="caption">{_safe(caption)}</p>' if caption else ""
    return f'<figure class="panel"><h3>{_safe(title)}</h3>{inside}{below}</figure>'


def _safe(text: str) -> str:
    return html.escape(visible(text))
