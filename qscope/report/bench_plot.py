"""One picture per operator: milliseconds, and share of the floor, against the dictionary size F."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qscope.errors import QscopeError

Row = dict[str, Any]


def write_plots(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Write `<op>.svg` for every operator that was timed. Raises QscopeError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QscopeError("Plots need matplotlib: pip install matplotlib, or leave out --plot.") from error
    timed: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("p50_ms"):
            timed.setdefault(row["op"], []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for op, members in timed.items():
        figure = Figure(figsize=(12, 5), layout="constrained")
        times, shares = figure.subplots(1, 2)
        for (name, ours), points in _lines(members).items():
            style = {"linewidth": 2.5 if ours else 1.0, "marker": "o" if ours else ".", "markersize": 6 if ours else 4}
            times.plot([r["F"] or r["D"] for r in points], [r["p50_ms"] for r in points], label=name, **style)
            known = [r for r in points if r.get("share_of_floor") is not None]
            if known:
                shares.plot([r["F"] or r["D"] for r in known], [100 * r["share_of_floor"] for r in known], **style)
        times.set(ylabel="median, ms", yscale="log")
        shares.set(ylabel="% of the floor that was measured in the same run", ylim=(0, None))
        sizes = sorted({r["F"] or r["D"] for r in _chosen(members)})
        for axes in (times, shares):
            axes.set(xlabel="F" if members[0]["F"] else "D", xscale="log")
            axes.minorticks_off()
            axes.set_xticks(sizes, [f"{size / 1024:g}K" for size in sizes])
            axes.grid(alpha=0.3)
        figure.legend(loc="outside right center", fontsize="x-small")
        figure.suptitle(_title(op, members))
        paths.append(folder / f"{''.join(c if c.isalnum() or c == '_' else '-' for c in op)}.svg")
        figure.savefig(paths[-1])
    return paths


def _chosen(rows: list[Row]) -> list[Row]:
    """The large batch at the K that most rows have; replay where it was measured."""
    largest = [row for row in rows if row["N"] == max(r["N"] for r in rows)]
    usual = max({row["K"] for row in largest}, key=lambda k: (sum(r["K"] == k for r in largest), -k))
    mode = "graph" if any(row["mode"] == "graph" for row in largest) else "eager"
    return [row for row in largest if row["K"] == usual and row["mode"] == mode]


def _title(op: str, rows: list[Row]) -> str:
    row = _chosen(rows)[0]
    return f"{op}, N={row['N']}, K={row['K']}, {row['mode']}, on {row['device']}"


def _lines(rows: list[Row]) -> dict[tuple[str, bool], list[Row]]:
    """One line per provider and dtype: (name, whether it is ours) -> rows by rising F."""
    lines: dict[tuple[str, bool], list[Row]] = {}
    for row in sorted(_chosen(rows), key=lambda r: (r["F"], r["D"])):
        lines.setdefault((f"{row['provider']}, {row['dtype']}", row["role"] == "ours"), []).append(row)
    return lines
