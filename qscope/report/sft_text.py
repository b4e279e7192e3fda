"""What `qscope sft` prints."""

from collections.abc import Sequence

from qscope.report.sft_page import arm_rows, change, points, write
from qscope.workflows.sft_result import SFTResult


def render(result: SFTResult) -> str:
    """The verdict, a line per arm, the comparisons; writes the page."""
    page = write(result)
    lines = [*result.verdict, *result.notes, "", *_columns(arm_rows(result.arms))]
    if result.comparisons:
        rows: list[Sequence[str]] = [("penalty minus", "switching, points", "clean held-out loss", "switches")]
        rows += [(f"{c.penalty} - {c.other}", points(c.ratio), change(c.loss), c.judgement) for c in result.comparisons]
        lines += ["", *_columns(rows)]
    return "\n".join([*lines, f"wrote {page} and {result.out / 'result.json'}"])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
