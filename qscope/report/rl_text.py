"""What `qscope rl` prints."""

from qscope.finding.stability import Interval
from qscope.report.evaluate_page import num, share
from qscope.report.rl_page import write
from qscope.report.steer_find_text import table
from qscope.workflows.rl_result import ArmLine, RLResult


def render(result: RLResult) -> str:
    """The features, the table of the arms, what it says; writes the page."""
    mined = result.mined
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    found = "mined from" if mined.mined else "given; beside"
    lines += [
        "",
        f"layer {mined.layer}, features {', '.join(map(str, mined.features))}, {found} {mined.looping} looping and "
        f"{mined.control} other responses; strength {num(mined.strength, 2)} of the residual's norm",
    ]
    for side, levels in mined.cause.items():
        tried = ", ".join(f"{level['strength']:+g}: {level['hits']:g}/{level['count']:g}" for level in levels)
        lines += [f"  {side} (strength: endless): {tried or 'no prompts'}"]
    head = ("endless", "- vanilla", "4-grams said", "tokens", "bits/byte", "copied", "arm")
    lines += ["", *table([head, *map(_row, result.arms)])]
    lines += ["", *result.verdicts]
    return "\n".join(lines + [f"wrote {path}" for path in map(str, write(result))])


def _row(line: ArmLine) -> tuple[str, ...]:
    return (
        shares(line.endless),
        "" if line.against is None else points(line.against),
        share(line.repeated.value),
        num(line.length.value, 0),
        span(line.bits_per_byte, 3),
        share(line.copied.value),
        f"{line.arm} ({line.seeds} seed{'s' if line.seeds > 1 else ''})",
    )


def shares(x: Interval) -> str:
    return f"{share(x.value)} [{share(x.low)}, {share(x.high)}]"


def points(x: Interval) -> str:
    """A difference of shares, in points."""
    return f"{100 * x.value:+.1f} [{100 * x.low:+.1f}, {100 * x.high:+.1f}]"


def span(x: Interval, digits: int) -> str:
    return f"{num(x.value, digits)} [{num(x.low, digits)}, {num(x.high, digits)}]"
