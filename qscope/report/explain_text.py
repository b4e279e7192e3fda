"""What `qscope explain` prints."""

from qscope.explaining.journal import Explanation
from qscope.explaining.scores import KINDS, Score
from qscope.report.evaluate_page import share
from qscope.report.explain_page import write
from qscope.report.inspect_page import visible
from qscope.report.steer_find_text import table
from qscope.workflows.explain_result import ExplainResult, MeanScore


def render(result: ExplainResult) -> str:
    """Features with their sentences and scores, and the scores over all features; writes the page as well."""
    lines = [", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    kept = len(result.explanations) - result.made
    lines += [f"{len(result.explanations)} features" + (f", {kept} of them explained before" if kept else ""), ""]
    lines += table([("feature", "density", *KINDS, ""), *map(_row, result.explanations)])
    if result.scores:
        lines += ["", "balanced accuracy and AUROC, mean over features (95 %); 0.5 is chance"]
        lines += [f"  {kind}: {_mean(found)}" for kind, found in result.scores.items()]
    for name, counts in result.requests.items():
        lines.append(f"{name}: " + ", ".join(f"{value:,} {what.replace('_', ' ')}" for what, value in counts.items()))
    page = write(result)
    written = [result.path, *([result.rule_path] if result.rule_path else []), *([str(page)] if page else [])]
    return "\n".join([*lines, "", *(f"wrote {path}" for path in written)])


def _row(one: Explanation) -> tuple[str, ...]:
    scores = (accuracy(one.scores.get(kind)) for kind in KINDS)
    return (f"{one.layer}:{one.feature}", share(one.density), *scores, visible(one.text))


def accuracy(score: Score | None) -> str:
    """The balanced accuracy; - for none."""
    return "-" if score is None or score.balanced_accuracy is None else f"{score.balanced_accuracy:.2f}"


def _mean(found: MeanScore) -> str:
    unanswered = f"; {found.unanswered} examples unanswered" if found.unanswered else ""
    return (
        f"{found.balanced_accuracy:.3f}{_between(found.balanced_accuracy_interval)}, "
        f"{found.auroc:.3f}{_between(found.auroc_interval)}, {found.features} features{unanswered}"
    )


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
