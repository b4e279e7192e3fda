"""Qwen-Scope files: `layer{n}.sae.pt`, a torch.save archive of a dict with exactly four tensors.

    W_enc [F, D]   row f is the encoder direction of feature f
    W_dec [D, F]   column f is its decoder direction; kept here as rows, [F, D], transposed once at load
    b_enc [F], b_dec [D]

k, model and layer are not in the file: they come from the names of the repository or folder and of the file.
The encoder does not subtract b_dec; the decoder adds it.

A .pt file is a pickle, which is a program. It is first read as data (archive structure, checksums, the names
that the pickle would import) and only then opened by torch's own restricted unpickler, on a torch without
known holes.
"""

import io
import pickle
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qscope.checkpoints import _files, registry
from qscope.checkpoints._weights import (
    NAMES,
    SAECard,
    Weights,
    check_keys,
    check_shapes,
    collect,
    dtype_name,
    first_line,
    place,
)
from qscope.errors import CheckpointError, UnsafeCheckpointError

FORMAT = "qwen_scope"

_PICKLE_LIMIT = 1 << 20
_CONVERT = "Ask for the SAE as safetensors (SAE.save(folder, format='qscope') writes that)."

# All that torch.save writes for a dict of plain tensors.
_HARMLESS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch.storage UntypedStorage",
    "torch Size",
}


def _check_torch() -> None:
    numbers = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if numbers is None or (int(numbers[1]), int(numbers[2])) < (2, 10):
        raise UnsafeCheckpointError(
            f"torch {torch.__version__} cannot open .pt files safely (CVE-2025-32434: code execution below "
            "2.6; CVE-2026-24747: memory corruption below 2.10). Use torch 2.10 or later, or convert the "
            "file to safetensors on a machine that has it: qscope.SAE.from_pretrained(file, "
            "k=...).save(folder, format='qscope')."
        )


def _imports_of(data: bytes | io.BytesIO) -> tuple[list[str], bool]:
    """The globals that a pickle names, `module name` each, and whether it is complete. Executes nothing."""
    names: list[str] = []
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument))
            elif opcode.name == "STACK_GLOBAL":
                names.append(" ".join(strings[-2:]) or "(computed)")
            elif opcode.name.startswith("EXT"):
                names.append(f"copyreg extension {argument}")
            elif "UNICODE" in opcode.name or opcode.name in ("STRING", "SHORT_BINSTRING", "BINSTRING"):
                strings.append(str(argument))
            elif opcode.name == "MEMOIZE" and strings:
                memo[len(memo)] = strings[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
                strings.append(memo[argument])
    except (ValueError, IndexError, KeyError, struct.error, OverflowError):
        return names, False
    return names, True


def _refuse_imports(names: list[str], path: Path) -> None:
    for name in names:
        module, _, attribute = name.partition(" ")
        is_storage = module in ("torch", "torch.storage") and attribute.endswith("Storage")
        is_dtype = module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype)
        if name not in _HARMLESS and not is_storage and not is_dtype:
            raise UnsafeCheckpointError(
                f"{path} was not opened: its pickle asks for {name.replace(' ', '.')}, which a dict of four "
                f"plain tensors never needs and which could run code. {_CONVERT}"
            )


def _not_an_archive(path: Path, head: bytes) -> CheckpointError:
    with path.open("rb") as file:
        start = io.BytesIO(file.read(_PICKLE_LIMIT))
    # The format of torch before 1.6 is several pickles in a row.
    complete = True
    while complete and start.tell() < len(start.getbuffer()):
        is_pickle = start.getbuffer()[start.tell()] == 0x80
        names, complete = _imports_of(start)
        if complete or is_pickle:
            _refuse_imports(names, path)
    size = path.stat().st_size
    if head.startswith(b"PK"):
        return CheckpointError(
            f"{path} ({size} bytes) is cut off or damaged: its archive has no readable directory. Download it again."
        )
    if head.startswith(b"\x80"):
        return CheckpointError(
            f"{path} ({size} bytes) is a bare pickle (torch before 1.6, or pickle.dump), which is not "
            "opened; Qwen-Scope files are archives of torch.save. Save it again with a current torch."
        )
    return CheckpointError(f"{path} ({size} bytes) is not a torch.save archive.")


def _inspect(path: Path) -> set[int]:
    """Sizes of the data records of an archive whose structure, imports and checksums were found in order."""
    head = _files.head_of(path)
    # Both, so that torch's reader and zipfile cannot see two different files in one.
    if not (head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path)):
        raise _not_an_archive(path, head)
    try:
        with zipfile.ZipFile(path) as archive:
            return _inspect_archive(archive, path)
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        NotImplementedError,
        struct.error,
        OverflowError,
    ) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}. Download or copy it again.") from error


def _inspect_archive(archive: zipfile.ZipFile, path: Path) -> set[int]:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} holds compressed records; torch.save never writes those, so it is refused.")
    if len({entry.filename for entry in entries}) != len(entries):
        raise CheckpointError(f"{path} holds two records of one name and is refused.")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _PICKLE_LIMIT:
        raise CheckpointError(
            f"{path} is an archive, but not one of torch.save with four tensors (no single small data.pkl)."
        )
    for entry in entries:
        if entry.CRC == 0:
            # torch.save writes 0 when told not to compute checksums; None makes zipfile skip the comparison.
            entry.CRC = None  # type: ignore[assignment]
        with archive.open(entry) as record:
            data = record.read(_PICKLE_LIMIT + 1) if entry is pickles[0] else b""
            while record.read(1 << 22):
                pass
        if entry is pickles[0]:
            names, complete = _imports_of(data)
            _refuse_imports(names, path)
            if not complete:
                raise CheckpointError(f"{path} is damaged: its data.pkl is not a complete pickle.")
    return {entry.file_size for entry in entries if "/data/" in entry.filename}


def _load(path: Path) -> Any:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # A hostile file can bring torch's reader to nearly any exception; none of them is a different answer.
        kind = "not a plain dict of tensors" if isinstance(error, pickle.UnpicklingError) else "damaged"
        raise CheckpointError(f"{path} is {kind}: torch says {first_line(error)}") from error


def _tensors(state: Any, path: Path, records: set[int]) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a dict with {', '.join(NAMES)}.")
    check_keys(state, str(path))
    size = path.stat().st_size
    for name in NAMES:
        tensor = state[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is a {type(tensor).__name__}; expected a dense tensor.")
        # Strides of 0 let some hundred bytes claim any number of elements: refuse before anything is copied.
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{path}: {name} claims {tensor.numel()} elements of {tensor.element_size()} bytes, more "
                f"than the file's {size} bytes."
            )
        if tensor.numel() and tensor.untyped_storage().nbytes() not in records:
            raise CheckpointError(f"{path}: {name} claims a storage of another size than any record in the file.")
    return state


def read(
    path: Path,
    *,
    k: int,
    layer: int | None,
    device: torch.device,
    dtype: torch.dtype,
    model: str | None = None,
    d_sae: int | None = None,
    d_in: int | None = None,
    source: str | None = None,
    source_hash: str | None = None,
) -> Weights:
    """One layer's file. d_sae, d_in: what the name promises, checked. Stored float32, bfloat16 or float16.

    Raises CheckpointError for damage and wrong content, UnsafeCheckpointError for a pickle that names code.
    A transposed matrix is told by b_enc and b_dec; with d_sae equal to d_in it cannot be told.
    """
    _check_torch()
    records = _inspect(path)
    digest = _files.sha256_of(path)
    if source_hash is not None and digest != source_hash:
        raise CheckpointError(
            f"{path} has sha256 {digest}, but {source_hash} was expected: the download is damaged. Delete it "
            "and try again."
        )
    tensors = _tensors(_load(path), path, records)
    features, _ = check_shapes(
        {name: tuple(tensors[name].shape) for name in NAMES},
        {name: dtype_name(tensors[name].dtype) for name in NAMES},
        str(path),
        decoder_rows=False,
        d_sae=d_sae,
        d_in=d_in,
    )
    if not 1 <= k <= features:
        raise CheckpointError(f"{path}: k={k} was given, but the dictionary has d_sae={features} features.")
    card = SAECard(model=model, layer=layer, source=source or path.name, source_hash=digest)
    return collect(tensors, k, card, str(path), decoder_rows=False, device=device, dtype=dtype)


def _target(path: Path, weights: Weights) -> Path:
    """The file to write: `path` itself when it ends in .pt, else `layer{n}.sae.pt` in the folder `path`."""
    layer = weights.card.layer
    is_file = path.suffix == ".pt"
    if not is_file and layer is None:
        raise CheckpointError(
            f"saving to the folder {path} as {FORMAT} needs to know the layer, which the card does not "
            "state: give a file name such as layer20.sae.pt, or set sae.card.layer."
        )
    target = path if is_file else path / registry.file_name(layer or 0)
    stated = registry.layer_of(target.name)
    if stated is not None and layer is not None and stated != layer:
        raise CheckpointError(f"{target.name} names layer {stated}, but this SAE's card says layer {layer}.")
    parts = registry.parse_name(target.parent.name)
    if parts and (parts.k, parts.d_sae) != (weights.k, weights.b_enc.numel()):
        raise CheckpointError(
            f"the folder name {target.parent.name} promises k={parts.k} and d_sae={parts.d_sae}, but this "
            f"SAE has k={weights.k} and d_sae={weights.b_enc.numel()}. Loading it would go wrong; choose "
            "another folder name."
        )
    return target


def write(weights: Weights, path: Path) -> Path:
    """Writes one file, atomically, in the weights' dtype. The format holds no k: name it in the folder."""
    target = _target(path, weights)
    _files.make_folder(target.parent)
    # Copies, because torch.save would write the whole storage that a view belongs to.
    state = {
        name: place(getattr(weights, name), weights.W_enc.dtype, torch.device("cpu"), transpose=name == "W_dec")
        for name in NAMES
    }
    with _files.temporary(target) as temp:
        # Given an open file, torch does not write the temporary name into it: equal SAEs, equal bytes.
        with temp.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # torch's writer replaces the disk's own answer by one about file positions.
                disk = error.__context__
                raise disk if isinstance(disk, OSError) else OSError(first_line(error)) from error
        _files.commit(temp, target)
    return target
