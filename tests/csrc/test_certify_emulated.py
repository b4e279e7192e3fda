"""The candidate selection of the certified encode on the emulator, against its definition.

The intervals in these tests are sums of few bits, so that numpy's float32 and the kernel agree to the bit.
"""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAN, INF = np.float32(np.nan), np.float32(np.inf)
CAPACITY = {64: 512, 256: 2048}


class Certify:
    def __init__(self, emulated) -> None:
        self.emulated = emulated
        i64, i32, address = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
        self.call = emulated.lib.qscope_exact_certify
        self.call.argtypes = [address, i64, i64, i64, i64, i32, i32] + [address] * 11 + [i32, address]

    def run(self, scores, rows, bounds, k, *, threads=64, blocks=(), seed=1):
        """Lists, counts, taus, feature counts and flagged rows; `blocks` are the first columns of later blocks."""
        self.emulated.seed(seed)
        array, copy = self.emulated.array, self.emulated.copy
        (N, F), capacity, groups = scores.shape, CAPACITY[threads], -(-scores.shape[1] // 64)
        padded = np.zeros((groups * 64, 4), np.float32)
        padded[:F] = bounds
        row_bounds, feature_bounds = copy(rows), copy(bounds)
        beta = copy(np.ascontiguousarray(padded[: -(-F // 4) * 4, 2]))
        tops = copy(padded.reshape(groups, 64, 4).max(1))
        lists = [array((N, capacity), dtype) for dtype in (np.int32, np.float32, np.float32)]
        counts, taus = array((N,), np.int32), array((N,), np.float32)
        features, flagged = array((F + 1,), np.int32), array((N + 1,), np.int32)
        features[...] = 0
        flagged[0] = 0
        for start, end in itertools.pairwise([0, *blocks, F]):
            stride = -(-(end - start) // 4) * 4
            tile = array((N, stride), np.float32)
            tile[...] = 1e30  # behind the row: may not be looked at
            tile[:, : end - start] = scores[:, start:end]
            pointers = [a.ctypes.data for a in (row_bounds, feature_bounds, beta, tops, *lists, counts, taus)]
            code = self.call(
                tile.ctypes.data, N, stride, end - start, start, end == F, k, *pointers, features.ctypes.data,
                flagged.ctypes.data, threads, None,
            )  # fmt: skip
            assert code == 0
        listed = [set(lists[0][n, : counts[n]].tolist()) if counts[n] >= 0 else None for n in range(N)]
        out = listed, counts.copy(), taus.copy(), features.copy(), flagged.copy()
        self.emulated.release()
        return out

    def check(self, scores, rows, bounds, k, *, flagged=(), **options) -> None:
        """The rows in `flagged`, and no others, must be; None leaves it open."""
        listed, counts, taus, features, flags = self.run(scores, rows, bounds, k, **options)
        low, high = intervals(scores, rows, bounds)
        given = sorted(flags[1 : 1 + flags[0]].tolist())
        assert given == np.flatnonzero(counts < 0).tolist()
        assert flagged is None or given == list(flagged)
        total = np.zeros(scores.shape[1] + 1, np.int32)
        for n in set(range(len(scores))) - set(given):
            tau = np.sort(low[n])[::-1][k - 1]
            want = np.flatnonzero(high[n] >= tau)
            assert taus[n] == tau and counts[n] == len(want) and listed[n] == set(want.tolist())
            total[want] += 1
        np.testing.assert_array_equal(features, total)


def intervals(scores, rows, bounds):
    with np.errstate(invalid="ignore", over="ignore"):
        width = rows[:, :1] * bounds[:, 0] + bounds[:, 3] + rows[:, 1:] * bounds[:, 1]
        middle = scores + bounds[:, 2]
        low, high = middle - width, middle + width
    known = np.isfinite(low) & np.isfinite(high)
    return np.where(known, low, -INF), np.where(known, high, INF)


def problem(rng, N, F, width=1.0):
    """Scores, row bounds and feature bounds; a typical interval is 0.3 * width wide, scores have deviation 1."""
    scores = rng.standard_normal((N, F)).astype(np.float32)
    rows = (rng.integers(1, 4, (N, 2)) * (width / 32)).astype(np.float32)
    bounds = np.stack(
        [rng.integers(8, 24, F) / 16, rng.integers(0, 8, F) / 16, rng.integers(-64, 64, F) / 128, np.zeros(F)], 1
    ).astype(np.float32)
    bounds[:, 3] = np.float32(2.0**-12)
    return scores, rows, bounds


@pytest.fixture(scope="module")
def certify(emulate) -> Certify:
    return Certify(emulate("certify.cu"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


SHAPES = [
    (1, 1), (3, 2), (64, 50), (255, 255), (256, 256), (257, 256), (1000, 50), (1027, 100), (2051, 1), (5003, 64),
    (9001, 100),
]  # fmt: skip


@pytest.mark.parametrize("threads", [64, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_candidates_and_tau_are_those_of_the_definition(certify, rng, shape, threads):
    F, k = shape
    for width in (0, 0.25, 1):
        certify.check(*problem(rng, 2, F, width), k, threads=threads, seed=F)


@pytest.mark.parametrize("k", [1, 2, 31, 100])
def test_rows_that_rise_fall_or_repeat(certify, rng, k):
    scores, rows, bounds = problem(rng, 6, 6000, 0.25)
    trend = np.linspace(0, 40, 6000, dtype=np.float32)
    scores[0] += trend
    scores[1] -= trend
    scores[2] += np.where(np.arange(6000) > 5000, 20, 0)
    scores[3, :] = np.where(np.arange(6000) % 97 == 0, 8, 0)
    scores[4] *= 50
    scores[5] = np.where(np.arange(6000) % 6 == 0, scores[5] + 30, -(2.0**90))
    certify.check(scores, rows, bounds, k)
    certify.check(scores, rows, bounds, k, threads=256)


def test_column_blocks_give_the_candidates_of_the_whole(certify, rng):
    problem_ = problem(rng, 3, 3001, 0.5)
    for blocks in ((64,), (1024, 2048), (64, 128, 192, 2944)):
        certify.check(*problem_, 40, blocks=blocks)


def test_a_weak_start_is_read_again_instead_of_flagged(certify, rng):
    """The first thousand features agree within the bound: more than the list holds, until later ones are seen."""
    scores, rows, bounds = problem(rng, 2, 4000, 0.25)
    scores[:, :1100] *= 2.0**-10
    bounds[:1100, 2] = 0
    certify.check(scores, rows, bounds, 30)
    certify.check(scores, rows, bounds, 30, blocks=(1024,), flagged=None)


def test_what_does_not_fit_is_flagged(certify, rng):
    scores, rows, bounds = problem(rng, 5, 3000, 0.25)
    scores[1] = 0
    bounds[:, 2] = 0
    rows[2, 0] = INF
    rows[3] = NAN
    certify.check(scores, rows, bounds, 30, flagged=[1, 2, 3])
    certify.check(scores, rows, bounds, 30, flagged=[1, 2, 3], blocks=(640, 1280))
    certify.check(scores, rows, bounds, 30, flagged=[1, 2, 3], threads=256)


def test_features_out_of_range_are_candidates_of_every_row(certify, rng):
    scores, rows, bounds = problem(rng, 3, 2000, 0.5)
    scores[:, 5], scores[:, 700], scores[:, 1999], scores[:, 64] = NAN, INF, -INF, 0
    for f in (5, 700, 1999, 64):
        bounds[f] = [INF, 0, 0, 0]
    rows[1] = 0  # 0 times infinity
    for threads in (64, 256):
        certify.check(scores, rows, bounds, 20, threads=threads)
    listed = certify.run(scores, rows, bounds, 20)[0]
    assert all({5, 64, 700, 1999} <= row for row in listed)


def test_ties_at_the_edge_are_kept(certify):
    """high == tau is a candidate, the float below it is not."""
    F, k = 500, 10
    scores = np.full((1, F), -5, np.float32)
    scores[0, : 4 * k : 4] = 1  # each in a group of its own: the gate is tau from the first look on
    rows, bounds = np.float32([[0.25, 0]]), np.zeros((F, 4), np.float32)
    bounds[:, 0] = 1
    scores[0, 400] = 0.5
    scores[0, 401] = np.float32(0.5) - np.float32(2.0**-23)
    listed, _, taus, _, _ = certify.run(scores, rows, bounds, k)
    assert taus[0] == 0.75 and listed[0] == {*range(0, 4 * k, 4), 400}


def test_thread_order_does_not_reach_the_result(certify, rng):
    problem_ = problem(rng, 1, 4000, 0.5)
    first = certify.run(*problem_, 50, seed=0)
    for seed in range(1, 12):
        again = certify.run(*problem_, 50, seed=seed)
        assert first[0] == again[0] and all(np.array_equal(a, b) for a, b in zip(first[1:4], again[1:4], strict=True))


@pytest.mark.parametrize(
    "change", [{"k": 0}, {"k": 257}, {"stride": 501}, {"stride": 496}, {"first": 32}, {"threads": 128}], ids=str
)
def test_what_the_launcher_refuses(certify, change):
    given = {"k": 20, "stride": 500, "first": 64, "threads": 64} | change
    call = [0, given["stride"], 500, given["first"], 1, given["k"], *[None] * 11]
    assert certify.call(None, 3, *call[1:], given["threads"], None) == 1
    assert certify.call(None, 0, 500, 500, 64, 1, 20, *[None] * 11, 64, None) == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_row_any_split(certify, data):
    F = data.draw(st.integers(1, 1500))
    k = data.draw(st.integers(1, min(F, 256)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores, rows, bounds = problem(rng, 2, F, data.draw(st.sampled_from([0, 0.5, 2])))
    if data.draw(st.booleans()):
        scores = np.round(scores * 2)
        bounds[:, 2] = 0
    if data.draw(st.booleans()):
        bounds[rng.integers(0, F, 3)] = [INF, 0, 0, 0]
    edges = [64 * i for i in range(1, -(-F // 64))]
    blocks = sorted(data.draw(st.sets(st.sampled_from(edges), max_size=3))) if edges else []
    certify.check(scores, rows, bounds, k, blocks=blocks, flagged=None, seed=data.draw(st.integers(0, 99)))
