"""What every checkpoint format is turned into: four checked tensors, one row per feature, and a card."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qscope.errors import CheckpointError, InputError

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Elements looked at together, so that a check of a 2 GB matrix needs some megabytes beside it.
CHUNK = 1 << 22


@dataclass
class SAECard:
    """Where an SAE belongs and where it came from. The SAE itself sets `k`, `d_in`, `d_sae` and `dtype`."""

    model: str | None = None
    """name of the language model"""
    hook_point: str | None = None
    """module whose output is encoded, `model.layers.15`; set from `layer` when not given"""
    layer: int | None = None
    """decoder layer, counted from 0"""
    k: int = 0
    d_in: int = 0
    d_sae: int = 0
    dtype: str = ""
    source: str | None = None
    """file or repository that the weights were read from"""
    source_hash: str | None = None
    """sha256 of that file"""
    context_size: int | None = None
    """tokens per training sequence"""
    training: dict[str, Any] = field(default_factory=dict)
    """settings and results of the training run, plain JSON values"""

    def __post_init__(self) -> None:
        if self.hook_point is None and self.layer is not None:
            self.hook_point = f"model.layers.{self.layer}"


class Weights(NamedTuple):
    """A loaded SAE before it becomes a module: all four tensors of one dtype on one device, contiguous."""

    W_enc: Tensor
    """[F, D]"""
    W_dec: Tensor
    """[F, D]"""
    b_enc: Tensor
    """[F]"""
    b_dec: Tensor
    """[D]"""
    k: int
    card: SAECard


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """float32 for None, else the dtype of that name. Raises InputError for one that an SAE cannot have."""
    if dtype is None:
        return torch.float32
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} was asked for; an SAE can be loaded as {', '.join(DTYPES)}.")
    return DTYPES[name]


def as_device(device: torch.device | str | int | None) -> torch.device:
    """Raises InputError for a device that does not exist here, before gigabytes have been read."""
    try:
        wanted = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not one that torch knows: {first_line(error)}") from error
    if wanted.type == "cuda" and not 0 <= (wanted.index or 0) < torch.cuda.device_count():
        raise InputError(
            f"device {str(wanted)!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices "
            "here. Use another one, such as device='cpu'."
        )
    return wanted


def first_line(error: BaseException) -> str:
    """The reason in an exception of another library, without its pages of advice."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_k(k: Any, d_sae: int, where: str, error: type[Exception] = CheckpointError) -> int:
    if isinstance(k, bool) or not isinstance(k, int):
        raise error(f"{where}: k must be a whole number, but {k!r} was given.")
    if not 1 <= k <= d_sae:
        raise error(
            f"{where}: k={k} was given, but the dictionary has d_sae={d_sae} features; k must lie in 1..{d_sae}."
        )
    return k


def agree(what: str, claims: Mapping[str, int | None]) -> int | None:
    """The one value that all sources with a claim share. Raises CheckpointError naming two that differ."""
    known = [(source, value) for source, value in claims.items() if value is not None]
    for source, value in known[1:]:
        if value != known[0][1]:
            raise CheckpointError(
                f"{what}={known[0][1]} according to {known[0][0]}, but {what}={value} according to {source}. "
                "Check that this is the SAE you meant; leave the argument out to use the checkpoint's own "
                "value."
            )
    return known[0][1] if known else None


def check_keys(found: Any, where: str) -> None:
    """Raises CheckpointError unless the keys are exactly the four names."""
    missing = [name for name in NAMES if name not in found]
    extra = sorted(repr(key)[:60] for key in found if key not in NAMES)
    if missing or extra:
        shown = ", ".join(extra[:10]) + (f" and {len(extra) - 10} more" if len(extra) > 10 else "")
        raise CheckpointError(
            f"{where} should hold exactly the tensors {', '.join(NAMES)}. Missing: "
            f"{', '.join(missing) or 'none'}; unexpected: {shown or 'none'}."
        )


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    where: str,
    decoder_rows: bool,
    d_sae: int | None = None,
    d_in: int | None = None,
) -> tuple[int, int]:
    """(F, D) of four tensors, told by their names: b_enc gives F, b_dec gives D, the matrices must follow.

    decoder_rows: W_dec is [F, D] (qscope) rather than [D, F] (Qwen-Scope). d_sae, d_in: what the name
    promises.
    With F equal to D a transposed matrix has the right shape; nothing in the file can tell then.
    """
    for name in NAMES:
        if dtypes[name] not in DTYPES:
            raise CheckpointError(f"{where}: {name} has dtype {dtypes[name]}; accepted are {', '.join(DTYPES)}.")
    for name in ("b_enc", "b_dec"):
        if len(shapes[name]) != 1 or shapes[name][0] < 1:
            raise CheckpointError(f"{where}: {name} has shape {list(shapes[name])}; it must be a vector.")
    features, width = shapes["b_enc"][0], shapes["b_dec"][0]
    expected = {
        "W_enc": (features, width),
        "W_dec": (features, width) if decoder_rows else (width, features),
    }
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            hint = " It looks transposed." if tuple(shapes[name]) == shape[::-1] else ""
            raise CheckpointError(
                f"{where}: {name} has shape {list(shapes[name])}, but b_enc [{features}] and b_dec [{width}] "
                f"ask for {list(shape)}.{hint}"
            )
    for label, got, promised in (("d_sae", features, d_sae), ("d_in", width, d_in)):
        if promised is not None and got != promised:
            raise CheckpointError(
                f"{where}: the tensors have {label}={got}, but the name or card promises {label}={promised}."
            )
    return features, width


def check_finite(
    tensors: Mapping[str, Tensor],
    where: str,
    advice: str = "The checkpoint is damaged or its training diverged.",
) -> None:
    """Raises CheckpointError with the tensor's name and the number of NaN and infinite entries."""
    for name, tensor in tensors.items():
        # The extremes are NaN if any entry is; unlike isfinite().all() they need one pass and no memory.
        if bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):
            continue
        parts = tensor.detach().reshape(-1).split(CHUNK)
        nan = sum(int(part.isnan().sum()) for part in parts)
        infinite = sum(int(part.isinf().sum()) for part in parts)
        raise CheckpointError(
            f"{where}: {name} has {nan} NaN and {infinite} infinite of {tensor.numel()} values. {advice}"
        )


def place(tensor: Tensor, dtype: torch.dtype, device: torch.device, transpose: bool = False) -> Tensor:
    """A fresh contiguous copy: what a file is mapped to must not stay the weights, the file may change."""
    source = tensor.detach().t() if transpose else tensor.detach()
    return torch.empty(source.shape, dtype=dtype, device=device).copy_(source)


def collect(
    tensors: Mapping[str, Tensor],
    k: int,
    card: SAECard,
    where: str,
    decoder_rows: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Weights:
    """Checks the values and makes the compute copy. `tensors` may be mapped from a file."""
    flat = {name: tensors[name] if tensors[name].is_contiguous() else tensors[name].contiguous() for name in NAMES}
    check_finite(flat, where)
    ready = {name: place(flat[name], dtype, device, transpose=name == "W_dec" and not decoder_rows) for name in NAMES}
    if dtype == torch.float16:
        check_finite(ready, where, "The stored values exceed float16; load with dtype='bfloat16' or 'float32'.")
    return Weights(**ready, k=k, card=card)
