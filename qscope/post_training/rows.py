"""The few encoder rows of a layer that a penalty reads, and what they belong to."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.ops.feature_penalty import MAX_FEATURES
from qscope.sae import SAE

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Rows of one layer. pre[n, s] = <x[n], W[s]> + b[s]."""

    W: Tensor
    """[S, D] float32"""
    b: Tensor
    """[S] float32"""
    features: tuple[int, ...] | None = None
    """Ids in the SAE; None for directions that belong to none."""
    sae_hash: str | None = None
    """`SAE.weight_hash()` of that SAE."""

    def fingerprint(self) -> str:
        """sha256 over the rows and biases: alphas are estimates of these rows alone."""
        digest = hashlib.sha256()
        for tensor in (self.W, self.b):
            digest.update(f"{list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def sae_rows(saes: Mapping[int, SAE], features: Mapping[int, Sequence[int]]) -> dict[int, Rows]:
    """The encoder rows of `features` (layer -> ids) of `saes` (layer -> SAE), copied, in float32.

    Raises InputError for a layer without SAE and for ids that the SAE does not have or that are named twice.
    """
    found = {}
    for layer, ids in _layers(features).items():
        if layer not in saes:
            raise InputError(
                f"Features of layer {layer} were given, and SAEs of the layers {sorted(saes)}. Give one for each layer."
            )
        sae, chosen = saes[layer], tuple(ids)
        wrong = [i for i in chosen if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < sae.d_sae]
        if wrong or not 1 <= len(set(chosen)) == len(chosen) <= MAX_FEATURES:
            raise InputError(
                f"Features {list(chosen)} of layer {layer} were given; accepted are 1 to {MAX_FEATURES} different ids "
                f"from 0 to {sae.d_sae - 1}."
            )
        place = torch.tensor(chosen, device=sae.device)
        W, b = (t.detach().index_select(0, place).float().clone() for t in (sae.W_enc, sae.b_enc))
        found[layer] = Rows(W, b, chosen, sae.weight_hash())
    return found


def direction_rows(rows: Mapping[int, Tensor], bias: Mapping[int, Tensor] | None = None) -> dict[int, Rows]:
    """Any directions as rows: `rows` layer -> [S, D], `bias` layer -> [S], 0 where it is not given.

    Raises InputError for shapes that do not fit and for numbers that are not finite.
    """
    found = {}
    for layer, W in _layers(rows).items():
        b = torch.zeros(W.shape[:1], device=W.device) if bias is None or layer not in bias else bias[layer]
        if W.ndim != 2 or b.shape != W.shape[:1] or not 1 <= W.shape[0] <= MAX_FEATURES:
            raise InputError(
                f"Directions of layer {layer} have the shape {list(W.shape)} and biases {list(b.shape)}; accepted are "
                f"[S, D] and [S] with S from 1 to {MAX_FEATURES}."
            )
        if not bool(W.isfinite().all() and b.isfinite().all()):
            raise InputError(f"Directions of layer {layer} hold NaN or infinity. Give finite numbers.")
        found[layer] = Rows(W.detach().float().clone(), b.detach().float().clone())
    return found


def _layers(given: Mapping[int, T]) -> dict[int, T]:
    """The mapping by ascending layer; InputError where it is empty or a key is no layer."""
    wrong = [layer for layer in given if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0]
    if wrong or not given:
        raise InputError(
            f"Layers {list(given)} were given; at least one whole number from 0 (blocks counted from 0) is accepted."
        )
    return dict(sorted(given.items()))


def check_rows(rows: Mapping[int, Rows], width: int, blocks: int) -> None:
    """InputError unless the rows fit a model of `blocks` blocks and this residual width."""
    for layer, one in rows.items():
        if layer >= blocks or one.W.shape[1] != width:
            raise InputError(
                f"Rows of layer {layer} and width {one.W.shape[1]} were given; the model has the layers 0 to "
                f"{blocks - 1} and width {width}. Take an SAE that was trained on this model."
            )


def names(values: Iterable[object], most: int = 8) -> str:
    """A list for an error message, cut after `most`."""
    listed = list(map(str, values))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
