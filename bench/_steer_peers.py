"""What bench_steer.py times: qscope's steering and what people do without it, each a context around a model."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

OURS, NAIVE, SUMMED, UNSTEERED = "qscope", "plain hook", "plain hook, presummed", "unsteered, once more"
PACKAGES = {"repeng": "repeng", "steering-vectors": "steering_vectors"}
Attach = Callable[[], AbstractContextManager[Any]]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One kind of steering, and everyone who can do it."""

    name: str
    contestants: dict[str, Attach]


@dataclass(frozen=True)
class Scene:
    """A model and what it is steered with."""

    model: Any
    sae: Any
    """float32, on the model's device"""
    layer: int
    features: tuple[int, ...]
    """32 features of the SAE"""
    strengths: tuple[float, ...]
    preact_gate: tuple[int, float]
    """(feature, threshold): its pre-activation exceeds it at about half of the tokens"""
    exact_gate: tuple[int, float]
    """(feature, threshold): it is among the k, and exceeds it, at about half of the tokens"""
    vectors: Tensor
    """[layers, D] float32: one vector for every layer"""


def cases(scene: Scene) -> list[Case]:
    """The cases. Directions are added to every token, by all in the model's dtype."""
    from qscope.steering import Edit, Gate

    layer, f, a = scene.layer, scene.features[0], scene.strengths[0]
    added = [Edit(layer, f, strength=a) for f, a in zip(scene.features, scene.strengths, strict=True)]
    vectors = [Edit(i, vector=tuple(row.tolist()), strength=1.0) for i, row in enumerate(scene.vectors)]
    gates = {
        "conditional, preact": Gate(scene.preact_gate[0], threshold=scene.preact_gate[1]),
        "conditional, exact": Gate(scene.exact_gate[0], threshold=scene.exact_gate[1], mode="exact"),
    }
    row = scene.sae.W_dec[f].cpu()
    found = [
        Case(
            "single feature",
            {
                OURS: lambda: _qscope(scene, added[:1]),
                "qscope, record=False": lambda: _qscope(scene, added[:1], record=False),
                NAIVE: lambda: _hooks(scene.model, {layer: _adding(scene, [(a, row)])}),
                **_peers(scene, {layer: a * row}),
            },
        ),
        Case(
            "32 features",
            {
                OURS: lambda: _qscope(scene, added),
                NAIVE: lambda: _hooks(scene.model, {layer: _adding(scene, _pairs(scene))}),
                SUMMED: lambda: _hooks(scene.model, {layer: _adding(scene, [(1.0, _sum(scene))])}),
            },
        ),
        Case(
            "all layers",
            {
                OURS: lambda: _qscope(scene, vectors),
                NAIVE: lambda: _hooks(
                    scene.model, {i: _adding(scene, [(1.0, v)]) for i, v in enumerate(scene.vectors)}
                ),
                **_peers(scene, dict(enumerate(scene.vectors))),
            },
        ),
    ]
    changes = {"conditional, preact": _preact_change, "conditional, exact": _exact_change}
    for name, gate in gates.items():
        edit, change = Edit(layer, f, strength=a, when=gate), changes[name](scene)
        found.append(
            Case(
                name,
                {
                    OURS: lambda edit=edit: _qscope(scene, [edit]),
                    NAIVE: lambda change=change: _hooks(scene.model, {layer: change}),
                },
            )
        )
    return found


def _qscope(scene: Scene, edits: list[Any], record: bool = True) -> AbstractContextManager[Any]:
    from qscope.steering import SteeringSpec, steer

    return steer(scene.model, SteeringSpec(tuple(edits)), saes={scene.layer: scene.sae}, record=record)


# --- hooks as people write them ------------------------------------------------------------------------------


@contextlib.contextmanager
def _hooks(model: Any, changes: dict[int, Change]) -> Iterator[None]:
    from qscope.model import decoder_layers

    blocks = decoder_layers(model)

    def hook(change: Change) -> Callable[..., Any]:
        def after(_module: Any, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return after

    handles = [blocks[layer].register_forward_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _like(scene: Scene, tensor: Tensor) -> Tensor:
    return tensor.to(scene.model.device, scene.model.dtype)


def _pairs(scene: Scene) -> list[tuple[float, Tensor]]:
    return [(a, scene.sae.W_dec[f].cpu()) for f, a in zip(scene.features, scene.strengths, strict=True)]


def _sum(scene: Scene) -> Tensor:
    return torch.stack([a * d for a, d in _pairs(scene)]).sum(0)


def _adding(scene: Scene, pairs: list[tuple[float, Tensor]]) -> Change:
    """h + a * d, one direction after the other."""
    given = [(a, _like(scene, d)) for a, d in pairs]

    def change(h: Tensor) -> Tensor:
        for a, d in given:
            h = h + a * d
        return h

    return change


def _preact_change(scene: Scene) -> Change:
    feature, threshold = scene.preact_gate
    gate, bias = _like(scene, scene.sae.W_enc[feature]), float(scene.sae.b_enc[feature])
    moved = scene.strengths[0] * _like(scene, scene.sae.W_dec[scene.features[0]])

    def change(h: Tensor) -> Tensor:
        return h + (h @ gate + bias > threshold)[..., None] * moved

    return change


def _exact_change(scene: Scene) -> Change:
    """The full encode in plain PyTorch: a dense product and torch.topk."""
    feature, threshold = scene.exact_gate
    W_enc, b_enc, k = scene.sae.W_enc.float(), scene.sae.b_enc.float(), scene.sae.k
    moved = scene.strengths[0] * _like(scene, scene.sae.W_dec[scene.features[0]])

    def change(h: Tensor) -> Tensor:
        acts, indices = torch.nn.functional.linear(h.float(), W_enc, b_enc).topk(k, dim=-1)
        active = ((indices == feature) & (acts > threshold)).any(-1, keepdim=True)
        return h + active * moved

    return change


# --- packages ------------------------------------------------------------------------------------------------


def missing(name: str) -> str:
    """Why a package cannot be used here; "" if it can, and for what is none."""
    module = PACKAGES.get(name)
    if module is None:
        return ""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(module)
    except Exception as error:  # importing another library may raise anything; its row says what
        return f"does not import: {type(error).__name__}: {str(error)[:120]}"
    return ""


def version(name: str) -> str:
    return metadata.version(name) if name in PACKAGES and not missing(name) else ""


def _peers(scene: Scene, vectors: dict[int, Tensor]) -> dict[str, Attach]:
    return {
        "repeng": lambda: _repeng(scene, vectors),
        "steering-vectors": lambda: _steering_vectors(scene, vectors),
    }


@contextlib.contextmanager
def _repeng(scene: Scene, vectors: dict[int, Tensor]) -> Iterator[None]:
    """ControlModel puts a module around each block; `model` itself is changed and generates through it."""
    from repeng import ControlModel

    wrapped = ControlModel(scene.model, list(vectors))
    try:
        wrapped.set_raw_control({layer: _like(scene, vector) for layer, vector in vectors.items()})
        yield
    finally:
        wrapped.unwrap()


@contextlib.contextmanager
def _steering_vectors(scene: Scene, vectors: dict[int, Tensor]) -> Iterator[None]:
    from steering_vectors import SteeringVector

    vector = SteeringVector({layer: _like(scene, v) for layer, v in vectors.items()})
    with vector.apply(scene.model):
        yield
