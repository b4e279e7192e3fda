"""The formula of every figure on the evaluation page, in one line each."""

FORMULAS = {
    "Ordinary tokens": "all but attention sinks (norm above 10 times the median of the fitted tokens) and the first "
    "token of every context; NaN rows are counted and left out everywhere",
    "FVU": "Σ‖x − x̂‖² / Σ‖x − x̄‖², x̄ the mean of the tokens measured; explained variance = 1 − FVU",
    "Variance explained about the error's mean": "1 − Σ‖e − ē‖² / Σ‖x − x̄‖², e = x − x̂ (dictionary_learning's "
    "frac_variance_explained): a constant error costs nothing",
    "MSE": "Σ‖x − x̂‖² / (n D)",
    "Cosine": "mean of x·x̂ / (‖x‖ ‖x̂‖)",
    "L0": "mean number of features above 0 per token",
    "PCA": "x̂ = m + UᵀU(x − m), U the k leading principal directions, k that of the SAE; m and U from other tokens",
    "Dead, dense": "features that fired on no token measured; on more than 10 % of them (shares of d_sae)",
    "Density": "tokens on which a feature is above 0 / tokens; bins of log₁₀ of width 0.25",
    "Norm ratio": "mean of ‖x̂‖ / ‖x‖; below 1: shrinkage",
    "Reconstruction bias": "Σ‖x̂‖² / Σ x·x̂ (arXiv 2404.16014, eq. 10); below 1: shrinkage",
    "Best scale": "the s that minimises Σ‖x − s x̂‖² = Σ x·x̂ / Σ‖x̂‖²; about the mean: with x − x̄ and x̂ − x̄",
    "Cross-entropy": "mean of −log p(next token), in nats, with the block's output replaced by x̂, 0, a mean or the PCA",
    "Increase": "CE(SAE) − CE(clean), ± its standard error over predictions, taken as independent",
    "KL": "mean of Σᵥ p(v) log(p(v) / q(v)), p of the clean model, q of the spliced one",
    "Loss recovered": "(CE(ablated) − CE(SAE)) / (CE(ablated) − CE(clean)), ablated: zero or mean",
    "Decoder cosine": "for each feature the largest cos(W_dec[f], W_dec[g]) over g ≠ f",
    "Recall": "share of a token's k features whose float64 score, rounded to float32, is at least the k-th largest",
    "Matched cosine": "mean cos(W_dec[f], W′_dec[m(f)]), m one to one: greedy takes the largest cosine of free rows "
    "first, hungarian the largest sum",
    "Mean max cosine": "mean over f of the largest cos(W_dec[f], W′_dec[g]) over all g",
}
