"""Texts through the model once: what every feature does in every text, at all layers, kept on disk as it is made.

Coverage, classification and synthesis read their texts here. A text is at most `context_size` tokens and one window.
Left out of every figure: the first token of a text (an attention sink, unless a BOS token stands before it), special
tokens, tokens with a residual norm above `EXTREME_FACTOR` times the median of their chunk, and tokens that are not
finite; `TextFeatures.facts` says how many.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from qscope.data import Piece, Windows, batches, tokenize
from qscope.errors import InputError
from qscope.files import storage_error, tensor_parts, write_file
from qscope.finding.pooled import Floats, Ints, PooledCodes, pool
from qscope.model import residuals
from qscope.store import FeatureStore, Shard
from qscope.store_packing import EXTREME_FACTOR, EXTREME_ROW, NAN_ROW
from qscope.workflows.encoder import Encoder, LayerBuffer
from qscope.workflows.steer_find_result import TokenFacts

Truncate = Literal["right", "left"]

CHUNK_TOKENS = 16_384  # at most so many tokens are lost when a run is killed: some 15 s on a CPU
_FORMAT = 1
_ENTRIES = ("feature", "text", "total", "firing", "largest", "last")
_ALL = 1 << 40  # a context size that cuts nothing


# --- tokens ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenTexts:
    """T texts as tokens."""

    ids: tuple[npt.NDArray[np.int64], ...]
    """One array per text, at most `context_size` tokens; empty for a text without tokens"""
    full_length: Ints
    """[T] tokens before the cut"""

    @property
    def lengths(self) -> Ints:
        return np.array([len(text) for text in self.ids], np.int64)

    @property
    def truncated(self) -> npt.NDArray[np.bool_]:
        """[T]"""
        return self.full_length > self.lengths

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Sequence[int] | Ints) -> "TokenTexts":
        picked = np.asarray(index, np.int64)
        return TokenTexts(tuple(self.ids[i] for i in picked.tolist()), self.full_length[picked])


def tokenize_texts(tokenizer: Any, texts: Sequence[str], context_size: int, truncate: Truncate = "right") -> TokenTexts:
    """The first (`right`: cut from the right) or the last (`left`) `context_size` tokens of each text."""
    ids: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(texts), 1024):
        part = texts[start : start + 1024]
        found = tokenize(tokenizer, [Piece(i, text) for i, text in enumerate(part)], _ALL, (-1, 0))
        bounds = np.searchsorted(found.document, np.arange(len(part) + 1))
        tokens = found.token.astype(np.int64)
        ids += [tokens[low:high] for low, high in itertools.pairwise(bounds.tolist())]
    full = np.array([len(text) for text in ids], np.int64)
    if truncate == "right":
        return TokenTexts(tuple(text[:context_size] for text in ids), full)
    return TokenTexts(tuple(text[max(0, len(text) - context_size) :] for text in ids), full)


def windows_of(texts: TokenTexts) -> Windows:
    """One window for each text that has tokens; `document` is the text's number."""
    lengths = texts.lengths
    document = np.repeat(np.arange(len(texts)), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(len(document)) - np.repeat(starts[:-1], lengths)
    token = np.concatenate(texts.ids) if len(document) else np.zeros(0, np.int64)
    keep = np.concatenate([[True], lengths > 0])
    narrow = lambda values: values.astype(np.uint32)  # noqa: E731  (as `data.tokenize` gives them)
    return Windows(narrow(document), narrow(position), narrow(token), starts[keep])


# --- features --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """What is kept of some texts at one layer."""

    codes: PooledCodes
    facts: TokenFacts
    residual: Mapping[str, npt.NDArray[np.float32]]
    """"mean" and "last" -> [T, D], where residuals are kept"""


@dataclass(frozen=True)
class TextFeatures:
    """Features of T texts, gathered per text. Codes of a layer are put together when they are asked for."""

    layers: tuple[int, ...]
    texts: int
    tokens: Ints
    """[T] tokens that count at every layer, as far as their activations are ordinary"""
    facts: Mapping[int, TokenFacts]
    _sizes: Mapping[int, int]
    _chunks: Sequence[Mapping[int, _Chunk]]

    def d_sae(self, layer: int) -> int:
        return self._sizes[layer]

    def codes(self, layer: int) -> PooledCodes:
        """Entries sorted by feature, then text; `codes.tokens` are the tokens that count at this layer."""
        return concatenate([chunk[layer].codes for chunk in self._chunks])

    def residual(self, layer: int, pooling: Literal["mean", "last"]) -> npt.NDArray[np.float32]:
        """[T, D] of the kept tokens; zeros for a text without any. Raises InputError if residuals were not kept."""
        if self._chunks and pooling not in self._chunks[0][layer].residual:
            raise InputError("The residuals of these texts were not kept. Read them with keep_residuals=True.")
        return np.concatenate([chunk[layer].residual[pooling] for chunk in self._chunks])


def concatenate(parts: Sequence[PooledCodes]) -> PooledCodes:
    """The codes of consecutive texts as one."""
    first = np.cumsum([0] + [len(part.tokens) for part in parts])
    ids = np.concatenate([part.features[part.column] for part in parts])
    text = np.concatenate([part.text + start for part, start in zip(parts, first[:-1], strict=True)])
    order = np.argsort(ids, kind="stable")  # texts ascend within a part, and parts ascend
    features, column = np.unique(ids[order], return_inverse=True)
    gather = lambda name: np.concatenate([getattr(part, name) for part in parts])[order]  # noqa: E731
    return PooledCodes(
        features=features,
        column=column.astype(np.int64),
        text=text[order],
        total=gather("total"),
        firing=gather("firing"),
        largest=gather("largest"),
        last=gather("last"),
        tokens=np.concatenate([part.tokens for part in parts]),
    )


def read_features(
    encoder: Encoder, texts: TokenTexts, folder: Path | None, keep_residuals: bool = False, label: str = "read"
) -> TextFeatures:
    """Features of the texts at all layers of the encoder. The model runs once, as far as the deepest layer.

    Args:
        folder: finished chunks are kept there under a hash of all that they depend on, and found again by a run that
            was killed or that reads some of the same texts; None: nothing is kept.
        keep_residuals: keep the mean and the last residual of each text as well.
        label: of the progress bar.

    Raises:
        InputError: for no texts, and where no token of a chunk has finite activations.
        StorageError: where the folder cannot be written.
    """
    from tqdm import tqdm

    if not len(texts):
        raise InputError("There is no text to read. Give at least one.")
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, folder) from error
    settings = identity(encoder, keep_residuals)
    special = np.array(sorted(encoder.tokenizer.all_special_ids), np.int64)
    chunks: list[dict[int, _Chunk]] = []
    counted: list[Ints] = []
    with tqdm(
        total=int(texts.lengths.sum()), unit="tok", unit_scale=True, desc=label, dynamic_ncols=True, mininterval=0.5
    ) as bar:
        for rows in _chunk_rows(texts.lengths):
            part = texts.rows(np.arange(rows.start, rows.stop))
            windows = windows_of(part)
            keep = ~np.isin(windows.token.astype(np.int64), special)
            if encoder.bos is None:
                keep &= windows.position > 0
            counted.append(np.bincount(windows.document[keep].astype(np.int64), minlength=len(part)).astype(np.int64))
            path = None if folder is None else folder / f"{_key(settings, part)}.safetensors"
            found = None if path is None else _load(path, encoder.layers)
            if found is None:
                found = _compute(encoder, windows, keep, len(part), keep_residuals, bar)
                if path is not None:
                    _save(path, found)
            else:
                bar.update(len(windows.token))
                bar.unpause()
            chunks.append(found)
    return TextFeatures(
        layers=encoder.layers,
        texts=len(texts),
        tokens=np.concatenate(counted),
        facts={layer: _sum_facts([chunk[layer].facts for chunk in chunks]) for layer in encoder.layers},
        _sizes={layer: sae.d_sae for layer, sae in encoder.saes.items()},
        _chunks=chunks,
    )


def store_features(store: FeatureStore) -> TextFeatures:
    """The documents of a feature store as texts, by the same rules; the store's own flags say what is left out.

    Raises StoreError as the store does. Residuals are not in a store.
    """
    chunks: list[dict[int, _Chunk]] = []
    counted: list[Ints] = []
    done = 0
    for shards in _whole_documents(store):
        last = max((s.record.last_doc for s in shards if s.record.last_doc is not None), default=done - 1)
        texts = last + 1 - done
        document = np.concatenate([shard.doc for shard in shards]).astype(np.int64) - done
        keep = np.ones(len(document), bool)
        if not store.settings.bos:
            keep = np.concatenate([shard.position for shard in shards]) > 0
        counted.append(np.bincount(document[keep], minlength=texts).astype(np.int64))
        chunks.append({layer: _stored(shards, layer, document, keep, texts) for layer in store.layers})
        done += texts
    return TextFeatures(
        layers=store.layers,
        texts=done,
        tokens=np.concatenate([np.zeros(0, np.int64), *counted]),
        facts={layer: _sum_facts([chunk[layer].facts for chunk in chunks]) for layer in store.layers},
        _sizes={layer: store.d_sae(layer) for layer in store.layers},
        _chunks=chunks,
    )


def _whole_documents(store: FeatureStore) -> Iterator[list[Shard]]:
    """Runs of shards that share no document with what follows."""
    group: list[Shard] = []
    for shard in store:
        before = group[-1].record.last_doc if group else None
        if group and before is not None and before != shard.record.first_doc:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def _stored(shards: Sequence[Shard], layer: int, document: Ints, keep: npt.NDArray[np.bool_], texts: int) -> _Chunk:
    codes = [shard.layer(layer) for shard in shards]
    values, indices, flags = (np.concatenate([getattr(c, n) for c in codes]) for n in ("values", "indices", "flags"))
    ordinary = keep & (flags == 0)
    return _Chunk(
        codes=pool(values, indices, document, ordinary, texts),
        facts=TokenFacts(
            texts=texts,
            tokens=len(document),
            kept=int(ordinary.sum()),
            extreme=int((keep & (flags & EXTREME_ROW != 0)).sum()),
            nan=int((flags & NAN_ROW != 0).sum()),
        ),
        residual={},
    )


def _chunk_rows(lengths: Ints) -> Iterator[slice]:
    """Runs of texts of at most CHUNK_TOKENS tokens (a longer text comes alone)."""
    start, size = 0, 0
    for i, length in enumerate(lengths.tolist()):
        if i > start and size + length > CHUNK_TOKENS:
            yield slice(start, i)
            start, size = i, 0
        size += length
    yield slice(start, len(lengths))


def _compute(
    encoder: Encoder, windows: Windows, keep: npt.NDArray[np.bool_], texts: int, keep_residuals: bool, bar: Any
) -> dict[int, _Chunk]:
    count = len(windows.token)
    buffers = {layer: LayerBuffer(count, sae) for layer, sae in encoder.saes.items()}
    width = next(iter(encoder.saes.values())).d_in
    kept = {layer: np.zeros((count if keep_residuals else 0, width), np.float32) for layer in encoder.layers}
    for rows in batches(windows.starts, encoder.batch_tokens):
        ids, real, places = encoder.pad(windows, rows)
        found = residuals(encoder.model, ids, encoder.layers)
        for layer, buffer in buffers.items():
            hidden = found[layer][:, 1:] if encoder.bos is not None else found[layer]
            x = hidden[real]
            buffer.put(places, x, encoder.precision)
            if keep_residuals:
                kept[layer][places] = x.float().cpu().numpy()
        bar.update(len(places))
    return {
        layer: _gather(buffer, windows, keep, texts, kept[layer] if keep_residuals else None)
        for layer, buffer in buffers.items()
    }


def _gather(
    buffer: LayerBuffer,
    windows: Windows,
    keep: npt.NDArray[np.bool_],
    texts: int,
    residual: npt.NDArray[np.float32] | None,
) -> _Chunk:
    norms, document = buffer.norms, windows.document.astype(np.int64)
    finite = np.isfinite(norms) & np.isfinite(buffer.top_acts).all(axis=1)
    extreme = finite & (norms > EXTREME_FACTOR * np.median(norms[finite])) if finite.any() else finite
    if len(norms) and not finite.any():
        raise InputError("No token of some texts has finite activations. Try --dtype float32.")
    ordinary = keep & finite & ~extreme
    pooled: dict[str, npt.NDArray[np.float32]] = {}
    if residual is not None:
        pooled = _pool_residual(residual[ordinary], document[ordinary], texts)
    return _Chunk(
        codes=pool(buffer.top_acts, buffer.top_indices, document, ordinary, texts),
        facts=TokenFacts(
            texts=texts,
            tokens=len(norms),
            kept=int(ordinary.sum()),
            extreme=int((keep & extreme).sum()),
            nan=int((~finite).sum()),
        ),
        residual=pooled,
    )


def _pool_residual(x: npt.NDArray[np.float32], text: Ints, texts: int) -> dict[str, npt.NDArray[np.float32]]:
    """x: [n, D] of the kept tokens, text: [n] ascending. Sums in float64, in the order of the tokens."""
    mean, last = (np.zeros((texts, x.shape[1]), np.float32) for _ in range(2))
    starts = np.flatnonzero(np.diff(text, prepend=-1))
    if len(starts):
        ends = np.append(starts[1:], len(text))
        rows = text[starts]
        mean[rows] = np.add.reduceat(x, starts, axis=0, dtype=np.float64) / (ends - starts)[:, None]
        last[rows] = x[ends - 1]
    return {"mean": mean, "last": last}


def _sum_facts(parts: Sequence[TokenFacts]) -> TokenFacts:
    total = lambda name: sum(getattr(part, name) for part in parts)  # noqa: E731
    return TokenFacts(total("texts"), total("tokens"), total("kept"), total("extreme"), total("nan"))


# --- chunks on disk --------------------------------------------------------------------------------------


def identity(encoder: Encoder, keep_residuals: bool) -> str:
    """All that features of given tokens depend on, as canonical JSON."""
    return json.dumps(
        {
            "format": _FORMAT,
            "model": encoder.model_sha256,
            "saes": {layer: sae.weight_hash() for layer, sae in sorted(encoder.saes.items())},
            "dtype": encoder.dtype,
            "device": encoder.device,
            "precision": encoder.precision,
            "batch_tokens": encoder.batch_tokens,
            "bos": encoder.bos,
            "special": sorted(encoder.tokenizer.all_special_ids),
            "residuals": keep_residuals,
            "torch": torch.__version__,
        },
        sort_keys=True,
    )


def _key(settings: str, texts: TokenTexts) -> str:
    digest = hashlib.sha256(settings.encode())
    for ids in texts.ids:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids, np.int64).tobytes())
    return digest.hexdigest()[:40]


def _save(path: Path, chunk: Mapping[int, _Chunk]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for layer, found in chunk.items():
        codes, facts = found.codes, found.facts
        wide: dict[str, npt.NDArray[Any]] = {
            "feature": codes.features[codes.column].astype(np.int32),
            "text": codes.text.astype(np.int32),
            "total": codes.total,
            "firing": codes.firing.astype(np.int32),
            "largest": codes.largest.astype(np.float32),  # they were float32 before they were pooled
            "last": codes.last.astype(np.float32),
            "tokens": codes.tokens,
            "facts": np.array([facts.texts, facts.tokens, facts.kept, facts.extreme, facts.nan], np.int64),
            **{f"residual.{name}": values for name, values in found.residual.items()},
        }
        arrays.update({f"{layer}.{name}": values for name, values in wide.items()})
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    parts, size = tensor_parts(tensors, {"sha256": _digest(arrays)})
    write_file(path, parts, size)


def _load(path: Path, layers: Sequence[int]) -> dict[int, _Chunk] | None:
    """The chunk, or None where there is none; a damaged one counts as none and is written again."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            if (file.metadata() or {}).get("sha256") != _digest(arrays):
                return None
    except (OSError, SafetensorError):
        return None
    return {
        layer: _unpack({n.partition(".")[2]: a for n, a in arrays.items() if n.partition(".")[0] == str(layer)})
        for layer in layers
    }


def _unpack(arrays: Mapping[str, npt.NDArray[Any]]) -> _Chunk:
    feature, text, total, firing, largest, last = (arrays[name] for name in _ENTRIES)
    features, column = np.unique(feature.astype(np.int64), return_inverse=True)
    wide: dict[str, Floats] = {"largest": largest.astype(np.float64), "last": last.astype(np.float64)}
    codes = PooledCodes(
        features=features,
        column=column.astype(np.int64),
        text=text.astype(np.int64),
        total=total,
        firing=firing.astype(np.int64),
        tokens=arrays["tokens"],
        **wide,
    )
    residual = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith("residual.")}
    return _Chunk(codes, TokenFacts(*arrays["facts"].tolist()), residual)


def _digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
