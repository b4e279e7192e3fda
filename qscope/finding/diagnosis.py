"""One problematic response against a pool of ordinary texts: which features are unusually active in it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qscope.finding.pooled import Floats, Ints, PooledCodes, Pooling


@dataclass(frozen=True)
class Diagnosis:
    """Features that fire in the response, most unusual first: [R] each, P texts in the pool."""

    feature: Ints
    activation: Floats
    """Pooled, in the response"""
    firing: Floats
    """Share of the response's kept tokens at which it fires"""
    z: Floats
    """(activation - mean) / deviation over the pool and the response together; at most P / sqrt(P + 1) with P texts in
    the pool, which is what a feature gets that fires in no text of the pool"""
    pool_mean: Floats
    """Mean of the pooled activation over the pool"""
    pool_rate: Floats
    """Share of the pool's kept tokens at which it fires"""
    exceed: Floats
    """(1 + texts of the pool that reach the response's activation) / (1 + P): the permutation p-value"""


def diagnose(
    codes: PooledCodes, response: int, pooling: Pooling, counts: npt.NDArray[np.bool_] | None = None
) -> Diagnosis:
    """Compare text number `response` with all others, or those that `counts` [T].

    The response counts in mean and deviation, so that a feature unseen in the pool has a finite z; equal z are ordered
    by activation (Qwen-Scope 3.2: features ranked by their activation on the problematic response), then feature id.
    """
    columns, texts = len(codes.features), len(codes.tokens) if counts is None else int(counts.sum())
    value = codes.values(pooling)[0]
    mine = codes.text == response
    own, firing = np.zeros(columns), np.zeros(columns)
    own[codes.column[mine]] = value[mine]
    firing[codes.column[mine]] = codes.firing[mine] / max(1, int(codes.tokens[response]))

    def total(entries: Floats) -> Floats:
        found: Floats = np.bincount(codes.column, weights=entries, minlength=columns).astype(np.float64)
        return found

    mean = total(value) / texts
    present = total(np.ones(len(value)))
    squares = total((value - mean[codes.column]) ** 2) + (texts - present) * mean**2
    deviation = np.sqrt(squares / max(1, texts - 1))
    z = np.divide(own - mean, deviation, out=np.zeros(columns), where=deviation > 0)
    reached = total((~mine & (value >= own[codes.column])).astype(np.float64))
    pool_mean = (total(value) - own) / max(1, texts - 1)
    pool_tokens = int(codes.tokens.sum() - codes.tokens[response])
    rate = total(np.where(mine, 0, codes.firing).astype(np.float64)) / max(1, pool_tokens)

    fires = np.flatnonzero(own > 0)
    order = fires[np.lexsort((fires, -own[fires], -np.round(z[fires], 9)))]  # rounding keeps equal z equal
    return Diagnosis(
        feature=codes.features[order],
        activation=own[order],
        firing=firing[order],
        z=z[order],
        pool_mean=pool_mean[order],
        pool_rate=rate[order],
        exceed=((1 + reached) / texts)[order],
    )
