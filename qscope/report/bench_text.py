"""What `qscope bench` prints, and the Markdown tables of the benchmarks: ratio first, losses marked."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

Row = dict[str, Any]
_MOST_GAPS = 40


class Summary(Protocol):
    """bench's summary of its rows; see bench/_summary.py."""

    @property
    def ratios(self) -> list[Any]: ...
    @property
    def gaps(self) -> list[Any]: ...
    @property
    def bars(self) -> list[Any]: ...


def markdown(rows: list[Row], summary: Summary) -> str:
    """The page beside a result file: bars, ratios to every peer, every time with its share of the floor, gaps."""
    about = next((row for row in rows if row.get("device")), {})
    versions = [f"{name} {about[name]}" for name in ("torch", "triton", "python") if about.get(name)]
    threads = f", {about['threads']} threads" if about.get("threads") else ""
    commits = sorted({f"{(r.get('commit') or 'no commit')[:24]}{_dirty(r)}" for r in rows})
    lines = [
        f"# Benchmarks on {about.get('device', 'an unknown device')}",
        "",
        f"{', '.join(versions) or 'versions unknown'}{threads}; commit {', '.join(commits)}.",
        "",
        "Every provider was checked against the float32 answer in the same process before it was timed; rounds are",
        "interleaved over the providers. Times are medians in ms; `fastest` is the ratio of the fastest rounds, which",
        "a busy machine disturbs least. `eager` is one call with its launches, `graph` the replay of a CUDA graph.",
        "Ratios above 1: qscope is faster.",
        "",
    ]
    copies = sorted({round(row["copy_gbps"]) for row in rows if row.get("copy_gbps")})
    if copies:
        spread = f"{copies[0]:,}" if len(copies) == 1 else f"{copies[0]:,} to {copies[-1]:,}"
        lines += [
            f"Floors use rates of the same process: a large copy ({spread} GB/s) and the matrix product alone.",
            "More than 100 % of a floor: caches served what the floor counts as memory traffic.",
            "",
        ]
    if summary.bars:
        lines += ["## Bars", "", *_table(("", "bar", "wanted", "measured"), map(_bar, summary.bars)), ""]
    losing = sorted((ratio for ratio in summary.ratios if ratio.ratio < 1), key=lambda ratio: ratio.ratio)
    head = ("ratio", "fastest", "", "case", "ours", "ms", "peer", "ms")
    lines += ["## Where qscope loses", ""]
    lines += [*_table(head, map(_ratio, losing)), ""] if losing else ["Nowhere in what was measured.", ""]
    lines += ["## Against every peer", "", *_table(head, map(_ratio, summary.ratios)), ""]
    lines += ["## Times and floors", "", *_table(_TIMES, (_time(row) for row in rows if row.get("p50_ms"))), ""]
    if summary.gaps:
        gaps = list(dict.fromkeys((gap.provider, gap.case["op"], gap.note) for gap in summary.gaps))
        lines += ["## Not timed", "", *_table(("provider", "operator", "why"), gaps[:_MOST_GAPS])]
        lines += [f"\n{len(gaps) - _MOST_GAPS} more stand in the CSV file."] * (len(gaps) > _MOST_GAPS)
    return "\n".join(lines).rstrip() + "\n"


_TIMES = ("case", "provider", "p20", "p50", "p80", "TFLOP/s", "GB/s", "of floor", "peak MiB")


def _dirty(row: Row) -> str:
    return " with uncommitted changes" if row.get("uncommitted") == "yes" else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _bar(bar: Any) -> tuple[str, ...]:
    verdict = {True: "met", False: "**MISSED**", None: "-"}[bar.met]
    return verdict, bar.name, bar.wanted, bar.measured


def _ratio(ratio: Any) -> tuple[str, ...]:
    ratios = f"{ratio.ratio:.2f}x", f"{ratio.fastest:.2f}x", "**LOSES**" if ratio.ratio < 1 else ""
    return *ratios, _case(ratio.case), ratio.ours, _ms(ratio.ours_ms), ratio.peer, _ms(ratio.peer_ms)


def _time(row: Row) -> tuple[str, ...]:
    share = row.get("share_of_floor")
    return (
        _case(row),
        row["provider"],
        *(_ms(row[name]) for name in ("p20_ms", "p50_ms", "p80_ms")),
        *(f"{row[name]:,.0f}" if row.get(name) else "" for name in ("tflops", "gbps")),
        "" if share is None else f"{100 * share:.0f} %",
        f"{row['peak_mib']:,.0f}" if row.get("peak_mib") is not None else "",
    )


def _case(case: dict[str, Any]) -> str:
    sizes = [f"{key}={case[key]}" for key in ("N", "D", "F", "K") if case.get(key)]
    return " ".join([case["op"], *sizes, str(case["dtype"]), str(case["mode"])])


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def render(result: Any) -> str:
    """What `qscope bench` prints: times per case with ratios, then losses and bars; writes plots when asked for."""
    lines = [*_cases(result.rows), ""]
    losing = [ratio for ratio in result.ratios if ratio.ratio < 1]
    lines.append(f"{len(result.ratios)} comparisons with peers, {len(losing)} lost:")
    lines += [f"  {r.ratio:5.3g}x  {_case(r.case)}: {r.ours} against {r.peer}" for r in losing]
    if result.bars:
        lines += ["", "Bars:"]
        for bar in result.bars:
            verdict = {True: "met   ", False: "MISSED", None: "-     "}[bar.met]
            lines.append(f"  {verdict} {bar.name}: {bar.measured}, wanted {bar.wanted}")
    lines += [f"not measured, out of time: {case}" for case in result.left_out]
    lines += [f"FAULT: {fault}" for fault in result.faults]
    lines += [f"rows: {result.csv}"] if result.csv else []
    lines += [f"plot: {path}" for path in finish(result)]
    return "\n".join(lines)


def finish(result: Any) -> list[str]:
    """Write the plots where the config asked for them; their paths."""
    if result.plot is None:
        return []
    from qscope.report.bench_plot import write_plots

    return [str(path) for path in write_plots(result.rows, result.plot)]


def _cases(rows: list[Row]) -> list[str]:
    """Per case: ratio of each provider's time to our first one's, its time, its share of the floor."""
    lines: list[str] = []
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), []).append(row)
    for name, members in cases.items():
        ours = next((r["p50_ms"] for r in members if r["role"] == "ours" and r.get("p50_ms")), None)
        lines.append(name)
        for row in members:
            if not row.get("p50_ms"):
                lines.append(f"  {'-':>7}  {row['provider']}: {row['note']}")
                continue
            ratio = f"{row['p50_ms'] / ours:6.2f}x" if ours else ""
            share = row.get("share_of_floor")
            floor = "" if share is None else f"  {100 * share:.0f} % of floor"
            lines.append(f"  {ratio:>7}  {row['provider']}  {_ms(row['p50_ms'])} ms{floor}")
    return lines
