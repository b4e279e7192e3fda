"""The three pictures of the evaluation page, as inline SVG whose colours follow the page's style."""

import html
from collections.abc import Sequence

WIDTH = 480


def histogram(counts: Sequence[int], ticks: Sequence[tuple[float, str]], label: str) -> str:
    """Bars of equal width; ticks: (place in bins from the left, text)."""
    height, base = 150, 122
    top, step = max([*counts, 1]), WIDTH / len(counts)
    bars = "".join(
        f'<rect class="bar" x="{i * step + 0.5:.1f}" y="{base - 104 * count / top:.1f}" width="{step - 1:.1f}" '
        f'height="{104 * count / top:.1f}"><title>{count:,} features</title></rect>'
        for i, count in enumerate(counts)
        if count
    )
    texts = "".join(_text(place * step, base + 15, text, _anchor(place, len(counts))) for place, text in ticks)
    return _svg(height, bars + _axis(base) + texts + _text(0, 11, f"{top:,} at the highest bar", "start"), label)


def _anchor(place: float, bins: int) -> str:
    return "start" if place == 0 else "end" if place == bins else "middle"


def bars(rows: Sequence[tuple[str, float | None, str, str]], label: str) -> str:
    """Horizontal bars from 0; rows: (name, value, text, class)."""
    most = max([value for _, value, _, _ in rows if value is not None] + [1e-12])
    left, span, parts = 92, WIDTH - 92 - 66, []
    for i, (name, value, text, kind) in enumerate(rows):
        y = 6 + 24 * i
        size = max(0.0, value or 0.0) / most * span
        parts.append(_text(left - 8, y + 12, name, "end"))
        parts.append(f'<rect class="bar {kind}" x="{left}" y="{y}" width="{size:.1f}" height="16" rx="2"/>')
        parts.append(_text(left + size + 6, y + 12, text, "start", "value"))
    return _svg(8 + 24 * len(rows), "".join(parts), label)


def lines(layers: Sequence[str], series: Sequence[tuple[str, Sequence[float | None], str]], label: str) -> str:
    """Values per layer from 0 up; series: (name, values, class)."""
    height, base, left, right = 170, 132, 8, WIDTH - 90
    most = max([v for _, values, _ in series for v in values if v is not None] + [1e-12])
    gap = (right - left) / max(1, len(layers) - 1)
    every = -(-len(layers) // 16)  # labels that do not touch
    named = [(i, name) for i, name in enumerate(layers) if i % every == 0]
    parts = [_axis(base), *(_text(left + i * gap, base + 15, name, "middle") for i, name in named)]
    for name, values, kind in series:
        points = [(left + i * gap, base - 112 * v / most, v) for i, v in enumerate(values) if v is not None]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline class="line {kind}" points="{joined}"/>')
        parts += [
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{v:.4f}</title></circle>'
            for x, y, v in points
        ]
        if points:
            parts.append(_text(points[-1][0] + 9, points[-1][1] + 4, f"{name} {points[-1][2]:.3f}", "start", "value"))
    return _svg(height, "".join([*parts, _text(left, height - 6, "layer", "start")]), label)


def _svg(height: int, inside: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">{inside}</svg>'


def _axis(y: int) -> str:
    return f'<line class="axis" x1="0" x2="{WIDTH}" y1="{y}" y2="{y}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{html.escape(text)}</text>'
