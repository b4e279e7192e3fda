"""What `qscope doctor` prints."""

import shutil
import textwrap

from qscope.report.inspect_text import clip
from qscope.workflows.doctor import DoctorResult


def render(result: DoctorResult) -> str:
    """The report for this terminal."""
    return tables(result, shutil.get_terminal_size((110, 24)).columns)


def tables(result: DoctorResult, width: int = 110) -> str:
    """Findings, operators and advice as lines of at most `width` cells (40 or more)."""
    width = max(width, 40)
    names = max((len(finding.name) for finding in result.findings), default=0)
    lines = []
    for finding in result.findings:
        value = " ".join(finding.value.split())
        lines.append(clip(f"  {'+' if finding.found else '-'} {finding.name:<{names}}  {value}", width))
    lines += ["", *_operators(result, width)]
    advice = result.advice
    lines += ["", "To get more:" if advice else "Nothing is missing."]
    for item in advice:
        lines += textwrap.wrap(item, width, initial_indent="  * ", subsequent_indent="    ")
    return "\n".join(lines)


def _operators(result: DoctorResult, width: int) -> list[str]:
    by_operator: dict[str, dict[str, str]] = {}
    for backend in result.backends:
        by_operator.setdefault(backend.operator, {})[backend.device] = backend.backend
    names = max(map(len, ["operator", *by_operator]))
    cpu = max(len(found.get("cpu", "")) for found in [{"cpu": "on CPU"}, *by_operator.values()])
    rows = [("operator", "on CPU", "on CUDA" if result.gpu else "on CUDA (no GPU found here)")]
    rows += [(name, found.get("cpu", ""), found.get("cuda", "")) for name, found in by_operator.items()]
    return [clip(f"  {a:<{names}}  {b:<{cpu}}  {c}".rstrip(), width) for a, b, c in rows]
