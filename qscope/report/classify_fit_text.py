"""What `qscope classify fit` prints."""

from qscope.report.classify_fit_page import near, part, write
from qscope.report.evaluate_page import num, share, signed
from qscope.report.inspect_page import visible
from qscope.report.steer_find_text import table
from qscope.workflows.classify_fit_result import ClassifyFitResult, ClauseFound, SensitivityLine


def render(result: ClassifyFitResult) -> str:
    """The rule, what it does on training and calibration texts, what else was there; writes the page and the JSON."""
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    parts = "; ".join(
        f"{name}: " + ", ".join(f"{number:,} {label}" for label, number in counts.items())
        for name, counts in result.counts.items()
    )
    lines += [f"texts: {parts}", "", *_layers(result), "", "rule (figures of the training texts)", *_clauses(result)]
    if result.sensitivity:
        lines += [
            "",
            "one thing different (no test text; precision, recall and false positives of the calibration texts)",
            *_sensitivity(result),
        ]
    written = [result.rule_path] if result.rule_path else []
    lines += ["", *(f"wrote {path}" for path in [*written, *map(str, write(result))])]
    return "\n".join(lines).rstrip()


def _layers(result: ClassifyFitResult) -> list[str]:
    several = len({line.of for line in result.layers}) > 1
    rows = [("class",) * several + ("layer", "top1 difference", "feature", "SAE")]
    for line in result.layers:
        name = f"*{line.layer}" if line.chosen else str(line.layer)
        rows.append((line.of,) * several + (name, signed(line.top1_difference), str(line.top1_feature), line.sae))
    return table(rows)


def _clauses(result: ClassifyFitResult) -> list[str]:
    several = len({clause.of for clause in result.clauses}) > 1
    head = ("layer", "feature", "above", "positive", "negative", "AUROC", "log-odds", "z", "q", "")
    return table([("class",) * several + head, *((c.of,) * several + _clause(c) for c in result.clauses)])


def _clause(c: ClauseFound) -> tuple[str, ...]:
    return (
        str(c.layer),
        str(c.feature),
        num(c.threshold, 3),
        share(c.rate_positive),
        share(c.rate_negative),
        num(c.auroc, 3),
        signed(c.log_odds),
        num(c.z, 1),
        f"{c.q:.1e}",
        visible(c.meaning),
    )


def _sensitivity(result: ClassifyFitResult) -> list[str]:
    head = ("layers", "K", "pooling", "threshold", "F1 train", "F1 calib", "precision", "recall", "false positives", "")
    return table([head, *map(_setting, near(result))])


def _setting(line: SensitivityLine) -> tuple[str, ...]:
    held = line.calibration
    return (
        line.layers,
        str(line.k),
        line.pooling,
        line.threshold,
        num(line.training.get("f1"), 3),
        num(held.get("f1"), 3),
        part(held.get("precision")),
        part(held.get("recall")),
        part(held.get("false_positive_rate")),
        "*" if line.chosen else "",
    )
