"""What the operators share: registration, how a body finds its native kernel, and how arguments are refused."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qscope import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)
MAX_CUDA_K = 256

_library = torch.library.Library("qscope", "FRAGMENT")


def operator(reference: Callable[..., Any], schema: str | None = None) -> Any:
    """Register the operator that is named like its reference; without a schema it follows the annotations.

    An argument that the operator writes to is marked in the schema: "(Tensor(a!) h, ...) -> ()".

    Autocast is off inside it: it would cast the matrix product in a body, whatever dtype the caller was promised.
    It is switched off in the dispatcher, so that torch.ops.qscope and calls in a backward pass are covered too.
    """
    name = reference.__name__
    mutates = re.findall(r"Tensor\(\w+!\)\??\s+(\w+)", schema or "")
    op = torch.library.custom_op(f"qscope::{name}", _body(reference), mutates_args=mutates, schema=schema)

    def without_autocast(device: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.autocast(device, enabled=False):
                return op(*args)

        return run

    _library.impl(name, without_autocast("cpu"), "AutocastCPU")
    _library.impl(name, without_autocast("cuda"), "AutocastCUDA")
    return op


def _body(reference: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's default body: load the native library on the first CPU call, else run the reference.

    Once the library is loaded its kernel owns the CPU dispatch key, so this body is not reached again.
    """
    name = reference.__name__

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        if native.load(device) and native.implements(name, device):
            return getattr(torch.ops.qscope, name)(*args)
        return reference(*args)

    return run


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Call the operator. Loading first spares its default body, which imports the compiler stack."""
    if not torch.compiler.is_compiling():
        native.load(args[0].device.type)
    return op(*args)


def check_float(op: str, name: str, tensor: Tensor, shape: str) -> None:
    """Refuse a tensor whose rank or dtype the operator does not take; `shape` is written like "[N, D]"."""
    _check_rank(op, name, tensor, shape)
    if tensor.dtype not in FLOATS:
        accepted = "float32, bfloat16 and float16"
        raise ValueError(f"{op}: {name} is {tensor.dtype}; accepted are {accepted}. Convert it with {name}.float().")


def check_indices(op: str, name: str, tensor: Tensor) -> None:
    """Refuse indices that are not [N, K] int32 or int64."""
    _check_rank(op, name, tensor, "[N, K]")
    if tensor.dtype not in INTS:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; accepted are int32 and int64.")


def check_index_range(op: str, name: str, indices: Tensor, d_sae: int) -> None:
    """With QSCOPE_DEBUG=1, refuse GPU indices outside 0..F-1. Not by default: it has to wait for the GPU."""
    if not indices.is_cuda or os.environ.get("QSCOPE_DEBUG", "0") in ("", "0") or torch.compiler.is_compiling():
        return
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < d_sae:
        raise IndexError(f"{op}: {name} holds {int(indices.min())}..{int(indices.max())}; accepted is 0..{d_sae - 1}.")


def check_sizes(op: str, rule: str, *pairs: tuple[int, int]) -> None:
    """Refuse sizes that must agree; `rule` says which ones, with what was given."""
    if any(a != b for a, b in pairs):
        raise ValueError(f"{op}: {rule}. Sizes that share a letter must be equal.")


def check_k(op: str, k: int, d_sae: int, given: Tensor) -> None:
    """Refuse a k outside 1..F, and on a GPU one that its kernels do not take."""
    if given.is_cuda and MAX_CUDA_K < k <= d_sae:
        raise ValueError(f"{op}: k={k} on {given.device}; a GPU takes k <= {MAX_CUDA_K}. Move the inputs to a CPU.")
    if not 1 <= k <= d_sae:
        raise ValueError(f"{op}: k={k}; accepted is 1 <= k <= {d_sae}, the number of features (columns) given.")


def check_devices(op: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that live on different devices."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors are on {sorted(map(str, devices))}; move them to one device with .to(device).")


def shape_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_rank(op: str, name: str, tensor: Tensor, shape: str) -> None:
    rank = shape.count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(f"{op}: {name} has shape {shape_of(tensor)}; it must be {shape}. Flatten leading dimensions.")
