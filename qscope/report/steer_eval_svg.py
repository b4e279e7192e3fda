"""Target rate against a side effect, a line per arm, as inline SVG whose colours follow the page's style."""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BASE = 40, 458, 12, 256


class Dot(NamedTuple):
    """A measured point: place, height, and the interval of the height."""

    x: float
    y: float
    low: float
    high: float
    text: str


class Line(NamedTuple):
    kind: str
    """Class of the page's style"""
    dots: list[Dot]


def scatter(lines: Sequence[Line], unsteered: float, label: str, x_label: str, log: bool) -> str:
    """Heights from 0 to 1 against x; the dashed line is the unsteered model. log: x on a logarithmic scale, where what
    is 0 or below stands at the left edge."""
    values = [dot.x for line in lines for dot in line.dots]
    positive = [x for x in values if x > 0]
    log = log and bool(positive)
    low, high = (min(positive), max(positive)) if log else (min(values, default=0.0), max(values, default=1.0))
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
    if high <= low:
        low, high = low - 0.5, low + 0.5

    def across(x: float) -> float:
        share = math.log(max(x, low) / low) / math.log(high / low) if log else (x - low) / (high - low)
        return LEFT + share * (RIGHT - LEFT)

    parts = [_axes(_ticks(low, high, log), across), _text((LEFT + RIGHT) / 2, HEIGHT - 6, x_label, "middle")]
    y = _up(unsteered)
    parts.append(f'<line class="dashed" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(_text(RIGHT, y - 4, "unsteered", "end"))
    for line in lines:
        joined = " ".join(f"{across(dot.x):.1f},{_up(dot.y):.1f}" for dot in line.dots)
        parts.append(f'<polyline class="line {line.kind}" points="{joined}"/>')
        for dot in line.dots:
            at = f"{across(dot.x):.1f}"
            parts.append(
                f'<line class="bar {line.kind}" x1="{at}" x2="{at}" y1="{_up(dot.low):.1f}" y2="{_up(dot.high):.1f}"/>'
                f'<circle class="dot {line.kind}" cx="{at}" cy="{_up(dot.y):.1f}" r="3.5">'
                f"<title>{html.escape(dot.text)}</title></circle>"
            )
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{inside}</svg>'


def _up(rate: float) -> float:
    return BASE - rate * (BASE - TOP)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        return [10.0**e for e in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    return [low + (high - low) * i / 4 for i in range(5)]


def _axes(ticks: Sequence[float], across: Callable[[float], float]) -> str:
    parts = []
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{_up(rate):.1f}" y2="{_up(rate):.1f}"/>')
        parts.append(_text(LEFT - 6, _up(rate) + 4, f"{rate:g}", "end"))
    for x in ticks:
        parts.append(_text(across(x), BASE + 16, f"{x:.3g}", "middle"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
