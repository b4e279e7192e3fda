"""The released Qwen-Scope SAE groups (Qwen-Scope report, table 1) and the grammar of their names.

A repository is called `Qwen/SAE-Res-{model}-W{N}K-L0_{k}` and holds one file `layer{n}.sae.pt` per decoder
layer,
counted from 0. K is 1024: W64K is a dictionary of 65536 features. The files carry neither k nor the model, so
the
name is the only source of both.
"""

import re
from typing import NamedTuple

from qscope.errors import CheckpointError

OWNER = "Qwen"


class Group(NamedTuple):
    """One repository: SAEs of one backbone, width and k, one per decoder layer."""

    name: str
    """repository without its owner, `SAE-Res-Qwen3-8B-Base-W64K-L0_50`"""
    backbone: str
    """Hub name of the language model, `Qwen/Qwen3-8B-Base`"""
    layers: int
    """decoder layers; files count them 0 .. layers - 1"""
    d_model: int
    d_sae: int
    k: int

    @property
    def repository(self) -> str:
        return f"{OWNER}/{self.name}"


class NameParts(NamedTuple):
    """What a name of the grammar says."""

    name: str
    model: str
    d_sae: int
    k: int


def _group(model: str, layers: int, d_model: int, width: int, k: int) -> Group:
    return Group(f"SAE-Res-{model}-W{width}K-L0_{k}", f"{OWNER}/{model}", layers, d_model, width * 1024, k)


# The two mixture-of-experts backbones come in a crossed pairing: W32K only with L0_50, W128K only with
# L0_100.
GROUPS: tuple[Group, ...] = (
    _group("Qwen3-1.7B-Base", 28, 2048, 32, 50),
    _group("Qwen3-1.7B-Base", 28, 2048, 32, 100),
    _group("Qwen3-8B-Base", 36, 4096, 64, 50),
    _group("Qwen3-8B-Base", 36, 4096, 64, 100),
    _group("Qwen3.5-2B-Base", 24, 2048, 32, 50),
    _group("Qwen3.5-2B-Base", 24, 2048, 32, 100),
    _group("Qwen3.5-9B-Base", 32, 4096, 64, 50),
    _group("Qwen3.5-9B-Base", 32, 4096, 64, 100),
    _group("Qwen3.5-27B", 64, 5120, 80, 50),
    _group("Qwen3.5-27B", 64, 5120, 80, 100),
    _group("Qwen3-30B-A3B-Base", 48, 2048, 32, 50),
    _group("Qwen3-30B-A3B-Base", 48, 2048, 128, 100),
    _group("Qwen3.5-35B-A3B-Base", 40, 2048, 32, 50),
    _group("Qwen3.5-35B-A3B-Base", 40, 2048, 128, 100),
)

_GRAMMAR = re.compile(r"SAE-Res-(?P<model>[A-Za-z0-9.\-]+?)-W(?P<width>\d{1,4})K-L0_(?P<k>\d{1,6})(?![\w.])")
_FILE = re.compile(r"layer(?P<layer>\d{1,5})\.sae\.pt")


def parse_name(text: str) -> NameParts | None:
    """The last group name inside `text`, which may be a repository, a folder or a path of the Hub's cache."""
    found = list(_GRAMMAR.finditer(text))
    if not found:
        return None
    match = found[-1]
    return NameParts(match.group(), match["model"], int(match["width"]) * 1024, int(match["k"]))


def file_name(layer: int) -> str:
    return f"layer{layer}.sae.pt"


def layer_of(name: str) -> int | None:
    """The layer that a file name `layer{n}.sae.pt` states, or None."""
    match = _FILE.fullmatch(name)
    return int(match["layer"]) if match else None


def find(text: str) -> Group | None:
    """The released group that `text` names, or None."""
    parts = parse_name(text)
    return next((group for group in GROUPS if parts and group.name == parts.name), None)


def require_group(repository: str) -> Group | None:
    """The released group behind a Hub name; None for another owner's group of the same grammar.

    Raises CheckpointError for a name under the owner Qwen (or without an owner) that was never released.
    """
    group = find(repository)
    owner = repository.rpartition("/")[0]
    if group is not None or owner not in ("", OWNER):
        return group
    parts = parse_name(repository)
    related = [item for item in GROUPS if parts and item.backbone == f"{OWNER}/{parts.model}"]
    raise CheckpointError(
        f"{repository!r} is not a released Qwen-Scope group, so nothing was downloaded. "
        f"{'For this model there are' if related else 'There are'}: "
        f"{', '.join(item.repository for item in related or GROUPS)}."
    )


def check_layer(group: Group, layer: int | None) -> int:
    """`layer` if the group has it. Raises CheckpointError that names the layers there are."""
    span = f"layers 0 to {group.layers - 1}, one SAE after each decoder layer of {group.backbone}"
    if layer is None:
        raise CheckpointError(f"{group.name} needs a layer: it has {span}. Give layer=0 for the first.")
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < group.layers:
        raise CheckpointError(f"layer {layer!r} was given, but {group.name} has {span}.")
    return layer
