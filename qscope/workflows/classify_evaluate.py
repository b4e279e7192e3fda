"""A rule of a few features beside every baseline on the same texts. Formulas: docs/classify-evaluate.md."""

import csv
import dataclasses
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from qscope.classification import Split, make_split, save_rule
from qscope.classification.fitting import COUNTS, FitMetric, FitSettings
from qscope.classification.methods import Problem, Threshold, sklearn
from qscope.classification.metrics import BINARY, SEVERAL
from qscope.classification.rule import Rule
from qscope.errors import InputError
from qscope.files import claim_folder, write_file
from qscope.finding.pooled import Pooling
from qscope.workflows import classify_split
from qscope.workflows.classify_evaluate_compare import STUDIES, Clock, Wanted, compare
from qscope.workflows.classify_evaluate_methods import BASELINES, Data
from qscope.workflows.classify_evaluate_result import ClassifyEvaluateResult, plain, table
from qscope.workflows.classify_evaluate_rule import named_rule, read_rule
from qscope.workflows.classify_inputs import Labelled, read_labelled, text_hash
from qscope.workflows.classify_read import train_limits
from qscope.workflows.classify_rules import ModelOptions, encoder_for, known_dtype, known_precision, source_of
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, load_encoder
from qscope.workflows.text_features import TextFeatures, TokenTexts, Truncate, read_features, tokenize_texts

MANIFEST = "options.json"
_TEMPORARY = re.compile(r"\.tmp-.*|\..*\.part")


@dataclass(frozen=True)
class ClassifyEvaluateConfig:
    """Measure a rule of SAE features beside probes, bags of words and chance, on the same texts.

    Example: qscope classify evaluate comments.jsonl --positive toxic --group-field language --out toxic-eval
    """

    texts: tuple[str, ...]
    """Files with labelled texts: .jsonl, .jsonl.gz, .csv, .parquet."""
    rule: Path | None = None
    """A rule that `qscope classify fit` wrote. Default: rules are fitted here, on the training texts."""
    out: Path = Path("classify-evaluate")
    """Folder for everything: evaluate.html, evaluate.json, evaluate.csv, rule.json, and what was read of the texts."""
    text_field: str = "text"
    """Field that holds the text, or a template: "{title} {body}"."""
    label_field: str = "label"
    """Field that holds the class."""
    group_field: str | None = None
    """Field that holds a language, a source and so on: figures of each, and transfer between them."""
    positive: str | None = None
    """The label that the rule looks for; all others are negative."""
    multiclass: bool = False
    """Every label is a class."""
    drop_duplicates: bool = False
    """Of rows with the same text only the first counts."""
    max_texts: int | None = None
    """Draw so many texts, by a hash."""
    calibration: float = 0.2
    """Share of the texts that set thresholds, the number of features, and the layers of baselines."""
    test: float = 0.2
    """Share of the texts that are looked at in the end."""
    seed: int = 0
    """Of the split, cross-validation, replicates and draws."""
    counts: tuple[int, ...] = COUNTS
    """Numbers of features K of a rule. The one with the best F1 on calibration texts is the headline rule."""
    multi_layer: int = 3
    """Layers of the multi-layer rule, one feature each; 1: no such rule."""
    metric: FitMetric = "rate"
    """What ranks features: rate (difference of firing rates), auroc, log_odds or mean (difference of activations)."""
    pooling: Pooling = "any"
    """A text's activation: the largest over its tokens (any), their mean, or that of the last token."""
    max_fpr: float | None = None
    """Calibrate thresholds to this false-positive rate on calibration texts. Default: threshold 0, and baselines are
    cut where F1 is highest."""
    skip: tuple[str, ...] = ()
    """Studies (efficiency, transfer, stability, sensitivity) or baselines by name that are left out."""
    replicates: int = 1000
    """Of the test texts, for intervals."""
    train_shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5, 1.0)
    """Of the training texts, for the data-efficiency curve."""
    train_draws: int = 3
    """Draws of each share below 1."""
    choice_replicates: int = 50
    """Of the training texts, for the stability of the features."""
    draws: int = 5
    """Rules of random features."""
    preact: bool = False
    """Also the headline rule on pre-activations, whatever the K largest are: the model reads the texts once more."""
    min_texts: int = 3
    """Features that fire in fewer training texts are not ranked or drawn."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: that of the rule, or the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer. Default: that of the rule, or
    the embedded."""
    layers: tuple[int, ...] = ()
    """Decoder blocks, from 0; all in one run of the model. Default: those of the rule, or the layer of the SAE."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    context_size: int = 256
    """Tokens read of each text; those of --rule, where one is given."""
    truncate: Truncate = "right"
    """Side on which longer texts are cut."""
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
    """Go on although the SAE was made for another model or layer."""

    def __post_init__(self) -> None:
        least = {
            "multi_layer": 1, "replicates": 0, "train_draws": 1, "choice_replicates": 0, "draws": 0, "min_texts": 1,
            "context_size": 2,
        }  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}.")
        if not self.counts or min(self.counts) < 1:
            raise InputError(f"--counts {' '.join(map(str, self.counts))}: numbers of at least 1 are accepted.")
        if self.max_fpr is not None and not 0 < self.max_fpr < 1:
            raise InputError(f"--max-fpr is {self.max_fpr}; a rate above 0 and below 1 is accepted.")
        if not (self.calibration > 0 and self.test > 0 and self.calibration + self.test < 1):
            raise InputError(
                f"--calibration is {self.calibration} and --test {self.test}; both must be above 0, and below 1 "
                "together: the rest is for training."
            )
        if not self.train_shares or any(not 0 < share <= 1 for share in self.train_shares):
            raise InputError(f"--train-shares are above 0 and at most 1; given: {self.train_shares}.")
        unknown = [name for name in self.skip if name not in (*STUDIES, *BASELINES)]
        if unknown:
            raise InputError(f"--skip {unknown[0]!r}: accepted are {', '.join((*STUDIES, *BASELINES))}.")


def run(config: ClassifyEvaluateConfig) -> ClassifyEvaluateResult:
    """Fit, compare, write evaluate.json, evaluate.csv and rule.json. Raises QscopeError for what a user can mend."""
    sklearn("linear_model")  # refused before the model runs
    labelled = read_labelled(
        config.texts, config.text_field, config.label_field, config.group_field, config.positive, config.multiclass,
        config.drop_duplicates, config.max_texts, config.seed,
    )  # fmt: skip
    given, notes = (None, []) if config.rule is None else read_rule(config.rule, labelled)
    split, more = _split(config, labelled)
    _claim(config)
    clock = Clock()
    encoder = _encoder(config, given)
    context, truncate = (config.context_size, config.truncate)
    if given is not None:
        context, truncate = given.source.context_size, given.source.truncate
    with clock("reading"):
        tokens = tokenize_texts(encoder.tokenizer, labelled.texts, context, truncate)
        features = read_features(encoder, tokens, config.out / "texts", keep_residuals=True, label="evaluate")
    data = Data(labelled, features, _problem(config, labelled, split), np.flatnonzero(split.test))
    found = compare(_wanted(config), data, encoder, tokens, given, clock)
    result = ClassifyEvaluateResult(
        title=", ".join(Path(name).name for name in config.texts),
        classes=list(labelled.names),
        multiclass=data.classes > 2,
        notes=[*labelled.notes(), *notes, *more, *_reading_notes(tokens, features), *found.notes],
        about=_about(config, encoder, context),
        counts=split.counts(labelled.label, labelled.names),
        seconds=clock.seconds,
        out=config.out,
        **found.parts,
    )
    _write(result)
    if given is None and found.rule is not None:
        source = source_of(encoder, config.model, config.sae, context, truncate)
        sinks = train_limits(encoder, tokens, data.problem.train, found.rule.layers)
        rule = named_rule(found.rule, labelled.names, source, _settings(config), found.top1, sinks)
        save_rule(rule, config.out / "rule.json")
        parts = classify_split.parts_of(labelled.texts, split)
        classify_split.write_parts(classify_split.split_path(config.out / "rule.json"), parts)
    return result


def _settings(config: ClassifyEvaluateConfig) -> FitSettings:
    return FitSettings(
        metric=config.metric, counts=config.counts, target=config.max_fpr, pooling=config.pooling,
        min_texts=config.min_texts,
    )  # fmt: skip


def _wanted(config: ClassifyEvaluateConfig) -> Wanted:
    return Wanted(
        settings=_settings(config), multi_layer=config.multi_layer, preact=config.preact, skip=config.skip,
        replicates=config.replicates, train_shares=config.train_shares, train_draws=config.train_draws,
        choice_replicates=config.choice_replicates, draws=config.draws, seed=config.seed,
    )  # fmt: skip


def _problem(config: ClassifyEvaluateConfig, labelled: Labelled, split: Split) -> Problem:
    threshold = Threshold("f1") if config.max_fpr is None else Threshold("fpr", config.max_fpr)
    train, calibration = np.flatnonzero(split.train), np.flatnonzero(split.calibration)
    return Problem(labelled.label, len(labelled.names), train, calibration, threshold, config.seed)


def _split(config: ClassifyEvaluateConfig, labelled: Labelled) -> tuple[Split, list[str]]:
    """The split that the rule was fitted with where its list of parts is there, else a new one."""
    shares = (1 - config.calibration - config.test, config.calibration, config.test)
    path = None if config.rule is None else classify_split.split_path(config.rule)
    if path is None or not path.exists():
        group = labelled.group if len(labelled.groups) > 1 else None
        split = make_split(labelled.texts, labelled.label, group, shares, config.seed, labelled.names)
        notes = [] if path is None else [
            f"There is no {path.name} beside the rule, so texts that it was fitted on may be among the test texts; a "
            "split was made by --test, --calibration and --seed."
        ]  # fmt: skip
        return split, notes
    parts = classify_split.read_parts(path)
    known = [text_hash(text) in parts for text in labelled.texts]
    if any(known):
        split = classify_split.split_of(labelled.texts, parts)
        split.check(labelled.label, labelled.names)
        new = len(known) - sum(known)
        notes = [f"{new} texts that fitting never saw are test texts."] if new else []
        if not split.test.any():
            raise InputError(f"All texts were used to fit the rule {config.rule}. Give texts that it never saw.")
        return split, [*notes, f"The split is that of {path.name}."]
    split = make_split(labelled.texts, labelled.label, None, shares, config.seed, labelled.names)
    return split, ["The rule was fitted on none of these texts; the baselines learn from the training part of them."]


def _encoder(config: ClassifyEvaluateConfig, given: Rule | None) -> Encoder:
    """Raises InputError for a model or SAEs that the rule was not fitted with."""
    if given is not None and not config.layers:
        dtype = "rule" if config.dtype == "auto" else config.dtype
        options = ModelOptions(config.model, config.sae, dtype, config.device, config.batch_tokens)
        return encoder_for(given, options)
    if given is not None:
        missing = sorted(set(given.layers) - set(config.layers))
        if missing:
            raise InputError(
                f"The rule has features of layer {missing[0]}, which --layers leaves out. Name it there too."
            )
        config = as_fitted(config, given)
    encoder = load_encoder(
        EncodeConfig(
            text=(), model=config.model, sae=config.sae, layers=config.layers, k=config.k,
            context_size=config.context_size, bos=config.bos, precision=config.precision, dtype=config.dtype,
            device=config.device, batch_tokens=config.batch_tokens, allow_mismatch=config.allow_mismatch,
        )
    )  # fmt: skip
    if given is not None:
        given.source.check_model(encoder.model_name, encoder.model_sha256, encoder.tokenizer_sha256)
        for layer in given.layers:
            given.source.check_sae(layer, encoder.saes[layer].weight_hash())
    return encoder


def as_fitted(config: ClassifyEvaluateConfig, given: Rule) -> ClassifyEvaluateConfig:
    """Read as the rule's activations were: with another BOS or precision its thresholds mean nothing."""
    source = given.source
    dtype = known_dtype(source.dtype) if config.dtype == "auto" else config.dtype
    return dataclasses.replace(config, bos=source.bos, precision=known_precision(source.precision), dtype=dtype)


def _reading_notes(tokens: TokenTexts, features: TextFeatures) -> list[str]:
    notes = []
    cut, empty = int(tokens.truncated.sum()), int((features.tokens == 0).sum())
    if cut:
        notes.append(f"{cut} of {len(tokens)} texts are longer than what is read of them, and cut.")
    if empty:
        notes.append(f"{empty} texts have no token that counts: no rule fires in them.")
    extreme = max(facts.extreme for facts in features.facts.values())
    nan = max(facts.nan for facts in features.facts.values())
    if extreme:
        notes.append(f"Up to {extreme} tokens of a layer are attention sinks by their norm and left out.")
    if nan:
        notes.append(f"Up to {nan} tokens of a layer are not finite and left out.")
    return notes


def _about(config: ClassifyEvaluateConfig, encoder: Encoder, context: int) -> dict[str, str]:
    about = {"model": encoder.model_name, "SAEs": ", ".join(config.sae) or "embedded"}
    about |= {"layers": ", ".join(map(str, encoder.layers)), "tokens per text": f"at most {context}"}
    thresholds = "0" if config.max_fpr is None else f"{100 * config.max_fpr:g} % false positives on calibration texts"
    about |= {"thresholds of the rule": thresholds, "pooling": config.pooling, "ranked by": config.metric}
    if config.rule is not None:
        about = {name: about[name] for name in ("model", "SAEs", "layers", "tokens per text")}
        about["rule"] = config.rule.name
    return about | {"seed": str(config.seed)}


def _claim(config: ClassifyEvaluateConfig) -> None:
    """Make the folder, and leave what was asked in it. Raises StoreError for a folder of something else."""
    claim_folder(config.out, MANIFEST, _TEMPORARY, "classifier evaluation")
    asked = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    data = json.dumps(asked, indent=1, ensure_ascii=False, default=str).encode()
    write_file(config.out / MANIFEST, [data], len(data))


def _write(result: ClassifyEvaluateResult) -> None:
    text = json.dumps(plain(result), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(table(result.rows, SEVERAL if result.multiclass else BINARY))
    for name, content in (("evaluate.json", text), ("evaluate.csv", lines.getvalue())):
        data = content.encode("utf-8", "replace")
        write_file(result.out / name, [data], len(data))
