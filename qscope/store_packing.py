"""How the codes of one layer lie in a shard of a feature store: sorted, padded, as narrow as is lossless.

Ids take 1 byte up to 256 features, 2 bytes up to 65536, and beyond that 2 bytes and packed high bits: 2.125
bytes for 131072 features. Values take 2 bytes as float16 unless that would lose a value's size altogether.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from qscope.errors import StoreError

COLUMNS = ("doc", "position", "token")
Form: TypeAlias = tuple[tuple[str, ...], tuple[int, ...]]

NAN_ROW = 1
EXTREME_ROW = 2
EXTREME_FACTOR = 10.0  # of the shard's median norm; attention sinks lie 20 to 1000 times above it


class LayerCodes(NamedTuple):
    """Codes of n tokens: per token the active entries by ascending id, then padding (id 0, value 0)."""

    values: npt.NDArray[np.float32]
    """[n, K] float32; what was stored as float16 is widened."""
    indices: npt.NDArray[np.int32]
    """[n, K] int32 feature ids."""
    flags: npt.NDArray[np.uint8]
    """[n] uint8 bits: `NAN_ROW` (not finite, stored empty) and `EXTREME_ROW` (norm of an attention sink)."""


def high_bits(d_sae: int) -> int:
    """Bits of a feature id above the low 16, as stored in `indices_high`."""
    return max(0, (d_sae - 1).bit_length() - 16)


def pack_layer(
    top_acts: npt.NDArray[Any],
    top_indices: npt.NDArray[Any],
    d_sae: int,
    norms: npt.NDArray[Any] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Codes of one layer as the tensors `values`, `indices`, `flags` (and `indices_high` when d_sae > 65536).

    top_acts: [N, K] float; top_indices: [N, K] integer, in [0, d_sae) and distinct where top_acts > 0;
    norms: [N] float, L2 norms of the residual rows. Entries <= 0 are dropped. A row with a NaN or an
    infinity, its norm included, is flagged `NAN_ROW` and stored empty; one whose norm is above
    `EXTREME_FACTOR` times the median of the finite norms is flagged `EXTREME_ROW`. Values become float16, or
    float32 for all rows when float16 would turn a value into infinity or a positive one into 0. Raises
    `StoreError` for other input.
    """
    acts, ids = np.asarray(top_acts), np.asarray(top_indices)
    if acts.ndim != 2 or acts.shape != ids.shape or ids.dtype.kind not in "iu" or not 1 <= d_sae < 2**31:
        raise StoreError(
            f"A store was given top_acts {acts.dtype}{list(acts.shape)}, top_indices {ids.dtype}"
            f"{list(ids.shape)} and d_sae {d_sae}; it takes top_acts [N, K] float, top_indices [N, K] integer"
            " and 1 <= d_sae < 2**31."
        )
    n, k = acts.shape
    flags = _norm_flags(norms, n)
    values = np.empty((n, k), np.float32)
    indices = np.empty((n, k), np.uint32)
    for start in range(0, n, _PACK_ROWS):
        rows = slice(start, start + _PACK_ROWS)
        part = np.ascontiguousarray(acts[rows], np.float32)
        flags[rows][~np.isfinite(part).all(axis=1)] |= NAN_ROW
        values[rows], indices[rows] = _sort_rows(part, ids[rows], flags[rows], d_sae)
    with np.errstate(over="ignore", under="ignore"):
        half = values.astype(np.float16)
    lossy = bool(np.isinf(half).any() or ((half == 0) & (values > 0)).any())
    packed: dict[str, npt.NDArray[Any]] = {
        "values": values if lossy else half,
        "indices": indices.astype(np.uint8 if d_sae <= 256 else np.uint16),
        "flags": flags,
    }
    bits = high_bits(d_sae)
    if bits:
        high = (indices >> np.uint32(16)).astype(np.uint16)
        planes = (high[:, :, None] >> np.arange(bits, dtype=np.uint16)) & np.uint16(1)
        packed["indices_high"] = np.packbits(planes.astype(np.uint8).reshape(n, k * bits), axis=1, bitorder="little")
    return packed


_PACK_ROWS = 8192  # keeps the 64-bit sort keys of a block inside the cache


def _sort_rows(
    acts: npt.NDArray[np.float32], ids: npt.NDArray[Any], flags: npt.NDArray[np.uint8], d_sae: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint32]]:
    """Values and ids with the active entries first, by id; rows flagged `NAN_ROW` empty."""
    active = (acts > 0) & (flags & NAN_ROW == 0)[:, None]
    if (((ids < 0) | (ids >= d_sae)) & active).any():
        raise StoreError(f"A store was given feature ids outside 0 to {d_sae - 1}: they are not of this SAE.")
    # Id above the float's bits in one word: a single sort moves both, and inactive entries go to the end.
    last = np.uint64(2**64 - 1)
    keys = (ids.astype(np.uint64) << np.uint64(32)) | acts.view(np.uint32)
    keys[~active] = last
    keys.sort(axis=1)
    padding = keys == last
    keys[padding] = 0
    indices = (keys >> np.uint64(32)).astype(np.uint32)
    if ((indices[:, 1:] == indices[:, :-1]) & ~padding[:, 1:]).any():
        raise StoreError("A store was given the same feature twice in one token; top_indices must be distinct per row.")
    return keys.astype(np.uint32).view(np.float32), indices


def _norm_flags(norms: npt.NDArray[Any] | None, n: int) -> npt.NDArray[np.uint8]:
    flags = np.zeros(n, np.uint8)
    if norms is None:
        return flags
    lengths = np.asarray(norms, np.float32)
    if lengths.shape != (n,):
        raise StoreError(f"A store was given norms {list(lengths.shape)} for {n} tokens; it takes one each.")
    finite = np.isfinite(lengths)
    flags[~finite] = NAN_ROW
    if finite.any():
        bar = np.float32(EXTREME_FACTOR) * np.median(lengths[finite])
        flags[finite & (lengths > bar)] = EXTREME_ROW
    return flags


def unpack_layer(tensors: Mapping[str, npt.NDArray[Any]], d_sae: int) -> LayerCodes:
    """Inverse of :func:`pack_layer`. Raises `StoreError` when an id lies outside the dictionary."""
    low = tensors["indices"]
    indices = low.astype(np.int32)
    n, k = low.shape
    bits = high_bits(d_sae)
    if bits:
        planes = np.unpackbits(tensors["indices_high"], axis=1, count=k * bits, bitorder="little")
        planes = planes.reshape(n, k, bits)
        for bit in range(bits):
            indices |= planes[:, :, bit].astype(np.int32) << (16 + bit)
    if indices.size and int(indices.max()) >= d_sae:
        raise StoreError(f"the store holds feature id {int(indices.max())}, but its dictionary has {d_sae} features.")
    return LayerCodes(tensors["values"].astype(np.float32), indices, tensors["flags"])


def layer_forms(d_sae: int, k: int) -> dict[str, Form]:
    """Accepted dtypes and trailing shape of each tensor of a layer."""
    layout: dict[str, Form] = {
        "values": (("float16", "float32"), (k,)),
        "indices": (("uint8",) if d_sae <= 256 else ("uint16",), (k,)),
        "flags": (("uint8",), ()),
    }
    if high_bits(d_sae):
        layout["indices_high"] = (("uint8",), ((k * high_bits(d_sae) + 7) // 8,))
    return layout


def shard_arrays(
    doc: npt.NDArray[Any],
    position: npt.NDArray[Any],
    token: npt.NDArray[Any],
    layers: Mapping[int, Mapping[str, npt.NDArray[Any]]],
) -> dict[str, npt.NDArray[Any]]:
    """All tensors of a shard under their names on disk.

    doc, position, token: [N] integers, doc ascending. layers: layer -> what :func:`pack_layer` returned.
    """
    columns = zip(COLUMNS, (doc, position, token), strict=True)
    arrays = {name: np.asarray(array).astype(np.uint32) for name, array in columns}
    return arrays | {f"{layer}.{name}": array for layer, packed in layers.items() for name, array in packed.items()}
