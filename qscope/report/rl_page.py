"""One page about an `qscope rl` run: the table of the arms, the features, responses. A single file, no script."""

import html
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.finding.stability import Interval
from qscope.report.evaluate_page import num, share, signed
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.rl_result import ArmLine, Mined, RLResult

FORMULAS = {
    "endless": "share of the held-out responses that were cut at the largest length and end in at least four copies of "
    "one piece, 32 tokens or more together, or whose last 128 tokens hold 75 % of 4-grams said before (defaults)",
    "− vanilla": "endless of the arm − endless of plain DAPO, in points; the same seeds and prompts are drawn for both",
    "4-grams said": "1 − different 4-grams / 4-grams of a response (seq-rep-4, Welleck et al. 2020)",
    "bits per byte": "negative log₂-likelihood of held-out texts / their UTF-8 bytes",
    "copied": "share of the tokens of a text that are the model's first choice when it is asked to copy that text",
    "[ ]": "2.5 % and 97.5 % quantiles of a bootstrap over seeds and over prompts or texts",
    "rise": "activation at the last occurrence of a token − at its first, mean over the tokens of a response that "
    "occur twice, then over responses (Qwen-Scope section 8)",
    "t": "Welch's t of the rises in looping responses against those in the others",
    "strength": "h + s·|h|·d/|d| at every generated token, shared evenly by the features (equation 28)",
}
CURVE = (240, 64)
"""Width and height of a curve."""


def write(result: RLResult) -> list[Path]:
    """Writes report.html into the run's folder; also what `qscope rl --json` calls."""
    if result.out is None:
        return []
    folder = Path(result.out)
    return [write_whole(folder / "report.html", page(result), "Choose another --out."), folder / "result.json"]


def page(result: RLResult) -> str:
    """The page as HTML."""
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    notes = "".join(f'<p class="soft">{_safe(note)}</p>' for note in result.notes)
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    said = "".join(f"<p>{_safe(words)}</p>" for words in result.verdicts)
    body = (
        '<header><h1><i class="mark"></i>Reinforcement learning against repetition '
        f'<span>{_safe(result.model)}</span></h1><p class="soft">{_safe(about)}</p>{notes}</header>'
        f'<section><h2>The arms</h2>{said}<div class="stack">{_panel("On held-out prompts and texts", _arms(result))}'
        f"{_panel('Mean reward of each step', _curves(result))}</div></section>"
        f"{_features(result.mined)}{_samples(result)}"
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}.</footer>"
    )
    return fill("steer_find_page.html", body, "qscope: reinforcement learning against repetition")


def _arms(result: RLResult) -> str:
    head = ("arm", "endless", "− vanilla", "4-grams said", "tokens", "ended", "bits per byte", "copied", "what it is")
    return _table(head, [_arm(line) for line in result.arms])


def _arm(line: ArmLine) -> tuple[str, ...]:
    against = line.against
    difference = "" if against is None else _span(Interval(*(100 * x for x in _three(against))), 1)
    endless = f"{share(line.endless.value)} [{share(line.endless.low)}, {share(line.endless.high)}]"
    seeds = f" ({line.seeds} seeds: {', '.join(share(x) for x in line.each)})" if line.seeds > 1 else ""
    return (
        line.arm, endless, difference, share(line.repeated.value), num(line.length.value, 0), share(line.ended.value),
        _span(line.bits_per_byte, 3), share(line.copied.value), line.what + seeds,
    )  # fmt: skip


def _three(x: Interval) -> tuple[float, float, float]:
    return x.value, x.low, x.high


def _span(x: Interval, digits: int) -> str:
    return f"{num(x.value, digits)} [{num(x.low, digits)}, {num(x.high, digits)}]"


def _curves(result: RLResult) -> str:
    values = [step["reward"] for runs in result.curves.values() for run in runs for step in run if "reward" in step]
    if not values:
        return '<p class="soft">none was logged</p>'
    low, high = min(values), max(values)
    rewards = {
        arm: [[s["reward"] for s in run if "reward" in s] for run in runs] for arm, runs in result.curves.items()
    }
    rows = "".join(f"<tr><td>{_safe(a)}</td><td>{_curve(r, low, high)}</td></tr>" for a, r in rewards.items())
    note = f'<p class="caption">A line for each seed, all from {num(low, 2)} to {num(high, 2)}; rewards of all '
    return f"<table><tbody>{rows}</tbody></table>{note}rollouts of a step, steered ones among them.</p>"


def _curve(runs: Sequence[Sequence[float]], low: float, high: float) -> str:
    width, height = CURVE
    lines = ""
    for run in runs:
        places = (
            f"{width * i / max(len(run) - 1, 1):.1f},{height - 2 - (height - 4) * (v - low) / ((high - low) or 1):.1f}"
            for i, v in enumerate(run)
        )
        lines += f'<polyline points="{" ".join(places)}" fill="none" stroke="currentColor" stroke-opacity=".55"/>'
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{lines}</svg>'


def _features(mined: Mined) -> str:
    where = f"Layer {mined.layer}. " + (
        f"Mined from {mined.looping} responses that repeat themselves and {mined.control} others."
        if mined.mined
        else "Named by the user."
    )
    rows = [
        (f"{row['feature']:.0f}", signed(row["looping"]), signed(row["control"]), num(row["t"], 1))
        for row in mined.rows
    ]
    causes = [
        (side, f"{level['strength']:+g}", f"{level['hits']:g} of {level['count']:g}")
        for side, levels in mined.cause.items()
        for level in levels
    ]
    rises = _panel("Rise", _table(("feature", "looping", "others", "t"), rows))
    cause = _panel(
        "Do they cause it?",
        _table(("", "strength", "endless"), causes),
        f"Amplified on prompts whose response did not repeat itself, suppressed on those whose did. The negatives are "
        f"steered with {num(mined.strength, 2)}.",
    )
    top = f'<section><h2>The features</h2><p class="soft">{_safe(where)}</p>'
    return f'{top}<div class="stack">{rises}{cause}</div></section>'


def _samples(result: RLResult) -> str:
    parts = ""
    for i, prompt in enumerate(result.prompts):
        rows = [(arm, texts[i]) for arm, texts in result.samples.items() if i < len(texts)]
        parts += _panel(prompt, _table(("arm", "response"), rows))
    return f'<section><h2>First held-out prompts</h2><div class="stack">{parts}</div></section>'


def _panel(title: str, inside: str, caption: str = "") -> str:
    foot = f'<p class="caption">{_safe(caption)}</p>' if caption else ""
    return f'<figure class="panel"><h3>{_safe(title)}</h3>{inside}{foot}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))
