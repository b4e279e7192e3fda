"""Directions that people would steer with if they had no SAE, fitted on training texts at one layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.model import residuals

SINK = 10.0
"""A residual whose norm is above this many medians is an attention sink, as in `qscope evaluate`."""
NAMES = ("difference of means", "PCA", "linear probe")


@dataclass(frozen=True)
class Fit:
    """A unit direction [D] with what is known about it."""

    name: str
    direction: tuple[float, ...]
    note: str


def pooled(
    model: Any, tokenizer: Any, texts: Sequence[str], layer: int, pool: Literal["mean", "last"], tokens: int, rows: int
) -> np.ndarray:
    """A residual per text [texts, D] float64: of its last token, or the mean over its ordinary tokens.

    Ordinary: not the first token and no attention sink (texts of one token give that token). Texts are cut after
    `tokens` tokens; `rows` of them go through the model at once.
    """
    ids = [tokenizer(text)["input_ids"][:tokens] for text in texts]
    found = np.zeros((len(texts), 0))
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    for begin in range(0, len(order), rows):
        taken = order[begin : begin + rows]
        longest = max(1, len(ids[taken[0]]))
        batch = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in taken])
        hidden = residuals(model, batch, [layer])[layer].double()
        if found.shape[1] == 0:
            found = np.zeros((len(texts), hidden.shape[-1]))
        for i, rows_of in zip(taken, hidden, strict=True):
            found[i] = _pool(rows_of[: max(1, len(ids[i]))], pool).cpu().numpy()
    return found


def _pool(hidden: Tensor, pool: str) -> Tensor:
    if pool == "last" or len(hidden) == 1:
        return hidden[-1]
    rest = hidden[1:]
    norms = rest.norm(dim=1)
    return rest[norms <= SINK * norms.median()].mean(0)


def fit(positive: np.ndarray, negative: np.ndarray, names: Sequence[str], seed: int) -> list[Fit]:
    """Difference of means, first principal component and linear probe of residuals [texts, D], as unit vectors that
    point from negative to positive; those of `names` (out of NAMES).

    difference of means: mean(positive) - mean(negative) (CAA, Rimsky et al. 2024).
    PCA: first principal component of all texts about their mean (RepE, Zou et al. 2023, takes that of differences of
        pairs, and these texts are no pairs).
    linear probe: weights of an L2-regularised logistic regression (C = 1) on residuals about their mean, divided by
        their root mean square norm.
    """
    for texts, sign in ((positive, "positive"), (negative, "negative")):
        if len(texts) < 2:
            raise InputError(f"{len(texts)} {sign} training texts were given; at least 2 are needed for a direction.")
    both = np.concatenate([positive, negative])
    labels = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    centred = both - both.mean(0)
    difference = positive.mean(0) - negative.mean(0)
    size = f"{len(positive)} positive and {len(negative)} negative texts"
    found = []
    if "difference of means" in names:
        found.append(_unit("difference of means", difference, difference, size))
    if "PCA" in names:
        _, spread, components = np.linalg.svd(centred, full_matrices=False)
        share = float(spread[0] ** 2 / (spread**2).sum())
        found.append(_unit("PCA", components[0], difference, f"{size}; {100 * share:.0f} % of their variance"))
    if "linear probe" in names:
        probe, right = _probe(centred / np.sqrt((centred**2).sum(1).mean()), labels, seed)
        found.append(_unit("linear probe", probe, difference, f"{size}; {100 * right:.0f} % of them told apart"))
    return found


def _unit(name: str, direction: np.ndarray, toward: np.ndarray, note: str) -> Fit:
    norm = float(np.linalg.norm(direction))
    if not norm > 0 or not np.isfinite(norm):
        raise InputError(f"The training texts give no direction for {name}: positive and negative ones are the same.")
    sign = -1.0 if float(direction @ toward) < 0 else 1.0
    return Fit(name, tuple((sign * direction / norm).tolist()), note)


def _probe(x: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """(weights [D], share of the training texts told apart)."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise InputError(
            "The linear-probe baseline needs scikit-learn: pip install scikit-learn. Or leave it out: --skip probe."
        ) from error
    model = LogisticRegression(max_iter=2000, random_state=seed).fit(x, labels)
    return np.asarray(model.coef_[0], np.float64), float(model.score(x, labels))


def random_directions(width: int, count: int, seed: int) -> list[tuple[float, ...]]:
    """Unit vectors, uniform on the sphere."""
    drawn = np.random.default_rng([seed, 1]).standard_normal((count, width))
    return [tuple(row.tolist()) for row in drawn / np.linalg.norm(drawn, axis=1, keepdims=True)]


def random_features(fired: Sequence[int], chosen: Sequence[int], count: int, seed: int) -> list[int]:
    """Features that fired on the neutral text and that the spec does not use."""
    pool = sorted(set(fired) - set(chosen))
    rng = np.random.default_rng([seed, 2])
    return [int(f) for f in rng.choice(pool, size=min(count, len(pool)), replace=False)] if pool else []


def typical_norm(hidden: Tensor) -> float:
    """Median norm of the residuals [B, S, D] that are neither first tokens nor attention sinks."""
    norms = hidden[:, 1:].float().norm(dim=-1).flatten()
    return float(norms[norms <= SINK * norms.median()].median())
