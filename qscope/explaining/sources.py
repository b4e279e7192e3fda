"""Token codes that features are explained from: a feature store's, or those of texts in memory."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.finding.pooled import Ints
from qscope.store import FeatureStore, Shard

ROWS = 8192  # tokens taken at a time


class TokenCodes(NamedTuple):
    """TopK codes of n tokens."""

    values: npt.NDArray[np.float32]
    """[n, K]"""
    indices: npt.NDArray[np.int32]
    """[n, K]"""
    keep: npt.NDArray[np.bool_]
    """[n] tokens that count: neither attention sinks nor NaN"""

    def rows(self, part: slice) -> "TokenCodes":
        return TokenCodes(self.values[part], self.indices[part], self.keep[part])


@dataclass(frozen=True)
class Block:
    """n consecutive tokens of a source."""

    start: int
    """Of its first token in the whole source"""
    document: Ints
    """[n] ascending"""
    position: Ints
    """[n] within the document"""
    token: Ints
    """[n]"""
    read: Callable[[], TokenCodes]

    @cached_property
    def codes(self) -> TokenCodes:
        """Read when first asked for."""
        return self.read()

    @property
    def stop(self) -> int:
        return self.start + len(self.token)


class Source(Protocol):
    """Token codes of documents at some layers, read block by block as often as needed."""

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def documents(self) -> int: ...

    def sae_sha256(self, layer: int) -> str:
        """`SAE.weight_hash()`"""
        ...

    def d_sae(self, layer: int) -> int: ...

    def blocks(self, layer: int) -> Iterator[Block]: ...


class StoreCodes:
    """A feature store as a source; tokens that it flags (attention sinks, NaN) do not count."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    @property
    def layers(self) -> tuple[int, ...]:
        return self.store.layers

    @property
    def documents(self) -> int:
        return self.store.num_documents

    def sae_sha256(self, layer: int) -> str:
        return self.store.settings.sae(layer).sha256

    def d_sae(self, layer: int) -> int:
        return self.store.d_sae(layer)

    def blocks(self, layer: int) -> Iterator[Block]:
        start = 0
        for shard in self.store:
            for low in range(0, len(shard), ROWS):
                rows = slice(low, min(low + ROWS, len(shard)))
                document, position, token = (a[rows].astype(np.int64) for a in (shard.doc, shard.position, shard.token))
                yield Block(start + low, document, position, token, _reader(shard, layer, rows))
            start += len(shard)


def _reader(shard: Shard, layer: int, rows: slice) -> Callable[[], TokenCodes]:
    def read() -> TokenCodes:
        codes = shard.layer(layer, rows)
        return TokenCodes(codes.values, codes.indices, codes.flags == 0)

    return read


@dataclass(frozen=True)
class MemoryCodes:
    """Codes of texts that were read into memory, N tokens in all."""

    document: Ints
    """[N] ascending"""
    position: Ints
    """[N]"""
    token: Ints
    """[N]"""
    codes: Mapping[int, TokenCodes]
    """layer -> codes [N, K]"""
    saes: Mapping[int, tuple[str, int]]
    """layer -> (`SAE.weight_hash()`, d_sae)"""

    def __post_init__(self) -> None:
        sizes = {len(self.document), len(self.position), len(self.token)}
        sizes |= {len(array) for found in self.codes.values() for array in found}
        if len(sizes) != 1 or set(self.codes) != set(self.saes) or not self.codes:
            raise InputError(
                f"Codes of {', '.join(map(str, sorted(sizes)))} tokens were given, of the layers {sorted(self.codes)} "
                f"with SAEs of {sorted(self.saes)}. Give one row per token and one SAE per layer."
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.codes))

    @property
    def documents(self) -> int:
        return int(self.document[-1]) + 1 if len(self.document) else 0

    def sae_sha256(self, layer: int) -> str:
        return self.saes[layer][0]

    def d_sae(self, layer: int) -> int:
        return self.saes[layer][1]

    def blocks(self, layer: int) -> Iterator[Block]:
        for low in range(0, len(self.token), ROWS):
            rows = slice(low, low + ROWS)
            read = functools.partial(self.codes[layer].rows, rows)
            yield Block(low, self.document[rows], self.position[rows], self.token[rows], read)
