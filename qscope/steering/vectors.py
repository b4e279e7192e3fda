"""Directions that do not come from an SAE: contrastive vectors, probes, GGUF control vectors."""

from pathlib import Path

import torch
from torch import Tensor

from qscope.errors import InputError


def load_vector(source: str | tuple[float, ...], layer: int, width: int) -> Tensor:
    """The vector [D] float32 that an edit of `layer` names.

    source: D numbers; "file.safetensors#name" (the name may be left out where the file holds one tensor), shape [D] or
        [layers, D], of which row `layer` is taken; or "file.gguf", a control vector as llama.cpp and repeng write it:
        its tensor direction.{layer} acts on the output of block `layer`, both counted from 0.

    Raises InputError for a file that cannot be read and a vector that does not fit.
    """
    if not isinstance(source, str):
        return _checked(torch.tensor(source, dtype=torch.float64), layer, width, "the vector in the spec")
    name, _, key = source.partition("#")
    path = Path(name).expanduser()
    if not path.is_file():
        raise InputError(f"The vector {source} was given, and there is no file {path}.")
    if path.suffix == ".gguf":
        return _checked(_gguf(path, layer), layer, width, source)
    if path.suffix == ".safetensors":
        return _checked(_safetensors(path, key), layer, width, source)
    raise InputError(f"The vector {source} was given; a .safetensors or .gguf file is accepted, no pickle.")


def _safetensors(path: Path, key: str) -> Tensor:
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            names = list(file.keys())
            key = key or (names[0] if len(names) == 1 else "")
            if key not in names:
                raise InputError(f"{path} holds {', '.join(names)}; name one of them behind a #: {path.name}#NAME.")
            return file.get_tensor(key)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file that can be read: {error}.") from error


def _gguf(path: Path, layer: int) -> Tensor:
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise InputError(f"{path} is a GGUF file, and the package gguf, which reads it, is not installed.") from error
    try:
        tensors = {t.name: t for t in GGUFReader(path).tensors}
    except ValueError as error:
        raise InputError(f"{path} is not a GGUF file that can be read: {error}.") from error
    found = tensors.get(f"direction.{layer}")
    if found is None:
        raise InputError(f"{path} holds {', '.join(tensors) or 'no tensors'}, and no direction.{layer} for this layer.")
    return torch.from_numpy(dequantize(found.data, found.tensor_type).copy())


def _checked(vector: Tensor, layer: int, width: int, what: str) -> Tensor:
    if vector.dim() == 2 and layer < len(vector):
        vector = vector[layer]
    vector = vector.float()
    if vector.shape != (width,) or not bool(vector.isfinite().all()):
        shape = list(vector.shape)
        raise InputError(f"{what} is {shape} or not finite; {width} finite numbers are expected for layer {layer}.")
    return vector
