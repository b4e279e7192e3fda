"""Figures of classifiers as inline SVG whose colours follow the page's style: rows with intervals, lines, matrices."""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BASE = 40, 464, 12, 236
_ROW = 24
_NAMES = 300  # width of the names beside rows, where the picture is as wide as the page
_CHARACTER = 6.2  # mean width at 11 px


class Bar(NamedTuple):
    """A row: a name, a value and its interval."""

    name: str
    kind: str
    """Class of the page's style"""
    value: float | None
    low: float | None
    high: float | None


class Dot(NamedTuple):
    x: float
    y: float | None
    low: float | None
    high: float | None
    text: str
    ring: bool = False
    """The one that was chosen"""


class Line(NamedTuple):
    kind: str
    dots: list[Dot]


def rows(bars: Sequence[Bar], label: str) -> str:
    """A row per method: dot and interval. The scale begins below the lowest end of what is not of the kind none; what
    lies lower stands at its left edge."""
    ends = [x for bar in bars for x in (bar.value, bar.low, bar.high) if x is not None and bar.kind != "none"]
    low = max(0.0, math.floor(10 * min(ends, default=0.0) - 1e-9) / 10)
    width, base = 960, _ROW * len(bars) + 10
    left, right = _NAMES, width - 60

    def across(x: float) -> float:
        return left + (max(x, low) - low) / (1 - low) * (right - left)

    parts = []
    for tick in _steps(low, 1.0, 0.1 if low >= 0.3 else 0.2):
        at = f"{across(tick):.1f}"
        parts.append(f'<line class="axis" x1="{at}" x2="{at}" y1="4" y2="{base}"/>')
        parts.append(_text(across(tick), base + 15, f"{tick:.1f}", "middle"))
    for place, bar in enumerate(bars):
        y = _ROW * place + 18
        parts.append(_text(left - 14, y + 4, bar.name, "end", "value" if bar.kind == "main" else ""))
        if bar.value is None:
            parts.append(_text(left + 6, y + 4, "not defined", "start"))
            continue
        if bar.low is not None and bar.high is not None:
            parts.append(
                f'<line class="bar {bar.kind}" x1="{across(bar.low):.1f}" x2="{across(bar.high):.1f}" y1="{y}" '
                f'y2="{y}"/>'
            )
        parts.append(f'<circle class="dot {bar.kind}" cx="{across(bar.value):.1f}" cy="{y}" r="4.5"/>')
        parts.append(_text(width - 6, y + 4, f"{bar.value:.3f}", "end", "value"))
    return _svg(width, base + 22, label, "".join(parts), "rows")


def lines(
    found: Sequence[Line],
    ticks: Sequence[tuple[float, str]],
    x_label: str,
    label: str,
    log: bool = False,
    diagonal: bool = False,
) -> str:
    """Values against x; ticks: (x, what stands below). log: x on a logarithmic scale. diagonal: where y = x."""
    values = [dot.y for line in found for dot in line.dots if dot.y is not None]
    low = 0.0 if diagonal else max(0.0, math.floor(10 * min(values, default=0.0) - 1e-9) / 10)
    scale: Callable[[float], float] = math.log if log else float
    first, last = (scale(ticks[0][0]), scale(ticks[-1][0])) if ticks else (0.0, 1.0)
    span = (last - first) or 1.0
    inset = 0 if diagonal else 14

    def across(x: float) -> float:
        share = 0.5 if last == first else (scale(x) - first) / span
        return LEFT + inset + share * (RIGHT - LEFT - 2 * inset)

    def up(y: float) -> float:
        return BASE - (min(max(y, low), 1.0) - low) / (1 - low) * (BASE - TOP)

    parts = []
    for y in _steps(low, 1.0, 0.1 if low >= 0.5 else 0.2):
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(_text(LEFT - 6, up(y) + 4, f"{y:.1f}", "end"))
    parts += [_text(across(x), BASE + 16, text, "middle") for x, text in ticks]
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    if diagonal:
        parts.append(f'<line class="dashed" x1="{across(0):.1f}" x2="{across(1):.1f}" y1="{up(0)}" y2="{up(1)}"/>')
    for line in found:
        drawn = [(dot, dot.y) for dot in line.dots if dot.y is not None]
        joined = " ".join(f"{across(dot.x):.1f},{up(y):.1f}" for dot, y in drawn)
        parts.append(f'<polyline class="line {line.kind}" points="{joined}"/>')
        for dot, y in drawn:
            at = f"{across(dot.x):.1f}"
            if dot.low is not None and dot.high is not None:
                ends = f'y1="{up(dot.low):.1f}" y2="{up(dot.high):.1f}"'
                parts.append(f'<line class="bar thin {line.kind}" x1="{at}" x2="{at}" {ends}/>')
            ring = f'<circle class="ring {line.kind}" cx="{at}" cy="{up(y):.1f}" r="7"/>' if dot.ring else ""
            parts.append(
                f'{ring}<circle class="dot {line.kind}" cx="{at}" cy="{up(y):.1f}" r="3.2">'
                f"<title>{html.escape(dot.text)}</title></circle>"
            )
    return _svg(WIDTH, HEIGHT, label, "".join(parts), "")


def matrix(
    names: Sequence[str],
    columns: Sequence[str],
    shades: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    label: str,
    corner: tuple[str, str] = ("", ""),
) -> str:
    """A heat map with its numbers. shades: 0 to 1, how deep; corner: what rows and columns are."""
    name_width = min(170, max([30.0, *(_CHARACTER * len(name) + 12 for name in (*names, corner[0]))]))
    longest = max([1, *(len(text) for row in texts for text in row)])
    size = max(34.0, min(64.0, 560 / max(1, len(columns))), _CHARACTER * longest + 8)
    slanted = any(_CHARACTER * len(name) > size - 4 for name in columns)
    head = min(110.0, 0.72 * _CHARACTER * max([1, *(min(len(n), 22) for n in columns)]) + 14) if slanted else 20.0
    top = head + (16 if corner[1] else 0)
    height = 30.0
    parts = []
    if corner[1]:
        parts.append(_text(name_width + size * len(columns) / 2, 11, corner[1], "middle"))
    if corner[0]:
        parts.append(_text(name_width - 8, top - 6, corner[0], "end"))
    for place, name in enumerate(columns):
        x, y = name_width + size * (place + 0.5), top - 6
        if slanted:
            parts.append(
                f'<text x="{x - 4:.1f}" y="{y:.1f}" text-anchor="start" transform="rotate(-45 {x - 4:.1f} {y:.1f})">'
                f"{html.escape(_cut(name, 22))}</text>"
            )
        else:
            parts.append(_text(x, y, name, "middle"))
    for i, name in enumerate(names):
        y = top + height * i
        parts.append(_text(name_width - 8, y + 19, _cut(name, 26), "end", "value"))
        for j, column in enumerate(columns):
            x, shade = name_width + size * j, shades[i][j]
            depth = 0.0 if shade is None else min(1.0, max(0.0, shade))
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{size - 2:.1f}" height="{height - 2:.1f}" '
                f'rx="4" fill-opacity="{0.05 + 0.75 * depth:.3f}"><title>{html.escape(f"{name} / {column}")}</title>'
                "</rect>"
            )
            parts.append(_text(x + size / 2, y + 19, texts[i][j], "middle", "value"))
    extra = 0.72 * _CHARACTER * min(len(columns[-1]), 22) if slanted and columns else 0.0
    width = name_width + size * len(columns) + max(4.0, extra - size / 2)
    return _svg(width, top + height * len(names) + 4, label, "".join(parts), "matrix")


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _steps(low: float, high: float, step: float) -> list[float]:
    count = round((high - low) / step - 1e-9)
    return [high - step * i for i in range(count + 1)][::-1]


def _svg(width: float, height: float, label: str, inside: str, kind: str) -> str:
    named = f' class="{kind}"' if kind else ""
    sized = f' width="{width:.0f}" height="{height:.0f}"' if kind == "matrix" else ""
    return (
        f'<svg{named} viewBox="0 0 {width:.0f} {height:.0f}"{sized} role="img" aria-label="{html.escape(label)}">'
        f"{inside}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
