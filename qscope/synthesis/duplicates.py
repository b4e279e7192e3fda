"""Which texts are too like one that is kept: in their words, or in the features that they fire."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from qscope.synthesis.minhash import MinHash, jaccard, shingles

Features = frozenset[int]
"""Fired features of all layers, each as layer * 2^32 + feature"""
BANDS = 64
_SIGNATURES = 256


def feature_key(layer: int, feature: int) -> int:
    return layer << 32 | feature


@dataclass
class Kept:
    """Texts that are kept, and the test that a further one must pass.

    Two texts with the Jaccard similarity J of their 3-word shingles become candidates with probability
    1 - (1 - J^4)^64 (64 bands of 4 entries): 0.9998 at J = 0.6, above 0.98 at 0.5. Candidates are compared exactly, so
    nothing is dropped that is not a near-duplicate.
    """

    text_bar: float = 0.6
    """A text at or above this similarity to a kept one is a near-duplicate"""
    feature_bar: float = 0.8
    """The same for the sets of fired features"""
    _hash: MinHash = field(default_factory=lambda: MinHash(_SIGNATURES))
    _shingles: list[frozenset[str]] = field(default_factory=list)
    _features: list[Features] = field(default_factory=list)
    _bands: dict[tuple[int, bytes], list[int]] = field(default_factory=dict)
    _firing: dict[int, list[int]] = field(default_factory=dict)

    def like_text(self, text: str) -> bool:
        """Whether its words are too like those of a kept text."""
        mine = shingles(text)
        found = {i for key in self._keys(mine) for i in self._bands.get(key, ())}
        return any(jaccard(mine, self._shingles[i]) >= self.text_bar for i in sorted(found))

    def like_features(self, features: Iterable[int]) -> bool:
        """Whether it fires nearly the same features as a kept text. Exact: the shared ones are counted."""
        mine = frozenset(features)
        shared = np.zeros(len(self._features), np.int64)
        for feature in sorted(mine):
            shared[self._firing.get(feature, [])] += 1
        sizes = np.array([len(other) for other in self._features], np.int64)
        return bool((shared >= self.feature_bar * (len(mine) + sizes - shared))[shared > 0].any())

    def add(self, text: str, features: Iterable[int] = ()) -> None:
        mine, fired = shingles(text), frozenset(features)
        number = len(self._shingles)
        for key in self._keys(mine):
            self._bands.setdefault(key, []).append(number)
        for feature in fired:
            self._firing.setdefault(feature, []).append(number)
        self._shingles.append(mine)
        self._features.append(fired)

    def __len__(self) -> int:
        return len(self._shingles)

    def _keys(self, items: frozenset[str]) -> list[tuple[int, bytes]]:
        rows = self._hash.signature(items).reshape(BANDS, -1)
        return [(i, row.tobytes()) for i, row in enumerate(rows)] if items else []
