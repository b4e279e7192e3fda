"""The classification benchmark's own parts: rounds turn about, rows are replaced and not piled up, ratios are shown."""

import json

from bench import bench_classify


def row(**changes):
    given = {
        "device": "cpu x", "torch": "2", "commit": "0123456789abcdef", "uncommitted": "yes", "model": "m",
        "dtype": "float32", "layers": [7, 15], "features": 2, "threads": 1, "clock": "cpu", "provider": "exported rule",
        "ratio": 1.0314, "ratio_low": 1.01, "ratio_high": 1.2, "tokens_per_second": 1234.5, "rounds": 3,
        "correct": True,
    }  # fmt: skip
    return given | changes


def test_rows_measured_again_take_the_place_of_the_old_ones(tmp_path):
    path = tmp_path / "results" / "classify-x.json"
    bench_classify.keep(path, [row(), row(features=10)])
    bench_classify.keep(path, [row(ratio=1.5)])
    kept = json.loads(path.read_text())
    assert sorted((r["features"], r["ratio"]) for r in kept) == [(2, 1.5), (10, 1.0314)]


def test_the_page_says_the_ratio_first_and_who_decided_otherwise():
    page = bench_classify.markdown([row(), row(provider="predict, topk", correct=False)])
    assert "| exported rule | 2 | 7 15 | 1.031 (1.010 to 1.200) | 1,234 | 3 | yes |" in page
    assert "predict, topk" in page and "| NO |" in page and "commit 0123456789ab with changes" in page


def test_contestants_take_turns_and_are_timed_by_the_given_clock():
    calls, ticks = [], iter(range(1000))
    work = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = bench_classify.turn_about(work, 60, 3, clock=lambda: next(ticks))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # one round that is not measured, then the order turns
    assert times == {name: [1, 1, 1] for name in "abc"}
