"""What a rule would be with another number of features, threshold, pooling or layer. No test text is looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qscope.classification.fitting import (
    Candidate,
    Fit,
    FitData,
    FitSettings,
    SensitivityRow,
    fit_multiclass,
    sensitivity,
)
from qscope.classification.metrics import Prediction, figures
from qscope.errors import InputError
from qscope.finding.pooled import Ints, PooledCodes
from qscope.workflows.classify_fit_result import SensitivityLine

RATES: tuple[float | None, ...] = (None, 0.01, 0.05, 0.1)


def one_class(data: FitData, of: str, settings: FitSettings, one: Fit, chosen: Candidate) -> list[SensitivityLine]:
    """The rule first, then every combination of layer, pooling, threshold and K."""
    targets = (*RATES, *(() if settings.target in RATES else (settings.target,)))
    lines = [_line(of, chosen, True)]
    for row in sensitivity(data, settings, targets=targets):
        if not _same(row, settings, chosen):
            lines.append(_line(of, row.candidate, False))
    if one.multi_layer is None and len(one.top1) > 1:
        return lines
    return lines + ([_line(of, one.chosen, False)] if one.multi_layer is chosen else [])


def _same(row: SensitivityRow, settings: FitSettings, chosen: Candidate) -> bool:
    return chosen.rule == row.candidate.rule and (row.target, row.pooling) == (settings.target, settings.pooling)


def _line(of: str, found: Candidate, chosen: bool) -> SensitivityLine:
    settings = found.settings
    return SensitivityLine(
        of=of,
        layers=" ".join(map(str, found.rule.layers)),
        k=found.count,
        pooling=settings.pooling,
        threshold=threshold_name(settings),
        training=_picked(found.training),
        calibration=_picked(found.calibration),
        chosen=chosen,
    )


def threshold_name(settings: FitSettings) -> str:
    name = "0" if settings.target is None else f"FPR {100 * settings.target:g} %"
    return f"{name}, preact" if settings.membership == "preact" else name


def _picked(found: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: found.get(name) for name in ("f1", "precision", "recall", "false_positive_rate", "auroc")}


def several_classes(
    codes: Mapping[int, PooledCodes],
    label: Ints,
    names: Sequence[str],
    train: Ints,
    calibration: Ints,
    settings: FitSettings,
    layer: int | None,
    count: int | None,
) -> list[SensitivityLine]:
    """The rule first, then rules in which one thing is different; figures are macro averages over the classes."""
    asked: list[tuple[FitSettings, int | None, int | None]] = [(settings, layer, count)]
    asked += [(settings, layer, k) for k in sorted(settings.counts) if k != count]
    asked += [(replace(settings, target=target), layer, count) for target in RATES if target != settings.target]
    asked += [(settings, number, count) for number in sorted(codes) if number != layer and len(codes) > 1]
    lines = []
    for place, (wanted, only, k) in enumerate(asked):
        try:
            found = fit_multiclass(codes, label, names, train, calibration, wanted, only, k)
        except InputError:  # a K for which some class has too few features
            continue
        used = {number: found.rule for number in found.rule.layers}
        scores, decided = found.rule.scores(codes), found.rule.decide(codes)
        tables = []
        for weight in (train, calibration):
            rows = np.flatnonzero(weight)
            table = figures(label[rows], len(names), Prediction(scores[rows], decided[rows]))
            tables.append({short: table[name].value for short, name in _MACRO.items()})
        lines.append(
            SensitivityLine(
                of="all",
                layers=" ".join(map(str, used)),
                k=k or max(len(rule.clauses) for rule in found.rule.rules),
                pooling=wanted.pooling,
                threshold=threshold_name(wanted),
                training=tables[0],
                calibration=tables[1],
                chosen=place == 0,
            )
        )
    return lines


_MACRO = {"f1": "macro_f1", "precision": "macro_precision", "recall": "macro_recall", "accuracy": "accuracy"}
