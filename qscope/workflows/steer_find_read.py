"""The texts of `qscope steer find` through the model once: sparse codes of every token at every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qscope.data import Piece, Windows, batches, tokenize
from qscope.errors import InputError
from qscope.finding.contrast import TokenLists, common_prefix, shared_tokens
from qscope.finding.pooled import Floats, PooledCodes, pool
from qscope.model import residuals
from qscope.store_packing import EXTREME_FACTOR
from qscope.workflows.encoder import Encoder, LayerBuffer
from qscope.workflows.steer_find_result import Context, TokenFacts
from qscope.workflows.steer_find_texts import PARAPHRASE, Texts

if TYPE_CHECKING:
    from qscope.workflows.steer_find import SteerFindConfig

CONTEXT_TOKENS = 12


@dataclass(frozen=True)
class Tokens:
    """The tokens of all texts, in order."""

    windows: Windows
    """One window for each text that has tokens"""
    keep: npt.NDArray[np.bool_]
    """[N] counts at every layer, as far as its activations are ordinary"""
    texts: int

    @property
    def text(self) -> npt.NDArray[np.int64]:
        return self.windows.document.astype(np.int64)


@dataclass(frozen=True)
class LayerCodes:
    """What is kept of one layer: codes of every token, K numbers and ids each."""

    top_acts: npt.NDArray[np.float32]
    top_indices: npt.NDArray[np.int32]
    keep: npt.NDArray[np.bool_]
    pooled: PooledCodes
    facts: TokenFacts
    residual_norm: float

    def activations(self, feature: int, rows: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], Floats]:
        """(tokens, activations) of the kept tokens among `rows` [N] at which the feature fires."""
        at, place = np.nonzero((self.top_indices == feature) & (self.top_acts > 0) & (self.keep & rows)[:, None])
        return at, self.top_acts[at, place].astype(np.float64)


def cut_texts(encoder: Encoder, texts: Sequence[str], context_size: int) -> Windows:
    """The first `context_size` tokens of each text, one window each; texts without tokens have none."""
    found = tokenize(encoder.tokenizer, [Piece(i, text) for i, text in enumerate(texts)], context_size, (0, 0))
    inside = found.position < context_size
    document = found.document[inside]
    starts = np.flatnonzero(np.diff(document.astype(np.int64), prepend=-1, append=len(texts)))
    return Windows(document, found.position[inside], found.token[inside], starts)


def select_tokens(encoder: Encoder, texts: Texts, config: "SteerFindConfig") -> Tokens:
    """Leave out the first token of every text, special tokens, and what the two options of the official app name.

    With a BOS before every text, that is the attention sink, and first tokens count.
    """
    windows = cut_texts(encoder, [text.text for text in texts.all], config.context_size)
    keep = ~np.isin(windows.token, np.array(sorted(encoder.tokenizer.all_special_ids), np.int64))
    if encoder.bos is None:
        keep &= windows.position > 0
    if config.drop_shared != "no" or config.drop_prefix != "no":
        for paraphrase in (False, True):
            among = (texts.part == PARAPHRASE) == paraphrase
            _drop(keep, windows, [np.flatnonzero(among & side) for side in (texts.positive, ~texts.positive)], config)
    return Tokens(windows, keep, len(texts.all))


def _drop(
    keep: npt.NDArray[np.bool_], windows: Windows, sides: list[npt.NDArray[np.int64]], config: "SteerFindConfig"
) -> None:
    """--drop-shared and --drop-prefix, in place; sides: numbers of the positive and of the negative texts."""
    if not all(map(len, sides)):
        return
    text = windows.document.astype(np.int64)
    bounds = np.searchsorted(text, np.arange(int(text[-1]) + 2)).tolist()
    lists = TokenLists(*([windows.token[bounds[i] : bounds[i + 1]].tolist() for i in side] for side in sides))
    shared, prefix = shared_tokens(lists, config.drop_shared), common_prefix(lists, config.drop_prefix)
    for side, out, sizes in zip(sides, shared, prefix, strict=True):
        for i, tokens, size in zip(side.tolist(), out, sizes, strict=True):
            mine = slice(bounds[i], bounds[i + 1])
            keep[mine] &= (windows.position[mine] >= size) & ~np.isin(windows.token[mine], list(tokens))


def usable(tokens: Tokens) -> npt.NDArray[np.bool_]:
    """[T] texts with a token that counts."""
    return np.bincount(tokens.text[tokens.keep], minlength=tokens.texts) > 0


def encode(encoder: Encoder, tokens: Tokens, bar: Any) -> dict[int, LayerCodes]:
    """Layer -> codes. The model runs once over every text, as far as the deepest layer."""
    windows = tokens.windows
    buffers = {layer: LayerBuffer(len(windows.token), sae) for layer, sae in encoder.saes.items()}
    for rows in batches(windows.starts, encoder.batch_tokens):
        ids, real, places = encoder.pad(windows, rows)
        found = residuals(encoder.model, ids, encoder.layers)
        for layer, buffer in buffers.items():
            hidden = found[layer][:, 1:] if encoder.bos is not None else found[layer]
            buffer.put(places, hidden[real], encoder.precision)
        bar.update(len(places))
    return {layer: _finish(buffer, tokens) for layer, buffer in buffers.items()}


def _finish(buffer: LayerBuffer, tokens: Tokens) -> LayerCodes:
    norms = buffer.norms
    finite = np.isfinite(norms) & np.isfinite(buffer.top_acts).all(axis=1)
    extreme = finite & (norms > EXTREME_FACTOR * np.median(norms[finite])) if finite.any() else finite
    keep = tokens.keep & finite & ~extreme
    if not keep.any():
        raise InputError("No token has finite activations of ordinary size. Try --dtype float32.")
    return LayerCodes(
        top_acts=buffer.top_acts,
        top_indices=buffer.top_indices,
        keep=keep,
        pooled=pool(buffer.top_acts, buffer.top_indices, tokens.text, keep, tokens.texts),
        facts=TokenFacts(
            texts=tokens.texts,
            tokens=len(norms),
            kept=int(keep.sum()),
            extreme=int((tokens.keep & extreme).sum()),
            nan=int((~finite).sum()),
        ),
        residual_norm=float(np.median(norms[keep])),
    )


def contexts(
    encoder: Encoder, tokens: Tokens, codes: LayerCodes, feature: int, rows: npt.NDArray[np.bool_], count: int = 3
) -> tuple[Context, ...]:
    """The strongest token of each of the `count` texts in which the feature is strongest."""
    at, value = codes.activations(feature, rows)
    ids, text = tokens.windows.token, tokens.text
    found: list[Context] = []
    used: set[int] = set()
    for i in np.lexsort((at, -value)):
        token, owner = int(at[i]), int(text[at[i]])
        if owner in used:
            continue
        used.add(owner)
        start, end = (int(x) for x in np.searchsorted(text, (owner, owner + 1)))
        left, right = max(start, token - CONTEXT_TOKENS), min(end, token + 1 + CONTEXT_TOKENS // 2)
        parts = (ids[left:token], ids[token : token + 1], ids[token + 1 : right])
        before, middle, after = (encoder.tokenizer.decode(part.tolist()) for part in parts)
        found.append(Context(before, middle, after, float(value[i])))
        if len(found) == count:
            break
    return tuple(found)


def scale(codes: LayerCodes, feature: int, rows: npt.NDArray[np.bool_]) -> float | None:
    """0.99 quantile (linear) of the activation over the kept tokens among `rows` at which the feature fires."""
    value = codes.activations(feature, rows)[1]
    return float(np.quantile(value, 0.99)) if len(value) else None
