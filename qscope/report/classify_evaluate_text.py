"""What `qscope classify evaluate` prints."""

from collections.abc import Sequence

from qscope.classification.resampling import Estimate
from qscope.report.classify_evaluate_page import NAMES, columns, write
from qscope.report.evaluate_page import num
from qscope.workflows.classify_evaluate_result import EMPTY, ClassifyEvaluateResult


def render(result: ClassifyEvaluateResult) -> str:
    """The verdict, where the rule loses, a line per method; writes the page."""
    lines = [result.verdict, *(f"- {line}" for line in result.loses), *result.notes, "", *_methods(result)]
    if result.stability:
        lines += ["", "stability of the features chosen, bootstrap replicates of the training texts (Jaccard):"]
        lines += [
            f"  {f'{s.of}: ' if s.of else ''}{num(s.with_all.value, 3)} with all texts, "
            f"{num(s.halves.value, 3)} of two halves"
            for s in result.stability
        ]
    written = ", ".join(str(result.out / name) for name in ("evaluate.json", "evaluate.csv"))
    return "\n".join([*lines, "", f"wrote {write(result)}, {written}"])


def _methods(result: ClassifyEvaluateResult) -> list[str]:
    main = result.main_figure
    shown = columns(result)
    head = ["method", "layer", NAMES[main], "95 %", *(NAMES[name] for name in shown if name != main)]
    rows = [[*head, f"rule minus this ({NAMES[main]})", ""]]
    for row in result.rows:
        figure, ahead = row.figures.get(main, EMPTY), row.ahead.get(main)
        cells = [row.method, row.layer, num(figure.value, 3), _between(figure.low, figure.high)]
        cells += [num(row.figures.get(name, EMPTY).value, 3) for name in shown if name != main]
        cells.append(_signed(ahead) if ahead else "")
        rows.append([*cells, row.judgement])
    return _columns(rows)


def _signed(found: Estimate) -> str:
    sign = "+" if (found.value or 0) > 0 else ""
    return f"{sign}{num(found.value, 3)} [{_between(found.low, found.high)}]"


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{num(low, 3)} to {num(high, 3)}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
