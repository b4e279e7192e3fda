"""What `qscope evaluate` prints."""

from qscope.evaluation.dictionary import Stability
from qscope.evaluation.exactness import Exactness
from qscope.evaluation.fidelity import Fit
from qscope.evaluation.splice import SpliceLoss
from qscope.report.evaluate_page import num, share, signed, write_files
from qscope.workflows.evaluate import EvaluateResult, LayerResult


def render(result: EvaluateResult) -> str:
    """A paragraph per layer, after a table where there are several; writes the page and the JSON if asked for."""
    lines = [f"{result.model}: " + ", ".join(f"{name} {value}" for name, value in result.about.items())]
    measured = [(name, found) for name, found in result.layers.items() if found.ordinary]
    if len(measured) > 1:
        lines += ["", *_table(measured)]
    for name, found in result.layers.items():
        lines += ["", *_layer(name, found)]
    lines += [f"wrote {path}" for path in write_files(result)]
    return "\n".join(lines)


def _table(layers: list[tuple[str, LayerResult]]) -> list[str]:
    rows = [("layer", "FVU", "PCA", "L0", "dead", "dense", "CE change", "recovered")]
    for name, found in layers:
        fit, loss = found.ordinary, found.splice_ordinary
        assert fit is not None
        rows.append(
            (
                name,
                num(fit.fvu),
                num(fit.pca_fvu),
                num(fit.l0, 1),
                share(fit.densities.dead_share),
                share(fit.densities.dense_share),
                signed(loss.ce_increase if loss else None),
                num(loss.loss_recovered if loss else None),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _layer(name: str, found: LayerResult) -> list[str]:
    lines = [f"layer {name}: {found.sae}; k = {found.k} of {found.d_sae:,} features"]
    if found.mismatch:
        lines.append(f"  made for something else: {found.mismatch}")
    counts = found.tokens
    if counts is not None:
        lines.append(
            f"  {counts.measured:,} tokens: {counts.ordinary:,} ordinary, {counts.sinks:,} attention sinks, "
            f"{counts.first:,} first of a context ({counts.first_sinks:,} both); these carry "
            f"{share(counts.set_aside_variance)} of the variance; {counts.nan_rows:,} NaN left out"
        )
    if found.ordinary and found.all:
        lines += _fit("ordinary tokens", found.ordinary) + _fit("all tokens", found.all)
    for title, loss in (("ordinary tokens", found.splice_ordinary), ("all tokens", found.splice_all)):
        lines += _splice(title, loss) if loss else []
    if found.decoder:
        lines.append(
            f"  largest cosine of a decoder row to another: mean {found.decoder.mean:.3f}, most "
            f"{found.decoder.largest:.3f}, above 0.9: {share(found.decoder.above_09)} of the features"
        )
    lines += _stability(found.stability) if found.stability else []
    return lines + (_exactness(found.exactness) if found.exactness else [])


def _fit(title: str, fit: Fit) -> list[str]:
    rare = fit.densities
    return [
        f"  {title}: FVU {num(fit.fvu)} (explained variance {num(fit.explained_variance)}; PCA of rank k "
        f"{num(fit.pca_fvu)}), MSE {num(fit.mse)}, cosine {num(fit.cosine)}, L0 {num(fit.l0, 1)}",
        f"    dead {share(rare.dead_share)}, dense {share(rare.dense_share)} on {fit.tokens:,} tokens; norm ratio "
        f"{num(fit.norm_ratio)}, best scale {num(fit.scale)} (about the mean {num(fit.scale_about_mean)})",
    ]


def _splice(title: str, loss: SpliceLoss) -> list[str]:
    return [
        f"  spliced in at {title}: CE {num(loss.ce_clean)} -> {num(loss.ce_sae)} "
        f"({signed(loss.ce_increase)} ± {num(loss.ce_increase_error)}; PCA {num(loss.ce_pca)}, mean "
        f"{num(loss.ce_mean)}, zero {num(loss.ce_zero)}), KL {num(loss.kl_sae)}, {loss.tokens:,} predictions",
        f"    loss recovered {num(loss.loss_recovered)} of zero ablation, {num(loss.loss_recovered_mean)} of mean; "
        f"PCA {num(loss.loss_recovered_pca)} of zero",
    ]


def _stability(found: Stability) -> list[str]:
    return [
        f"  against {found.against} ({found.other_features:,} features), {found.matching} matching: mean cosine "
        f"{found.matched_cosine:.3f}, {share(found.matched_share)} at 0.7 or more; mean max cosine "
        f"{found.mean_max_cosine:.3f}, reverse {found.mean_max_cosine_reverse:.3f}"
    ]


def _exactness(found: Exactness) -> list[str]:
    margin = "every feature was scored" if found.smallest_margin is None else f"{found.smallest_margin:.3g}"
    left_out = f", {found.nan_rows} of them with NaN scores left out" if found.nan_rows else ""
    return [
        f"  {found.tokens:,} tokens{left_out} against float64 scores of all features (ties in float32 count as right):",
        f"    recall  exact {found.recall_exact:.6f}   bf16 {found.recall_bf16:.6f}",
        f"    values of exact off by more than one float32 unit: {found.wrong_values}",
        f"    features scored exactly per token: mean {found.candidates_mean:.1f}, most {found.candidates_max:,}"
        f"; tokens scored in full: {found.full_rows}",
        f"    smallest proven margin to a feature that was not: {margin}",
    ]
