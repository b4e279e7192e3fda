"""How good an SAE, or a suite of them, is on held-out text: reconstruction, sparsity, the model's loss, the dictionary.

Every figure's formula stands with its field in `qscope.evaluation`, and on the page.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qscope import embedded
from qscope._version import __version__
from qscope.errors import InputError, ModelError
from qscope.evaluation.dictionary import DecoderCosines, Stability, decoder_cosines, stability
from qscope.evaluation.exactness import Exactness, exactness
from qscope.evaluation.fidelity import Fit
from qscope.evaluation.splice import SpliceLoss
from qscope.files import cache_dir
from qscope.model import residuals
from qscope.sae import SAE
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, load_encoder, load_saes
from qscope.workflows.evaluate_pass import LayerPass, Pass, TokenCounts, parts, token_windows

TOKENS, EXACTNESS_TOKENS = 16384, 1024


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure SAEs on held-out text: FVU, sparsity, dead features, loss with the reconstruction spliced in, stability.

    Example: qscope evaluate --tokens 20000 --html evaluation.html
    """

    text: tuple[str, ...] = ()
    """Files (.txt, .md, .jsonl, .jsonl.gz, .parquet) or folders of them. Default: the demo's held-out text."""
    tokens: int | None = None
    """How many tokens to measure. Default: 16384, with --exactness 1024."""
    fit_tokens: int = 8192
    """Tokens before those, which only serve to fit the mean and the PCA of rank k that the SAE is compared with."""
    loss_tokens: int = 4096
    """How many of the measured tokens, in whole contexts, go through the model nine times for the loss; 0: none."""
    recall_tokens: int = 256
    """How many of the measured tokens are compared with float64 scores of all features; 0: none."""
    exactness: bool = False
    """Do only this last comparison, on all --tokens from the beginning of the text."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer. Default: the embedded."""
    layers: tuple[int, ...] = ()
    """Decoder blocks, from 0. Default: the layer that the SAE was made for."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    against: tuple[str, ...] = ()
    """Other SAEs, one for all layers or one per layer: how many features has each found that the first has?"""
    matching: Literal["greedy", "hungarian"] = "greedy"
    """How features are paired for --against; hungarian: best in sum, up to 8192 features, needs scipy."""
    field: str = "text"
    """Field of JSON Lines or Parquet that holds the text."""
    context_size: int = 512
    """Tokens that the model sees at once."""
    bos: bool = False
    """Put the tokenizer's BOS token before every context; its own residual is neither measured nor replaced."""
    precision: Literal["exact", "bf16"] = "exact"
    """Of the features measured."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    batch_tokens: int | None = None
    """Tokens per forward pass, padding included. Default: 1024 on a CPU, 8192 on a GPU."""
    allow_mismatch: bool = False
    """Evaluate although the SAE was made for another model or layer."""
    html: Path | None = None
    """Write a page to look at in a browser: one file, no network."""
    out: Path | None = None
    """Write the figures to this file as JSON."""

    def __post_init__(self) -> None:
        least = {"tokens": 1, "fit_tokens": 1, "context_size": 1, "k": 1, "batch_tokens": 1}
        for name, low in {**least, "loss_tokens": 0, "recall_tokens": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}.")
        if self.exactness and (self.against or self.html):
            raise InputError(
                "--exactness does only that comparison, and --against or --html was given as well. Leave one out."
            )

    @property
    def measured(self) -> int:
        return self.tokens or (EXACTNESS_TOKENS if self.exactness else TOKENS)


@dataclass(frozen=True)
class LayerResult:
    """One SAE. What was not asked for is None."""

    sae: str
    d_in: int
    d_sae: int
    k: int
    mismatch: str | None = None
    """In what way the SAE was made for something else, where that was allowed."""
    tokens: TokenCounts | None = None
    ordinary: Fit | None = None
    """Without attention sinks and the first token of every context."""
    all: Fit | None = None
    """All tokens that are finite."""
    splice_ordinary: SpliceLoss | None = None
    """The residuals of ordinary tokens replaced, those of sinks and first tokens as they were."""
    splice_all: SpliceLoss | None = None
    """The residuals of all tokens replaced."""
    decoder: DecoderCosines | None = None
    exactness: Exactness | None = None
    stability: Stability | None = None


@dataclass(frozen=True)
class EvaluateResult:
    model: str
    layers: dict[str, LayerResult]
    about: dict[str, str]
    """What was measured on what: text, sizes, dtype, device, versions."""
    html: Path | None = None
    out: Path | None = None

    @property
    def exit_status(self) -> int:
        """1 if "exact" missed a feature or got a value wrong: that is a fault of qscope."""
        found = [layer.exactness for layer in self.layers.values() if layer.exactness]
        return int(any(e.tokens > e.nan_rows and (e.recall_exact < 1 or e.wrong_values) for e in found))


def run(config: EvaluateConfig) -> EvaluateResult:
    """Measure every layer in one reading of the text. Raises QscopeError for what a user can mend."""
    text = config.text or (str(embedded.demo_text(cache_dir() / "demo-text.jsonl")),)
    settings = EncodeConfig(
        text=text, model=config.model, sae=config.sae, layers=config.layers, k=config.k, field=config.field,
        context_size=config.context_size, bos=config.bos, precision=config.precision, dtype=config.dtype,
        device=config.device, batch_tokens=config.batch_tokens, allow_mismatch=config.allow_mismatch,
    )  # fmt: skip
    encoder = load_encoder(settings)
    if config.exactness:
        taken = collect(encoder, settings, config.measured)
        layers = {n: replace(_about_layer(encoder, n), exactness=exactness(encoder.saes[n], taken[n])) for n in taken}
    else:
        layers = _measure(config, settings, encoder)
    return EvaluateResult(
        model=encoder.model_name,
        layers={str(layer): found for layer, found in sorted(layers.items())},
        about=_about(config, encoder),
        html=config.html,
        out=config.out,
    )


def _measure(config: EvaluateConfig, settings: EncodeConfig, encoder: Encoder) -> dict[int, LayerResult]:
    others = _others(config, settings, encoder)
    reading = Pass(encoder, config)
    with _progress(config.fit_tokens + config.measured) as bar:
        reading.run(token_windows(encoder, settings), bar)
    return {
        layer: _layer_result(config, encoder, layer, found, others.get(layer))
        for layer, found in reading.layers.items()
    }


def _others(config: EvaluateConfig, settings: EncodeConfig, encoder: Encoder) -> dict[int, SAE]:
    """Layer -> the SAE it is compared with."""
    if not config.against:
        return {}
    device = str(next(iter(encoder.saes.values())).device)
    others = load_saes(replace(settings, sae=config.against, layers=tuple(encoder.saes)), device)
    for layer, other in others.items():
        if other.d_in != encoder.saes[layer].d_in:
            raise ModelError(
                f"--against names an SAE of width {other.d_in} for layer {layer}, where the first has width "
                f"{encoder.saes[layer].d_in}. Take two SAEs of one residual stream."
            )
    return others


def _layer_result(
    config: EvaluateConfig, encoder: Encoder, layer: int, found: LayerPass, other: SAE | None
) -> LayerResult:
    sae = found.sae
    assert found.fidelity is not None
    spliced = {scope: sums.result() for scope, sums in found.sums.items()} if config.loss_tokens else {}
    compared = None
    if other is not None:
        against = config.against[0] if len(config.against) == 1 else config.against[list(encoder.saes).index(layer)]
        compared = stability(sae.W_enc, sae.W_dec, other.W_enc, other.W_dec, against, config.matching)
    return replace(
        _about_layer(encoder, layer),
        tokens=found.token_counts(),
        ordinary=found.fidelity.fit(ordinary_only=True),
        all=found.fidelity.fit(ordinary_only=False),
        splice_ordinary=spliced.get("ordinary"),
        splice_all=spliced.get("all"),
        decoder=decoder_cosines(sae.W_enc.detach(), sae.W_dec.detach()),
        exactness=exactness(sae, torch.cat(found.sample)) if found.sample else None,
        stability=compared,
    )


def _about_layer(encoder: Encoder, layer: int) -> LayerResult:
    sae = encoder.saes[layer]
    source = sae.card.source or f"sha256 {sae.weight_hash()[:12]}"
    return LayerResult(source, sae.d_in, sae.d_sae, sae.k, encoder.mismatches.get(layer))


def _about(config: EvaluateConfig, encoder: Encoder) -> dict[str, str]:
    return {
        "text": ", ".join(config.text) or "held-out demo text",
        "context": f"{config.context_size} tokens{' after a BOS' if config.bos else ''}",
        "dtype": encoder.dtype,
        "features": config.precision,
        "device": encoder.device,
        "versions": f"qscope {__version__}, torch {torch.__version__}, transformers {metadata.version('transformers')}",
    }


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="tok", unit_scale=True, desc="evaluate", dynamic_ncols=True, mininterval=0.5) as bar:
        yield bar


def collect(encoder: Encoder, config: EncodeConfig, tokens: int) -> dict[int, Tensor]:
    """Residuals [tokens, D] of every layer, of the first tokens of the text."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in encoder.saes}
    for _, windows in parts(token_windows(encoder, config), 0, tokens):
        for begin in range(0, len(windows.starts) - 1, 4):
            ids, real, _ = encoder.pad(windows, np.arange(begin, min(begin + 4, len(windows.starts) - 1)))
            for layer, x in residuals(encoder.model, ids, sorted(encoder.saes)).items():
                found[layer].append((x[:, 1:] if encoder.bos is not None else x)[real])
    if not any(found.values()):
        raise InputError(f"{', '.join(config.text)} holds no text. Give text that is not empty, or another --field.")
    return {layer: torch.cat(x) for layer, x in found.items()}
