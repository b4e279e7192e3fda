"""One pass over a feature store's shards at a time, in memory that does not grow with the corpus."""

from typing import Any

import numpy as np

from qscope.store import FeatureStore, LayerCodes, Shard, StoredDocument
from qscope.store_packing import EXTREME_ROW, NAN_ROW
from qscope.workflows.inspect_result import Context, TokenShare

_SILENT = 8  # imagined silent tokens: a feature seen once or twice should not lead the order "specific"
BINS = 16
ROWS = 8192  # rows taken at a time: the thresholds rise early and the temporary arrays stay small


def kept_rows(flags: np.ndarray, include_sinks: bool) -> np.ndarray:
    """[n] bool: rows that count. flags: uint8 of the store."""
    return (flags & (NAN_ROW if include_sinks else NAN_ROW | EXTREME_ROW)) == 0


class Survey:
    """What the first reading keeps: per feature a count, a sum and its best places.

    `best_value` f32, `best_row` int64 (row in the whole store) and `best_key` int64 (which text) are [F, n],
    strongest first, ties by row; at most one place per text. A value of 0 marks an empty place.
    """

    def __init__(self, d_sae: int, places: int):
        self.d_sae = d_sae
        self.count = np.zeros(d_sae, np.int64)
        self.total = np.zeros(d_sae, np.float64)
        self.best_value = np.zeros((d_sae, places), np.float32)
        self.best_row = np.zeros((d_sae, places), np.int64)
        self.best_key = np.zeros((d_sae, places), np.int64)
        self.tokens = self.nan_tokens = self.sink_tokens = 0

    def add(self, feature: np.ndarray, value: np.ndarray, row: np.ndarray, key: np.ndarray) -> None:
        """Entries of equal length, rows ascending and above all rows added before."""
        self.count += np.bincount(feature, minlength=self.d_sae)
        self.total += np.bincount(feature, weights=value, minlength=self.d_sae)
        # Strictly above: an equal value further on loses to the earlier row.
        strong = value > self.best_value[feature, -1]
        self._keep(feature[strong], value[strong], row[strong], key[strong])

    def _keep(self, feature: np.ndarray, value: np.ndarray, row: np.ndarray, key: np.ndarray) -> None:
        if not len(feature):
            return
        old = np.unique(feature)
        old_value = self.best_value[old]
        held = old_value > 0
        places = self.best_value.shape[1]
        feature = np.concatenate([np.repeat(old, places)[held.ravel()], feature])
        value = np.concatenate([old_value[held], value])
        row = np.concatenate([self.best_row[old][held], row])
        key = np.concatenate([self.best_key[old][held], key])
        ranked = np.lexsort((row, -value, feature))
        feature, value, row, key = feature[ranked], value[ranked], row[ranked], key[ranked]
        pair = feature * (key.max() + 1) + key
        first = np.sort(np.unique(pair, return_index=True)[1])
        feature, value, row, key = feature[first], value[first], row[first], key[first]
        place = np.arange(len(feature)) - np.searchsorted(feature, feature)
        kept = place < places
        at = feature[kept], place[kept]
        self.best_value[at], self.best_row[at], self.best_key[at] = value[kept], row[kept], key[kept]

    @property
    def density(self) -> np.ndarray:
        return self.count / max(self.tokens, 1)

    def rarity(self) -> np.ndarray:
        """ln(tokens / active tokens), 0 for a feature that is never active."""
        return np.log(max(self.tokens, 1) / np.maximum(self.count, 1)) * (self.count > 0)

    def score(self, order: str) -> np.ndarray:
        """[F] float64, larger first: see `ORDERS`."""
        if order == "frequent":
            return self.count.astype(np.float64)
        if order == "strongest":
            return self.best_value[:, 0].astype(np.float64)
        return self.total / (self.count + _SILENT) * self.rarity()


def survey_store(store: FeatureStore, layer: int, contexts: int, window: int, include_sinks: bool) -> Survey:
    """The first reading, with `contexts` places per feature, at most one per text where there are enough
    texts."""
    survey = Survey(store.d_sae(layer), contexts)
    # A store of few long texts would otherwise show fewer passages than were asked for.
    by_text = store.num_documents >= contexts
    start = 0
    for shard in store:
        for part, codes in shard.blocks(layer, ROWS):
            keep = kept_rows(codes.flags, include_sinks)
            nan = codes.flags & NAN_ROW != 0
            survey.tokens += int(keep.sum())
            survey.nan_tokens += int(nan.sum())
            survey.sink_tokens += int((~nan & (codes.flags & EXTREME_ROW != 0)).sum())
            row, slot = np.nonzero((codes.values > 0) & keep[:, None])
            feature = codes.indices[row, slot].astype(np.int64)
            place = row + (start + part.start)
            key = shard.doc[part][row].astype(np.int64) if by_text else place // (2 * window + 1)
            survey.add(feature, codes.values[row, slot], place, key)
        start += len(shard)
    return survey


class TextSums:
    """One text, read in blocks: per feature `count` int64, `total` f64, and the first of its strongest places.

    All are [F]; `best_value` f32 is 0 and `best_row` int64 (token of the text) without meaning where it is silent.
    """

    def __init__(self, document: StoredDocument, layer: int, d_sae: int, include_sinks: bool):
        self.count = np.zeros(d_sae, np.int64)
        self.total = np.zeros(d_sae, np.float64)
        self.best_value = np.zeros(d_sae, np.float32)
        self.best_row = np.zeros(d_sae, np.int64)
        for start in range(0, len(document), ROWS):
            codes = document.part(slice(start, start + ROWS)).codes(layer)
            keep = kept_rows(codes.flags, include_sinks)
            row, slot = np.nonzero((codes.values > 0) & keep[:, None])
            self._add(codes.indices[row, slot], codes.values[row, slot], row + start)

    def _add(self, feature: np.ndarray, value: np.ndarray, row: np.ndarray) -> None:
        self.count += np.bincount(feature, minlength=len(self.count))
        self.total += np.bincount(feature, weights=value, minlength=len(self.count))
        before = self.best_value.copy()
        np.maximum.at(self.best_value, feature, value)
        peak = (value == self.best_value[feature]) & (value > before[feature])
        # Of several assignments to one place the last one stays: backwards, that is the earliest row.
        self.best_row[feature[peak][::-1]] = row[peak][::-1]


class Words:
    """Token ids to strings, each decoded alone: a character spread over tokens shows as U+FFFD in each of
    them."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        token = int(token)
        if token not in self._known:
            self._known[token] = self._decode(token)
        return self._known[token]

    def _decode(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        # SentencePiece decoders drop the space in front of the first token of what they decode.
        piece = getattr(self._tokenizer, "convert_ids_to_tokens", lambda _: None)(token)
        if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
            text = " " + text
        return text


class Gathered:
    """What the second reading collects for the features shown."""

    def __init__(self, chosen: list[int], survey: Survey):
        self.slot_of = np.full(survey.d_sae, -1, np.int64)
        self.slot_of[chosen] = np.arange(len(chosen))
        self.top = np.maximum(survey.best_value[chosen, 0].astype(np.float64), np.finfo(np.float64).tiny)
        self.histogram = np.zeros(len(chosen) * BINS, np.int64)
        self.pair = np.zeros(0, np.int64)  # slot << 32 | token
        self.pair_mass: np.ndarray = np.zeros(0, np.float64)
        self.pair_count: np.ndarray = np.zeros(0, np.float64)  # exact: counts stay far below 2**53

    def add(self, codes: LayerCodes, tokens: np.ndarray, keep: np.ndarray) -> None:
        slots = self.slot_of[codes.indices]
        row, column = np.nonzero((slots >= 0) & (codes.values > 0) & keep[:, None])
        slot, value = slots[row, column], codes.values[row, column].astype(np.float64)
        step = np.minimum((value / self.top[slot] * BINS).astype(np.int64), BINS - 1)
        self.histogram += np.bincount(slot * BINS + step, minlength=len(self.histogram))
        pair = np.concatenate([self.pair, slot << 32 | tokens[row].astype(np.int64)])
        mass = np.concatenate([self.pair_mass, value])
        count = np.concatenate([self.pair_count, np.ones(len(value))])
        self.pair, place = np.unique(pair, return_inverse=True)
        self.pair_mass = np.bincount(place, weights=mass, minlength=len(self.pair))
        self.pair_count = np.bincount(place, weights=count, minlength=len(self.pair))

    def top_tokens(self, slot: int, words: Words, most: int) -> list[TokenShare]:
        mine = self.pair >> 32 == slot
        token, mass, count = self.pair[mine] & 0xFFFFFFFF, self.pair_mass[mine], self.pair_count[mine]
        best = np.lexsort((token, -mass))[:most]
        return [TokenShare(int(token[i]), words[token[i]], int(count[i]), float(mass[i] / mass.sum())) for i in best]


class Passage:
    """The rows around one place, which may lie in two shards: store row, document, position, token,
    activation."""

    def __init__(self, feature: int, row: int):
        self.feature, self.row = feature, row
        self.rows: list[tuple[int, int, int, int, float]] = []

    def read(self, start: int, shard: Shard, layer: int, window: int, include_sinks: bool) -> None:
        """Take what the shard, which starts at row `start` of the store, holds of the passage."""
        low = max(self.row - window - start, 0)
        high = min(self.row + window + 1 - start, len(shard))
        if low >= high:
            return
        part = slice(low, high)
        codes = shard.layer(layer, part)
        mine = (codes.indices == self.feature) & kept_rows(codes.flags, include_sinks)[:, None]
        activation = np.where(mine, codes.values, 0).sum(1)
        columns = (shard.doc[part], shard.position[part], shard.token[part], activation)
        self.rows += zip(range(start + low, start + high), *(c.tolist() for c in columns), strict=True)

    def context(self, words: Words) -> Context:
        (_, document, position, _, _) = next(r for r in self.rows if r[0] == self.row)
        rows = [r for r in self.rows if r[1] == document]
        peak = next(i for i, r in enumerate(rows) if r[0] == self.row)
        return Context(document, position, peak, [words[r[3]] for r in rows], [r[4] for r in rows])
