"""What examples are worth to a classifier: AUROC on held-out texts, learned from the seed with n added texts."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qscope.classification.baselines import feature_probe, residual_probe, sparse_features, tfidf
from qscope.classification.methods import Method, Problem
from qscope.classification.metrics import Prediction
from qscope.classification.resampling import bootstrap
from qscope.errors import InputError
from qscope.finding.pooled import Ints
from qscope.workflows.encoder import Encoder
from qscope.workflows.text_features import read_features, tokenize_texts

SEED = "seed alone"


@dataclass(frozen=True)
class Labels:
    """Texts with a class each: 1 is the positive one."""

    texts: tuple[str, ...]
    label: tuple[int, ...]


@dataclass(frozen=True)
class Gain:
    """One method on one training set."""

    method: str
    added: str
    texts: int
    """Added to the seed, in each draw"""
    draws: int
    auroc: float
    """Mean over the draws"""
    low: float
    """2.5 % and 97.5 % quantiles over the held-out texts drawn again, and over the draws of added texts"""
    high: float
    gain: float
    """Above the seed alone"""
    gain_low: float
    gain_high: float


def downstream(
    encoder: Encoder,
    layer: int,
    seed: Labels,
    added: Mapping[str, Labels],
    held_out: Labels,
    context_size: int,
    draws: int = 5,
    replicates: int = 500,
    number: int = 0,
    folder: Path | None = None,
) -> list[Gain]:
    """AUROC of a linear probe of the residual, of all features and of TF-IDF, learned from each training set.

    Args:
        added: kind -> its texts; as many of each are added as the smallest kind has, drawn `draws` times where it has
            more.
        replicates: of the held-out texts, for the intervals; spread over the draws.
        number: seed of draws, folds and replicates.
        folder: keeps what was read, for a run that goes on.

    Raises InputError where a set lacks a class that it needs.
    """
    if any(not one.texts for one in added.values()) or len(set(held_out.label)) < 2:
        raise InputError("A kind of added texts is empty, or the held-out texts are of one class. Give both classes.")
    parts = [seed, held_out, *added.values()]
    texts = [text for part in parts for text in part.texts]
    label = np.array([value for part in parts for value in part.label], np.int64)
    starts = np.cumsum([0, *(len(part.texts) for part in parts)])
    place = [np.arange(a, b) for a, b in itertools.pairwise(starts.tolist())]
    found = read_features(
        encoder, tokenize_texts(encoder.tokenizer, texts, context_size), folder, keep_residuals=True, label="downstream"
    )
    methods = [
        residual_probe(found.residual(layer, "mean")),
        feature_probe(sparse_features(found.codes(layer))),
        tfidf(texts),
    ]
    size = min((len(one.texts) for one in added.values()), default=0)
    sets = {SEED: [place[0]]}
    for kind, mine in zip(added, place[2:], strict=True):
        times = draws if len(mine) > size else 1
        sets[kind] = [np.concatenate([place[0], taken]) for taken in _draws(mine, size, times, number)]
    return [gain for method in methods for gain in _gains(method, sets, place, label, size, replicates, number)]


def _draws(mine: Ints, size: int, times: int, number: int) -> list[Ints]:
    generator = np.random.default_rng(number)
    return [np.sort(generator.choice(mine, size, replace=False)) for _ in range(times)]


def _gains(
    method: Method,
    sets: Mapping[str, Sequence[Ints]],
    place: Sequence[Ints],
    label: Ints,
    size: int,
    replicates: int,
    number: int,
) -> list[Gain]:
    held = place[1]
    judged: dict[str, Prediction] = {}
    for kind, trains in sets.items():
        for i, train in enumerate(trains):
            problem = Problem(label, 2, train, place[0], seed=number)
            judged[f"{kind} {i}"] = method.fit(problem).take(held)
    drawn = bootstrap(label[held], 2, judged, replicates, number, names=("auroc",))
    alone = drawn.replicates[f"{SEED} 0"]["auroc"], drawn.value[f"{SEED} 0"]["auroc"]
    found = []
    for kind, trains in sets.items():
        names = [f"{kind} {i}" for i in range(len(trains))]
        values = np.array([drawn.value[name]["auroc"] for name in names])
        every = np.concatenate([drawn.replicates[name]["auroc"] for name in names])
        more = np.concatenate([drawn.replicates[name]["auroc"] - alone[0] for name in names])
        (low, high), (gain_low, gain_high) = (np.nanquantile(x, (0.025, 0.975)).tolist() for x in (every, more))
        found.append(
            Gain(
                method.name, kind, 0 if kind == SEED else size, len(trains), float(values.mean()), low, high,
                float(values.mean() - alone[1]), gain_low, gain_high,
            )
        )  # fmt: skip
    return found
