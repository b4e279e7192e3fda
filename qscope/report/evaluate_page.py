"""One page about the quality of SAEs, and the same figures as JSON: single files, no network, no script."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

from qscope._version import __version__
from qscope.evaluation.dictionary import DecoderCosines, Stability
from qscope.evaluation.exactness import Exactness
from qscope.evaluation.fidelity import BINS, LOG10_START, LOG10_STEP, Fit
from qscope.evaluation.splice import SpliceLoss
from qscope.report import evaluate_svg as svg
from qscope.report.evaluate_formulas import FORMULAS
from qscope.report.inspect_page import visible
from qscope.report.page_file import fill, write_whole
from qscope.workflows.evaluate import EvaluateResult, LayerResult
from qscope.workflows.evaluate_pass import TokenCounts


def write_files(result: EvaluateResult) -> list[Path]:
    """Write the page and the JSON where the config asked for them, each whole or not at all; their paths.

    Also what `qscope evaluate --json` calls.
    """
    from qscope.cli import to_json

    written = []
    if result.html is not None:
        written.append(write_whole(result.html, page(result), "Choose another --html path."))
    if result.out is not None:
        text = json.dumps(to_json(result), indent=1, allow_nan=False) + "\n"
        written.append(write_whole(result.out, text, "Choose another --out path."))
    return written


def page(result: EvaluateResult) -> str:
    """The page as HTML."""
    return fill("evaluate_page.html", _body(result))


def _body(result: EvaluateResult) -> str:
    about = " · ".join(f"{name} {value}" for name, value in result.about.items())
    sections = [_suite(result.layers)] if len(result.layers) > 1 else []
    sections += [_layer(name, found) for name, found in result.layers.items()]
    formulas = "".join(f"<dt>{_safe(name)}</dt><dd>{_safe(text)}</dd>" for name, text in FORMULAS.items())
    return (
        f'<header><h1><i class="mark"></i>SAE evaluation <span>{_safe(result.model)}</span></h1>'
        f'<p class="soft">{_safe(about)}</p></header>{"".join(sections)}'
        f'<section><h2>Formulas</h2><dl class="formulas">{formulas}</dl></section>'
        f"<footer>Made by qscope {__version__}.</footer>"
    )


# --- a suite ---------------------------------------------------------------------------------------------


def _suite(layers: dict[str, LayerResult]) -> str:
    head = ("layer", "SAE", "FVU", "PCA's FVU", "cosine", "L0", "dead", "dense", "CE increase", "loss recovered", "KL")
    rows = []
    for name, found in layers.items():
        fit, loss = found.ordinary, found.splice_ordinary
        if fit is None:
            continue
        figures = [num(fit.fvu), num(fit.pca_fvu), num(fit.cosine), num(fit.l0, 1)]
        figures += [share(fit.densities.dead_share), share(fit.densities.dense_share)]
        figures += [signed(loss.ce_increase), num(loss.loss_recovered), num(loss.kl_sae)] if loss else ["–"] * 3
        rows.append((name, found.sae, *figures))
    fits = [found.ordinary for found in layers.values()]
    losses = [found.splice_ordinary for found in layers.values()]
    fvu = svg.lines(
        list(layers),
        [
            ("PCA", [fit.pca_fvu if fit else None for fit in fits], "quiet"),
            ("SAE", [fit.fvu if fit else None for fit in fits], ""),
        ],
        "FVU per layer",
    )
    increase = svg.lines(
        list(layers), [("", [loss.ce_increase if loss else None for loss in losses], "")], "CE increase per layer"
    )
    pictures = _panel("FVU of ordinary tokens", fvu) + _panel("Increase of the cross-entropy, nats", increase)
    table = _panel("All layers, ordinary tokens", _table(head, rows), wide=True)
    return f'<section><h2>Suite</h2><div class="panels">{table}{pictures}</div></section>'


# --- one layer -------------------------------------------------------------------------------------------


def _layer(name: str, found: LayerResult) -> str:
    left, right = [], []
    if found.ordinary and found.all:
        left.append(_fits(found.ordinary, found.all))
        right.append(_densities(found.ordinary, found.d_sae))
    if found.decoder:
        right.append(_decoder(found.decoder))
    if found.splice_ordinary and found.splice_all:
        left.append(_splice_table(found.splice_ordinary, found.splice_all))
        right.append(_splice_bars(found.splice_ordinary))
    if found.exactness:
        (right if found.decoder else left).append(_exactness(found.exactness))
    if found.stability:
        left.append(_stability(found.stability))
    columns = "".join(f'<div class="column">{"".join(panels)}</div>' for panels in (left, right))
    mismatch = f'<p class="soft">Made for something else: {_safe(found.mismatch)}</p>' if found.mismatch else ""
    counts = f'<p class="soft">{_counts(found.tokens)}</p>' if found.tokens else ""
    return (
        f'<section id="layer-{_safe(name)}"><h2>Layer {_safe(name)}</h2><p class="soft">{_safe(found.sae)} · width '
        f"{found.d_in:,} · {found.d_sae:,} features · k = {found.k}</p>{mismatch}{counts}{_facts(found)}"
        f'<div class="panels">{columns}</div></section>'
    )


def _counts(counts: TokenCounts) -> str:
    return (
        f"{counts.measured:,} tokens measured, {counts.ordinary:,} of them ordinary; {counts.sinks:,} attention sinks "
        f"and {counts.first:,} first tokens of a context ({counts.first_sinks:,} both), which carry "
        f"{share(counts.set_aside_variance)} of the variance of all; {counts.nan_rows:,} NaN left out. Mean and PCA "
        f"fitted on {counts.fitted:,} other tokens ({counts.fitted_ordinary:,} ordinary), median norm "
        f"{num(counts.norm_median, 1)}."
    )


def _facts(found: LayerResult) -> str:
    fit, loss, facts = found.ordinary, found.splice_ordinary, []
    if fit:
        facts += [("FVU", num(fit.fvu), f"PCA of rank {found.k}: {num(fit.pca_fvu)}")]
    if loss:
        facts += [
            ("Loss recovered", num(loss.loss_recovered), "against zero ablation"),
            ("Cross-entropy", signed(loss.ce_increase), f"± {num(loss.ce_increase_error)} nats"),
        ]
    if fit:
        facts += [
            ("L0", num(fit.l0, 1), "active per token"),
            ("Dead", share(fit.densities.dead_share), f"on {fit.tokens:,} tokens"),
            ("Dense", share(fit.densities.dense_share), "fire on > 10 %"),
        ]
    if found.stability:
        facts += [("Matched", share(found.stability.matched_share), "of features at cosine ≥ 0.7")]
    inner = "".join(f'<div><dt>{a}</dt><dd>{b}</dd><dd class="note">{c}</dd></div>' for a, b, c in facts)
    return f'<dl class="facts">{inner}</dl>'


def _fits(ordinary: Fit, every: Fit) -> str:
    rows = [("tokens", *(f"{fit.tokens:,}" for fit in (ordinary, every)))]
    names = {
        "FVU": "fvu",
        "explained variance": "explained_variance",
        "variance explained about the error's mean": "frac_variance_explained",
        "FVU of the rank-k PCA": "pca_fvu",
        "MSE": "mse",
        "cosine": "cosine",
        "L0": "l0",
        "norm ratio": "norm_ratio",
        "reconstruction bias": "relative_reconstruction_bias",
        "best scale": "scale",
        "best scale about the mean": "scale_about_mean",
    }
    rows += [(name, *(num(getattr(fit, field)) for fit in (ordinary, every))) for name, field in names.items()]
    for name, field in {"dead": "dead_share", "dense": "dense_share"}.items():
        rows.append((name, *(share(getattr(fit.densities, field)) for fit in (ordinary, every))))
    return _panel("Reconstruction", _table(("", "ordinary tokens", "all tokens"), rows))


def _densities(fit: Fit, d_sae: int) -> str:
    found = fit.densities
    rarest = next((i for i, count in enumerate(found.histogram) if count), BINS)
    start = min(int(rarest * LOG10_STEP), 3)  # whole decades of empty bins are cut off
    counts = found.histogram[int(start / LOG10_STEP) :]
    decades = range(start, int(BINS * LOG10_STEP) + 1)
    ticks = [((d - start) / LOG10_STEP, f"10{_superscript(int(LOG10_START) + d)}") for d in decades]
    picture = svg.histogram(counts, ticks, "Histogram of log10 of the feature density")
    return _panel(
        "Feature density, ordinary tokens",
        picture,
        f"{found.alive:,} of {d_sae:,} features fired; {d_sae - found.alive:,} did not. Half of those that did fire on "
        f"fewer than {num(None if found.median is None else 100 * found.median)} % of {fit.tokens:,} tokens.",
    )


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _splice_table(ordinary: SpliceLoss, every: SpliceLoss) -> str:
    both = (ordinary, every)
    rows = [("predictions", *(f"{loss.tokens:,}" for loss in both))]
    rows.append(("tokens replaced", *(f"{loss.replaced:,}" for loss in both)))
    rows.append(("predictions left out, not finite", *(f"{loss.left_out:,}" for loss in both)))
    rows.append(("CE increase", *(f"{signed(loss.ce_increase)} ± {num(loss.ce_increase_error)}" for loss in both)))
    names = {
        "loss recovered, of zero ablation": "loss_recovered",
        "loss recovered, of mean ablation": "loss_recovered_mean",
        "PCA: loss recovered, of zero ablation": "loss_recovered_pca",
        "KL recovered, of zero ablation": "kl_recovered",
        "KL, SAE": "kl_sae",
        "KL, PCA": "kl_pca",
        "KL, mean": "kl_mean",
        "KL, zero": "kl_zero",
    }
    rows += [(name, *(num(getattr(loss, field)) for loss in both)) for name, field in names.items()]
    head = ("", "ordinary tokens replaced", "all replaced")
    return _panel("The model with the reconstruction spliced in", _table(head, rows))


def _splice_bars(loss: SpliceLoss) -> str:
    rows = [
        (name, value, num(value), kind)
        for name, value, kind in (
            ("untouched", loss.ce_clean, "quiet"),
            ("SAE", loss.ce_sae, "main"),
            ("PCA", loss.ce_pca, ""),
            ("mean", loss.ce_mean, ""),
            ("zero", loss.ce_zero, ""),
        )
    ]
    caption = "Residuals of ordinary tokens replaced; sinks and first tokens as they were."
    return _panel("Cross-entropy of the next token, nats", svg.bars(rows, "Cross-entropy per replacement"), caption)


_COSINE_TICKS = [(0.0, "0"), (5.0, "0.25"), (10.0, "0.5"), (15.0, "0.75"), (20.0, "1")]


def _decoder(found: DecoderCosines) -> str:
    return _panel(
        "Largest cosine of each decoder row to another",
        svg.histogram(found.histogram, _COSINE_TICKS, "Histogram of the largest decoder cosines"),
        f"Mean {num(found.mean)}, median {num(found.median)}, largest {num(found.largest)}; above 0.9: "
        f"{share(found.above_09)}. Row norms {num(found.norm_smallest)} to {num(found.norm_largest)}; mean cosine of "
        f"encoder and decoder row {num(found.encoder_cosine)}.",
    )


def _exactness(found: Exactness) -> str:
    rows = [
        ("recall, exact", f"{found.recall_exact:.6f}"),
        ("recall, bf16", f"{found.recall_bf16:.6f}"),
        ("wrong values, exact", f"{found.wrong_values:,}"),
        ("features scored exactly per token, mean", num(found.candidates_mean, 1)),
        ("features scored exactly per token, most", f"{found.candidates_max:,}"),
        ("tokens scored in full", f"{found.full_rows:,}"),
        ("smallest proven margin", "–" if found.smallest_margin is None else f"{found.smallest_margin:.3g}"),
        ("tokens left out (NaN)", f"{found.nan_rows:,}"),
    ]
    title = f"Features against float64 scores, {found.tokens:,} tokens"
    return _panel(title, _table(("", "share or count"), rows))


def _stability(found: Stability) -> str:
    picture = svg.histogram(found.histogram, _COSINE_TICKS, "Histogram of the cosines of matched features")
    rows = [
        ("mean cosine of the pairs, decoder", num(found.matched_cosine)),
        ("mean cosine of the pairs, encoder", num(found.matched_encoder_cosine)),
        ("features matched at 0.7 or more", share(found.matched_share)),
        ("mean max cosine", num(found.mean_max_cosine)),
        ("mean max cosine, reverse", num(found.mean_max_cosine_reverse)),
    ]
    caption = (
        f"Against {found.against}: {found.matched:,} pairs of {found.features:,} and {found.other_features:,} features"
        f", {found.matching} matching. The bars count pairs by decoder cosine."
    )
    return _panel("Stability between two SAEs", picture + _table(("", ""), rows), caption)


# --- pieces ----------------------------------------------------------------------------------------------


def _panel(title: str, inside: str, caption: str = "", wide: bool = False) -> str:
    foot = f'<p class="caption">{_safe(caption)}</p>' if caption else ""
    kind = "panel wide" if wide else "panel"
    return f'<figure class="{kind}"><h3>{_safe(title)}</h3>{inside}{foot}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return html.escape(visible(text))


def num(value: float | None, digits: int = 4) -> str:
    """With `digits` places, fewer (but one) as the number grows, more where it would look like 0; – for None."""
    if value is None:
        return "–"
    if value and abs(value) < 10.0**-digits:
        return f"{value:.2g}"
    places = 0 if abs(value) >= 10000 else max(1, digits + 1 - len(str(int(abs(value)))))
    return f"{value:,.{places}f}"


def signed(value: float | None) -> str:
    """`num` with a + before what is above 0."""
    return f"{'+' if value is not None and value > 0 else ''}{num(value)}"


def share(value: float) -> str:
    return f"{100 * value:.2g} %" if 0 < value < 0.1 else f"{100 * value:.1f} %"
