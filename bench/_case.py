"""What a benchmark case is, and the shapes that all benchmarks share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._floors import Floor

OURS, PEER, YARDSTICK = "ours", "peer", "yardstick"


class Sizes(NamedTuple):
    """N tokens, D residual width, F features, K active ones; 0 where an operator has no such size."""

    N: int
    D: int
    F: int
    K: int


@dataclass(frozen=True)
class Provider:
    """One implementation of the operator."""

    make: Callable[[Any], Callable[[], Any]]
    """Input set -> the call that is timed. It clones what the call overwrites."""
    role: str = PEER
    """`ours`, `peer`, or `yardstick`: part of the work, such as the matrix product alone, that floors and bars use."""
    precision: str = "float32"
    """What its result is held to: float32, tf32 or bfloat16."""
    adapt: Callable[[Any], Any] | None = None
    """Result -> what the check reads; never timed."""
    check: Callable[[Any, Any, str], None] | None = None
    """In place of the case's check, for a yardstick that returns something else."""
    optional: bool = False
    """A variant of ours that may refuse a shape. A wrong result of it is a fault all the same."""
    note: Callable[[Any], str] | None = None
    """Input set -> what its row of the table says beside the time; never timed."""
    missing: str = ""
    """Why it cannot run here, for example that its package is not installed."""


@dataclass(frozen=True)
class Case:
    """One operator at one shape and dtype with everything that is timed side by side."""

    op: str
    sizes: Sizes
    dtype: str
    inputs: Callable[[int], tuple[Any, ...]]
    """Seed -> one input set, tensors on the device."""
    want: Callable[[tuple[Any, ...]], Any]
    """Input set -> the float32 (or float64) answer."""
    check: Callable[[Any, Any, str], None]
    """(result, answer, precision) -> raises AssertionError where the result is wrong."""
    providers: dict[str, Provider]
    floor: Floor
    gemm: str = ""
    """Name of the yardstick whose time is that of the floor's matrix product."""
    seconds: float = 0.0
    """Most seconds of timed rounds; 0 takes the device's default."""
    in_place: bool = False
    """Calls change their input, so that only the first result can be checked."""

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes._asdict().items() if value)
        return f"{self.op} {sizes} {self.dtype}"


# The Qwen-Scope dictionaries: name -> (D, F).
QWEN_SCOPE = {"A": (2048, 32768), "B": (4096, 65536), "C": (5120, 81920), "D": (2048, 131072)}
SMALL = (768, 8192)
TINY = (256, 4096)


def widths(device: str, quick: bool) -> list[tuple[int, int]]:
    """(D, F) of the dictionaries that are measured on this device."""
    if device.startswith("cuda"):
        return [QWEN_SCOPE["A"]] if quick else list(QWEN_SCOPE.values())
    return [TINY] if quick else [QWEN_SCOPE["A"], SMALL]


def tokens(device: str, quick: bool) -> int:
    """N of the large batch."""
    return 8192 if device.startswith("cuda") else 64 if quick else 512


def actives(device: str, quick: bool) -> tuple[int, ...]:
    """The K that are measured."""
    return (50, 100) if device.startswith("cuda") and not quick else (50,)


def generator(device: str, seed: int) -> torch.Generator:
    """Inputs depend on the seed alone, so that a case can be repeated."""
    return torch.Generator(device).manual_seed(1234 + seed)


def dictionary(device: str, seed: int, D: int, F: int, dtype: torch.dtype) -> Tensor:
    """[F, D] rows of about unit norm."""
    return (torch.randn(F, D, generator=generator(device, seed), device=device) / D**0.5).to(dtype)


def activations(device: str, seed: int, sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """top_acts [N, K] and top_indices [N, K] int32, uniform over the dictionary: the least kind to a cache."""
    gen = generator(device, seed + 1)
    shape = (sizes.N, sizes.K)
    acts = torch.rand(shape, generator=gen, device=device).to(dtype)
    return acts, torch.randint(0, sizes.F, shape, generator=gen, device=device, dtype=torch.int32)


def name_of(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a fresh graph: cases share code objects, and a ninth shape would silently stay eager.

    A graph break is an error, so that no eager time is shown as a compiled one.
    """
    torch.compiler.reset()
    result: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
    return result
