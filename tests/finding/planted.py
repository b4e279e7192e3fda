"""Small sparse codes with planted features, and the same dense."""

import numpy as np

F, K = 40, 6


def codes(seed, texts=24, planted=None, tokens=(1, 9)):
    """(top_acts [N, K], top_indices, text [N], keep [N], positive [T], group [T]); ties, zeros and unkept tokens.

    planted: {feature: (share of tokens in positive texts, in negative texts)}; the rest fire everywhere alike.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(*tokens, size=texts)
    text = np.repeat(np.arange(texts), lengths)
    positive = np.arange(texts) % 2 == 0
    group = np.where(positive, 0, np.arange(texts) // 2 % 2)
    n = len(text)
    indices = np.argsort(rng.random((n, F - 3)), axis=1)[:, :K].astype(np.int32) + 3
    acts = rng.integers(0, 5, (n, K)).astype(np.float32) / 4  # a quarter grid: ties between texts and with 0
    for feature, shares in (planted or {}).items():
        fires = rng.random(n) < np.where(positive[text], *shares)
        indices[fires, feature % 3], acts[fires, feature % 3] = feature, 1 + rng.integers(0, 3, fires.sum())
    keep = rng.random(n) < 0.9
    keep[np.unique(text, return_index=True)[1]] = True
    return acts, indices, text, keep, positive, group


def dense(acts, indices, text, keep):
    """Per text the dense activations [tokens, F] of its kept tokens."""
    full = np.zeros((len(text), F))
    np.put_along_axis(full, indices.astype(np.int64), acts.astype(np.float64), axis=1)
    return [full[(text == i) & keep] for i in range(text[-1] + 1)]


def pooled(blocks, pooling):
    """[T, F] activation and firing of every text, from its dense block."""
    if pooling == "any":
        return np.array([b.max(0) for b in blocks]), np.array([(b > 0).max(0) for b in blocks], float)
    if pooling == "last":
        return np.array([b[-1] for b in blocks]), np.array([b[-1] > 0 for b in blocks], float)
    return np.array([b.mean(0) for b in blocks]), np.array([(b > 0).mean(0) for b in blocks])
