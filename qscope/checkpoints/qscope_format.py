"""qscope's own format: a folder with `sae.safetensors` and the card `sae.json`.

    sae.safetensors   W_enc [F, D], W_dec [F, D] (both rows per feature), b_enc [F], b_dec [D], one dtype
    sae.json          format, format_version, the fields of SAECard, sha256 of the tensor file, and
                      card_sha256 of the other fields, so that a changed byte is found in either file

Overwriting is atomic over both files: the new card waits as `sae.json.new` while the tensors are exchanged.
The true card is the one whose sha256 matches the tensors, so a reader gets the old SAE or the new one, never
a mixture.
"""

import hashlib
import json
import struct
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from qscope.checkpoints import _files
from qscope.checkpoints._weights import (
    NAMES,
    SAECard,
    Weights,
    check_keys,
    check_shapes,
    collect,
    first_line,
)
from qscope.errors import CheckpointError

FORMAT = "qscope"
FORMAT_VERSION = 1
TENSORS = "sae.safetensors"
CARD = "sae.json"
_WAITING = "sae.json.new"

_CARD_LIMIT = 1 << 24
_HEADER_LIMIT = 1 << 20
_DTYPE_OF_CODE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_NONE = type(None)
_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "format_version": (int,),
    "model": (str, _NONE),
    "hook_point": (str, _NONE),
    "layer": (int, _NONE),
    "k": (int,),
    "d_in": (int,),
    "d_sae": (int,),
    "dtype": (str,),
    "source": (str, _NONE),
    "source_hash": (str, _NONE),
    "context_size": (int, _NONE),
    "training": (dict,),
    "sha256": (str,),
    "card_sha256": (str,),
}
_LEAST = {"format_version": 1, "layer": 0, "k": 1, "d_in": 1, "d_sae": 1}


def _wrong_fields(content: dict[str, Any]) -> list[str]:
    """What is wrong with a card. By hand, because loading an SAE needs no package beside the core's."""
    wrong = [f"{name} is missing" for name in _FIELDS if name not in content]
    wrong += [f"{name!r} is unknown" for name in content if name not in _FIELDS]
    for name, types in _FIELDS.items():
        value = content.get(name)
        if name not in content:
            continue
        # type() and not isinstance(): true and false are no numbers.
        if type(value) not in types:
            names = " or ".join("null" if kind is _NONE else kind.__name__ for kind in types)
            wrong.append(f"{name} is {str(value)[:40]!r}, expected {names}")
        elif isinstance(value, int) and value < _LEAST.get(name, value):
            wrong.append(f"{name} is {value}, expected at least {_LEAST[name]}")
    return wrong


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON objects keep the last of two equal keys in silence; two readers may then see two files."""
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
    if twice is not None:
        raise ValueError(f"the key {twice!r} occurs twice")
    return dict(pairs)


def _card_hash(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "card_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _parse_card(path: Path) -> dict[str, Any]:
    """The checked content of a card file. Raises CheckpointError."""
    _files.head_of(path)
    if path.stat().st_size > _CARD_LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a card has some kilobytes.")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != "qscope-sae":
        raise CheckpointError(f'{path} is not the card of a qscope SAE (no "format": "qscope-sae").')
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}; this qscope reads up to {FORMAT_VERSION}. Update qscope to load it."
        )
    wrong = _wrong_fields(content)
    if wrong:
        raise CheckpointError(f"{path} is not a valid card: {'; '.join(wrong[:5])}.")
    if _card_hash(content) != content["card_sha256"]:
        raise CheckpointError(
            f"{path} was changed after it was written (card_sha256 differs). Save the SAE again instead of "
            "editing its card."
        )
    return content


def read_card(folder: Path) -> tuple[SAECard, str]:
    """The card of the folder's SAE and the sha256 of its tensor file, which is read and compared.

    Raises CheckpointError when the tensors are not those of the card.
    """
    content = _parse_card(folder / CARD)
    _files.head_of(folder / TENSORS)
    digest = _files.sha256_of(folder / TENSORS)
    if digest != content["sha256"] and (folder / _WAITING).is_file():
        content = _parse_card(folder / _WAITING)
    if digest != content["sha256"]:
        raise CheckpointError(
            f"{folder / TENSORS} has sha256 {digest}, but its card says {content['sha256']}: the file was "
            "damaged or exchanged. Copy the SAE again."
        )
    return SAECard(**{item.name: content[item.name] for item in fields(SAECard)}), digest


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. The library checks all but its size and doubled keys."""
    head = _files.head_of(path)
    size = path.stat().st_size
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else size
    if length > min(_HEADER_LIMIT, size - 8):
        raise CheckpointError(
            f"{path} ({size} bytes) is not a safetensors file of an SAE, or is cut off: its header claims "
            f"{length} bytes."
        )
    with path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {first_line(error)}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: a JSON object is expected.")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def read_tensors(path: Path, *, k: int, card: SAECard, device: torch.device, dtype: torch.dtype) -> Weights:
    """The four tensors of one safetensors file, rows per feature. Sizes that the card states are checked."""
    from safetensors import SafetensorError, safe_open

    check_keys(_header(path), str(path))
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in NAMES}
            features, _ = check_shapes(
                {name: tuple(item.get_shape()) for name, item in slices.items()},
                {name: _DTYPE_OF_CODE.get(item.get_dtype(), item.get_dtype()) for name, item in slices.items()},
                str(path),
                decoder_rows=True,
                d_sae=card.d_sae or None,
                d_in=card.d_in or None,
            )
            if not 1 <= k <= features:
                raise CheckpointError(f"{path}: k={k} was given, but the dictionary has d_sae={features} features.")
            tensors = {name: file.get_tensor(name) for name in NAMES}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}.") from error
    return collect(tensors, k, card, str(path), decoder_rows=True, device=device, dtype=dtype)


def read(folder: Path, *, k: int | None, device: torch.device, dtype: torch.dtype) -> Weights:
    """The SAE of a folder; k only to check it. Raises CheckpointError."""
    card, _ = read_card(folder)
    if k is not None and k != card.k:
        raise CheckpointError(
            f"k={k} was given, but the card {folder / CARD} says k={card.k}. Leave k out to use the card's."
        )
    return read_tensors(folder / TENSORS, k=card.k, card=card, device=device, dtype=dtype)


def write(weights: Weights, path: Path) -> Path:
    """Writes both files into the folder `path`, atomically, in the weights' dtype. Returns the folder."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.suffix in (".pt", ".safetensors", ".json"):
        raise CheckpointError(f"format 'qscope' writes a folder, but {path} names a file. Give the folder's name.")
    _files.make_folder(path)
    state, seen = {}, set()
    for name in NAMES:
        tensor = getattr(weights, name).detach().cpu().contiguous()
        # safetensors refuses tensors that share memory (tied encoder and decoder).
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    with _files.temporary(path / TENSORS) as temp, _files.temporary(path / _WAITING) as temp_card:
        try:
            save_file(state, str(temp), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(first_line(error)) from error
        content = {
            "format": "qscope-sae",
            "format_version": FORMAT_VERSION,
            **asdict(weights.card),
            "sha256": _files.sha256_of(temp),
        }
        temp_card.write_text(_card_text(content), encoding="utf-8")
        # safetensors makes its file readable by the owner alone; the card has what the umask allows.
        temp.chmod(temp_card.stat().st_mode)
        _files.commit(temp_card, path / _WAITING)
        _files.commit(temp, path / TENSORS)
        _files.commit(path / _WAITING, path / CARD)
    return path


def _card_text(content: dict[str, Any]) -> str:
    try:
        plain = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the card cannot be saved as JSON: {first_line(error)}. Keep plain finite values in card.training."
        ) from error
    return json.dumps({**plain, "card_sha256": _card_hash(plain)}, indent=2, ensure_ascii=False) + "\n"
