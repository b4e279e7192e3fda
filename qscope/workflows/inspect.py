"""What the features of a store react to: statistics, contexts and texts, from the stored activations.

The store is read twice, shard by shard. The first reading keeps, for every feature, sums and the places of
its strongest activations (20 bytes per place, F x `contexts` places); after it the features to show are
known, and the second reading collects their histograms, tokens and contexts. A text that is shown is read in
blocks as well. Memory depends on F and on what is shown, never on the length of the corpus or of a text.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qscope.errors import InputError
from qscope.explaining.journal import load_explanations
from qscope.store import FeatureStore, LayerCodes, StoredDocument
from qscope.workflows.inspect_result import (
    ORDERS,
    Feature,
    InspectResult,
    Meaning,
    Order,
    Text,
    TextFeature,
    TextToken,
)
from qscope.workflows.inspect_scan import (
    BINS,
    ROWS,
    Gathered,
    Passage,
    TextSums,
    Words,
    kept_rows,
    survey_store,
)

_TEXT_TOKENS = 600
_PER_TOKEN = 6
_PER_TEXT = 14
_LINKED = 5  # leading features of each text that get a card on the page


@dataclass(frozen=True)
class InspectConfig:
    """Show what the features of a store react to."""

    store: Path
    """Folder written by `qscope encode`."""
    layer: int | None = None
    """Layer to look at. Without it: the first of the store."""
    features: int = 30
    """How many features to show."""
    feature: int | None = None
    """Show this one feature in depth."""
    document: int | None = None
    """Show the strongest features of this stored text (its number in the store)."""
    order: Order = "specific"
    """Which features come first. `frequent`: active on most tokens. `strongest`: largest activation.
    `specific`:
    strong where active, and rarely active: sum / (active tokens + 8) x ln(tokens / active tokens)."""
    contexts: int = 8
    """Passages per feature, the strongest first, each from another text."""
    window: int = 16
    """Tokens shown on either side of the peak."""
    texts: int = 6
    """Texts on the page in which every token can be looked at."""
    include_sinks: bool = False
    """Count tokens of extreme norm (attention sinks, mostly first tokens) as well. NaN rows are never
    counted."""
    explanations: Path | None = None
    """Show what `qscope explain` says of each feature: the folder or file that it wrote."""
    html: Path | None = None
    """Write a page to look at in a browser: one file, no network."""


def run(config: InspectConfig) -> InspectResult:
    """Read `config.store` and return what to show. Raises `InputError` for options that do not fit the
    store."""
    _check(config)
    view = _View(config)
    if config.document is not None:
        texts = [view.text(config.document)]
        chosen = [f.id for f in texts[0].features[: config.features]]
        features = view.features(chosen)
    elif config.feature is not None:
        features = view.features([config.feature])
        peaks = dict.fromkeys(c.document for f in features for c in f.contexts)
        texts = [view.text(number) for number in list(peaks)[: config.texts]]
    else:
        texts = view.sample_texts()
        features = view.features(view.leading())
    linked = []
    if config.html is not None:
        shown = {f.id for f in features}
        linked = [f.id for text in texts for f in text.features[:_LINKED] if f.id not in shown]
    return view.result(features, texts, view.features(list(dict.fromkeys(linked))))


MOST_CONTEXTS = 1000  # of every feature: their places are kept for all F features while the store is read


def _check(config: InspectConfig) -> None:
    for name, least in (("features", 1), ("contexts", 1), ("window", 0), ("texts", 0)):
        if getattr(config, name) < least:
            raise InputError(f"{name}={getattr(config, name)} was given; it has to be {least} or more.")
    if config.contexts > MOST_CONTEXTS:
        raise InputError(
            f"contexts={config.contexts} was given; at most {MOST_CONTEXTS} per feature are kept. The store itself "
            "gives all of them: FeatureStore.feature(layer, feature)."
        )
    if config.order not in ORDERS:
        raise InputError(f"order={config.order!r} was given; it has to be one of {', '.join(ORDERS)}.")
    if config.feature is not None and config.document is not None:
        raise InputError(
            "feature and document were both given. Give one of them: feature shows what a feature reacts to,"
            " document which features a text holds."
        )


def _check_range(name: str, value: int | None, size: int) -> None:
    if value is not None and not 0 <= value < size:
        held = f"they are numbered 0 to {size - 1}" if size else "it holds none"
        raise InputError(f"{name}={value} is not in the store: {held}.")


class _View:
    """A store, the layer looked at, and its survey."""

    def __init__(self, config: InspectConfig):
        self.config = config
        self.store = FeatureStore(config.store)
        self.layer = self.store.layers[0] if config.layer is None else config.layer
        if self.layer not in self.store.layers:
            held = ", ".join(map(str, self.store.layers))
            raise InputError(f"layer={config.layer} was given, but the store holds layers {held}.")
        _check_range("feature", config.feature, self.store.d_sae(self.layer))
        _check_range("document", config.document, self.store.num_documents)
        self.meanings = self._meanings(config.explanations)
        self.words = Words(self.store.tokenizer())
        self.survey = survey_store(self.store, self.layer, config.contexts, config.window, config.include_sinks)
        # Within one token, the order "specific" discounts features that are always on.
        specific = config.order == "specific"
        self.weight = self.survey.rarity() if specific else np.ones(self.survey.d_sae)

    def _meanings(self, path: Path | None) -> dict[int, Meaning]:
        if path is None:
            return {}
        found = load_explanations(path, {self.layer: self.store.settings.sae(self.layer).sha256})
        meanings = {}
        for (_, feature), one in found.items():
            scores = {kind: one.scores[kind].balanced_accuracy for kind in one.scores}
            by = "plain" if one.problem else one.made.explainer
            meanings[feature] = Meaning(one.text, by, scores.get("detection"), scores.get("fuzzing"))
        return meanings

    def leading(self) -> list[int]:
        """The first features of the chosen order, lowest id first among equals; dead ones never."""
        score = self.survey.score(self.config.order)
        active = np.flatnonzero(self.survey.count)
        return active[np.argsort(-score[active], kind="stable")[: self.config.features]].tolist()

    def features(self, chosen: list[int]) -> list[Feature]:
        """The second reading: all that is shown of the chosen features."""
        if not chosen:
            return []
        survey, sinks = self.survey, self.config.include_sinks
        gathered = Gathered(chosen, survey)
        passages = {f: [Passage(f, int(r)) for r in survey.best_row[f][survey.best_value[f] > 0]] for f in chosen}
        start = 0
        for shard in self.store:
            for part, codes in shard.blocks(self.layer, ROWS):
                gathered.add(codes, shard.token[part], kept_rows(codes.flags, sinks))
            for of_feature in passages.values():
                for passage in of_feature:
                    passage.read(start, shard, self.layer, self.config.window, sinks)
            start += len(shard)
        score = survey.score(self.config.order)
        return [
            Feature(
                id=f,
                count=int(survey.count[f]),
                density=float(survey.density[f]),
                mean=float(survey.total[f] / max(survey.count[f], 1)),
                max=float(survey.best_value[f, 0]),
                score=float(score[f]),
                histogram=gathered.histogram[slot * BINS : (slot + 1) * BINS].tolist(),
                top_tokens=gathered.top_tokens(slot, self.words, 8),
                contexts=[p.context(self.words) for p in passages[f]],
                meaning=self.meanings.get(f),
            )
            for slot, f in enumerate(chosen)
        ]

    def sample_texts(self) -> list[Text]:
        """Texts spread evenly over the store; those without tokens are passed over."""
        held = self.store.num_documents
        number = min(self.config.texts, held)
        texts = [self.text(i * held // number) for i in range(number)]
        return [text for text in texts if text.num_tokens]

    def text(self, number: int) -> Text:
        """A stored text: the leading features of its first 600 tokens, and of the whole."""
        document = self.store.document(number)
        head = document.part(slice(_TEXT_TOKENS))
        codes = head.codes(self.layer)
        keep = kept_rows(codes.flags, self.config.include_sinks)
        active = (codes.values > 0) & keep[:, None]
        ranked = np.where(active, codes.values * self.weight[codes.indices], -1.0)
        best = np.argsort(-ranked, axis=1, kind="stable")[:, :_PER_TOKEN]
        tokens = []
        for row in range(len(head)):
            pairs = [(int(codes.indices[row, c]), float(codes.values[row, c])) for c in best[row] if active[row, c]]
            tokens.append(TextToken(self.words[head.tokens[row]], pairs, not keep[row]))
        return Text(number, len(document), tokens, self._text_features(document, codes, active))

    def _text_features(self, document: StoredDocument, head: LayerCodes, active: np.ndarray) -> list[TextFeature]:
        """The first features of the text in the order `TEXT_ORDERS[order]`.

        head: codes of its shown tokens; active: [n, K] bool, which of them count.
        """
        order = self.config.order
        sums = TextSums(document, self.layer, self.survey.d_sae, self.config.include_sinks)
        ids = np.flatnonzero(sums.count)
        total, count, density = sums.total[ids], sums.count[ids], self.survey.density[ids]
        if order == "specific":
            score = total * np.log(np.maximum(count / max(len(document), 1) / density, 1.0))
        else:
            score = total if order == "strongest" else count.astype(np.float64)
        row, column = np.nonzero(active)
        by_feature = np.argsort(head.indices[row, column], kind="stable")
        row, column = row[by_feature], column[by_feature]
        feature, value = head.indices[row, column], head.values[row, column]
        shown = []
        for i in np.lexsort((ids, -score))[: max(self.config.features, _PER_TEXT)]:
            f = int(ids[i])
            mine = slice(*np.searchsorted(feature, [f, f + 1]))
            pairs = list(zip(row[mine].tolist(), value[mine].tolist(), strict=True))
            top, peak = float(sums.best_value[f]), int(sums.best_row[f])
            shown.append(TextFeature(f, int(count[i]), float(total[i]), top, peak, float(density[i]), pairs))
        return shown

    def result(self, features: list[Feature], texts: list[Text], linked: list[Feature]) -> InspectResult:
        store, survey, settings = self.store, self.survey, self.store.settings
        sae = settings.sae(self.layer)
        active = survey.count > 0
        half_decade = np.clip(np.floor(2 * np.log10(survey.density[active])) + 14, 0, 13).astype(np.int64)
        return InspectResult(
            about={
                "model": settings.model.name,
                "SAE": sae.source or f"sha256 {sae.sha256[:12]}",
                "dtype": settings.dtype,
                "precision": settings.precision,
                "context": f"{settings.context_size} tokens",
            },
            layer=self.layer,
            layers=list(store.layers),
            num_tokens=store.num_tokens,
            counted_tokens=survey.tokens,
            nan_tokens=survey.nan_tokens,
            sink_tokens=survey.sink_tokens,
            sinks_counted=self.config.include_sinks,
            num_documents=store.num_documents,
            d_sae=survey.d_sae,
            k=store.k(self.layer),
            l0=float(survey.count.sum() / max(survey.tokens, 1)),
            alive=int(active.sum()),
            density_histogram=np.bincount(half_decade, minlength=14).tolist(),
            order=self.config.order,
            document=self.config.document,
            html=self.config.html,
            features=features,
            texts=texts,
            text_features=linked,
        )
