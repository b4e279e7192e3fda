"""What `qscope steer eval` prints."""

from collections.abc import Sequence

from qscope.report.evaluate_page import num, signed
from qscope.report.steer_eval_page import SIDE_NAMES, write
from qscope.workflows.steer_eval_arms import SPEC, UNSTEERED
from qscope.workflows.steer_eval_result import PointResult, SteerEvalResult


def render(result: SteerEvalResult) -> str:
    """The verdict, a line per setting, the comparison at each strength of the spec; writes the page."""
    lines = [result.verdict, *result.notes, "", *_settings(result.points)]
    own = {point.strength: point for point in result.points if point.arm == SPEC}
    for strength in dict.fromkeys(item.strength for item in result.matched):
        mine = [item for item in result.matched if item.strength == strength]
        lines += [
            "",
            f"at {SIDE_NAMES[result.match]} {num(mine[0].side_effect, 3)} (strength {strength:g}), target rate of the "
            f"spec {num(own[strength].target.value, 3)}:",
        ]
        rows = []
        for item in mine:
            there = num(item.best_below, 3) + f" at less, reaches {num(item.reached, 3)}"
            rate = num(item.rate.value, 3) if item.rate else there
            ahead = item.difference
            rows.append(
                (item.arm, rate, f"{signed(ahead.value)} [{num(ahead.low, 3)}, {num(ahead.high, 3)}]", item.judgement)
            )
        lines += _columns([("", "arm's rate", "spec minus arm", ""), *rows])
    lines += [f"not run: {arm} ({why})" for arm, why in result.left_out.items()]
    return "\n".join([*lines, f"wrote {write(result)} and {result.out / 'result.json'}"])


def _settings(points: Sequence[PointResult]) -> list[str]:
    rows = [("setting", "size", "target", "95 %", "KL", "perplexity", "distinct-2", "repetition", "length", "accuracy")]
    for p in points:
        name = p.arm if p.arm == UNSTEERED else f"{p.arm} {p.strength:.3g}"
        rows.append(
            (
                name, num(p.size, 3), num(p.target.value, 3), f"{num(p.target.low, 3)} to {num(p.target.high, 3)}",
                num(p.kl.value, 3), num(p.perplexity, 2), num(p.distinct_2.value, 3), num(p.repetition.value, 3),
                num(p.length.value, 1), num(None if p.accuracy is None else p.accuracy.value, 3),
            )
        )  # fmt: skip
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
