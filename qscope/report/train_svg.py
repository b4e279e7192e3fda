"""Curves over training, as inline SVG whose colours follow the page's style."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 480, 190
LEFT, RIGHT, TOP, BASE = 46, 424, 10, 162
POINTS = 240


class Curve(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    kind: str
    """Class of the line; "quiet" lines lie below and get no value at their end"""


def curves(series: Sequence[Curve], label: str, log: bool = False, percent: bool = False) -> str:
    """Lines over tokens; log: of the values, which must then be above 0, others are left out."""
    kept = [c._replace(points=[(x, y) for x, y in _thin(c.points) if y > 0 or not log]) for c in series]
    values = [y for c in kept for _, y in c.points]
    if not values:
        return _svg(_text(LEFT, 40, "nothing was measured", "start"), label)
    low, high, ticks = _log_axis(values) if log else _axis(values)
    end = max(x for c in kept for x, _ in c.points)

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * x / end, BASE - (BASE - TOP) * share

    parts = []
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, _short(100 * tick) + " %" if percent else _short(tick), "end"))
    parts += [_text(place(x, low)[0], BASE + 15, _short(x), "middle") for x in _axis([end])[2]]
    parts.append(_text(RIGHT, HEIGHT - 1, "tokens", "end"))
    ordered = sorted(kept, key=lambda c: c.kind != "quiet")
    for curve in ordered:
        joined = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve.points)
        parts.append(
            f'<polyline class="line {curve.kind}" points="{joined}"><title>{_safe(curve.name)}</title></polyline>'
        )
    named = [(place(*c.points[-1])[1], c) for c in ordered if c.points and c.kind != "quiet"]
    for y, curve in _apart(named):
        value = curve.points[-1][1]
        text = f"{100 * value:.3g} %" if percent else _short(value)
        parts.append(_text(RIGHT + 6, y + 4, text, "start", f"value {curve.kind}"))
    return _svg("".join(parts), label)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS, each the mean of its neighbours; the last one is kept as it is."""
    size = -(-len(points) // POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups] + [points[-1]]


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(0 or less, the top, round ticks)."""
    low, high = min(0.0, *values), max(*values, 0.0)
    if high == low:
        high = low + 1.0
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= raw * 0.999)
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]
    return low, high, ticks


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    low, high = min(values), max(values)
    if high / low < 1.2:
        low, high = low / 1.1, high * 1.1
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1,)):
        ticks = [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]
        if len(ticks) <= 6:
            break
    return low, high, ticks[:: -(-len(ticks) // 6)] if ticks else ticks


def _apart(named: list[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """Labels at least a line apart, within the picture."""
    placed: list[tuple[float, Curve]] = []
    for y, curve in sorted(named, key=lambda item: item[0]):
        placed.append((max(y, placed[-1][0] + 12) if placed else y, curve))
    over = max(0.0, placed[-1][0] - BASE) if placed else 0.0
    return [(y - over, curve) for y, curve in placed]


def _short(value: float) -> str:
    """Three digits: 0.152, 2.54k, 3M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _svg(inside: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_safe(label)}">{inside}</svg>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{_safe(text)}</text>'


def _safe(text: str) -> str:
    return html.escape(text)
