"""What `qscope steer find` prints."""

from collections.abc import Sequence

from qscope.finding.stability import Agreement, Interval
from qscope.report.evaluate_page import num, share, signed
from qscope.report.inspect_page import visible
from qscope.report.steer_find_page import write
from qscope.workflows.steer_find_result import LayerDiagnosis, LayerFound, SteerFindResult


def render(result: SteerFindResult) -> str:
    """A table per layer, then the choice; writes the page and the JSON if asked for."""
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    lines += [f"note: {note}" for note in result.notes]
    for name, found in result.layers.items():
        lines += ["", *_layer(name, found)]
    for name, case in result.diagnosis.items():
        lines += ["", *_case(name, case)]
    if result.targets:
        lines += ["", "target tokens: " + " ".join(repr(t) for t in result.targets)]
    lines += ["", f"chosen: layer {result.layer}, feature {', '.join(map(str, result.chosen))} ({result.reason})"]
    written = [result.spec_path] if result.spec_path else []
    return "\n".join(lines + [f"wrote {path}" for path in [*written, *map(str, write(result))]])


def interval(found: Interval, digits: int = 3) -> str:
    return f"{num(found.value, digits)} [{num(found.low, digits)}, {num(found.high, digits)}]"


def agreement(found: Agreement) -> str:
    return f"Jaccard of the top {interval(found.jaccard, 2)}, rank correlation {interval(found.rank_correlation, 2)}"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Right-aligned columns, but for the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(c.rjust(w) for c, w in zip(row[:-1], widths[:-1], strict=True)) + "  " + row[-1]
        for row in rows
    ]


def _layer(name: str, found: LayerFound) -> list[str]:
    counts = found.tokens
    lines = [
        f"layer {name}: {found.sae}; k = {found.k} of {found.d_sae:,} features; "
        f"{counts.kept:,} of {counts.tokens:,} tokens ({counts.extreme} attention sinks, {counts.nan} NaN left out); "
        f"residual norm {num(found.residual_norm, 1)}",
        f"  {found.ranked:,} features ranked, {found.significant:,} significant; top1 difference "
        f"{interval(found.top1.difference)}, largest in {share(found.top1.chosen)} of the replicates",
    ]
    for title, agreed in (("bootstrap", found.bootstrap), ("halves", found.halves), ("paraphrases", found.paraphrase)):
        lines += [f"  {title} ({agreed.pairs}): {agreement(agreed)}"] if agreed else []
    head = ("feature", "mean diff", "rate diff", "AUROC", "t", "q", "nu", "test AUROC", "output", "target", "q99", "")
    rows = [head]
    for f in found.features:
        rows.append(
            (
                str(f.feature),
                signed(f.mean_difference),
                signed(f.rate_difference),
                num(f.auroc, 3),
                num(f.t, 1),
                f"{f.q:.1e}",
                signed(f.nu),
                num(f.held_out.auroc if f.held_out else None, 3),
                num(f.output_score, 3),
                signed(f.target_change),
                num(f.scale, 2),
                ("dense  " if f.dense else "") + " ".join(visible(token).strip() for token in f.lens[:5]),
            )
        )
    return lines + table(rows)


def _case(name: str, found: LayerDiagnosis) -> list[str]:
    rows = [("feature", "z", "activation", "pool mean", "fires", "pool fires", "p", "q99", "")]
    for f in found.features:
        where = f.contexts[0] if f.contexts else None
        rows.append(
            (
                str(f.feature),
                num(f.z, 2),
                num(f.activation, 3),
                num(f.pool_mean, 3),
                share(f.firing),
                share(f.pool_rate),
                num(f.exceed, 3),
                num(f.scale, 2),
                ("dense  " if f.dense else "")
                + (visible(f"{where.before[-30:]}[{where.token}]{where.after[:15]}") if where else ""),
            )
        )
    return [f"layer {name}: {found.sae}; residual norm {num(found.residual_norm, 1)}", *table(rows)]
