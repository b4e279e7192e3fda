"""Splits: duplicates together, shares held in every class and group, the same for the same texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope.classification.split import Split, make_split
from qscope.errors import InputError


def corpus(sizes):
    """Texts, label and group with sizes[label][group] texts each."""
    label = np.repeat(np.arange(len(sizes)), [sum(row) for row in sizes])
    group = np.concatenate([np.repeat(np.arange(len(row)), row) for row in sizes])
    return [f"text {i}" for i in range(len(label))], label, group


def test_shares_hold_in_every_class_and_group():
    texts, label, group = corpus([[100, 40, 60], [50, 20, 30]])
    split = make_split(texts, label, group, (0.6, 0.2, 0.2), seed=3)
    for part, share in (("train", 0.6), ("calibration", 0.2), ("test", 0.2)):
        mask = getattr(split, part)
        for number in range(2):
            assert mask[label == number].sum() == share * (label == number).sum()
            for of in range(3):
                here = (label == number) & (group == of)
                assert abs(mask[here].sum() - share * here.sum()) <= 1


def test_groups_of_one_text_fill_every_part():
    texts, label, group = corpus([[1] * 50, [1] * 50])
    split = make_split(texts, label, group, (0.5, 0.2, 0.3))
    assert split.counts(label, "ab") == {
        "train": {"a": 25, "b": 25},
        "calibration": {"a": 10, "b": 10},
        "test": {"a": 15, "b": 15},
    }


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_text_is_in_one_part_and_equal_texts_in_the_same(data):
    words = data.draw(st.lists(st.sampled_from([f"w{i}" for i in range(40)]), min_size=0, max_size=60))
    texts = words + [f"{side} {i}" for side in "ab" for i in range(10)]
    label = np.array([hash_free(text) for text in texts])
    group = np.array([i % 3 for i in range(len(texts))])
    split = make_split(texts, label, group, seed=data.draw(st.integers(0, 5)))
    total = split.train.astype(int) + split.calibration + split.test
    assert (total == 1).all()
    sides = {}
    for i, text in enumerate(texts):
        sides.setdefault(text, set()).add((bool(split.train[i]), bool(split.calibration[i])))
    assert all(len(found) == 1 for found in sides.values())
    for number in (0, 1):  # of the different texts each part has its share, rounded
        different = len({text for text, of in zip(texts, label, strict=True) if of == number})
        tested = len({t for t, of, test in zip(texts, label, split.test, strict=True) if of == number and test})
        assert abs(tested - 0.2 * different) <= 0.5


def hash_free(text):
    return sum(map(ord, text)) % 2 if text.startswith("w") else int(text.startswith("a"))


def test_the_order_of_the_texts_makes_no_difference():
    texts, label, group = corpus([[30, 7], [9, 21]])
    order = np.random.default_rng(0).permutation(len(texts))
    one = make_split(texts, label, group, seed=1)
    two = make_split([texts[i] for i in order], label[order], group[order], seed=1)
    np.testing.assert_array_equal(one.train[order], two.train)
    np.testing.assert_array_equal(one.test[order], two.test)
    other = make_split(texts, label, group, seed=2)
    assert (one.test != other.test).any()


def test_what_cannot_be_split():
    texts, label, group = corpus([[30], [4]])
    with pytest.raises(InputError, match="calibration part has 1 text of the class 'toxic'"):
        make_split(texts, label, group, names=["clean", "toxic"])
    with pytest.raises(InputError, match="add up to 1"):
        make_split(texts, label, group, (0.5, 0.2, 0.2))
    with pytest.raises(InputError, match="class 'clean'"):
        make_split(["a", "b", "c"], np.ones(3, np.int64), names=["clean", "toxic"])
    ones = np.ones(3, bool)
    with pytest.raises(InputError, match="in two of them or in none"):
        Split(ones, ones, ~ones)
