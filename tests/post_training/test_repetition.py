"""What counts as endless repetition: known strings, and the definition against a plain search."""

import random

import pytest

from qscope.errors import InputError
from qscope.post_training.repetition import (
    Thresholds,
    endless,
    endless_text,
    occurrences,
    repeated_share,
    shared_prefixes,
    suffix_loop,
)


def words(text: str) -> list[int]:
    """Token ids as stable numbers of words."""
    known: dict[str, int] = {}
    return [known.setdefault(word, len(known)) for word in text.split()]


def plain_loop(items, repeats, length):
    """The definition, O(n^2): the shortest period whose run at the end is long enough."""
    for period in range(1, len(items)):
        run = 0
        while run + period < len(items) and items[-1 - run] == items[-1 - run - period]:
            run += 1
        if run and run + period >= length and run + period >= repeats * period:
            return period, run + period
    return None


def test_shared_prefixes_of_known_strings():
    assert shared_prefixes("aabxaabxcaabxaabxay") == [19, 1, 0, 0, 4, 1, 0, 0, 0, 8, 1, 0, 0, 5, 1, 0, 0, 1, 0]
    assert shared_prefixes("aaaa") == [4, 3, 2, 1]
    assert shared_prefixes("") == []


def test_suffix_loop_is_its_definition():
    chance = random.Random(0)
    seen = 0
    for _ in range(600):
        items = [chance.randrange(2) for _ in range(chance.randrange(14))]
        repeats, length = chance.choice([2.0, 2.5, 3.0]), chance.randrange(1, 8)
        found = suffix_loop(items, repeats, length)
        seen += found is not None
        assert (found and (found.period, found.length)) == plain_loop(items, repeats, length), (items, repeats, length)
    assert 100 < seen < 500


def test_suffix_loop_of_known_strings():
    loop = suffix_loop("well, " + "again " * 5 + "ag")
    assert loop is not None and (loop.period, loop.length) == (6, 33)  # the space before it belongs to the run
    assert loop.repeats == pytest.approx(33 / 6)
    assert suffix_loop("abcdef") is None
    assert suffix_loop("ababab, but then it ended") is None  # a loop that was left


@pytest.mark.parametrize("period", [1, 2, 7, 20])
def test_a_loop_is_found_behind_any_start(period):
    chance = random.Random(period)
    for _ in range(20):
        start = [chance.randrange(1000) for _ in range(chance.randrange(60))]
        piece = [chance.randrange(1000, 2000) for _ in range(period)]
        copies = max(5, 32 // period + 1)
        assert endless(start + piece * copies)
        assert endless(start + piece * copies + piece[: period // 2])  # cut in the middle of a copy
        assert not endless(start + piece * copies, ended=True)
        assert not endless(start + piece * copies + [chance.randrange(3000, 4000) for _ in range(60)])


def test_names_of_tokens_do_not_matter():
    chance = random.Random(5)
    for _ in range(50):
        ids = [chance.randrange(3) for _ in range(chance.randrange(80))]
        assert endless(ids) == endless([10_000 - 7 * i for i in ids])


def test_thresholds_are_met_exactly():
    assert endless([1, 2, 3, 4, 5, 6, 7, 8] * 4)  # 32 tokens, 4 copies
    assert not endless([9, *([1, 2, 3, 4, 5, 6, 7, 8] * 4)][:32])  # 31 of them
    assert not endless(list(range(16)) * 3)  # 48 tokens, but 3 copies
    assert endless(list(range(16)) * 3, thresholds=Thresholds(repeats=3))
    assert not endless([5] * 31) and endless([5] * 32)


def counting(period: int, copies: int) -> list[int]:
    """Copies of a piece with one new token in each."""
    return [token for i in range(copies) for token in (*range(1, period), 1000 + i)]


def test_a_loop_that_is_not_to_the_letter_is_found_by_its_share():
    ids = counting(32, 8)
    assert suffix_loop(ids, 4.0, 32) is None
    assert repeated_share(ids[-128:]) == pytest.approx(1 - (28 + 3 * 4 + 1) / 125)  # 28 of the piece, 4 per new token
    assert not endless(ids) and endless(ids, thresholds=Thresholds(share=0.65))
    assert endless(counting(40, 8), thresholds=Thresholds(window=256))
    assert not endless(counting(40, 8)[:127])  # shorter than the window
    assert not endless(counting(20, 20))  # a table may look like that
    lines = [token for i in range(20) for token in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 50 + i % 3)]
    assert suffix_loop([*lines[:-2], 99], 4.0, 32) is None and endless([*lines[:-2], 99])  # not a loop to the letter


@pytest.mark.parametrize(
    "text",
    [
        "Repeat this: the cat sat on the mat by the door. Yes: the cat sat on the mat by the door.",
        "row row row your boat gently down the stream merrily merrily merrily merrily life is but a dream " * 3,
        "ha ha ha ha ha ha ha ha ha ha",
        "no no no no, not again; we said no no no no and then we left the house and went home for the night at last",
        "\n".join(f"{i} . {fruit} pie with cream" for i, fruit in enumerate(["apple", "pear", "plum", "fig", "lime"])),
        "a , b , c , d\n" * 3 + "the answer is a , as the second of the choices says in the text above",
        "name age town\n" + "\n".join(f"person{i} {20 + i} town{i} yes no yes" for i in range(20)),
        " ".join(f"word{i}" for i in range(300)),
        "",
    ],
    ids=["echo", "refrain", "laugh", "left", "list", "choices", "table", "plain", "empty"],
)
def test_benign_repetition_is_not_endless(text):
    assert not endless(words(text)) and not endless_text(text)


def test_text_is_judged_in_characters():
    assert endless_text("The end. " + "and so on, " * 12)
    assert endless_text("The end. " + "그리고 " * 40 + "\ufffd")  # a character that was cut
    assert not endless_text("and so on, " * 12, ended=True)
    assert not endless_text("and so on, " * 4)


def test_repeated_share_of_known_strings():
    assert repeated_share("abcdefgh") == 0.0
    assert repeated_share("aaaaaaaa") == pytest.approx(1 - 1 / 5)
    assert repeated_share("abcabcabc", 3) == pytest.approx(1 - 3 / 7)
    assert repeated_share("abc") == 0.0


def test_occurrences():
    assert occurrences([5, 6, 5, 7, 6, 5]) == [(5, 0, 5), (6, 1, 4)]
    assert occurrences([1, 2, 3]) == [] == occurrences([])


@pytest.mark.parametrize("wrong", [{"repeats": 1.5}, {"tokens": 0}, {"share": 0.0}, {"share": 1.5}, {"window": 4}])
def test_thresholds_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InputError, match="accepted"):
        Thresholds(**wrong)
