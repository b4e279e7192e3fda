"""How good an SAE's features are on real text. So far: how exact they are, against a float64 oracle."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qscope import embedded, ops, reference
from qscope.data import ReadCounts, TextOptions, Windows, find_sources, read_pieces, text_shards, tokenize
from qscope.errors import InputError
from qscope.files import cache_dir
from qscope.model import residuals
from qscope.sae import SAE
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, load_encoder


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how exact the features of real text are: recall of both precisions against a float64 oracle.

    Example: qscope evaluate --exactness --tokens 2048
    """

    text: tuple[str, ...] = ()
    """Files (.txt, .md, .jsonl, .jsonl.gz, .parquet) or folders of them. Default: the demo's text."""
    exactness: bool = False
    """Compare with a brute-force float64 oracle."""
    tokens: int = 1024
    """How many tokens, from the beginning of the text."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer. Default: the embedded."""
    layers: tuple[int, ...] = ()
    """Decoder blocks, from 0. Default: the layer that the SAE was made for."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    field: str = "text"
    """Field of JSON Lines or Parquet that holds the text."""
    context_size: int = 512
    """Tokens that the model sees at once."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    allow_mismatch: bool = False
    """Evaluate although the SAE was made for another model or layer."""

    def __post_init__(self) -> None:
        if not self.exactness:
            raise InputError("Nothing to evaluate was chosen. Give --exactness.")
        for name in ("tokens", "context_size", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class Exactness:
    """One layer. Recall: the share of the k features of a token whose float64 score, rounded to float32, is at least
    the k-th largest of these; ties in float32 count as right."""

    tokens: int
    nan_rows: int
    """Tokens with a score that is NaN; left out of everything else."""
    recall_exact: float
    recall_bf16: float
    wrong_values: int
    """Values of "exact" that are not the float64 score rounded to float32, by more than one unit in the last place."""
    candidates_mean: float
    """Features that were scored exactly, of d_sae."""
    candidates_max: int
    full_rows: int
    """Tokens that the bound could not serve: all their features were scored exactly."""
    smallest_margin: float | None
    """Least proven distance of a k-th score from the features that were never scored exactly; None if all were."""
    d_sae: int
    k: int


@dataclass(frozen=True)
class EvaluateResult:
    model: str
    layers: dict[str, Exactness]

    @property
    def exit_status(self) -> int:
        """1 if "exact" missed a feature or got a value wrong: that is a fault of qscope."""
        return int(any(found.recall_exact < 1 or found.wrong_values for found in self.layers.values()))


def run(config: EvaluateConfig) -> EvaluateResult:
    """Take the residuals of the first tokens of the text and compare. Raises QscopeError for what a user can mend."""
    text = config.text or (str(embedded.demo_text(cache_dir() / "demo-text.jsonl")),)
    settings = EncodeConfig(
        text=text, model=config.model, sae=config.sae, layers=config.layers, k=config.k, field=config.field,
        context_size=config.context_size, dtype=config.dtype, device=config.device,
        allow_mismatch=config.allow_mismatch,
    )  # fmt: skip
    encoder = load_encoder(settings)
    taken = collect(encoder, settings, config.tokens)
    return EvaluateResult(
        encoder.model_name,
        {str(layer): exactness(sae, taken[layer]) for layer, sae in sorted(encoder.saes.items())},
    )


def collect(encoder: Encoder, config: EncodeConfig, tokens: int) -> dict[int, Tensor]:
    """Residuals [tokens, D] of every layer, of the first tokens of the text."""
    options = TextOptions(field=config.field)
    pieces = read_pieces(find_sources(config.text, options), options, ReadCounts())
    parts: dict[int, list[Tensor]] = {layer: [] for layer in encoder.saes}
    found, carry = 0, (0, 0)
    for shard in text_shards(pieces, config.shard_bytes):
        windows = tokenize(encoder.tokenizer, shard.pieces, config.context_size, carry, tokens - found)
        if not len(windows.token):
            continue
        for layer, x in _forward(encoder, windows).items():
            parts[layer].append(x)
        found += len(windows.token)
        carry = (int(windows.document[-1]), int(windows.position[-1]) + 1)
        if found >= tokens:
            break
    if not found:
        raise InputError(f"{', '.join(config.text)} holds no text. Give text that is not empty, or another --field.")
    return {layer: torch.cat(x) for layer, x in parts.items()}


def _forward(encoder: Encoder, windows: Windows) -> dict[int, Tensor]:
    """Residuals of all tokens of the windows, a few windows at a time."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in encoder.saes}
    count = len(windows.starts) - 1
    for begin in range(0, count, 4):
        ids, real, _ = encoder.pad(windows, np.arange(begin, min(begin + 4, count)))
        residual = residuals(encoder.model, ids, sorted(encoder.saes))
        for layer in encoder.saes:
            parts[layer].append(residual[layer][real])
    return {layer: torch.cat(x) for layer, x in parts.items()}


def exactness(sae: SAE, x: Tensor) -> Exactness:
    """Compare both precisions of sae on x [N, D] with float64 scores of all features."""
    W, b, k = sae.W_enc.detach(), sae.b_enc.detach(), sae.k
    acts, indices, candidates, margin = ops.topk_encode_certified(x, W, b, k)
    rounded = ops.topk_encode(x, W, b, k, "bf16")[1]
    kept = hits = hits_bf16 = wrong = 0
    good = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for rows in torch.arange(len(x), device=x.device).split(reference.rows_per_block(sae.d_sae, 8)):
        scores = float64_scores(x[rows], W, b).float()
        good[rows] = ~scores.isnan().any(1)
        scores, rows = scores[good[rows]], rows[good[rows]]
        kth = scores.topk(k, dim=1).values[:, -1:]
        hits += int((scores.gather(1, indices[rows].long()) >= kth).sum())
        hits_bf16 += int((scores.gather(1, rounded[rows].long()) >= kth).sum())
        want = scores.gather(1, indices[rows].long()).relu()
        wrong += int(((acts[rows] < _below(want)) | (acts[rows] > _above(want))).sum())
        kept += len(rows)
    finite = margin[good][margin[good].isfinite()]
    return Exactness(
        tokens=len(x),
        nan_rows=len(x) - kept,
        recall_exact=hits / max(1, kept * k),
        recall_bf16=hits_bf16 / max(1, kept * k),
        wrong_values=wrong,
        candidates_mean=float(candidates[good].double().mean()) if kept else 0.0,
        candidates_max=int(candidates[good].max()) if kept else 0,
        full_rows=int((candidates[good] == sae.d_sae).sum()),
        smallest_margin=float(finite.min()) if len(finite) else None,
        d_sae=sae.d_sae,
        k=k,
    )


def float64_scores(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x W^T + b in float64, [N, F], from x [N, D] and W [F, D] in blocks of features that fit the workspace."""
    wide = x.double()
    parts = [wide @ part.double().T for part in W.split(reference.rows_per_block(W.shape[1], 8))]
    return torch.cat(parts, dim=1) + b.double()


def _below(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, -torch.inf))


def _above(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, torch.inf))
