"""A model and the SAEs of some of its layers, ready to turn token windows into features."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from qscope import embedded
from qscope.data import Windows, batches
from qscope.errors import InputError, ModelError
from qscope.model import load_model, model_hash, num_layers, residual_width, residuals, tokenizer_hash
from qscope.sae import SAE
from qscope.store_packing import EXTREME_FACTOR, NAN_ROW, pack_layer

if TYPE_CHECKING:
    from qscope.workflows.encode import EncodeConfig

# On a CPU (SmolLM2-135M, two cores): 1,940 tokens/s at 1024, 1,840 at 2048, 1,480 at 8192, where a batch's activations
# leave the cache. On a GPU: enough to fill it, not measured.
BATCH_TOKENS = {False: 1024, True: 8192}
FIT_TOKENS = 1024  # tokens of each shard on which the reconstruction error is measured


class LayerFeatures(NamedTuple):
    """Features of one layer for one shard, packed for the store, and how well they reconstruct a sample of it."""

    packed: dict[str, np.ndarray]
    squared_error: float
    squared_deviation: float
    """From the sample's mean: `squared_error` over this is the FVU."""


class Encoded(NamedTuple):
    """What one shard of text became, in the order of its tokens."""

    layers: dict[int, LayerFeatures]
    residuals: dict[int, torch.Tensor]
    """layer -> [N, D] in the model's dtype on the host, where they were asked for"""


@dataclass
class Encoder:
    """What `load_encoder` returns."""

    model: Any
    tokenizer: Any
    saes: dict[int, SAE]
    layers: tuple[int, ...]
    """Ascending; those of the SAEs, where there are any."""
    mismatches: dict[int, str | None]
    """In what way an SAE was made for something else, where that was allowed."""
    model_name: str
    model_sha256: str
    tokenizer_sha256: str
    dtype: str
    device: str
    """cpu, or the name of the GPU."""
    precision: str
    batch_tokens: int
    strict: bool
    bos: int | None
    """Token put before every window, or None."""

    def encode(self, windows: Windows, clock: Any, bar: Any, keep_residuals: bool = False) -> Encoded:
        """Features, and the residuals if they are to be kept, of every token of `windows` at every layer."""
        count = len(windows.token)
        buffers = {layer: LayerBuffer(count, sae) for layer, sae in self.saes.items()}
        kept: dict[int, torch.Tensor] = {}
        if keep_residuals:
            width, dtype = residual_width(self.model), next(self.model.parameters()).dtype
            kept = {layer: torch.empty(count, width, dtype=dtype) for layer in self.layers}
        for rows in batches(windows.starts, self.batch_tokens):
            ids, real, places = self.pad(windows, rows)
            try:
                with clock("model"):
                    residual = residuals(self.model, ids, self.layers)
                with clock("encode"):
                    for layer in self.layers:
                        hidden = residual[layer][:, 1:] if self.bos is not None else residual[layer]
                        x = hidden[real]
                        if layer in buffers:
                            buffers[layer].put(places, x, self.precision)
                        if keep_residuals:
                            kept[layer][torch.from_numpy(places)] = x.cpu()
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"A batch of {ids.shape[0]} x {ids.shape[1]} tokens did not fit into the device's memory. Finished "
                    f"shards are kept; in a new folder, try --batch-tokens {max(1, self.batch_tokens // 2)}."
                ) from error
            bar.update(len(places))
        features = {layer: buffer.finish() for layer, buffer in buffers.items()}
        if self.strict:
            self.refuse_nan(features, kept, windows)
        return Encoded(features, kept)

    def pad(self, windows: Windows, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Right-padded ids [B, S], which of them are real [B, S], and the places of those in `windows`.

        The model is causal, so what stands to the right of a token cannot change it, and no attention mask is needed.
        """
        starts, ends = windows.starts[rows], windows.starts[rows + 1]
        size = int((ends - starts).max())
        offsets = np.arange(size)
        real = offsets[None, :] < (ends - starts)[:, None]
        places = (starts[:, None] + offsets[None, :])[real]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = windows.token[places]
        if self.bos is not None:
            ids = np.concatenate([np.full((len(rows), 1), self.bos), ids], axis=1)
        device = next(self.model.parameters()).device
        return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device), places

    def refuse_nan(self, features: dict[int, LayerFeatures], kept: dict[int, torch.Tensor], windows: Windows) -> None:
        for layer in self.layers:
            if layer in features:
                bad = np.flatnonzero(features[layer].packed["flags"] & NAN_ROW)
            else:
                bad = (~kept[layer].isfinite().all(dim=1)).nonzero().flatten().numpy()
            if len(bad):
                raise InputError(
                    f"The residual of layer {layer} is NaN or infinite at {len(bad)} tokens, first in document "
                    f"{windows.document[bad[0]]} at position {windows.position[bad[0]]}, and --strict was given. Try "
                    "--dtype float32, or leave --strict out to flag and count such tokens."
                )


class LayerBuffer:
    """Features of one layer for one shard, filled batch by batch."""

    def __init__(self, count: int, sae: SAE) -> None:
        self.sae = sae
        self.top_acts = np.zeros((count, sae.k), np.float32)
        self.top_indices = np.zeros((count, sae.k), np.int32)
        self.norms = np.zeros(count, np.float32)
        self.fit: tuple[float, float] | None = None

    def put(self, places: np.ndarray, x: torch.Tensor, precision: str) -> None:
        """x: residuals [n, D] of the tokens at `places`."""
        acts, indices = self.sae.encode_topk(x, precision=precision)
        self.top_acts[places] = acts.float().cpu().numpy()
        self.top_indices[places] = indices.cpu().numpy()
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        self.norms[places] = norms.cpu().numpy()
        if self.fit is None:
            self.fit = self.measure(x, norms, acts, indices)

    def measure(
        self, x: torch.Tensor, norms: torch.Tensor, acts: torch.Tensor, indices: torch.Tensor
    ) -> tuple[float, float]:
        """(squared error, squared deviation from the mean) on a sample of the shard's longest windows.

        Attention sinks are left out: their variance is thousands of times that of all other tokens.
        """
        usable = torch.isfinite(norms) & (norms <= EXTREME_FACTOR * norms.nanmedian())
        sample = usable.nonzero().flatten()
        sample = sample[:: max(1, len(sample) // FIT_TOKENS)][:FIT_TOKENS]
        x = x[sample].float()
        error = (self.sae.decode(acts[sample], indices[sample]).float() - x).double().square().sum()
        deviation = (x - x.mean(0)).double().square().sum()
        return float(f"{float(error):.6g}"), float(f"{float(deviation):.6g}")  # the digits that mean something

    def finish(self) -> LayerFeatures:
        packed = pack_layer(self.top_acts, self.top_indices, self.sae.d_sae, self.norms)
        return LayerFeatures(packed, *(self.fit or (0.0, 0.0)))


# --- loading ---------------------------------------------------------------------------------------------


def load_encoder(config: "EncodeConfig") -> Encoder:
    """The model and SAEs that `config` names, checked against each other."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    saes = load_saes(config, device) if config.features else {}
    path = config.model or str(embedded.default_model_path())
    model, tokenizer = load_model(path, device=device, dtype=config.dtype)
    sha256 = model_hash(path)
    name = config.model or embedded.DEFAULT_MODEL_NAME
    local = Path(name).exists()
    if local:  # the same folder by another path is the same model
        name = Path(name).resolve().name
    check_window(name, model, tokenizer, config)
    mismatches = {}
    for layer, sae in saes.items():
        mismatches[layer] = check_fit(model, name, sha256, local, layer, sae, config.allow_mismatch)
    if not saes:
        check_layers(config.layers, name, num_layers(model))
    return Encoder(
        model=model,
        tokenizer=tokenizer,
        saes=saes,
        layers=tuple(sorted(saes or config.layers)),
        mismatches=mismatches,
        model_name=name,
        model_sha256=sha256,
        tokenizer_sha256=tokenizer_hash(tokenizer),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        precision=config.precision,
        batch_tokens=config.batch_tokens or BATCH_TOKENS[model.device.type == "cuda"],
        strict=config.strict,
        bos=tokenizer.bos_token_id if config.bos else None,
    )


def check_layers(layers: tuple[int, ...], name: str, blocks: int) -> None:
    """Refuse layers that the model does not have, or that are named twice."""
    wrong = [layer for layer in layers if not 0 <= layer < blocks]
    if wrong:
        raise ModelError(f"Layer {wrong[0]} was asked for, and {name} has the layers 0 to {blocks - 1}.")
    if len(set(layers)) < len(layers):
        raise InputError(f"--layers {' '.join(map(str, layers))} names a layer twice. Name every layer once.")


def check_window(name: str, model: Any, tokenizer: Any, config: "EncodeConfig") -> None:
    """Refuse a tokenizer or a context size that the model cannot serve."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"The tokenizer of {name} ({type(tokenizer).__name__}) has no fast version, which qscope needs. Convert it "
            "to a tokenizer.json with transformers, or take a model that has one."
        )
    if config.bos and tokenizer.bos_token_id is None:
        raise InputError(f"--bos was given, and the tokenizer of {name} has no BOS token. Leave --bos out.")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context_size + config.bos > longest:
        raise InputError(
            f"--context-size {config.context_size}{' and a BOS token' if config.bos else ''} was given, and {name} was "
            f"made for at most {longest} tokens. Give a smaller one."
        )


def load_saes(config: "EncodeConfig", device: str) -> dict[int, SAE]:
    """Layer -> SAE. One name serves all layers (a release); several names are one per layer."""
    names = config.sae
    if not names:
        if config.model is not None:
            raise InputError(
                f"--model {config.model} was given without --sae. Name an SAE that was trained on this model: a Hub "
                'repository such as "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", a folder or a file.'
            )
        names = (embedded.SAES,)
    own = embedded.DEFAULT_LAYER if not config.sae else None
    layers: tuple[int | None, ...] = config.layers or (own,) * len(names)
    if len(names) == 1:
        names = names * len(layers)
    if len(names) != len(layers):
        raise InputError(
            f"{len(names)} SAEs were given for {len(layers)} layers. Accepted: one --sae for all layers, or one per "
            "layer."
        )
    if len(set(config.layers)) < len(config.layers):
        raise InputError(f"--layers {' '.join(map(str, config.layers))} names a layer twice. Name every layer once.")
    saes: dict[int, SAE] = {}
    for name, wanted in zip(names, layers, strict=True):
        own_card = config.allow_mismatch and (Path(name) / "sae.json").exists()  # whose layer is not insisted on
        sae = SAE.from_pretrained(name, layer=None if own_card else wanted, k=config.k, device=device)
        layer = wanted if wanted is not None else sae.card.layer
        if layer is None:
            raise InputError(f"The SAE {name} does not say which layer it was made for. Say it with --layers.")
        if layer in saes:
            raise InputError(f"Two of the SAEs were made for layer {layer}. Name one SAE per layer.")
        saes[layer] = sae
    return saes


def check_fit(
    model: Any, name: str, sha256: str, local: bool, layer: int, sae: SAE, allow_mismatch: bool
) -> str | None:
    """Refuse an SAE that cannot fit (width, layer), and one made for another model or layer unless allowed.

    The name of a local folder tells nothing about the model in it, so only Hub names are compared. Returns what does
    not match, if that was allowed.
    """
    width, blocks = residual_width(model), num_layers(model)
    if sae.d_in != width:
        raise ModelError(
            f"The SAE reads residuals of width {sae.d_in}, and {name} has width {width}. Take an SAE that was trained "
            f"on this model{f' (this one: on {sae.card.model})' if sae.card.model else ''}."
        )
    if not 0 <= layer < blocks:
        raise ModelError(f"Layer {layer} was asked for, and {name} has the layers 0 to {blocks - 1}.")
    problems = []
    if sae.card.layer is not None and sae.card.layer != layer:
        problems.append(f"it was made for layer {sae.card.layer}, not {layer}")
    trained_on = (sae.card.training or {}).get("model_sha256")
    if trained_on is not None and trained_on != sha256:
        problems.append(f"it was trained on other weights than {name}'s (sha256 {trained_on[:12]}, not {sha256[:12]})")
    elif trained_on is None and sae.card.model and not local and sae.card.model != name:
        problems.append(f"it was made for {sae.card.model}, not {name}")
    if problems and not allow_mismatch:
        raise ModelError(
            f"The SAE for layer {layer} does not belong here: {'; '.join(problems)}. Take the matching one, or say "
            "--allow-mismatch to encode all the same (the store records it)."
        )
    return "; ".join(problems) or None
