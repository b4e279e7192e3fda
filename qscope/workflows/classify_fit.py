"""Labelled texts to a rule of a few features: which, of which layer, with which thresholds.

Test texts are set aside by a hash before the model runs, and nothing here reads them. Formulas and sources:
docs/classify.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qscope.classification import make_split
from qscope.classification.fitting import COUNTS, FitMetric, FitSettings
from qscope.errors import InputError
from qscope.finding.pooled import Pooling
from qscope.workflows.classify_fit_result import ClassifyFitResult
from qscope.workflows.classify_fit_rule import Fitting, fitted
from qscope.workflows.classify_inputs import read_labelled
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import load_encoder
from qscope.workflows.text_features import Truncate, read_features, tokenize_texts


@dataclass(frozen=True)
class ClassifyFitConfig:
    """Fit a rule that classifies text by a few SAE features: a text is positive if one of them fires strongly enough.

    Example: qscope classify fit comments.csv --label-field toxic --positive 1 --rule toxic.json --html toxic.html
    """

    texts: tuple[str, ...]
    """Files of labelled texts: .jsonl, .jsonl.gz, .csv or .parquet."""
    text_field: str = "text"
    """Field that holds the text, or a template such as "{title} {body}"."""
    label_field: str = "label"
    """Field that holds the label."""
    group_field: str | None = None
    """Field that holds a group, such as a language: every part of the split gets its share of each."""
    positive: str | None = None
    """Label that is looked for; with more than two labels, that one against all others."""
    multiclass: bool = False
    """Every label is a class: one rule for each against all others."""
    drop_duplicates: bool = False
    """Of rows with the same text, use the first."""
    max_texts: int | None = None
    """Use at most so many texts, drawn by a hash."""
    calibration: float = 0.2
    """Share of the texts that set thresholds and the number of features."""
    test: float = 0.2
    """Share of the texts that are set aside, for qscope classify evaluate."""
    seed: int = 0
    """Of the split and of --max-texts."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer. Default: the embedded."""
    layers: tuple[int, ...] = ()
    """Decoder blocks, from 0; all in one run of the model. Default: the layer that the SAE was made for."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    metric: FitMetric = "rate"
    """What ranks features: rate (difference of firing rates), auroc, log_odds (with a false discovery rate) or mean."""
    counts: tuple[int, ...] = COUNTS
    """Numbers of features K to try."""
    count: int | None = None
    """The rule's K. Default: the one with the highest F1 on the calibration texts, the smallest of equals."""
    layer: int | None = None
    """The rule's layer. Default: that of the largest top1 difference on the training texts."""
    multi_layer: int | None = None
    """Instead: one feature each of so many layers, the best by top1 difference."""
    max_fpr: float | None = None
    """Calibrate thresholds to at most this false-positive rate on the calibration texts. Default: thresholds 0."""
    pooling: Pooling = "any"
    """A text's activation: the largest over its tokens (any), their mean, or that of the last token."""
    membership: Literal["topk", "preact"] = "topk"
    """topk: as the SAE defines it. preact: pre-activations, of which serving computes only the rule's own rows; needs
    --max-fpr."""
    min_texts: int = 3
    """Training texts in which a feature must fire."""
    fdr: float = 0.05
    """False discovery rate of --metric log_odds."""
    sensitivity: bool = True
    """Also what other numbers of features, thresholds, poolings and layers give; without test texts."""
    context_size: int = 256
    """Tokens read of each text."""
    truncate: Truncate = "right"
    """Which end of a longer text is cut off."""
    bos: bool = False
    """Put the tokenizer's BOS token before every text."""
    precision: Literal["exact", "bf16"] = "exact"
    """Of the features."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    batch_tokens: int | None = None
    """Tokens per forward pass, padding included. Default: 1024 on a CPU, 8192 on a GPU."""
    allow_mismatch: bool = False
    """Go on although an SAE was made for another model or layer."""
    cache: Path | None = None
    """Folder to keep features in while they are made: a killed run, or one with other options, finds them."""
    rule: Path = Path("rule.json")
    """The rule is written to this file, and beside it NAME.split.jsonl, which says what part each text was in."""
    html: Path | None = None
    """Write a page to look at in a browser: one file, no network."""
    out: Path | None = None
    """Write everything to this file as JSON."""

    def __post_init__(self) -> None:
        least = {"max_texts": 4, "count": 1, "multi_layer": 1, "min_texts": 1, "context_size": 2, "batch_tokens": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}.")
        if not (self.calibration > 0 and self.test >= 0 and self.calibration + self.test < 1):
            raise InputError(
                f"--calibration is {self.calibration} and --test {self.test}; the first must be above 0, the second at "
                "least 0, and both together below 1: the rest is for training."
            )
        if self.membership == "preact" and self.max_fpr is None:
            raise InputError(
                "--membership preact was given without --max-fpr. Pre-activations are above 0 at a good part of all "
                "tokens, so a threshold of 0 means little; give the rate to hold, such as --max-fpr 0.05."
            )
        if self.multi_layer is not None and (self.multiclass or self.layer is not None or self.count is not None):
            raise InputError(
                "--multi-layer takes one feature of each layer; leave --multiclass, --layer and --count out."
            )
        self.settings()

    def settings(self) -> FitSettings:
        """Of fitting on TopK codes, which rank the features whatever the membership of the rule."""
        counts = self.counts if self.count is None or self.count in self.counts else (*self.counts, self.count)
        return FitSettings(
            metric=self.metric, counts=counts, target=self.max_fpr, pooling=self.pooling, min_texts=self.min_texts,
            fdr=self.fdr,
        )  # fmt: skip


def run(config: ClassifyFitConfig) -> ClassifyFitResult:
    """Fit a rule and write it. Raises QscopeError for what a user can mend."""
    data = read_labelled(
        config.texts, config.text_field, config.label_field, config.group_field, config.positive, config.multiclass,
        config.drop_duplicates, config.max_texts, config.seed,
    )  # fmt: skip
    shares = (1 - config.calibration - config.test, config.calibration, config.test)
    split = make_split(data.texts, data.label, data.group, shares, config.seed, data.names)
    encoder = load_encoder(
        EncodeConfig(
            text=(), model=config.model, sae=config.sae, layers=config.layers, k=config.k,
            context_size=config.context_size, bos=config.bos, precision=config.precision, dtype=config.dtype,
            device=config.device, batch_tokens=config.batch_tokens, allow_mismatch=config.allow_mismatch,
        )
    )  # fmt: skip
    seen = (split.train | split.calibration).nonzero()[0]  # the only texts that the model reads
    texts = tokenize_texts(
        encoder.tokenizer, [data.texts[i] for i in seen.tolist()], config.context_size, config.truncate
    )
    features = read_features(encoder, texts, config.cache, label="fit")
    return fitted(Fitting(config, encoder, data, split, seen, texts, features))
