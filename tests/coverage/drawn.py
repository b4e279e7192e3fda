"""Small footprints with the answers by brute force, and a planted suite."""

import itertools
import math
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from qscope.coverage.footprints import Footprints

F = 7


def footprints(least=1, most=7):
    """Strategy: footprints of few items over F features, empty ones among them."""
    sets = st.lists(st.sets(st.integers(0, F - 1), max_size=4), min_size=least, max_size=most)
    return sets.map(lambda found: Footprints.from_sets([sorted(ids) for ids in found], F))


def as_sets(footprints):
    return [set(footprints.item(i).tolist()) for i in range(len(footprints))]


def union(sets, chosen):
    return set().union(*(sets[i] for i in chosen))


def subsets(N, n):
    return list(itertools.combinations(range(N), n))


def mean(values):
    values = list(values)
    return Fraction(sum(values), len(values))


def exact_probability(m, N, n):
    """p(n) in integers."""
    return 1 - Fraction(math.comb(N - m, n), math.comb(N, n))


def zipf(seed, items, k, d_sae, exponent=1.1):
    """Items of k different features, drawn without replacement with Zipf weights (Gumbel top-k)."""
    rng = np.random.default_rng(seed)
    keys = -exponent * np.log(np.arange(1, d_sae + 1)) + rng.gumbel(size=(items, d_sae))
    return np.argpartition(-keys, k, axis=1)[:, :k].astype(np.int32)


def planted_suite(seed=0, items=60):
    """Benchmarks with known feature sets, each item firing 6 of its benchmark's 20 features and the common 0 and 1.

    a and b draw from the same 20 features, c shares half of them, d none.
    """
    rng = np.random.default_rng(seed)
    pools = {"a": range(2, 22), "b": range(2, 22), "c": range(12, 32), "d": range(32, 52)}
    drawn = {
        name: [[0, 1, *rng.choice(np.array(pool), 6, replace=False)] for _ in range(items)]
        for name, pool in pools.items()
    }
    return {name: Footprints.from_sets(sets, 60) for name, sets in drawn.items()}, pools
