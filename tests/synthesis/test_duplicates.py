"""Near-duplicates by words and by fired features."""

import random

import pytest

from qscope.synthesis.duplicates import Kept, feature_key
from qscope.synthesis.minhash import jaccard, shingles

WORDS = [f"word{i}" for i in range(400)]


def text(rng, size=20):
    return " ".join(rng.choice(WORDS) for _ in range(size))


def test_texts_at_or_above_the_bar_are_found_and_others_are_not():
    kept = Kept(text_bar=0.6)
    base = " ".join(WORDS[:20])  # 18 runs of 3 words
    kept.add(base)
    near, far = base + " more", " ".join(WORDS[:10] + WORDS[50:60])
    assert jaccard(shingles(base), shingles(near)) == 18 / 19
    assert jaccard(shingles(base), shingles(far)) == 8 / 28
    assert kept.like_text(near) and kept.like_text(base.upper() + "!")
    assert not kept.like_text(far) and not kept.like_text("something else altogether")
    assert not kept.like_text("")


def test_candidates_are_found_by_bands_as_an_exact_search_finds_them():
    """2,000 pairs; a miss at J >= 0.6 has a chance below 2e-4 each, and what lies below the bar is never found."""
    rng = random.Random(0)
    found = missed = 0
    for _ in range(60):
        kept, base = Kept(text_bar=0.6), text(rng).split()
        kept.add(" ".join(base))
        for _ in range(30):
            other = base[:]
            for place in rng.sample(range(20), rng.randint(0, 4)):
                other[place] = rng.choice(WORDS)
            exact = jaccard(shingles(" ".join(base)), shingles(" ".join(other))) >= 0.6
            said = kept.like_text(" ".join(other))
            assert not said or exact
            found += exact and said
            missed += exact and not said
    assert found > 300 and missed <= 1


def test_feature_sets_are_compared_exactly():
    kept = Kept(feature_bar=0.8)
    ids = [feature_key(15, i) for i in range(10)]
    kept.add("a text", ids)
    assert kept.like_features(ids)
    assert kept.like_features(ids[:8])  # 8 of 10
    assert not kept.like_features(ids[:7])
    assert not kept.like_features(ids + [feature_key(15, i) for i in range(20, 24)])  # 10 of 14
    assert not kept.like_features([feature_key(7, i) for i in range(10)])  # another layer
    assert not kept.like_features([])


def test_a_text_that_was_added_without_features_is_like_none():
    kept = Kept()
    kept.add("seed text")
    assert not kept.like_features([1, 2]) and len(kept) == 1


@pytest.mark.parametrize("bar", [0.3, 0.99])
def test_the_bar_counts(bar):
    kept = Kept(text_bar=bar)
    kept.add("a b c d e f")
    assert kept.like_text("a b c d e g") is (bar <= 3 / 5)
