"""What `qscope classify predict`, `stream` and `serve-check` print."""

import sys

from qscope.report.evaluate_page import num, share
from qscope.workflows.classify_predict_result import ClassifyPredictResult
from qscope.workflows.classify_serve_check import ServeCheckResult
from qscope.workflows.classify_stream import ClassifyStreamConfig
from qscope.workflows.classify_stream import run as run_stream


def render(result: ClassifyPredictResult) -> str:
    """How the texts were decided, and what to know of it."""
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    total = max(1, result.texts)
    shares = ", ".join(f"{count:,} {name} ({share(count / total)})" for name, count in result.decided.items())
    lines.append(f"{result.texts:,} texts: {shares}")
    if result.truncated:
        lines.append(f"{result.truncated:,} texts are longer than the rule's context and were cut")
    if result.empty:
        lines.append(f"{result.empty:,} texts have no token that counts; nothing can fire in them")
    if result.resumed:
        lines.append(f"{result.resumed:,} texts had been decided by an earlier run")
    if result.failed:
        lines.append(f"{result.failed:,} lines could not be read; their output says why")
    if result.tokens:
        lines.append(f"{result.tokens:,} tokens read, {num(result.tokens_per_second, 1)} per second")
    return "\n".join([*lines, f"wrote {result.out}"] if result.out else lines)


def stream(config: ClassifyStreamConfig) -> ClassifyPredictResult:
    """Decide the lines of standard input as they come; the summary goes to standard error."""
    result = run_stream(config)
    print(render(result), file=sys.stderr)
    return result


def render_check(result: ServeCheckResult) -> str:
    """The rule's cost beside the model's own pass."""
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    lines += [
        f"model alone, to layer {result.deepest}: {num(result.model_tokens_per_second, 1)} tokens per second",
        f"model and rule: {num(result.rule_tokens_per_second, 1)} tokens per second",
        f"the rule costs {100 * result.cost:+.1f} % of the model's time (median of {result.rounds} rounds; bar "
        f"{share(result.bar)}): {'within the bar' if result.within else 'OVER THE BAR'}",
        f"decisions of the exported rule and of predict agree on {result.agreeing:,} of {result.texts:,} texts",
    ]
    return "\n".join([*lines, f"wrote {result.exported}"] if result.exported else lines)
