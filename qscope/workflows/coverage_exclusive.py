"""Features that one benchmark fires more often than any other, with the items at which they are strongest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qscope.errors import ModelError
from qscope.finding.output_score import logit_lens
from qscope.finding.pooled import Floats, Ints, Pooling
from qscope.workflows.coverage_read import Loaded, Read, blocks
from qscope.workflows.coverage_result import ExclusiveFeature, StrongItem

ITEMS = 3  # shown of each feature
LENS_TOKENS = 8
TEXT_TOKENS = 40  # shown of each item
ROWS = 128  # decoder rows against the whole vocabulary at once


def most_exclusive(names: Sequence[str], rates: Floats, count: int) -> list[tuple[ExclusiveFeature, ...]]:
    """For each benchmark the features with the largest (rate here - largest rate elsewhere) above 0; ties: lowest id.

    rates: [B, F] share of the items that fire each feature. A suite of one benchmark has none to compare with.
    """
    if len(names) < 2:
        return [()] * len(names)
    found = []
    for b in range(len(names)):
        others = np.delete(rates, b, axis=0)
        elsewhere = others.max(axis=0)
        lead = rates[b] - elsewhere
        names_elsewhere = [name for i, name in enumerate(names) if i != b]
        listed = []
        for j in np.argsort(-lead, kind="stable")[:count].tolist():
            if lead[j] > 0:
                where = names_elsewhere[int(others[:, j].argmax())] if elsewhere[j] > 0 else None
                listed.append(ExclusiveFeature(j, float(rates[b, j]), float(elsewhere[j]), where))
        found.append(tuple(listed))
    return found


def with_items(
    suite: Loaded, read: Read, wanted: Mapping[int, Sequence[ExclusiveFeature]], pooling: Pooling
) -> dict[int, tuple[ExclusiveFeature, ...]]:
    """Layer -> the features with their strongest items. What was read before is read again from the folder."""
    best: dict[tuple[int, int], list[tuple[float, int]]] = {(n, f.feature): [] for n in wanted for f in wanted[n]}
    if not best:
        return {layer: () for layer in wanted}
    label = f"items of {read.benchmark.name}"
    for first, features in blocks(read.benchmark, read.texts, suite.encoder, suite.folder, label):
        for layer, listed in wanted.items():
            codes = features.codes(layer)
            value = codes.values(pooling)[0]
            for found in listed:
                place = int(np.searchsorted(codes.features, found.feature))
                if place == len(codes.features) or codes.features[place] != found.feature:
                    continue
                low, high = np.searchsorted(codes.column, [place, place + 1]).tolist()
                top = np.argsort(-value[low:high], kind="stable")[:ITEMS] + low
                rows = [(float(value[i]), first + int(codes.text[i])) for i in top.tolist() if value[i] > 0]
                kept = best[layer, found.feature] + rows
                best[layer, found.feature] = sorted(kept, key=lambda pair: (-pair[0], pair[1]))[:ITEMS]
    shown = _Shown(suite, read, pooling == "last")
    return {
        layer: tuple(
            replace(f, items=tuple(StrongItem(shown.row(i), v, shown.text(i)) for v, i in best[layer, f.feature]))
            for f in listed
        )
        for layer, listed in wanted.items()
    }


@dataclass(frozen=True)
class _Shown:
    """The end (or the beginning) of an item's text as the model read it."""

    suite: Loaded
    read: Read
    end: bool

    def row(self, item: int) -> int:
        return item if self.read.benchmark.store is not None else self.read.benchmark.items[item].row

    def text(self, item: int) -> str:
        store = self.read.benchmark.store
        ids: Ints
        if store is not None:
            ids = store.document(item).tokens.astype(np.int64)
        else:
            assert self.read.texts is not None
            ids = self.read.texts.ids[item]
        tokenizer = self.suite.encoder.tokenizer if self.suite.encoder else store.tokenizer() if store else None
        assert tokenizer is not None
        cut = ids[-TEXT_TOKENS:] if self.end else ids[:TEXT_TOKENS]
        text = str(tokenizer.decode(cut.tolist()))
        gone = len(cut) < len(ids)
        return f"…{text}" if gone and self.end else f"{text}…" if gone else text


def with_lens(
    suite: Loaded, layer: int, found: Sequence[Sequence[ExclusiveFeature]]
) -> tuple[list[tuple[ExclusiveFeature, ...]], str | None]:
    """The features with the tokens that their decoder rows raise most; and why not, where the model has no head."""
    numbers = sorted({f.feature for listed in found for f in listed})
    if suite.encoder is None or not numbers:
        return [tuple(listed) for listed in found], None
    sae, tokenizer = suite.encoder.saes[layer], suite.encoder.tokenizer
    tokens: dict[int, tuple[str, ...]] = {}
    try:
        for start in range(0, len(numbers), ROWS):
            part = numbers[start : start + ROWS]
            rows = sae.W_dec.detach()[torch.tensor(part, device=sae.device)]
            ids = logit_lens(suite.encoder.model, rows, []).tokens[:, :LENS_TOKENS]
            tokens |= {f: tuple(tokenizer.decode([i]) for i in row) for f, row in zip(part, ids.tolist(), strict=True)}
    except ModelError as error:
        return [tuple(listed) for listed in found], f"no tokens are shown for exclusive features: {error}"
    return [tuple(replace(f, lens=tokens[f.feature]) for f in listed) for listed in found], None
