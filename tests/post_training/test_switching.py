"""The code-switching metric on known strings, and its intervals."""

import numpy as np
import pytest

from qscope.errors import InputError
from qscope.post_training.switching import (
    Response,
    bootstrap,
    contains,
    identifier,
    measure,
    scripts_of,
    two_way,
    wilson,
    wrong_groups,
)


@pytest.mark.parametrize(
    ("text", "scripts", "found"),
    [
        ("Guten Tag 你好", ("Han",), True),
        ("Guten Tag", ("Han",), False),
        ("„äöüß“ — 123 。，「」", ("Han",), False),  # CJK punctuation is Common
        ("ー", ("Katakana",), False),  # the long vowel mark is Common too
        ("カ", ("Hiragana",), False),
        ("カ", ("Hiragana", "Katakana"), True),
        ("Привет", ("Cyrillic",), True),
        ("a а", ("Cyrillic",), True),  # a Cyrillic a among Latin ones
        ("㐀", ("Han",), True),  # extension A
        ("𠀀", ("Han",), True),  # outside the basic plane
        ("안녕", ("Hangul",), True),
        ("", ("Han",), False),
    ],
)
def test_contains_known_strings(text, scripts, found):
    assert contains(text, scripts) is found


def test_scripts_of_languages_and_errors():
    assert scripts_of("zh-CN") == ("Han",) and scripts_of("ru") == ("Cyrillic",)
    assert scripts_of("fr", ("Greek",)) == ("Greek",)
    with pytest.raises(InputError, match="'fr' are not known"):
        scripts_of("fr")
    with pytest.raises(InputError, match="Klingon"):
        scripts_of("zh", ("Klingon",))
    assert wrong_groups(["de", "ja", "zh"], "zh", ("Han",)) == ["ja"]


def test_wilson_against_scipy_and_by_hand():
    scipy = pytest.importorskip("scipy.stats", reason="the peer of this test; qscope itself does without")
    for hits, size in ((0, 10), (1, 3), (15, 50), (40, 160), (10, 10)):
        peer = scipy.binomtest(hits, size).proportion_ci(0.95, "wilson")
        assert (wilson(hits, size).low, wilson(hits, size).high) == pytest.approx((peer.low, peer.high), abs=1e-14)
    z2 = 1.959963984540054**2  # 0 of n has the upper end z^2 / (n + z^2)
    assert wilson(0, 10).low == 0
    assert wilson(0, 10).high == pytest.approx(z2 / (10 + z2), rel=1e-12)
    assert wilson(10, 10).low == pytest.approx(10 / (10 + z2), rel=1e-12) and wilson(10, 10).high == 1
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


def test_measure_counts_languages_and_empty_responses():
    responses = [
        Response("gut", "de", 0),
        Response("gut 好", "de", 0),
        Response("", "de", 1),
        Response(" \n", "de", 1),
        Response("bien 好好", "fr", 2),
        Response("bien", "fr", 2),
    ]
    found = measure(responses, ("Han",))
    assert (found.all.responses, found.all.switched, found.all.empty) == (6, 2, 2)
    assert found.all.ratio.value == pytest.approx(1 / 3)
    assert (found.groups["de"].switched, found.groups["de"].empty, found.groups["fr"].switched) == (1, 2, 1)
    assert found.groups["de"].share == pytest.approx((0 + 1 / 4 + 0 + 0) / 4)
    assert found.groups["fr"].share == pytest.approx((2 / 6) / 2)
    assert found.groups["de"].other_language is None
    with pytest.raises(InputError, match="no response"):
        measure([], ("Han",))


def test_language_identifier():
    pytest.importorskip("py3langid", reason="the language identifier is an extra")
    german, french = "Heute ist das Wetter sehr schön, wir gehen in den Wald.", "Je ne sais pas ce que tu veux dire."
    found = measure(
        [Response(german, "de", 0), Response(french, "de", 1), Response("", "de", 2)], ("Han",), identifier()
    )
    assert found.all.other_language.value == 0.5  # of the two that say something


def test_bootstrap_draws_prompts_not_responses():
    """8 samples of a prompt that all agree are one observation: the interval is that of the prompts."""
    hits = np.array([8.0] * 5 + [0.0] * 15)
    sizes = np.full(20, 8.0)
    found = bootstrap(hits, sizes, draws=4000)
    assert found.value == 0.25
    exact = np.random.default_rng(1).binomial(20, 0.25, 200_000) / 20
    assert found.low == pytest.approx(np.quantile(exact, 0.025), abs=0.051)  # one prompt more or less
    assert found.high == pytest.approx(np.quantile(exact, 0.975), abs=0.051)
    narrow = wilson(40, 160)
    assert found.high - found.low > 1.5 * (narrow.high - narrow.low)


def test_paired_difference_is_exact_where_the_arms_are_equal_or_shifted():
    sizes = np.full(10, 4.0)
    one = {s: np.arange(10.0) % 5 for s in range(3)}
    same = two_way(one, sizes, 300, 0, one)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    more = {s: row + 1 for s, row in one.items()}
    shifted = two_way(more, sizes, 300, 0, one)
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((0.25, 0.25, 0.25))
    # Seeds that differ and prompts that do not: only the seeds spread.
    seeds = {0: np.zeros(10), 1: np.full(10, 4.0)}
    wide = two_way(seeds, sizes, 2000)
    assert (wide.value, wide.low, wide.high) == (0.5, 0.0, 1.0)
