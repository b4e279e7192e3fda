"""The Markdown page of bench_steer.py: ratio first, losses named."""

from typing import Any

from ._steer_peers import OURS, UNSTEERED

Row = dict[str, Any]
_GROUP = ("model", "dtype", "mode", "threads", "clock")

_ABOUT = """\
Time of one generated token against the unsteered model, of whole `generate` calls. `ratio` is the median over rounds
of time / unsteered time of the same round; `of minima` divides the shortest times, which other work on the machine
disturbs least. In mode eager every round runs all contestants in turn, in a rotating order; in mode graphs (static
cache, compiled by generate, CUDA graphs) each is compiled and timed between two unsteered runs. `unsteered, once more`
is the unsteered model against itself: what its ratio differs from 1 is noise. Before anything is timed, all
contestants of a case have to give the same tokens in float32, other ones than the unsteered model."""


def markdown(rows: list[Row]) -> str:
    about = rows[-1]
    commits = sorted({f"{r['commit'][:24]}{' with changes' if r.get('uncommitted') == 'yes' else ''}" for r in rows})
    versions = sorted({f"{row['provider']} {row['version']}" for row in rows if row.get("version")})
    facts = [f"torch {about['torch']}", *versions, f"python {about['python']}", f"commit {', '.join(commits)}"]
    lines = [f"# Steering on {about['device']}", "", f"{', '.join(facts)}.", "", _ABOUT, ""]
    losses = [loss for key in _groups(rows) for loss in _losses(_of(rows, key))]
    lines += ["## Where qscope loses", "", *([f"- {loss}" for loss in losses] or [_nowhere(rows)]), ""]
    for key in _groups(rows):
        model, dtype, mode, threads, clock = key
        where = (f", {threads} threads" if threads else "") + (", CPU time" if clock == "cpu" else "")
        chosen = _of(rows, key)
        lines += [f"## {model}, {dtype}, {mode}{where}", ""]
        lines += ["| ratio | of minima | case | contestant | ms/token | least | rounds |", "| --- " * 7 + "|"]
        for row in chosen:
            if not row["note"]:
                cells = [f"{row['ratio']:.3f}x", f"{row['ratio_min']:.3f}x", row["case"], row["provider"]]
                cells += [f"{row['ms']:.3f}", f"{row['ms_min']:.3f}", str(row["rounds"])]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    gaps = sorted({f"{row['provider']}, {row['case']}: {row['note']}" for row in rows if row["note"]})
    lines += ["## Not measured", "", *(f"- {gap}" for gap in gaps), ""] if gaps else []
    return "\n".join(lines).rstrip() + "\n"


def _groups(rows: list[Row]) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(row[name] for name in _GROUP) for row in rows))


def _of(rows: list[Row], key: tuple[Any, ...]) -> list[Row]:
    return [row for row in rows if tuple(row[name] for name in _GROUP) == key]


def _noise(rows: list[Row]) -> float:
    """How far the unsteered model is from itself, at most."""
    found = [row for row in rows if not row["note"] and row["provider"] == UNSTEERED]
    return max((abs(row[name] - 1) for row in found for name in ("ratio", "ratio_min")), default=0.0)


def _nowhere(rows: list[Row]) -> str:
    return f"Nowhere by more than the noise, which is up to {_noise(rows):.1%} here: less cannot be told."


def _losses(rows: list[Row]) -> list[str]:
    """Cases in which another is faster by more than what the unsteered model differs from itself."""
    good = [row for row in rows if not row["note"]]
    noise, found = _noise(rows), []
    for mine in (row for row in good if row["provider"] == OURS):
        for other in good:
            faster = all(mine[name] - other[name] > noise for name in ("ratio", "ratio_min"))
            if other["case"] == mine["case"] and other["provider"] not in (OURS, UNSTEERED) and faster:
                found.append(
                    f"{mine['case']} ({mine['mode']}): {mine['ratio']:.3f}x against {other['ratio']:.3f}x of "
                    f"{other['provider']}"
                )
    return found
