"""What the plug-in is told when the engine starts: `additional_config={"qscope": {...}}`."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qscope.errors import InputError
from qscope.ops.steer_add_ import MAX_DIRECTIONS
from qscope.sae import SAE
from qscope.steering import SteeringSpec

KEY = "qscope"
MAX_READS = 64


@dataclass(frozen=True)
class Options:
    """Which layers can be steered and read. The operator runs in these layers alone."""

    saes: Mapping[int, str] = field(default_factory=dict)
    """Layer -> SAE, as for `qscope.SAE.from_pretrained`"""
    layers: tuple[int, ...] = ()
    """Layers without an SAE that plain vectors may steer"""
    specs: Mapping[str, SteeringSpec] = field(default_factory=dict)
    """Specs that a request can name"""
    max_directions: int = MAX_DIRECTIONS
    """Different edits of one layer among the unfinished requests, 1..32"""
    max_reads: int = 8
    """Different features of one layer that unfinished requests read out, 0..64"""
    allow_mismatch: bool = False
    """Take a spec although it was made for another SAE"""

    @property
    def all_layers(self) -> tuple[int, ...]:
        return tuple(sorted({*self.saes, *self.layers}))


def options_of(vllm_config: Any) -> Options | None:
    """The plug-in's options in a VllmConfig; None where it has none, and the plug-in leaves vLLM as it is."""
    given = vllm_config.additional_config
    if not isinstance(given, dict) or given.get(KEY) is None:
        return None
    try:
        return _read_once(json.dumps(given[KEY], sort_keys=True))
    except TypeError as error:
        raise _wrong(f"is not plain data ({error})") from error


@functools.lru_cache(maxsize=16)
def _read_once(text: str) -> Options:
    """Asked for with every request; a spec file that changes meanwhile changes nothing."""
    return from_json(json.loads(text))


def from_json(given: Any) -> Options:
    """Options from what JSON gives. Raises InputError for unknown names and values that do not fit."""
    names = [f.name for f in fields(Options)]
    if not isinstance(given, dict) or not set(given) <= set(names):
        unknown = sorted(set(given) - set(names)) if isinstance(given, dict) else type(given).__name__
        raise _wrong(f"has {unknown}; an object with {', '.join(names)} is accepted")
    saes, specs = given.get("saes", {}), given.get("specs", {})
    if not isinstance(saes, dict) or not all(str(layer).isdecimal() for layer in saes):
        raise _wrong('has `saes` that are not layers with sources, such as {"15": "path/of/sae"}')
    layers = given.get("layers", [])
    if not isinstance(layers, list | tuple) or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _wrong(f"has layers {layers!r}; a list of layers from 0 is accepted")
    if not isinstance(specs, dict):
        raise _wrong("has `specs` that are not names with files or specs")
    options = Options(
        saes={int(layer): str(source) for layer, source in saes.items()},
        layers=tuple(layers),
        specs={str(name): _spec(item) for name, item in specs.items()},
        max_directions=_count(given, "max_directions", 1, MAX_DIRECTIONS),
        max_reads=_count(given, "max_reads", 0, MAX_READS),
        allow_mismatch=bool(given.get("allow_mismatch", False)),
    )
    if not options.all_layers:
        raise _wrong("names no layer; give `saes`, or `layers` for plain vectors")
    return options


def _spec(item: Any) -> SteeringSpec:
    return SteeringSpec.load(Path(item)) if isinstance(item, str) else SteeringSpec.from_json(item)


def _count(given: dict[str, Any], name: str, least: int, most: int) -> int:
    value = given.get(name, getattr(Options, name))
    if type(value) is not int or not least <= value <= most:
        raise _wrong(f"has {name} {value!r}; a whole number from {least} to {most} is accepted")
    return value


def _wrong(what: str) -> InputError:
    return InputError(f"additional_config['{KEY}'], given to vLLM, {what} (docs/vllm.md).")


@functools.cache
def load_sae(source: str, layer: int) -> SAE:
    """The SAE in float32 in this process's host memory; its rows are copied to the device when a request asks."""
    return SAE.from_pretrained(source, layer=layer, device="cpu")


@functools.cache
def sae_hash(source: str, layer: int) -> str:
    return load_sae(source, layer).weight_hash()
