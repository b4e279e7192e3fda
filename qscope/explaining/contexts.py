"""What features fire on: strongest passages, and passages set aside to test an explanation on.

A hash divides the documents in two halves. Explanations see the first half only: its strongest passages and the
tokens on which the feature fires there. Scores use the second half only: passages in which the feature fires, drawn
evenly from quantiles of its activation; random passages in which it is silent; and near ones, silent although they
hold a token on which the feature fired in the first half. A source of fewer than 20 documents is divided by blocks of
256 tokens instead, so that one long text can be explained too.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError
from qscope.explaining.sources import Block, Source
from qscope.finding.pooled import Floats, Ints

FEW_DOCUMENTS = 20
UNIT_TOKENS = 256
QUANTILES = 5
_SAMPLED = 512  # of the firings of a feature, and of places for random passages
_NEAR_TOKENS = 5  # leading tokens of a feature that near passages hold
_SPARE = 4  # candidates per near passage, some of which turn out to fire beside the token


@dataclass(frozen=True)
class Sampling:
    """How many passages of each feature. Raises InputError for numbers that cannot be."""

    contexts: int = 10
    """Strongest passages, each from another document; the explanation is made of them"""
    positives: int = 20
    """Passages in which it fires, to score with"""
    negatives: int = 20
    """Random passages in which it is silent, to score with"""
    near: int = 10
    """Silent passages that hold one of its leading tokens, to score with"""
    window: int = 12
    """Tokens on either side of a passage's centre"""
    tokens: int = 8
    """Leading tokens"""
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"contexts": 1, "positives": 0, "negatives": 0, "near": 0, "window": 1, "tokens": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if not low <= value <= _SAMPLED:
                raise InputError(f"{name} is {value}; it must be at least {low} and at most {_SAMPLED}.")


class Passage(NamedTuple):
    """Tokens around one place of a document."""

    document: int
    position: int
    """Of its centre in the document"""
    centre: int
    """Of its tokens"""
    tokens: tuple[int, ...]
    activations: tuple[float, ...]
    """Of the feature, per token; 0 where it is silent or the token does not count"""

    @property
    def largest(self) -> float:
        return max(self.activations)


@dataclass(frozen=True)
class TopToken:
    """A token of the vocabulary on which a feature fires, in the first half of the documents."""

    token: int
    count: int
    """How often it fires there"""
    share: float
    """Of the sum of the feature's activations"""
    precision: float
    """Share of the token's occurrences on which it fires"""


@dataclass(frozen=True)
class Evidence:
    """All that one feature is explained and tested with."""

    layer: int
    feature: int
    sae_sha256: str
    count: int
    """Tokens on which it fires, in both halves"""
    counted: int
    """Tokens that count, in both halves"""
    largest: float
    top_tokens: tuple[TopToken, ...]
    """Largest share first"""
    strongest: tuple[Passage, ...]
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]
    near: tuple[Passage, ...]

    @property
    def density(self) -> float:
        return self.count / max(self.counted, 1)

    def sha256(self) -> str:
        """Of all passages, tokens and figures: equal evidence, equal hash."""
        parts = (self.count, self.counted, self.top_tokens, self.strongest, self.positives, self.negatives, self.near)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def gather(source: Source, layer: int, features: Sequence[int], sampling: Sampling | None = None) -> list[Evidence]:
    """Evidence of each feature, in the order given. The source is read three times; memory does not grow with it.

    Raises InputError for a layer or feature that the source does not have.
    """
    sampling = Sampling() if sampling is None else sampling
    if layer not in source.layers:
        raise InputError(f"Layer {layer} was asked for; there are the layers {', '.join(map(str, source.layers))}.")
    wrong = [f for f in features if not 0 <= f < source.d_sae(layer)]
    if wrong or len(set(features)) < len(features):
        raise InputError(
            f"The features {list(features)[:20]} of layer {layer} were asked for; its SAE has the features 0 to "
            f"{source.d_sae(layer) - 1}. Name each at most once."
        )
    return _Gathering(source, layer, np.array(features, np.int64), sampling).evidence() if features else []


class _Best:
    """The n entries of each slot with the lowest rank (then the lowest row), at most one per slot and key."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.slot, self.key, self.row = (np.zeros(0, np.int64) for _ in range(3))
        self.rank: Floats = np.zeros(0)
        self.value: Floats = np.zeros(0)

    def add(self, slot: Ints, key: Ints, row: Ints, rank: Floats, value: Floats | None = None) -> None:
        if not self._n or not len(slot):
            return
        value = rank if value is None else value
        slot, key, row = (np.concatenate([a, b]) for a, b in ((self.slot, slot), (self.key, key), (self.row, row)))
        rank, value = np.concatenate([self.rank, rank]), np.concatenate([self.value, value])
        order = np.lexsort((row, rank, key, slot))
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(slot[order]) != 0) | (np.diff(key[order]) != 0)
        order = order[first]
        order = order[np.lexsort((row[order], rank[order], slot[order]))]
        place = np.arange(len(order)) - np.searchsorted(slot[order], slot[order])
        order = order[place < self._n]
        self.slot, self.key, self.row = slot[order], key[order], row[order]
        self.rank, self.value = rank[order], value[order]

    def of(self, slot: int) -> list[int]:
        """Rows, lowest rank first."""
        return self.row[self._slice(slot)].tolist()

    def values(self, slot: int) -> Floats:
        return self.value[self._slice(slot)]

    def _slice(self, slot: int) -> slice:
        return slice(*np.searchsorted(self.slot, [slot, slot + 1]))


class _Tokens:
    """How much of each slot's activation falls on which token."""

    def __init__(self) -> None:
        self.pair = np.zeros(0, np.int64)  # slot << 32 | token
        self.mass: Floats = np.zeros(0)
        self.count = np.zeros(0, np.int64)
        self.seen = np.zeros(0, np.int64)  # occurrences of each token of the vocabulary

    def add(self, slot: Ints, token: Ints, value: Floats, every: Ints) -> None:
        """every: all tokens of the block that count."""
        seen = np.bincount(every, minlength=len(self.seen))
        seen[: len(self.seen)] += self.seen
        self.seen = seen.astype(np.int64)
        pair = np.concatenate([self.pair, slot << 32 | token])
        mass = np.concatenate([self.mass, value])
        count = np.concatenate([self.count, np.ones(len(slot), np.int64)])
        self.pair, place = np.unique(pair, return_inverse=True)
        self.mass = np.bincount(place, weights=mass, minlength=len(self.pair)).astype(np.float64)
        self.count = np.bincount(place, weights=count, minlength=len(self.pair)).astype(np.int64)

    def top(self, slot: int, most: int) -> tuple[TopToken, ...]:
        mine = slice(*np.searchsorted(self.pair, [slot << 32, (slot + 1) << 32]))
        token, mass, count = self.pair[mine] & 0xFFFFFFFF, self.mass[mine], self.count[mine]
        best = np.lexsort((token, -mass))[:most]
        return tuple(
            TopToken(int(token[i]), int(count[i]), float(mass[i] / mass.sum()), float(count[i] / self.seen[token[i]]))
            for i in best
        )


@dataclass
class _Place:
    """A passage to read: the row of its centre, and what was read of it so far."""

    row: int
    slot: int
    """Whose activations are kept; -1: those of all"""
    unit: int = -1
    tokens: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(row, unit, document, position, token)"""
    activations: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """Per token, of all slots or of the one"""


class _Gathering:
    def __init__(self, source: Source, layer: int, features: Ints, sampling: Sampling) -> None:
        self.source, self.layer, self.features, self.sampling = source, layer, features, sampling
        self.by_block = source.documents < FEW_DOCUMENTS
        self.slot_of = np.full(source.d_sae(layer), -1, np.int64)
        self.slot_of[features] = np.arange(len(features))
        self.count = np.zeros(len(features), np.int64)
        self.largest: npt.NDArray[np.float32] = np.zeros(len(features), np.float32)
        self.counted = 0
        self.tokens = _Tokens()
        self.strongest, self.fired = _Best(sampling.contexts), _Best(_SAMPLED if sampling.positives else 0)
        self.pool, self.near = _Best(_SAMPLED if sampling.negatives else 0), _Best(sampling.near * _SPARE)

    # --- the three readings ----------------------------------------------------------------------------------

    def evidence(self) -> list[Evidence]:
        for block in self.source.blocks(self.layer):
            self._survey(block)
        top = [self.tokens.top(slot, self.sampling.tokens) for slot in range(len(self.features))]
        if self.sampling.near:
            self._find_near(top)
        positives = [self._stratified(slot) for slot in range(len(self.features))]
        places = self._places(positives)
        self._read(list(places.values()))
        pool = [places[-1, row] for row in self.pool.of(0)]
        return [
            Evidence(
                layer=self.layer,
                feature=int(feature),
                sae_sha256=self.source.sae_sha256(self.layer),
                count=int(self.count[slot]),
                counted=self.counted,
                largest=float(self.largest[slot]),
                top_tokens=top[slot],
                strongest=tuple(self._passage(places[slot, r], slot) for r in self.strongest.of(slot)),
                positives=tuple(self._passage(places[slot, r], slot) for r in positives[slot]),
                negatives=self._silent(self._shuffled(pool, slot), slot, self.sampling.negatives),
                near=self._silent([places[slot, r] for r in self.near.of(slot)], slot, self.sampling.near),
            )
            for slot, feature in enumerate(self.features.tolist())
        ]

    def _survey(self, block: Block) -> None:
        unit = self._unit(block)
        held_out = self._held_out(unit)
        keep = block.codes.keep
        self.counted += int(keep.sum())
        row, slot, value = self._entries(block)
        self.count += np.bincount(slot, minlength=len(self.count))
        np.maximum.at(self.largest, slot, value)
        seen = ~held_out[row]
        r, s, v = row[seen], slot[seen], value[seen].astype(np.float64)
        self.tokens.add(s, block.token[r], v, block.token[keep & ~held_out])
        self.strongest.add(s, unit[r], r + block.start, -v)
        r, s, v = row[~seen], slot[~seen], value[~seen].astype(np.float64)
        self.fired.add(s, unit[r], r + block.start, self._hash(r + block.start, 1), v)
        r = np.flatnonzero(keep & held_out)
        apart = (r + block.start) // (2 * self.sampling.window + 1)
        self.pool.add(np.zeros(len(r), np.int64), apart, r + block.start, self._hash(r + block.start, 2))

    def _find_near(self, top: Sequence[tuple[TopToken, ...]]) -> None:
        """Places of the second half where a leading token stands and the feature is silent."""
        pairs = [(t.token, slot) for slot, tokens in enumerate(top) for t in tokens[:_NEAR_TOKENS]]
        if not pairs:
            return
        wanted, slots = (np.array(column, np.int64) for column in zip(*sorted(pairs), strict=True))
        for block in self.source.blocks(self.layer):
            held_out = self._held_out(self._unit(block))
            row = np.flatnonzero(held_out & np.isin(block.token, wanted))
            if not len(row):
                continue
            row = row[block.codes.keep[row]]
            low, high = (np.searchsorted(wanted, block.token[row], side) for side in ("left", "right"))
            each = high - low
            slot = slots[np.repeat(low, each) + _counting(each)]
            row = np.repeat(row, each)
            fired_row, fired_slot, _ = self._entries(block)
            fires = np.isin(row * len(self.features) + slot, fired_row * len(self.features) + fired_slot)
            row, slot = row[~fires], slot[~fires]
            at = row + block.start
            self.near.add(slot, at // (2 * self.sampling.window + 1), at, self._hash(at, 3))

    def _read(self, places: list[_Place]) -> None:
        places.sort(key=lambda place: place.row)
        rows, window = np.array([place.row for place in places], np.int64), self.sampling.window
        for block in self.source.blocks(self.layer):
            # A passage may begin in one block and end in the next.
            first, last = np.searchsorted(rows, [block.start - window, block.stop + window])
            for place in places[first:last]:
                low, high = max(place.row - window, block.start), min(place.row + window + 1, block.stop)
                if low < high:
                    self._take(place, block, slice(low - block.start, high - block.start))

    def _take(self, place: _Place, block: Block, part: slice) -> None:
        values, indices, keep = block.codes.rows(part)
        slots = np.where((values > 0) & keep[:, None], self.slot_of[indices], -1)
        mine = slots >= 0 if place.slot < 0 else slots == place.slot
        row, column = np.nonzero(mine)
        found = np.zeros((len(slots), len(self.features) if place.slot < 0 else 1), np.float32)
        found[row, slots[row, column] if place.slot < 0 else 0] = values[row, column]
        unit = self._unit(block)[part]
        columns = (unit, block.document[part], block.position[part], block.token[part])
        at = range(block.start + part.start, block.start + part.stop)
        place.tokens += zip(at, *(column.tolist() for column in columns), strict=True)
        place.activations += list(found)

    def _passage(self, place: _Place, slot: int) -> Passage:
        """What was read of the centre's own document (or block of it)."""
        centre = next(i for i, found in enumerate(place.tokens) if found[0] == place.row)
        _, unit, document, position, _ = place.tokens[centre]
        inside = [i for i, found in enumerate(place.tokens) if found[1] == unit]
        column = slot if place.slot < 0 else 0
        return Passage(
            document=document,
            position=position,
            centre=inside.index(centre),
            tokens=tuple(place.tokens[i][4] for i in inside),
            activations=tuple(float(place.activations[i][column]) for i in inside),
        )

    # --- choosing --------------------------------------------------------------------------------------------

    def _unit(self, block: Block) -> Ints:
        """[n] what is divided into halves: the document, or a block of 256 tokens of it."""
        return block.document << 32 | (block.position // UNIT_TOKENS if self.by_block else np.int64(0))

    def _held_out(self, unit: Ints) -> npt.NDArray[np.bool_]:
        return _mixed(unit, self.sampling.seed) >> np.uint64(63) == 1

    def _hash(self, row: Ints, salt: int) -> Floats:
        return _mixed(row, self.sampling.seed * 16 + salt).astype(np.float64)

    def _entries(self, block: Block) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
        """(row in the block, slot, value) where a chosen feature fires on a token that counts."""
        values, indices, keep = block.codes
        slots = self.slot_of[indices]
        row, column = np.nonzero((slots >= 0) & (values > 0) & keep[:, None])
        return row, slots[row, column], values[row, column]

    def _stratified(self, slot: int) -> list[int]:
        """Rows of the second half where it fires: evenly from each fifth of its activations, fifths in turn."""
        rows, values = np.array(self.fired.of(slot), np.int64), self.fired.values(slot)  # in the order of a hash
        strata = np.array_split(np.argsort(-values, kind="stable"), QUANTILES)
        turns = [np.sort(stratum).tolist() for stratum in strata]
        chosen = [turn[i] for i in range(max(map(len, turns))) for turn in turns if i < len(turn)]
        return rows[np.array(chosen[: self.sampling.positives], np.int64)].tolist()

    def _silent(self, places: Sequence[_Place], slot: int, most: int) -> tuple[Passage, ...]:
        found = (self._passage(place, slot) for place in places)
        return tuple(itertools.islice((passage for passage in found if passage.largest == 0), most))

    def _places(self, positives: Sequence[Sequence[int]]) -> dict[tuple[int, int], _Place]:
        wanted = {(-1, row) for row in self.pool.of(0)}
        for slot in range(len(self.features)):
            rows = [*self.strongest.of(slot), *positives[slot], *self.near.of(slot)]
            wanted |= {(slot, row) for row in rows}
        return {(slot, row): _Place(row, slot) for slot, row in sorted(wanted)}

    def _shuffled(self, pool: Sequence[_Place], slot: int) -> list[_Place]:
        """The pool in an order of the feature's own."""
        order = np.argsort(self._hash(np.array([p.row for p in pool], np.int64), 100 + int(self.features[slot])))
        return [pool[i] for i in order.tolist()]


def _mixed(number: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood 2014) of number + seed x the golden ratio: evenly spread, always the same."""
    golden = 0x9E3779B97F4A7C15
    z = number.astype(np.uint64) + np.uint64((seed + 1) * golden % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def _counting(lengths: Ints) -> Ints:
    """0, 1, .. for each length in turn."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
