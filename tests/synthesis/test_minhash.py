"""MinHash against the exact Jaccard similarity."""

import math
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope.synthesis.minhash import MinHash, jaccard, shingles


def test_shingles_are_runs_of_words_without_case_and_punctuation():
    assert shingles("The cat, the CAT sat!") == {"the cat the", "cat the cat", "the cat sat"}
    assert shingles("Two words") == {"two words"}
    assert shingles("... !") == frozenset()
    assert shingles("我喜欢你") == {"我 喜 欢", "喜 欢 你"}


def test_jaccard_by_hand():
    assert jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4})) == 2 / 4
    assert jaccard(frozenset(), frozenset()) == 0.0


@settings(max_examples=40, deadline=None)
@given(shared=st.integers(0, 40), left=st.integers(0, 20), right=st.integers(0, 20), salt=st.integers(0, 10**6))
def test_the_share_of_equal_entries_estimates_jaccard(shared, left, right, salt):
    """|estimate - J| <= 5 standard errors sqrt(J (1 - J) / 256), a chance of 6e-7 per example; exact at 0 and 1."""
    both = {f"{salt} both {i}" for i in range(shared)}
    a = frozenset(both | {f"{salt} a {i}" for i in range(left)})
    b = frozenset(both | {f"{salt} b {i}" for i in range(right)})
    if not a or not b:
        return
    hashing = MinHash(256)
    estimate = float((hashing.signature(a) == hashing.signature(b)).mean())
    exact = jaccard(a, b)
    assert abs(estimate - exact) <= 5 * math.sqrt(exact * (1 - exact) / 256)


def test_signatures_do_not_depend_on_order_or_process():
    items = [f"item {i}" for i in range(30)]
    mixed = items[:]
    random.Random(1).shuffle(mixed)
    assert np.array_equal(MinHash(16).signature(items), MinHash(16).signature(mixed))
    # Pinned: another machine or Python must find the same near-duplicates.
    assert MinHash(4).signature(["a", "b"]).tolist() == [
        817939433937004287,
        163800247108707408,
        1020094702655142783,
        178967461616468825,
    ]
    assert not np.array_equal(MinHash(16, seed=1).signature(items), MinHash(16).signature(items))
