"""Scores of explanations: figures by hand, and judges whose answers are known."""

import math

import pytest

from qscope.explaining import scores
from qscope.explaining.contexts import Passage, Sampling, gather
from qscope.explaining.judges import KeywordJudge, Verdict
from qscope.explaining.scores import of_verdicts
from tests.explaining.planted_codes import BESIDE, CAPITAL, KING, KINGS, QUEEN, ROPE, SILENT, decode, source

Z2 = 1.959963984540054**2


def verdicts(*values: float | None) -> list[Verdict | None]:
    return [None if v is None else Verdict(v >= 0.5, v) for v in values]


def test_figures_by_hand():
    found = of_verdicts(verdicts(0.9, 0.6, 0.2, None), verdicts(0.6, 0.1, 0.1, 0.1))
    assert (found.positives, found.negatives, found.true_yes, found.true_no, found.unanswered) == (3, 4, 2, 3, 1)
    assert found.balanced_accuracy == (2 / 3 + 3 / 4) / 2
    # 0.9 is above all 4; 0.6 above 3 and equal to 1; 0.2 above 3
    assert found.auroc == (4 + 3.5 + 3) / 12


def test_a_judge_that_guesses_by_coin_has_the_figures_of_chance():
    found = of_verdicts(verdicts(1, 0), verdicts(1, 0))
    assert found.balanced_accuracy == found.auroc == 0.5


def test_auroc_of_yes_and_no_is_the_balanced_accuracy():
    found = of_verdicts(verdicts(1, 1, 0), verdicts(1, 0, 0, 0, 0))
    assert found.auroc == pytest.approx(found.balanced_accuracy, rel=1e-15)


def test_wilson_is_the_published_one():
    # R. G. Newcombe 1998 (Statistics in Medicine 17, 857), table I, method 3: four digits are printed
    assert scores.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert scores.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert scores.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert scores.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_the_interval_of_balanced_accuracy_squares_and_adds():
    # all right: Wilson's lower bound of n of n is n / (n + z^2)
    low, high = scores.balanced_accuracy_interval(10, 10, 10, 10)
    assert high == 1.0 and low == pytest.approx(1 - math.sqrt(2) * Z2 / (10 + Z2) / 2, rel=1e-12)
    low, high = scores.balanced_accuracy_interval(8, 10, 5, 20)
    a, b = scores.wilson(8, 10), scores.wilson(5, 20)
    assert low == pytest.approx(0.525 - math.sqrt((0.8 - a[0]) ** 2 + (0.25 - b[0]) ** 2) / 2, rel=1e-12)
    assert high == pytest.approx(0.525 + math.sqrt((a[1] - 0.8) ** 2 + (b[1] - 0.25) ** 2) / 2, rel=1e-12)


@pytest.mark.parametrize(("area", "m", "n"), [(0.5, 10, 10), (0.9, 20, 30), (0.97, 5, 40), (0.1, 20, 20)])
def test_the_interval_of_an_auroc_solves_its_equation(area, m, n):
    half = (m + n) / 2 - 1
    for t in scores.auroc_interval(area, m, n):
        v = t * (1 - t) * (1 + half * (1 - t) / (2 - t) + half * t / (1 + t)) / (m * n)
        assert abs(area - t) == pytest.approx(1.959963984540054 * math.sqrt(v), rel=1e-9)  # 60 halvings
    low, high = scores.auroc_interval(area, m, n)
    assert low < area < high


def test_the_interval_of_a_perfect_auroc_does_not_vanish():
    low, high = scores.auroc_interval(1.0, 20, 20)
    assert high == 1.0 and 0.8 < low < 0.95
    assert scores.auroc_interval(0.0, 20, 20) == pytest.approx((0.0, 1 - low), rel=1e-9)


def test_without_one_side_there_is_no_figure():
    found = of_verdicts(verdicts(1.0), verdicts(None))
    assert (found.balanced_accuracy, found.auroc, found.unanswered) == (None, None, 1)


def passage(*activations: float) -> Passage:
    return Passage(0, 5, 1, tuple(range(len(activations))), activations)


def test_fuzzing_marks_what_fires_and_as_many_silent_tokens():
    one, two = passage(0, 10, 0, 2, 0, 4), passage(0, 0, 8, 0, 0, 0)
    dense = passage(1, 1, 1, 0)
    right, wrong = scores.fuzzing_examples([one, two, one, dense, two, one])
    assert [p for p, _ in right] == [one, one, one]
    assert right[0][1] == [False, True, False, False, False, True]  # 2 is not above 0.3 x 10
    assert [p for p, _ in wrong] == [two, two]  # dense has too few silent tokens for a wrong marking
    for which, marks in wrong:
        assert sum(marks) == 1 and not any(m and a for m, a in zip(marks, which.activations, strict=True))


@pytest.fixture(scope="module")
def evidence():
    return {one.feature: one for one in gather(source(), 3, [KINGS, BESIDE, SILENT], Sampling(window=3))}


def test_keywords_are_the_leading_words_and_their_precision(evidence):
    assert KeywordJudge(evidence[KINGS], decode).words == {"king": 1.0}  # both spellings are one word
    words = KeywordJudge(evidence[BESIDE], decode).words
    (top,) = evidence[BESIDE].top_tokens
    assert words == {"rope": pytest.approx(top.precision, rel=1e-12)} and 0.7 < top.precision < 1


def test_keywords_find_a_feature_of_a_word_and_no_near_miss(evidence):
    found = scores.score(evidence[KINGS], KeywordJudge(evidence[KINGS], decode))
    for kind in ("detection", "fuzzing"):
        assert found[kind].balanced_accuracy == found[kind].auroc == 1.0
    assert found["near"].balanced_accuracy is None  # there is no near passage: it fires on each of its tokens
    near = scores.score(evidence[BESIDE], KeywordJudge(evidence[BESIDE], decode))["near"]
    assert (near.true_yes, near.true_no) == (near.positives, 0) and near.balanced_accuracy == 0.5
    assert near.negatives > 3 and near.auroc == 0.5


def test_keywords_of_a_feature_that_never_fires(evidence):
    found = scores.score(evidence[SILENT], KeywordJudge(evidence[SILENT], decode))
    assert {one.balanced_accuracy for one in found.values()} == {None}


def test_fuzz_verdicts_are_the_share_of_marked_words(evidence):
    judge = KeywordJudge(evidence[KINGS], decode)
    tokens = Passage(0, 0, 0, (KING, QUEEN, CAPITAL, ROPE), (3.0, 0.0, 2.0, 0.0))
    assert judge.fuzz(tokens, [True, False, True, False]) == Verdict(True, 1.0)
    assert judge.fuzz(tokens, [True, True, True, True]) == Verdict(True, 0.5)
    assert judge.fuzz(tokens, [True, True, False, True]) == Verdict(False, 1 / 3)
    assert judge.detect(tokens) == Verdict(True, 1.0)
    assert judge.detect(Passage(0, 0, 0, (QUEEN, ROPE), (0.0, 0.0))) == Verdict(False, 0.0)
