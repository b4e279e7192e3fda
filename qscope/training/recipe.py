"""Everything that defines the training of one sparse autoencoder."""

from dataclasses import dataclass

from qscope.errors import InputError

OBJECTIVES = ("topk", "batch_topk", "matryoshka", "jumprelu")
NORMALISATIONS = ("unit", "sqrt_d", "none")
SCALES = ("sample", "probes")
PENALTIES = ("target", "linear")
MAX_ROW = 256
"""Entries of one token that the selection kernels keep on a GPU (qscope.ops.topk_encode)."""


@dataclass(frozen=True)
class Recipe:
    """The training of one SAE. The defaults follow dictionary_learning's TopK trainer (Marks et al. 2024) and
    Gao et al. 2024 (arXiv 2406.04093), the two that Qwen-Scope cites; what Qwen-Scope itself discloses is TopK, AuxK
    with weight 1/32 and a filter of extreme norms, which belongs to the stream of activations.

    Raises InputError for a combination that cannot be trained.
    """

    d_sae: int
    """Number of features F."""
    k: int
    """Active features per token; the mean over tokens for batch_topk, the target of the penalty for jumprelu."""
    seed: int = 0
    """Of the random directions that the decoder starts from. Nothing else in the trainer is random."""
    encoder_scale: str = "sample"
    """Length of the encoder rows at the start, which are parallel to the decoder's: "sample" gives the least squared
    error on the sample; "probes" reconstructs random unit vectors with norm 1 on average (Gao et al. 2024), which on
    activations overshoots, because they are not spread over all directions alike."""
    objective: str = "topk"
    """"topk" (Gao et al. 2024); "batch_topk": the k N largest of a batch of N tokens (Bussmann et al. 2024, arXiv
    2412.06410); "matryoshka": TopK with nested prefix losses (Bussmann et al. 2025, arXiv 2503.17547; for their
    selection over the batch, give `prefixes` to batch_topk); "jumprelu": a learned threshold per feature
    (Rajamanoharan et al. 2024, arXiv 2407.14435)."""
    multi_topk: bool = False
    """With "topk": add 1/8 of the loss at 4 k (Gao et al. 2024, section 4.3), which makes the SAE good at other k."""
    prefixes: tuple[int, ...] | None = None
    """Ascending sizes of the nested dictionaries of "matryoshka" (and of batch_topk when given); d_sae is added as the
    last. None means d_sae / 16, / 8, / 4, / 2 and d_sae for "matryoshka". The loss is the mean over the sizes."""
    row_limit: int | None = None
    """Most active features of one token for batch_topk and jumprelu; None means 4 k for batch_topk and 256 for
    jumprelu, at most 256 and d_sae. Tokens that would need more are cut off there and counted (`overflow`)."""

    aux_weight: float = 1 / 32
    """Of the AuxK loss (Gao et al. 2024, section 4.2; Qwen-Scope), and a tenth of it of the pre-activation loss of dead
    features that are negative on a whole batch, which AuxK cannot reach (Conerly et al. 2025). 0 switches both off."""
    k_aux: int | None = None
    """Dead features that predict the error together; None means half the output width, as dictionary_learning, at most
    256."""
    dead_after_tokens: int = 10_000_000
    """Tokens without firing after which a feature counts as dead (Gao et al. 2024)."""
    dead_every: int = 8
    """Steps between two looks at which features are dead: on a GPU each one waits for the device."""

    lr: float | None = None
    """Peak learning rate of Adam; None means 2e-4 / sqrt(d_sae / 2^14), as dictionary_learning."""
    warmup_steps: int | None = None
    """Steps over which the rate rises linearly; None means 1000 (dictionary_learning), at most a twentieth of all."""
    decay: float = 0.2
    """Share of the steps, the last ones, over which the rate falls linearly to zero (dictionary_learning's runs)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam (both sources)."""
    momentum_steps: int = 5
    """Steps that a feature's rows go on moving by momentum after their last gradient. Dense Adam never stops: rare
    features then learn faster, but more fall silent at high rates. 0 is lazy Adam, which has neither. Measured
    (bench/bench_train.py's data): 5 recovers a planted dictionary as well as 20, which left 3 times as many features
    of real residuals silent."""
    eps: float = 6.25e-10
    """Of Adam (Gao et al. 2024, whose loss is divided by the variance like ours)."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient of all parameters together, the part parallel to decoder rows already removed
    (dictionary_learning); None does not clip."""
    ema: float | None = None
    """Decay per step of a running mean of the weights, which is what `to_sae` then gives (Gao et al. 2024: 0.999)."""
    normalize_activations: str = "unit"
    """Scale on the inputs, measured once on the sample about its geometric median: "unit" makes the mean norm 1
    (dictionary_learning, whose learning rate this is; Rajamanoharan et al. 2024), "sqrt_d" makes it sqrt(d_in)
    (SAELens, expected_average_only_in), "none" leaves the units. It decides how fast the biases learn beside the weight
    rows. Folded into the weights by `to_sae`."""
    precision: str | None = None
    """Of the forward pass: "exact" ranks float32 scores of float32 weights, "bf16" reads bfloat16 copies of inputs and
    weights. None means "bf16" on a GPU and "exact" on a CPU. Master weights, gradients and moments are float32."""

    threshold_beta: float = 0.99
    """Decay of the running mean of batch_topk's smallest active value, its threshold at inference (SAELens)."""
    bandwidth: float = 1e-3
    """Width of jumprelu's rectangle kernel, in units of the mean norm of the (centred) inputs (Rajamanoharan et al.
    2024, section 5.1, who normalise it to 1)."""
    l0_penalty: str = "target"
    """Of jumprelu: "target" is l0_weight (L0 / k - 1)^2 (dictionary_learning), "linear" is l0_weight L0
    (Rajamanoharan et al. 2024)."""
    l0_weight: float = 1.0
    """Weight of that penalty beside the fraction of variance unexplained. For "linear", 1e-3 is a place to start."""

    def __post_init__(self) -> None:
        _choice("objective", self.objective, OBJECTIVES)
        _choice("normalize_activations", self.normalize_activations, NORMALISATIONS)
        _choice("encoder_scale", self.encoder_scale, SCALES)
        _choice("l0_penalty", self.l0_penalty, PENALTIES)
        _choice("precision", self.precision, (None, "exact", "bf16"))
        self._check_sizes()
        self._check_numbers()

    def _check_sizes(self) -> None:
        _require(self.d_sae >= 1, "d_sae", self.d_sae, "at least 1")
        _require(1 <= self.k <= self.d_sae, "k", self.k, f"1 to d_sae={self.d_sae}")
        _require(self.k_aux is None or self.k_aux >= 1, "k_aux", self.k_aux, "at least 1, or None")
        _require(self.dead_every >= 1, "dead_every", self.dead_every, "at least 1")
        _require(self.momentum_steps >= 0, "momentum_steps", self.momentum_steps, "0 or more")
        _require(self.dead_after_tokens >= 1, "dead_after_tokens", self.dead_after_tokens, "at least 1")
        if self.multi_topk and self.objective != "topk":
            raise InputError(f"multi_topk was asked for with objective {self.objective!r}; it belongs to 'topk'.")
        if self.prefixes is not None:
            if self.objective not in ("matryoshka", "batch_topk"):
                accepted = "'matryoshka' and 'batch_topk' have prefixes"
                raise InputError(f"prefixes were given with objective {self.objective!r}; only {accepted}.")
            ascending = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
            right = bool(self.prefixes) and ascending and self.prefixes[-1] <= self.d_sae
            _require(right, "prefixes", self.prefixes, f"ascending sizes from 1 to d_sae={self.d_sae}")
        if self.row_limit is not None:
            right = self.k <= self.row_limit <= min(MAX_ROW, self.d_sae)
            _require(right, "row_limit", self.row_limit, f"k={self.k} to {min(MAX_ROW, self.d_sae)}, or None")
        if self.objective in ("batch_topk", "jumprelu"):
            _require(self.k <= MAX_ROW, "k", self.k, f"at most {MAX_ROW} for objective {self.objective!r}")

    def _check_numbers(self) -> None:
        for name in ("aux_weight", "l0_weight"):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), name, value, "0 or more")
        for name in ("lr", "eps", "grad_clip", "bandwidth"):
            value = getattr(self, name)
            _require(value is None or 0 < value < float("inf"), name, value, "above 0")
        for name in ("ema", "threshold_beta"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, name, value, "0 or more and below 1")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two of 0 <= b < 1")
        _require(0 <= self.decay <= 1, "decay", self.decay, "0 to 1, a share of the steps")
        warmup = self.warmup_steps
        _require(warmup is None or warmup >= 0, "warmup_steps", warmup, "0 or more, or None")

    @property
    def peak_lr(self) -> float:
        return 2e-4 / (self.d_sae / 2**14) ** 0.5 if self.lr is None else self.lr

    def warmup(self, total_steps: int) -> int:
        return min(1000, total_steps // 20) if self.warmup_steps is None else self.warmup_steps

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of step 1 to total_steps: warm-up, constant, linear decay that would reach 0 one step later."""
        rise = step / max(1, self.warmup(total_steps))
        fall = (total_steps + 1 - step) / (self.decay * total_steps + 1)
        return self.peak_lr * min(1.0, rise, fall)

    def auxiliary_k(self, d_out: int) -> int:
        return min(MAX_ROW, max(1, d_out // 2) if self.k_aux is None else self.k_aux)

    @property
    def nested(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries, the last one d_sae; one size where there is no nesting."""
        sizes = self.prefixes or ()
        if self.objective == "matryoshka" and self.prefixes is None:
            sizes = tuple(sorted({max(1, self.d_sae // part) for part in (16, 8, 4, 2)}))
        return (*(size for size in sizes if size < self.d_sae), self.d_sae)

    @property
    def width(self) -> int:
        """Entries per token that the selection returns."""
        if self.objective == "batch_topk":
            return min(MAX_ROW, self.d_sae, self.row_limit or 4 * self.k)
        if self.objective == "jumprelu":
            return min(MAX_ROW, self.d_sae, self.row_limit or MAX_ROW)
        return min(self.d_sae, 4 * self.k) if self.multi_topk else self.k


def _choice(name: str, value: str | None, accepted: tuple[str | None, ...]) -> None:
    if value not in accepted:
        raise InputError(f"{name}={value!r}; accepted are {', '.join(map(repr, accepted))}.")


def _require(right: bool, name: str, value: object, accepted: str) -> None:
    if not right:
        raise InputError(f"{name}={value}; accepted is {accepted}.")
