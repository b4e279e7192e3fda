"""Which SAE features stand for a property: contrastive texts to ranked features and a steering spec.

The model runs once over all texts, for all layers. Ranking, layer choice and scales use the training texts only; the
held-out ones are looked at once, for the features that are listed. Formulas and sources: docs/steer-find.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qscope.errors import InputError
from qscope.finding.contrast import Scope, Unit
from qscope.finding.output_score import NEUTRAL_PROMPTS
from qscope.finding.pooled import Pooling
from qscope.finding.scores import Metric
from qscope.steering.spec import SteeringSpec
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import load_encoder
from qscope.workflows.steer_find_rank import Found, diagnosis, named_targets, ranked
from qscope.workflows.steer_find_read import encode, select_tokens
from qscope.workflows.steer_find_result import SteerFindResult
from qscope.workflows.steer_find_texts import gather


@dataclass(frozen=True)
class SteerFindConfig:
    """Find SAE features for a property of text, from texts with it and texts without, or for one bad response.

    Example: qscope steer find --builtin language:fr/en --out found.json --html found.html --spec french.json
    """

    positive: tuple[str, ...] = ()
    """Texts with the property: files (.txt, .jsonl, .jsonl.gz, .parquet) or folders of them."""
    negative: tuple[str, ...] = ()
    """Texts without it, alike in all else. Every file is a group (a language, say) for the measure nu."""
    builtin: str | None = None
    """Instead: language:fr, language:fr/en, topic:math/code, style:verse, declaration:rus and so on."""
    paraphrase_positive: tuple[str, ...] = ()
    """The positive texts in other words: ranked on their own, to see whether the ranking holds."""
    paraphrase_negative: tuple[str, ...] = ()
    """The same of the negative texts."""
    response: str | None = None
    """Diagnose one bad response instead, a file or the text itself, against --neutral."""
    neutral: tuple[str, ...] = ()
    """Pool of ordinary texts for --response."""
    count: int = 100
    """Texts of a built-in set on each side and in each group; files are read whole."""
    unit: Unit = "document"
    """What is one text of a file: document (a row of JSONL, a whole .txt), paragraph or line."""
    field: str = "text"
    """Field of JSON Lines or Parquet that holds the text."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer. Default: the embedded."""
    layers: tuple[int, ...] = ()
    """Decoder blocks, from 0; all in one run of the model. Default: the layer that the SAE was made for."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    metric: Metric = "mean"
    """What ranks: mean or rate (difference of mean activation, of firing rate), auroc, t (Welch), nu (per token)."""
    pooling: Pooling = "mean"
    """A text's value: mean over its tokens, any (largest), or last token."""
    top: int = 10
    """Features to list per layer; also the n of the stability of the top n."""
    choose: int = 1
    """Features to put into the spec."""
    choose_by: Literal["rank", "output_score", "target_change"] = "rank"
    """rank: of the layer with the largest top1 difference, the best ranked features. output_score, target_change: layer
    and features with the most effect on the next token."""
    min_texts: int = 3
    """Features that fire in fewer training texts are not ranked or tested."""
    fdr: float = 0.05
    """False discovery rate up to which features count as significant."""
    test: float = 0.25
    """Share of the texts kept out of everything but a last look at the features listed; 0: none."""
    bootstrap: int = 200
    """Replicates of the texts for intervals and stability, and a fifth as many random halves; 0: none."""
    seed: int = 0
    """Of built-in samples, held-out texts, bootstrap and halves."""
    drop_shared: Scope = "no"
    """Leave out tokens that are in both texts of a pair (same place in both sets), or anywhere in both sets."""
    drop_prefix: Scope = "no"
    """Leave out the tokens that both texts of a pair, or all texts, begin with."""
    targets: tuple[str, ...] = ()
    """Tokens whose probability should rise: texts of one token each. Default: 20 typical of the positive texts."""
    prompts: tuple[str, ...] = NEUTRAL_PROMPTS
    """Neutral prompts for the output score; one empty string: no output scores."""
    amplify: float = 10.0
    """Strength of the output score's intervention, in units of the largest activation at the prompt's last token."""
    context_size: int = 128
    """Tokens read of each text."""
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
    strength: float | None = None
    """Of the spec, in units of the feature's own 0.99 quantile. Default: 1; -1 for --response."""
    spec: Path | None = None
    """Write the steering spec to this file (.json, .yaml)."""
    html: Path | None = None
    """Write a page to look at in a browser: one file, no network."""
    out: Path | None = None
    """Write everything to this file as JSON."""

    def __post_init__(self) -> None:
        least = {"count": 2, "top": 1, "choose": 1, "min_texts": 1, "bootstrap": 0, "context_size": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}.")
        if not 0 <= self.test <= 0.9 or not 0 < self.fdr < 1:
            raise InputError(f"--test is {self.test} and --fdr {self.fdr}; 0 to 0.9 and above 0, below 1 are accepted.")
        if not np.isfinite(self.amplify) or (self.strength is not None and not np.isfinite(self.strength)):
            raise InputError(f"--amplify is {self.amplify}, --strength {self.strength}; finite numbers are accepted.")
        self._check_sources()

    def _check_sources(self) -> None:
        files, bad_case = bool(self.positive or self.negative), self.response is not None
        if files + (self.builtin is not None) + bad_case != 1:
            raise InputError(
                "Texts are needed from one source: --positive with --negative, --builtin, or --response with "
                "--neutral. Give exactly one of them."
            )
        for left, right in (("positive", "negative"), ("paraphrase_positive", "paraphrase_negative")):
            if bool(getattr(self, left)) != bool(getattr(self, right)):
                raise InputError(f"--{left} and --{right} belong together; give both.".replace("_", "-"))
        if bad_case != bool(self.neutral) or (bad_case and self.paraphrase_positive):
            raise InputError(
                "--response and --neutral belong together, without --paraphrase-positive: the response is compared "
                "with the pool of neutral texts."
            )

    @property
    def neutral_prompts(self) -> tuple[str, ...]:
        return tuple(prompt for prompt in self.prompts if prompt)


def run(config: SteerFindConfig) -> SteerFindResult:
    """Find features, and write the spec where the config says. Raises QscopeError for what a user can mend."""
    texts = gather(config)
    encoder = load_encoder(
        EncodeConfig(
            text=(), model=config.model, sae=config.sae, layers=config.layers, k=config.k,
            context_size=config.context_size, bos=config.bos, precision=config.precision, dtype=config.dtype,
            device=config.device, batch_tokens=config.batch_tokens, allow_mismatch=config.allow_mismatch,
        )
    )  # fmt: skip
    named_targets(config, encoder.tokenizer)  # refused before the model runs
    tokens = select_tokens(encoder, texts, config)
    with _progress(len(tokens.windows.token)) as bar:
        codes = encode(encoder, tokens, bar)
    found = Found(config, encoder, texts, tokens, codes)
    result = diagnosis(found) if config.response is not None else ranked(found)
    if config.spec is not None:
        SteeringSpec.from_json(result.spec).save(config.spec)
    return result


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="tok", unit_scale=True, desc="find", dynamic_ncols=True, mininterval=0.5) as bar:
        yield bar
