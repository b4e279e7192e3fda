"""Intervals by arm, and curves over training steps, as inline SVG whose colours follow the page's style."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 480
LEFT, RIGHT = 118, 424


class Row(NamedTuple):
    """One arm: estimate, interval, and the single seeds."""

    name: str
    value: float
    low: float
    high: float
    dots: Sequence[float]
    text: str
    kind: str
    """Class of the page's style"""


class Curve(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    kind: str


def intervals(rows: Sequence[Row], label: str, zero: bool) -> str:
    """A line per arm, with its interval and a small dot per seed. zero: the scale begins at 0."""
    values = [x for row in rows for x in (row.low, row.high, *row.dots)]
    low, high = (0.0 if zero else min(values, default=0.0)), max(values, default=1.0)
    pad = 0.04 * (high - low) or 0.5
    low, high = (0.0 if zero else low - pad), high + pad

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - low) / (high - low)

    parts = [f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="0" y2="{24 * len(rows) + 4}"/>']
    for i, row in enumerate(rows):
        y = 16 + 24 * i
        ends = f'x1="{across(row.low):.1f}" x2="{across(row.high):.1f}"'
        parts.append(f'<line class="line {row.kind}" {ends} y1="{y}" y2="{y}"/>')
        parts += [
            f'<line class="line {row.kind}" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{y - 7}" y2="{y - 3}"/>'
            for x in row.dots
        ]
        parts.append(
            f'<circle class="dot {row.kind}" cx="{across(row.value):.1f}" cy="{y}" r="3.5">'
            f"<title>{_safe(row.text)}</title></circle>"
        )
        parts.append(_text(LEFT - 8, y + 4, row.name, "end"))
        parts.append(_text(RIGHT + 6, y + 4, row.text.split(" [")[0], "start", "value"))
    return _svg(24 * len(rows) + 10, "".join(parts), label)


def curves(series: Sequence[Curve], label: str) -> str:
    """Lines over training steps; the scale of the heights begins at the lowest of them, or at 0 where it is near."""
    height, left, top, base = 200, 52, 10, 168
    values = [y for curve in series for _, y in curve.points if math.isfinite(y)]
    if not values:
        return _svg(60, _text(left, 40, "nothing was logged", "start"), label)
    low, high = min(values), max(values)
    low = min(low, 0.0) if low < 0.5 * high else low
    high = high if high > low else low + 1.0
    end = max([x for curve in series for x, _ in curve.points] + [1.0])

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (RIGHT - left) * x / end, base - (base - top) * (y - low) / (high - low)

    parts = []
    for tick in [low + (high - low) * i / 4 for i in range(5)]:
        y = place(0, tick)[1]
        parts.append(f'<line class="axis" x1="{left}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:.3g}", "end"))
    parts += [_text(place(end * i / 4, low)[0], base + 15, f"{end * i / 4:.0f}", "middle") for i in range(5)]
    parts.append(_text(RIGHT, height - 2, "steps", "end"))
    for curve in series:
        placed = [place(x, y) for x, y in curve.points if math.isfinite(y)]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        if len(placed) == 1:
            parts.append(f'<circle class="dot {curve.kind}" cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="3.5"/>')
        parts.append(
            f'<polyline class="line {curve.kind}" points="{joined}"><title>{_safe(curve.name)}</title></polyline>'
        )
    return _svg(height, "".join(parts), label)


def _svg(height: int, inside: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_safe(label)}">{inside}</svg>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{_safe(text)}</text>'


def _safe(text: str) -> str:
    return html.escape(text)
