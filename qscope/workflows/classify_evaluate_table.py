"""From fitted methods to the table: figures with intervals, differences to the rule, groups, and what all this says."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from qscope.classification import metrics, resampling
from qscope.classification.metrics import BINARY, SEVERAL, Prediction
from qscope.classification.resampling import Bootstrap, Estimate
from qscope.workflows.classify_evaluate_methods import RANDOM, Data, Entry, RandomRules, reliability
from qscope.workflows.classify_evaluate_result import EMPTY, LayerLine, MethodRow

FEW = 20
"""A group with fewer texts of a class than this is not named among those in which the rule loses"""


def table(
    data: Data, headline: str, entries: Sequence[Entry], randoms: RandomRules | None, replicates: int, seed: int
) -> tuple[list[MethodRow], Bootstrap]:
    """A row per entry, and one for the draws of random features together: mean over them, replicate by replicate.

    The headline rule comes first, then other rules, then what was best.
    """
    names = BINARY if data.classes == 2 else SEVERAL
    test, label = data.test, data.problem.label
    predictions = {entry.name: entry.prediction.take(test) for entry in entries}
    draws = {f"{RANDOM} {i}": prediction.take(test) for i, prediction in enumerate(randoms.draws if randoms else ())}
    found = resampling.bootstrap(label[test], data.classes, predictions | draws, replicates, seed, names)
    rows = [_row(data, entry, found, headline, names) for entry in entries]
    if randoms is not None:
        rows.append(_random_row(data, list(draws), randoms, found, headline, names))
    main = data.main
    rows.sort(key=lambda row: (not row.headline, row.family != "rule", -(row.figures[main].value or 0.0)))
    return rows, found


def _row(data: Data, entry: Entry, found: Bootstrap, headline: str, names: Sequence[str]) -> MethodRow:
    label, test = data.problem.label, data.test
    own = entry.name == headline
    ahead = {} if own else _ahead(data, found, headline, entry.name)
    return MethodRow(
        method=entry.name,
        family=entry.family,
        layer=", ".join(map(str, entry.layers)),
        detail=entry.detail,
        headline=own,
        figures={name: found.interval(entry.name, name) for name in names},
        ahead=ahead,
        judgement=judge(ahead.get(data.main, EMPTY)),
        groups=_groups(data, [entry.prediction]),
        confusion=metrics.confusion(label[test], entry.prediction.decisions[test], data.classes).tolist(),
        reliability=reliability(entry.prediction, label, test),
    )


def _random_row(
    data: Data,
    draws: list[str],
    randoms: RandomRules,
    found: Bootstrap,
    headline: str,
    names: Sequence[str],
) -> MethodRow:
    found.value[RANDOM] = {name: float(np.mean([found.value[draw][name] for draw in draws])) for name in names}
    found.replicates[RANDOM] = {
        name: np.mean([found.replicates[draw][name] for draw in draws], axis=0) for name in names
    }
    ahead = _ahead(data, found, headline, RANDOM)
    values = [found.value[draw][data.main] for draw in draws]
    spread = f"{min(values):.3f} and {max(values):.3f}"
    return MethodRow(
        method=RANDOM,
        family="features",
        layer=str(randoms.layer),
        detail=f"{randoms.detail}; mean of {len(draws)} draws, which lie between {spread}",
        headline=False,
        figures={name: found.interval(RANDOM, name) for name in names},
        ahead=ahead,
        judgement=judge(ahead[data.main]),
        groups=_groups(data, randoms.draws),
        confusion=metrics.confusion(
            data.problem.label[data.test], randoms.draws[0].decisions[data.test], data.classes
        ).tolist(),
        reliability=[],
    )


def _ahead(data: Data, found: Bootstrap, headline: str, other: str) -> dict[str, Estimate]:
    return {name: found.difference(headline, other, name) for name in (data.main, data.curve)}


def judge(ahead: Estimate) -> Literal["", "rule wins", "rule loses"]:
    if ahead.low is None or ahead.high is None:
        return ""
    return "rule wins" if ahead.low > 0 else "rule loses" if ahead.high < 0 else ""


def _groups(data: Data, predictions: Sequence[Prediction]) -> dict[str, dict[str, float | None]]:
    """Means over the predictions; nothing without groups."""
    labelled, label = data.labelled, data.problem.label
    if len(labelled.groups) < 2:
        return {}
    found: dict[str, dict[str, float | None]] = {}
    for number, name in enumerate(labelled.groups):
        mine = data.test[labelled.group[data.test] == number]
        tables = [metrics.figures(label[mine], data.classes, prediction.take(mine)) for prediction in predictions]
        values = {
            figure: None
            if any(table[figure].value is None for table in tables)
            else float(np.mean([table[figure].value or 0.0 for table in tables]))
            for figure in tables[0]
        }
        sizes: dict[str, float | None] = {"texts": float(len(mine)), "positive": float((label[mine] == 1).sum())}
        found[name] = sizes | values
    return found


def layer_lines(
    data: Data, entries: Sequence[Entry], top1: Mapping[int, float], replicates: int, seed: int
) -> list[LayerLine]:
    """Every method that was fitted at several layers, at each of them."""
    test = data.test
    keyed = {
        (entry.name, layer): prediction.take(test)
        for entry in entries
        if len(entry.at_layer) > 1
        for layer, prediction in entry.at_layer.items()
    }
    named = {f"{name} {layer}": prediction for (name, layer), prediction in keyed.items()}
    figures = (data.main, data.curve)
    found = resampling.bootstrap(data.problem.label[test], data.classes, named, replicates, seed, figures)
    of = {entry.name: entry for entry in entries}
    return [
        LayerLine(
            method=name,
            family=of[name].family,
            layer=layer,
            f1=found.interval(f"{name} {layer}", data.main),
            auroc=found.interval(f"{name} {layer}", data.curve),
            chosen=(layer,) == of[name].layers,
            top1_difference=top1.get(layer) if of[name].family == "rule" else None,
        )
        for name, layer in keyed
    ]


def per_class(data: Data, entries: Sequence[Entry]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Multi-class: method -> class -> figures of that class against the rest."""
    if data.classes == 2:
        return {}
    label = data.problem.label[data.test]
    return {
        entry.name: {
            name: {figure: found.value for figure, found in figures.items()}
            for name, figures in metrics.by_class(label, entry.prediction.take(data.test), data.labelled.names).items()
        }
        for entry in entries
    }


# --- what it amounts to ----------------------------------------------------------------------------------

_WORDS = {"f1": "F1", "macro_f1": "macro-F1", "auroc": "AUROC", "macro_auroc": "macro-AUROC"}


def verdict(data: Data, rows: Sequence[MethodRow]) -> str:
    """The rule and the best baseline, in two sentences."""
    main = data.main
    rule = rows[0]
    rivals = [row for row in rows if row.family != "rule"]
    name = _WORDS[main]
    said = f"{_capital(rule.method)} reaches {name} {_range(rule.figures[main])} on {len(data.test):,} test texts"
    if not rivals:
        return f"{said}. No baseline was run."
    best = max(rivals, key=lambda row: row.figures[main].value or 0.0)
    ahead = best.ahead[main]
    how = {
        "rule loses": "the rule loses to it",
        "rule wins": "the rule beats it, and with it every baseline",
        "": "neither is ahead beyond chance",
    }[best.judgement]
    gap = "" if ahead.value is None else f", rule minus baseline {ahead.value:+.3f} ({_bounds(ahead, '+.3f')})"
    losers = [row.method for row in rivals if row.judgement == "rule loses"]
    winners = [row.method for row in rivals if row.judgement == "rule wins"]
    said += f"; the best baseline, {best.method}, reaches {_range(best.figures[main])}: {how}{gap}."
    if winners and best.judgement != "rule wins":
        said += f" The rule beats {_listed(winners)}."
    if len(losers) > 1:
        said += f" It loses to {_listed(losers)}."
    return said


def losses(data: Data, rows: Sequence[MethodRow]) -> list[str]:
    """Where the rule loses: figures, groups, and other rules. A sentence each; where it does not, that is said."""
    found = []
    for name in (data.main, data.curve):
        worse = [row for row in rows[1:] if row.family != "rule" and judge(row.ahead[name]) == "rule loses"]
        if worse:
            gaps = sorted(-(row.ahead[name].value or 0.0) for row in worse)
            by = f"{gaps[0]:.3f}" + (f" to {gaps[-1]:.3f}" if len(worse) > 1 else "")
            listed = _listed([f"{row.method} {_plain(row.figures[name])}" for row in worse])
            found.append(f"{_WORDS[name]}: the rule's {_plain(rows[0].figures[name])} loses to {listed}, by {by}")
    found += _weak_groups(data, rows)
    own = rows[0].figures["ece"].value
    rivals = [row for row in rows[1:] if row.family not in ("rule", "none") and row.figures["ece"].value is not None]
    best = min(rivals, key=lambda row: row.figures["ece"].value or 0.0, default=None)
    if own is not None and best is not None and (best.figures["ece"].value or 0.0) < own:
        found.append(
            f"Calibration: ECE {own:.3f}, {best.method} {_plain(best.figures['ece'])} (no interval of the difference)"
        )
    return found or ["No baseline is ahead of the rule in F1 or AUROC beyond the 95 % interval"]


def _weak_groups(data: Data, rows: Sequence[MethodRow]) -> list[str]:
    """Groups in which the best baseline of all texts is ahead of the rule."""
    rivals = [row for row in rows[1:] if row.family not in ("rule", "none") and row.groups]
    if not rivals:
        return []
    best, own = max(rivals, key=lambda row: row.figures[data.main].value or 0.0), rows[0]
    found = []
    for name, mine in own.groups.items():
        left, right = mine.get(data.main), best.groups[name].get(data.main)
        positive, texts = mine.get("positive") or 0, mine.get("texts") or 0
        enough = min(positive, texts - positive) >= FEW if data.classes == 2 else texts >= FEW
        if left is not None and right is not None and enough and left < right:
            found.append((right - left, f"{name} {left:.3f} to {right:.3f}"))
    found.sort(key=lambda pair: -pair[0])
    if not found:
        return []
    listed = "; ".join(text for _, text in found[:8]) + ("; and others" if len(found) > 8 else "")
    return [
        f"Groups with a lower {_WORDS[data.main]} than {best.method}, {len(found)} of {len(own.groups)}, without "
        f"intervals: {listed}"
    ]


def _plain(found: Estimate) -> str:
    return "–" if found.value is None else f"{found.value:.3f}"


def _range(found: Estimate) -> str:
    return _plain(found) + (f" ({_bounds(found)})" if found.low is not None else "")


def _bounds(found: Estimate, form: str = ".3f") -> str:
    return "" if found.low is None or found.high is None else f"{found.low:{form}} to {found.high:{form}}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
