"""The Markdown page of bench_train.py: ratio first, losses marked."""

import statistics
from typing import Any

from ._train_peers import OURS
from ._train_run import MEASURED, PCA, SWEEP
from ._train_worker import GLANCE

Row = dict[str, Any]

_ABOUT = """\
The same batches in the same order for all, one process per trainer; on a CPU a block of each in turn. Tokens/s are
medians over blocks and seeds, of the training steps alone; above a ratio of 1 qscope is faster. Memory is the growth
of the process (GPU: of the device's allocations) over what it held with data and libraries loaded: weights,
gradients, moments, activations. FVU, silent features (never above 0) and recovery are of held-out tokens, by one
function for all, from each library's own encode and decode; means over seeds, +- half their range. Every trainer has
the learning rate that suits it best in the sweep below (a multiple of its own automatic rate), warm-up over a
twentieth, decay to 0 over the last fifth (eai-sparsify: as its Trainer does), and AuxK with weight 1/32 (sae-lens:
its own) for features that were silent for an eighth of the tokens. `torch dense` is qscope's recipe in plain PyTorch.
eai-sparsify's Trainer reads a model, not activations: its SparseCoder is driven here with the Trainer's loss,
optimisers and order of operations."""


def markdown(rows: list[Row]) -> str:
    about = rows[-1]
    threads = f", {about['threads']} threads" if about.get("threads") else ""
    commits = sorted(
        {f"{row['commit'][:24]}{' with changes' if row.get('uncommitted') == 'yes' else ''}" for row in rows}
    )
    versions = sorted({f"{row['trainer'].split()[0]} {row['version']}" for row in rows if row.get("version")})
    lines = [
        f"# Training on {about['device']}",
        "",
        f"{', '.join(versions)}, python {about['python']}{threads}; commit {', '.join(commits)}.",
        "",
        _ABOUT,
        "",
    ]
    measured = [row for row in rows if row["stage"] == MEASURED]
    losses = [loss for data in _names(measured, "data") for loss in _losses(_of(measured, data))]
    lines += ["## Where qscope loses", "", *([f"- {loss}" for loss in losses] or ["Nowhere in what was measured."]), ""]
    for data in _names(measured, "data"):
        lines += _page(data, _of(measured, data))
    swept = [row for row in rows if row["stage"] == SWEEP and row.get("fvu") is not None]
    for data in _names(swept, "data"):
        lines += _sweep(data, [row for row in swept if row["data"] == data])
    gaps = sorted({f"{row['trainer']}: {row['note']}" for row in rows if row["note"]})
    if gaps:
        lines += ["## Not measured", "", *(f"- {gap}" for gap in gaps), ""]
    return "\n".join(lines).rstrip() + "\n"


def _names(rows: list[Row], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _of(rows: list[Row], data: str) -> dict[str, list[Row]]:
    """Trainer -> its runs on this data, those that failed left out."""
    good = [row for row in rows if row["data"] == data and not row["note"]]
    return {name: [row for row in good if row["trainer"] == name] for name in _names(good, "trainer")}


def _values(rows: list[Row], field: str) -> list[float]:
    return [row[field] for row in rows if row.get(field) is not None]


def _mean(rows: list[Row], field: str) -> float | None:
    values = _values(rows, field)
    return statistics.fmean(values) if values else None


def _spread(rows: list[Row], field: str, digits: int = 4) -> str:
    values = _values(rows, field)
    if not values:
        return ""
    shown = f"{statistics.fmean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} +- {(max(values) - min(values)) / 2:.{digits}f}"


def _speed(rows: list[Row]) -> float | None:
    values = _values(rows, "tokens_per_s")
    return statistics.median(values) if values else None


def _losses(runs: dict[str, list[Row]]) -> list[str]:
    """What qscope is worse at than another, with the figures. Quality counts as worse beyond the range of its seeds."""
    ours, found = runs.get(OURS, []), []
    if not ours:
        return []
    data, speed, memory = ours[0]["data"], _speed(ours) or 0.0, _mean(ours, "peak_mib")
    for name, rows in runs.items():
        if name in (OURS, PCA):
            continue
        theirs, their_memory = _speed(rows) or 0.0, _mean(rows, "peak_mib")
        if theirs > speed:
            found.append(f"{data}, tokens/s: {speed:,.0f} against {theirs:,.0f} of {name}")
        if memory and their_memory and their_memory < memory:
            found.append(f"{data}, peak memory: {memory:,.0f} MiB against {their_memory:,.0f} of {name}")
        for field, sign in (("fvu", 1), ("mmcs", -1)):
            mine, other = _values(ours, field), _values(rows, field)
            noise = max((max(v) - min(v)) / 2 for v in (mine, other)) if mine and other else 0.0
            if mine and other and sign * (statistics.fmean(mine) - statistics.fmean(other)) > noise:
                found.append(f"{data}, {field}: {_spread(ours, field)} against {_spread(rows, field)} of {name}")
    return found


def _page(data: str, runs: dict[str, list[Row]]) -> list[str]:
    first = next(iter(runs.values()))[0]
    sizes = " ".join(f"{name}={first[name]}" for name in ("D", "F", "K", "batch", "tokens"))
    ours = _speed(runs.get(OURS, []))
    lines = [f"## {data}: {sizes}", "", "| ratio | trainer | lr | tokens/s | peak MiB | FVU | MMCS | match | silent |"]
    lines += ["| --- " * 9 + "|"]
    for name, rows in runs.items():
        speed, peak, rate = _speed(rows), _mean(rows, "peak_mib"), rows[0].get("lr_factor")
        cells = [f"{ours / speed:.2f}x" if ours and speed else "", name, f"x{rate:g}" if rate else ""]
        cells += [f"{speed:,.0f}" if speed else "", f"{peak:,.0f}" if peak else "", _spread(rows, "fvu")]
        cells += [_spread(rows, "mmcs"), _spread(rows, "match", 3), _spread(rows, "silent", 3)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_curves(runs)]


def _curves(runs: dict[str, list[Row]]) -> list[str]:
    """FVU after so many tokens, mean over seeds; before the end on the first of the held-out tokens only."""
    curves = {name: [row["curve"] for row in rows] for name, rows in runs.items() if "curve" in rows[0]}
    if not curves:
        return []
    tokens = [point["tokens"] for point in next(iter(curves.values()))[0]]
    lines = [f"FVU over training; before the end on {GLANCE:,} held-out tokens.", ""]
    lines += [f"| tokens | {' | '.join(curves)} |", "| --- " * (len(curves) + 1) + "|"]
    for i, count in enumerate(tokens):
        cells = [f"{statistics.fmean(curve[i]['fvu'] for curve in each):.4f}" for each in curves.values()]
        lines.append(f"| {count:,} | {' | '.join(cells)} |")
    return [*lines, ""]


def _sweep(data: str, rows: list[Row]) -> list[str]:
    """Final FVU of one seed at every multiple of a trainer's own rate."""
    factors = sorted({row["lr_factor"] for row in rows})
    lines = [f"## Learning rates, {data}: final FVU", "", f"| trainer | {' | '.join(f'x{f:g}' for f in factors)} |"]
    lines += ["| --- " * (len(factors) + 1) + "|"]
    for name in _names(rows, "trainer"):
        found = {row["lr_factor"]: row["fvu"] for row in rows if row["trainer"] == name}
        lines.append(f"| {name} | {' | '.join(f'{found[f]:.4f}' if f in found else '' for f in factors)} |")
    return [*lines, ""]
