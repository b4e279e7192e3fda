"""SAE files: finding out what a name means, and one module per format that reads and writes it."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from qscope.checkpoints import _files, qscope_format, qwen_scope, registry
from qscope.checkpoints._weights import (
    SAECard,
    Weights,
    agree,
    as_device,
    as_dtype,
    check_finite,
    check_k,
    first_line,
)
from qscope.errors import CheckpointError
from qscope.files import EMBEDDED, EMBEDDED_FOLDER

__all__ = ["FORMATS", "SAECard", "Weights", "load", "save"]

FORMATS = {qscope_format.FORMAT: qscope_format, qwen_scope.FORMAT: qwen_scope}

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")

# A file that only one other library writes -> that library's format.
_FOREIGN = {
    "sae_weights.safetensors": "SAELens or Llamascopium",
    "cfg.json": "SAELens or sparsify",
    "ae.pt": "dictionary_learning",
    "params.npz": "Gemma Scope",
    "hyperparams.json": "Llama Scope",
}


def load(
    name_or_path: str | Path,
    layer: int | None = None,
    k: int | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | None = None,
) -> Weights:
    """Weights from a Hub repository, a folder or a file; see `qscope.SAE.from_pretrained`."""
    where, precision = as_device(device), as_dtype(dtype)
    for name, value in (("layer", layer), ("k", k)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"{name} must be a whole number, but {value!r} was given.")
    if k is not None and k < 1:
        raise CheckpointError(f"k={k} was given; at least one feature must stay active.")
    path = Path(name_or_path).expanduser()
    if str(name_or_path) == EMBEDDED and not path.exists():
        path = EMBEDDED_FOLDER
    if path.is_dir():
        return _from_folder(path, layer, k, where, precision)
    if path.is_file():
        return _from_file(path, layer, k, where, precision)
    return _from_hub(str(name_or_path), layer, k, where, precision)


def _read_own(folder: Path, layer: int | None, k: int | None, device: torch.device, dtype: torch.dtype) -> Weights:
    weights = qscope_format.read(folder, k=k, device=device, dtype=dtype)
    layer = agree("layer", {f"the card in {folder}": weights.card.layer, "the argument": layer})
    return weights._replace(card=replace(weights.card, layer=layer))


def _read_qwen(
    path: Path,
    context: str,
    layer: int | None,
    k: int | None,
    device: torch.device,
    dtype: torch.dtype,
    source: str | None = None,
    source_hash: str | None = None,
) -> Weights:
    """One .pt file. `context`, a repository or a path, is where a group's name may stand."""
    parts, group = registry.parse_name(context), registry.find(context)
    layer = agree("layer", {f"the file name {path.name}": registry.layer_of(path.name), "the argument": layer})
    if group is not None:
        layer = registry.check_layer(group, layer)
    if layer is not None and layer < 0:
        raise CheckpointError(f"layer {layer} was given for {path}; layers are counted from 0.")
    k = agree(
        "k",
        {f"the name {parts.name}" if parts else "the name": parts.k if parts else None, "the argument": k},
    )
    if k is None:
        raise CheckpointError(
            f"{path}: this format does not store k and no folder of its path is named like "
            "SAE-Res-MODEL-W64K-L0_50. Give k, the number of active features that the SAE was trained with."
        )
    return qwen_scope.read(
        path,
        k=k,
        layer=layer,
        device=device,
        dtype=dtype,
        model=group.backbone if group else (parts.model if parts else None),
        d_sae=parts.d_sae if parts else None,
        d_in=group.d_model if group else None,
        source=source,
        source_hash=source_hash,
    )


def _from_folder(folder: Path, layer: int | None, k: int | None, device: torch.device, dtype: torch.dtype) -> Weights:
    for candidate in (folder, folder / f"layer{layer}"):
        if (candidate / qscope_format.CARD).exists():
            return _read_own(candidate, layer, k, device, dtype)
    own = sorted(int(found.parent.name[5:]) for found in folder.glob(f"layer[0-9]*/{qscope_format.CARD}"))
    if own:
        given = "no layer was given" if layer is None else f"layer {layer} was given"
        raise CheckpointError(f"{given}, but {folder} has the layers {', '.join(map(str, own))}. Choose one of them.")
    layers = sorted(found for item in folder.glob("*.pt") if (found := registry.layer_of(item.name)) is not None)
    if layers:
        if layer is None or layer not in layers:
            given = "no layer was given" if layer is None else f"layer {layer} was given"
            raise CheckpointError(
                f"{given}, but {folder} has the layers {', '.join(map(str, layers))}. Choose one of them."
            )
        return _read_qwen(folder / registry.file_name(layer), str(folder.resolve()), layer, k, device, dtype)
    foreign = next((library for name, library in _FOREIGN.items() if (folder / name).exists()), None)
    holds = f"It looks like an SAE of {foreign}, which this version cannot read. " if foreign else ""
    raise CheckpointError(
        f"{folder} holds no SAE that qscope reads. {holds}Formats that exist now: qscope "
        f"({qscope_format.TENSORS} and {qscope_format.CARD}) and qwen_scope (layer0.sae.pt, layer1.sae.pt, "
        "...)."
    )


def _from_file(path: Path, layer: int | None, k: int | None, device: torch.device, dtype: torch.dtype) -> Weights:
    if path.suffix == ".pt":
        return _read_qwen(path, str(path.resolve().parent / path.name), layer, k, device, dtype)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a checkpoint file that qscope reads: accepted are .pt (Qwen-Scope) and "
            ".safetensors (qscope)."
        )
    if path.name == qscope_format.TENSORS and (path.parent / qscope_format.CARD).exists():
        return _read_own(path.parent, layer, k, device, dtype)
    if k is None:
        raise CheckpointError(
            f"{path} has no card {qscope_format.CARD} beside it, so k is unknown. Give k, the number of "
            "active features."
        )
    card = SAECard(layer=layer, source=path.name, source_hash=_files.sha256_of(path))
    return qscope_format.read_tensors(path, k=k, card=card, device=device, dtype=dtype)


def _from_hub(name: str, layer: int | None, k: int | None, device: torch.device, dtype: torch.dtype) -> Weights:
    parts = registry.parse_name(name)
    bare = parts is not None and name == parts.name
    if not bare and (_HUB_NAME.fullmatch(name) is None or name.endswith((".pt", ".safetensors"))):
        raise CheckpointError(
            f"{name!r} is neither a file nor a folder here, nor the name of a Hub repository such as "
            f"{registry.GROUPS[0].repository}."
        )
    if parts is None:
        if name.startswith(f"{registry.OWNER}/SAE-Res-"):
            registry.require_group(name)
        files = [_download(name, item) for item in (qscope_format.CARD, qscope_format.TENSORS)]
        if files[0].parent != files[1].parent:
            raise CheckpointError(f"{name} changed while it was being downloaded. Try again.")
        return _read_own(files[0].parent, layer, k, device, dtype)
    group = registry.require_group(name)
    repository = group.repository if group is not None and bare else name
    agree("k", {f"the name {parts.name}": parts.k, "the argument": k})
    if group is not None:
        layer = registry.check_layer(group, layer)
    if layer is None or layer < 0:
        raise CheckpointError(f"{name} has one file per layer; layer {layer!r} was given. Give layer=0 for the first.")
    filename = registry.file_name(layer)
    path = _download(repository, filename)
    source = f"{repository}/{filename}"
    return _read_qwen(path, repository, layer, k, device, dtype, source=source, source_hash=_stated_hash(path))


def _stated_hash(path: Path) -> str | None:
    """What the content should hash to: the Hub's cache names the blob of a large file by its sha256."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _download(repository: str, filename: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{repository} is a Hub name, but the package huggingface_hub is not installed. Install it, or "
            "give a local folder."
        ) from error
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id=repository, filename=filename))
    except Exception as error:
        # The client lets exceptions of its HTTP library through, and has changed that library before.
        raise CheckpointError(
            f"{filename} of {repository} could not be fetched from the Hub: {type(error).__name__}: "
            f"{first_line(error)} Check the name and the network (and HF_HUB_OFFLINE), or give a local "
            "folder that holds the file."
        ) from error


def save(weights: Weights, path: str | Path, format: str = qscope_format.FORMAT) -> Path:
    """Writes an SAE atomically and returns the folder or file.

    Raises CheckpointError for weights or a name that cannot be saved, StorageError when the disk refuses.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format {format!r} was asked for; formats that qscope writes now: {', '.join(FORMATS)}.")
    check_k(weights.k, weights.b_enc.numel(), "this SAE")
    check_finite(
        {name: getattr(weights, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec")},
        "this SAE",
        "It was not saved.",
    )
    return FORMATS[format].write(weights, Path(path).expanduser())
