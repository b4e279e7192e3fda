"""What the launchers check of their arguments, and how an error names what was given."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)


def check(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def describe(**tensors: Tensor) -> str:
    """Name, shape, dtype and device of each tensor, for an error message."""
    return ", ".join(f"{name} {list(t.shape)} {t.dtype} on {t.device}" for name, t in tensors.items())


def check_gather(indices: Tensor, floats: dict[str, Tensor]) -> None:
    """ValueError unless indices is [N, K] of integers and `floats` are floating point, all on one device."""
    given = describe(indices=indices, **floats)
    check(indices.ndim == 2 and indices.dtype in INTS, f"indices must be [N, K] int32 or int64; got {given}.")
    check(
        all(t.dtype in FLOATS for t in floats.values()),
        f"The Triton kernels take float32, bfloat16 or float16; got {given}. Cast the other tensors.",
    )
    check(
        all(t.device == indices.device for t in floats.values()),
        f"All tensors must be on one device; got {given}. Move them together.",
    )
