"""Interpolation at equal side effect on planted curves, the search for strengths, the bootstrap, the verdict."""

import numpy as np
import pytest

from qscope.workflows.steer_eval_matching import (
    Curve,
    at_side_effect,
    interval,
    matched,
    mean_interval,
    resamples,
    strengths_for,
    verdict,
)


def test_a_curve_is_straight_between_its_points():
    x, y = [0.0, 0.1, 0.3], [0.2, 0.4, 1.0]
    assert at_side_effect(x, y, 0.1) == 0.4
    assert at_side_effect(x, y, 0.05) == pytest.approx(0.3, abs=1e-15)
    assert at_side_effect(x, y, 0.25) == pytest.approx(0.85, abs=1e-15)  # 0.4 + 0.75 * 0.6
    assert at_side_effect(x, y, 0.31) is None  # never reached
    assert at_side_effect(x, y, -0.1) == 0.2  # the unsteered point


def test_the_first_place_counts_where_a_curve_turns_back():
    x, y = [0.0, 0.4, 0.1, 0.5], [0.0, 0.8, 0.1, 0.3]
    assert at_side_effect(x, y, 0.2) == pytest.approx(0.4, abs=1e-15)
    assert at_side_effect(x, y, 0.45) == pytest.approx(0.275, abs=1e-15)  # between the last two: 0.1 + 7/8 * 0.2


def test_strengths_are_found_on_a_power_law_and_at_its_ends():
    sizes = [0.1 * 2**i for i in range(5)]
    side = [3.0 * size**1.7 for size in sizes]
    levels = [3.0 * 0.25**1.7, 3.0 * 0.7**1.7]
    assert strengths_for(sizes, side, levels) == [0.25, 0.7]  # exact: a power law is straight in the logarithms
    assert strengths_for(sizes, side, [2 * side[-1]]) == [1.6]  # never reached: the largest
    assert strengths_for(sizes, side, [side[0] / 4]) == [0.05]  # below the first: the square law
    assert strengths_for([1.0, 2.0], [-0.1, 0.4], [0.1]) == [1.0]  # no logarithm of what is below 0


def test_the_bootstrap_repeats_and_knows_the_spread_of_a_mean():
    rng = np.random.default_rng(5)
    values = (rng.random(400) < 0.3).astype(float).tolist()
    drawn = resamples(400, 2000, 7)
    assert (drawn == resamples(400, 2000, 7)).all() and (drawn != resamples(400, 2000, 8)).any()
    found = mean_interval(values, drawn)
    assert found == mean_interval(values, resamples(400, 2000, 7))
    assert found.value == np.mean(values)
    # Half the width of the interval is 1.96 standard errors; 2000 draws know a 2.5 % quantile to about 4 % of that.
    wide = 1.96 * np.std(values) / 20
    assert found.high - found.value == pytest.approx(wide, rel=0.2)
    assert found.value - found.low == pytest.approx(wide, rel=0.2)


def test_weights_make_the_mean_one_over_all_tokens():
    assert mean_interval([1.0, 4.0], resamples(2, 10, 0), [3.0, 1.0]).value == 7 / 4


def test_resamples_without_a_value_are_left_out():
    found = interval(lambda rows: None if 0 in rows[:1] and len(set(rows.tolist())) == 1 else 1.0, resamples(2, 50, 0))
    assert found is not None and (found.low, found.high) == (1.0, 1.0)
    assert interval(lambda rows: None, resamples(2, 50, 0)) is None


def test_arms_are_compared_on_the_same_prompts():
    """Scores that differ by 0.1 at every prompt: the difference is certain although each rate is not."""
    rng = np.random.default_rng(0)
    spec = rng.random(30) * 0.8
    other = Curve((0.0, 0.2), np.array([np.zeros(30), spec + 0.1]))
    found = matched("other", other, 2.0, 0.2, spec, resamples(30, 200, 0))
    assert found.rate is not None and found.rate.high - found.rate.low > 0.1
    assert found.difference.value == pytest.approx(-0.1, abs=1e-12)
    assert found.difference.high - found.difference.low < 1e-12


def test_an_arm_that_never_gets_there_is_compared_at_its_best():
    spec = np.full(8, 0.5)
    scores = np.array([np.zeros(8), np.full(8, 0.9), np.full(8, 0.3)])
    found = matched("prompt", Curve((0.0, 0.05, 0.1), scores), 1.0, 0.4, spec, resamples(8, 20, 0))
    assert found.rate is None and found.reached == 0.1
    assert found.best_below == pytest.approx(0.9)
    assert found.difference.value == pytest.approx(-0.4, abs=1e-12)
    assert verdict([found]).startswith("At equal side effect the spec loses to prompt (at strength 1)")


def test_one_prompt_more_and_a_sliver_of_interpolation_decide_nothing():
    """Of 12 scores 11 are equal, and a little of the arm's next point is in its rate: that decides nothing."""
    spec = np.array([1.0] * 4 + [0.0] * 8)
    better = np.array([1.0] * 5 + [0.0] * 7)
    curve = Curve((0.0, 0.1, 0.5), np.array([np.zeros(12), better, np.ones(12)]))
    found = matched("probe", curve, 1.0, 0.101, spec, resamples(12, 1000, 0))
    assert -0.5 / 12 < found.difference.high < 0 and found.judgement == "not told apart"
    assert "is behind probe (at strength 1) by less than" in verdict([found])


def test_the_verdict_counts_only_intervals_that_exclude_zero():
    drawn = resamples(8, 200, 0)
    spec = np.array([1.0, 0, 1, 0, 1, 0, 1, 0])
    same = Curve((0.0, 1.0), np.array([np.zeros(8), spec[::-1]]))
    worse = Curve((0.0, 1.0), np.array([np.zeros(8), np.zeros(8)]))
    found = [matched("same", same, 2.0, 0.5, spec * 0.5, drawn), matched("worse", worse, 2.0, 0.5, spec, drawn)]
    assert verdict(found) == (
        "At equal side effect the spec loses to none of the arms; it beats worse (at strength 2); it cannot be told "
        "from same."
    )
