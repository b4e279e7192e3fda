"""The arms of a steering evaluation: the spec at several strengths, and what it is compared with."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.sae import SAE
from qscope.steering import Edit, SteeringSpec
from qscope.steering.vectors import load_vector

UNSTEERED, SPEC, FLIPPED, PROMPT = "unsteered", "spec", "sign-flipped", "prompt only"


@dataclass(frozen=True)
class Point:
    """One way to run the model: an arm at one strength."""

    arm: str
    strength: float
    """Of the spec and its negative: the factor of its strengths; of a direction: |change| / typical norm; of the
    prompt-only arm: the number of the instruction."""
    size: float | None = None
    """|change of the residual| / typical norm of the residual, where that is one number"""
    spec: SteeringSpec | None = None
    instruction: str = ""

    @property
    def key(self) -> str:
        return f"{self.arm} {self.strength:.6g}"


@dataclass(frozen=True)
class Direction:
    """A baseline that adds one direction, at any size."""

    name: str
    note: str
    vector: tuple[float, ...]
    """[D], of any length"""


def added(spec: SteeringSpec, layer: int, saes: Mapping[int, SAE], width: int) -> Tensor | None:
    """What the `add` edits of a layer add together where all of them act: [D] float32; None if there is none."""
    total = torch.zeros(width)
    edits = [edit for edit in spec.edits if edit.layer == layer and edit.mode == "add"]
    for edit in edits:
        if edit.vector is not None:
            d = load_vector(edit.vector, layer, width)
        elif layer in saes:
            assert edit.feature is not None
            d = saes[layer].W_dec[edit.feature].detach().float().cpu()
        else:
            return None
        total += edit.amount * (d / d.norm() if edit.unit == "residual" else d)
    return total if edits else None


def relative_size(spec: SteeringSpec, norms: Mapping[int, float], saes: Mapping[int, SAE], width: int) -> float | None:
    """|change| / typical norm of the residual, at the layer where that is largest; None with edits other than add."""
    if any(edit.mode != "add" for edit in spec.edits):
        return None
    sizes = []
    for layer, norm in norms.items():
        total = added(spec, layer, saes, width)
        if total is not None:
            sizes.append(float(total.norm()) / norm)
    return max(sizes, default=None)


def spec_points(
    spec: SteeringSpec, strengths: Sequence[float], norms: Mapping[int, float], saes: Mapping[int, SAE], width: int
) -> list[Point]:
    """The spec with its strengths times each factor (negative ones: the sign-flipped arm)."""
    found = []
    for factor in strengths:
        scaled = spec.scaled(factor)
        size = relative_size(scaled, norms, saes, width)
        found.append(Point(SPEC if factor > 0 else FLIPPED, abs(factor), size, scaled))
    return found


def direction_point(direction: Direction, size: float, like: Edit, norm: float) -> Point:
    """h += size * norm * d/|d| at the layer and tokens, and under the condition, of the edit `like`."""
    edit = dataclasses.replace(
        like, feature=None, vector=direction.vector, mode="add", strength=size, unit="residual", scale=norm,
        activation="preact",
    )  # fmt: skip
    return Point(direction.name, size, size, SteeringSpec((edit,)))


def check_strengths(spec: SteeringSpec, strengths: Sequence[float]) -> list[float]:
    """Strengths in rising order. InputError for what is not above 0, and for factors that a spec does not feel."""
    if not strengths or any(not 0 < s < float("inf") for s in strengths):
        raise InputError(f"--strengths {' '.join(map(str, strengths))} was given; numbers above 0 are accepted.")
    if len(set(strengths)) > 1 and not any(edit.mode == "add" for edit in spec.edits):
        raise InputError(
            f"--strengths {' '.join(map(str, strengths))} was given, and the spec has no edit of mode add, whose "
            "strength a factor could change. Say --strengths 1."
        )
    return sorted(set(strengths))
