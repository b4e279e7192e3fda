"""What `qscope evaluate` prints."""

from qscope.workflows.evaluate import EvaluateResult, Exactness


def render(result: EvaluateResult) -> str:
    """One paragraph per layer."""
    return "\n\n".join(_layer(result.model, layer, found) for layer, found in result.layers.items())


def _layer(model: str, layer: str, found: Exactness) -> str:
    margin = "every feature was scored" if found.smallest_margin is None else f"{found.smallest_margin:.3g}"
    left_out = f", {found.nan_rows} of them with NaN scores left out" if found.nan_rows else ""
    return "\n".join(
        [
            f"{model}, layer {layer}: {found.tokens:,} tokens{left_out}; k = {found.k} of {found.d_sae:,} features",
            "  against float64 scores of all features (ties in float32 count as right):",
            f"    recall  exact {found.recall_exact:.6f}   bf16 {found.recall_bf16:.6f}",
            f"    values of exact off by more than one float32 unit: {found.wrong_values}",
            f"  features scored exactly per token: mean {found.candidates_mean:.1f}, most {found.candidates_max:,}"
            f"; tokens scored in full: {found.full_rows}",
            f"  smallest proven margin to a feature that was not: {margin}",
        ]
    )
