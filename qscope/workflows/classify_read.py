"""What a few named features do in texts: the model to the deepest layer that is needed, and nothing else.

Two memberships. `topk`: the feature's activation where it is among the K largest of the token, else 0, by the full
encode. `preact`: ReLU(w x + b) of the feature whether or not it is among the K largest; one row of the encoder each.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.linalg import vector_norm

from qscope.data import Windows, batches
from qscope.finding.pooled import Ints, PooledCodes, pool
from qscope.model import residuals
from qscope.sae import SAE
from qscope.store_packing import EXTREME_FACTOR
from qscope.workflows.encoder import Encoder
from qscope.workflows.text_features import TokenTexts, windows_of

Membership = Literal["topk", "preact"]
BLOCK_TOKENS = 16_384  # at most so many tokens are lost when a run is killed
AROUND = 8  # tokens shown on either side of one
NORM_TOKENS = 4096  # of the training texts, whose median norm tells what an attention sink is


@dataclass(frozen=True)
class Block:
    """Named features in T consecutive texts."""

    texts: TokenTexts
    tokens: Ints
    """[T] kept tokens"""
    codes: Mapping[int, PooledCodes]
    """Layer -> codes of the named features only"""
    strongest: Mapping[int, Ints]
    """Layer -> [T, C] place in the text's tokens of the largest activation (the first of equals), -1: never above 0"""
    last: Ints
    """[T] place of the last kept token, -1 without one"""
    extreme: int
    """Tokens left out as attention sinks"""
    nan: int


def features_at(
    x: Tensor, sae: SAE, features: Tensor, membership: Membership, precision: str
) -> npt.NDArray[np.float32]:
    """[N, C] activations, float32, of the C features for the residuals x [N, D]."""
    if membership == "preact":
        weight, bias = (t.detach()[features].double() for t in (sae.W_enc, sae.b_enc))
        return (x.double() @ weight.T + bias).float().relu_().cpu().numpy()  # as RuleModule and encode_topk round
    acts, indices = sae.encode_topk(x, precision)
    place = torch.full((sae.d_sae,), len(features), dtype=torch.int64, device=x.device)
    place[features] = torch.arange(len(features), device=x.device)
    found = torch.zeros(len(x), len(features) + 1, device=x.device)
    found.scatter_(1, place[indices.long()], acts.float())
    return found[:, :-1].cpu().numpy()


def read_block(
    encoder: Encoder,
    features: Mapping[int, Sequence[int]],
    texts: TokenTexts,
    membership: Membership,
    limits: Mapping[int, float],
) -> Block:
    """The named features (ascending, by layer) in some texts.

    limits: layer -> residual norm above which a token is left out as an attention sink. First tokens (without a BOS),
    special tokens and tokens that are not finite are left out as well. A token counts at all layers or at none.
    """
    windows = windows_of(texts)
    count, layers = len(windows.token), tuple(sorted(features))
    acts = {layer: np.zeros((count, len(features[layer])), np.float32) for layer in layers}
    norms = {layer: np.zeros(count, np.float32) for layer in layers}
    for places, x in residual_batches(encoder, windows, layers):
        for layer in layers:
            sae = encoder.saes[layer]
            wanted = torch.tensor(list(features[layer]), dtype=torch.int64, device=x[layer].device)
            acts[layer][places] = features_at(x[layer], sae, wanted, membership, encoder.precision)
            norms[layer][places] = vector_norm(x[layer], dim=1, dtype=torch.float32).cpu().numpy()
    document, keep = windows.document.astype(np.int64), counted(encoder, windows)
    finite, ordinary = keep.copy(), keep.copy()
    for layer in layers:
        finite &= np.isfinite(norms[layer]) & np.isfinite(acts[layer]).all(axis=1)
        ordinary &= norms[layer] <= limits.get(layer, np.inf)
    ordinary &= finite
    codes = {}
    for layer in layers:
        ids = np.broadcast_to(np.asarray(features[layer], np.int32), acts[layer].shape)
        codes[layer] = pool(acts[layer], ids, document, ordinary, len(texts))
    return Block(
        texts=texts,
        tokens=np.bincount(document[ordinary], minlength=len(texts)).astype(np.int64),
        codes=codes,
        strongest={layer: _strongest(acts[layer], ordinary, windows, len(texts)) for layer in layers},
        last=_last(ordinary, windows, len(texts)),
        extreme=int((finite & ~ordinary).sum()),
        nan=int((keep & ~finite).sum()),
    )


def residual_batches(
    encoder: Encoder, windows: Windows, layers: Sequence[int]
) -> Iterator[tuple[npt.NDArray[np.int64], dict[int, Tensor]]]:
    """(places in `windows`, layer -> residuals [n, D] of these tokens), batch by batch."""
    for rows in batches(windows.starts, encoder.batch_tokens):
        ids, real, places = encoder.pad(windows, rows)
        found = residuals(encoder.model, ids, layers)
        start = 0 if encoder.bos is None else 1
        yield places, {layer: found[layer][:, start:][real] for layer in layers}


def counted(encoder: Encoder, windows: Windows) -> npt.NDArray[np.bool_]:
    """[N] tokens that count as far as their activations are ordinary: no special ones, no first ones without a BOS."""
    keep = ~np.isin(windows.token.astype(np.int64), np.array(sorted(encoder.tokenizer.all_special_ids), np.int64))
    if encoder.bos is None:
        keep &= windows.position > 0
    return keep


def norm_limits(encoder: Encoder, texts: TokenTexts, layers: Sequence[int]) -> dict[int, float]:
    """Layer -> `EXTREME_FACTOR` times the median residual norm of the tokens of these texts that count."""
    windows = windows_of(texts)
    keep, norms = counted(encoder, windows), {layer: np.zeros(len(windows.token)) for layer in layers}
    for places, x in residual_batches(encoder, windows, layers):
        for layer in layers:
            norms[layer][places] = vector_norm(x[layer], dim=1, dtype=torch.float32).cpu().numpy()
    found = {}
    for layer, values in norms.items():
        usable = values[keep & np.isfinite(values)]
        found[layer] = float(EXTREME_FACTOR * np.median(usable)) if len(usable) else float("inf")
    return found


def train_limits(encoder: Encoder, texts: TokenTexts, train: Ints, layers: Sequence[int]) -> dict[int, float]:
    """`norm_limits` of the first training texts. train: their places in `texts`."""
    ends = np.cumsum(texts.lengths[train])
    return norm_limits(encoder, texts.rows(train[: int(np.searchsorted(ends, NORM_TOKENS)) + 1]), layers)


def block_rows(lengths: Ints) -> list[slice]:
    """Runs of texts of at most BLOCK_TOKENS tokens and 4,096 texts; a longer text comes alone."""
    found, start, size = [], 0, 0
    for i, length in enumerate(lengths.tolist()):
        if i > start and (size + length > BLOCK_TOKENS or i - start == 4096):
            found.append(slice(start, i))
            start, size = i, 0
        size += length
    return [*found, slice(start, len(lengths))] if len(lengths) else []


def token_text(tokenizer: Any, ids: npt.NDArray[np.int64], place: int) -> tuple[str, str, str]:
    """(some text before the token, the token, some text behind it)."""
    left, right = max(0, place - AROUND), place + 1 + AROUND
    parts = (ids[left:place], ids[place : place + 1], ids[place + 1 : right])
    before, token, after = (str(tokenizer.decode(part.tolist())) for part in parts)
    return before, token, after


def _strongest(acts: npt.NDArray[np.float32], keep: npt.NDArray[np.bool_], windows: Windows, texts: int) -> Ints:
    """[T, C] place in the text of the largest activation; -1: none above 0."""
    found = np.full((texts, acts.shape[1]), -1, np.int64)
    masked = np.where(keep[:, None], acts, np.float32(0))
    for low, high in itertools.pairwise(windows.starts.tolist()):
        part = masked[low:high]
        found[int(windows.document[low])] = np.where(part.max(axis=0) > 0, part.argmax(axis=0), -1)
    return found


def _last(keep: npt.NDArray[np.bool_], windows: Windows, texts: int) -> Ints:
    """[T] place in the text of its last kept token, -1 without one."""
    found = np.full(texts, -1, np.int64)
    places = np.flatnonzero(keep)
    found[windows.document[places].astype(np.int64)] = windows.position[places]  # the last of a repeated index stays
    return found
