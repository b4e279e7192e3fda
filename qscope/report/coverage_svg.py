"""Heat map, dendrogram and saturation curves as inline SVG whose colours follow the page's style."""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

CELL, LETTER = 40, 6.2
LEAST_SPAN = 0.1  # so that noise does not look like structure
NUMBERS_UP_TO = 26  # benchmarks: with more the cells shrink and carry no numbers
WIDTH, LEFT, RIGHT, TOP = 520, 44, 372, 12
COLOURS = 8


Tell = Callable[[int, int, float], str]


class Curve(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    """Places and heights; places are above 0"""


def heat_map(
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    label: str,
    tell: Tell,
    diagonal: Sequence[float | None] | None = None,
) -> str:
    """Values of rows against columns, coloured from the lowest to the highest off the diagonal.

    tell: words for a cell (row, column, value), shown when pointed at. diagonal: what stands there instead of values,
    in pale cells.
    """
    many = len(names) > NUMBERS_UP_TO
    cell = max(8.0, min(CELL, NUMBERS_UP_TO * CELL / len(names)))
    longest = max(map(len, names))
    side, head = 24 + LETTER * min(longest, 26), 24 + 0.74 * LETTER * min(longest, 22)
    width, height = side + cell * len(names) + head - 24, head + cell * len(names) + 4
    apart = [v for i, row in enumerate(values) for j, v in enumerate(row) if i != j and v is not None]
    low = min(apart, default=0.0)
    span = max(LEAST_SPAN, max(apart, default=1.0) - low)
    parts = []
    for i, name in enumerate(names):
        middle = cell * (i + 0.5)
        parts.append(_text(side - 8, head + middle + 4, _short(name, 26), "end", "name"))
        x, y = side + middle, head - 7
        text = html.escape(_short(name, 22))
        parts.append(
            f'<text class="name" x="{x:.1f}" y="{y:.1f}" transform="rotate(-48 {x:.1f} {y:.1f})">{text}</text>'
        )
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            own = diagonal is not None and i == j
            shown = diagonal[i] if diagonal is not None and i == j else value
            if shown is None:
                continue
            left, top = side + cell * j, head + cell * i
            depth = 0.0 if own else 0.04 + 0.86 * min(1.0, max(0.0, (shown - low) / span))
            words = html.escape(tell(i, j, shown))
            kind = "own" if own else "cell"
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                f'fill-opacity="{depth:.3f}"><title>{words}</title></rect>'
            )
            if not many:
                at = left + cell / 2 - 0.5, top + cell / 2 + 4
                parts.append(_text(*at, _two(shown), "middle", "pale" if own else "in"))
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f'<svg class="map" {size} role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def dendrogram(names: Sequence[str], merges: Sequence[tuple[int, int, float]], order: Sequence[int], label: str) -> str:
    """A tree with leaves at the left. merges: (node, node, height from 0 to 1) as scipy numbers nodes: leaves first,
    then each merge. order: leaves from top to bottom.
    """
    step = 22
    base, left, right = TOP + step * len(order), 150, WIDTH - 16

    def across(distance: float) -> float:
        return left + (right - left) * min(1.0, max(0.0, distance))

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}"/>')
        parts.append(_text(x, base + 15, f"{tick:g}", "middle"))
    places: dict[int, tuple[float, float]] = {}
    for row, leaf in enumerate(order):
        y = TOP + step * (row + 0.5)
        places[leaf] = (left, y)
        parts.append(_text(left - 8, y + 4, _short(names[leaf], 22), "end", "name"))
    for number, (a, b, distance) in enumerate(merges):
        (xa, ya), (xb, yb), x = places[a], places[b], across(distance)
        parts.append(
            f'<path class="branch" d="M{xa:.1f},{ya:.1f}H{x:.1f}V{yb:.1f}H{xb:.1f}">'
            f"<title>{distance:.3f}</title></path>"
        )
        places[len(order) + number] = (x, (ya + yb) / 2)
    parts.append(_text(right, base + 30, "1 − size-matched Jaccard", "end"))
    return f'<svg viewBox="0 0 {WIDTH} {base + 36}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def curves(series: Sequence[Curve], label: str, x_label: str, share: bool = False) -> str:
    """Lines over a logarithmic axis with their names at their ends. share: heights from 0 to 1."""
    height = max(260, 30 + 13 * len(series))
    base = height - 40
    places = [x for curve in series for x, _ in curve.points]
    low, high = min(places), max(places)
    if high <= low:
        high = low * 2
    top = 1.0 if share else max(y for curve in series for _, y in curve.points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * math.log(x / low) / math.log(high / low), base - (base - TOP) * y / top

    parts = []
    for tick in _round_ticks(top):
        y = place(low, tick)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, _count(tick), "end"))
    for tick in _decades(low, high):
        parts.append(_text(place(tick, 0)[0], base + 16, _count(tick), "middle"))
    parts.append(_text(RIGHT, base + 32, x_label, "end"))
    ends = []
    for number, curve in enumerate(series):
        kind = f"s{number % COLOURS}"
        joined = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve.points)
        title = f"<title>{html.escape(curve.name)}</title>"
        parts.append(f'<polyline class="line {kind}" points="{joined}">{title}</polyline>')
        ends.append((*place(*curve.points[-1]), kind, curve.name))
    for y, (x, at, kind, name) in _apart(ends, base):
        parts.append(f'<polyline class="lead" points="{x:.1f},{at:.1f} {RIGHT + 4},{y:.1f} {RIGHT + 12},{y:.1f}"/>')
        parts.append(_text(RIGHT + 15, y + 4, _short(name, 20), "start", f"end {kind}"))
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


End = tuple[float, float, str, str]


def _apart(ends: Sequence[End], base: float) -> list[tuple[float, End]]:
    """Labels at least a line apart, within the picture."""
    placed: list[tuple[float, End]] = []
    for end in sorted(ends, key=lambda found: (found[1], found[3])):
        placed.append((max(end[1], placed[-1][0] + 12.5) if placed else end[1], end))
    limit = base
    for i in reversed(range(len(placed))):
        placed[i] = (min(placed[i][0], limit), placed[i][1])
        limit = placed[i][0] - 12.5
    return placed


def _round_ticks(top: float) -> list[float]:
    raw = top / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(f * unit for f in (1, 2, 2.5, 5, 10) if f * unit >= raw * 0.999)
    return [i * step for i in range(math.floor(top / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    found = [f * 10.0**e for e in range(9) for f in (1, 2, 5) if low <= f * 10.0**e <= high]
    return found[:: -(-len(found) // 8)] or [low]


def _count(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _two(value: float) -> str:
    """0.42 as .42, to be read in a small cell."""
    text = f"{value:.2f}"
    return text.removeprefix("0") if value < 0.995 else text[:3] if value < 9.95 else f"{value:.0f}"


def _short(text: str, most: int) -> str:
    """Cut in the middle: names of one family differ at their ends."""
    tail = most // 2
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[-tail:]}"


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>'
