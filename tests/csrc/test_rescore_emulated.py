"""The float64 scores of the certified encode on the emulator: bits of the fixed order, grouping, final selection."""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAN, INF = np.float32(np.nan), np.float32(np.inf)
SEGMENT = 6144


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(stored: np.ndarray) -> np.ndarray:
    return (stored.astype(np.uint32) << 16).view(np.float32)


# name: code, how values are stored, how stored values are read
TYPES = {
    "float32": (0, lambda v: v.astype(np.float32), lambda s: s),
    "float16": (1, lambda v: v.astype(np.float16).view(np.uint16), lambda s: s.view(np.float16).astype(np.float32)),
    "bfloat16": (2, to_bfloat16, from_bfloat16),
}


def score(x: np.ndarray, W: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """float32 [N, F]. Products of float32 are exact in float64: an addition rounds as a fused multiply-add does."""
    pad = -x.shape[1] % 16
    x, W = (np.pad(a.astype(np.float64), ((0, 0), (0, pad))).reshape(len(a), -1, 16) for a in (x, W))
    acc = np.zeros((len(x), len(W), 16))
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(x.shape[1]):
            acc += x[:, None, i] * W[None, :, i]
        for half in (8, 4, 2, 1):
            acc = acc[..., :half] + acc[..., half:]
        return (acc[..., 0] + (0.0 if bias is None else bias.astype(np.float64))).astype(np.float32)


def best(scores: np.ndarray, columns: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one row: the k largest, ReLU, and their columns."""
    if np.isnan(scores).any():
        return np.full(k, NAN), np.arange(k)
    order = np.lexsort((columns, -(scores + np.float32(0))))[:k]
    return np.maximum(scores[order] + np.float32(0), 0), columns[order]


class Rescore:
    def __init__(self, emulated) -> None:
        self.emulated, lib = emulated, emulated.lib
        i64, i32, address = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
        source = [address, i32, i64, i64, address, address, i32, address]
        lib.qscope_exact_group.argtypes = [address, address, i64, i32, address, address, address]
        lib.qscope_exact_score.argtypes = [*source, i64, i64, address, address, i32, address, address]
        lib.qscope_exact_score_flagged.argtypes = [*source, address, i64, i64, address, i64, i32, address]
        lib.qscope_exact_select_flagged.argtypes = [address, i64, i64, i64, i32, i32, i32, i64, i64, *[address] * 6]
        lib.qscope_exact_choose.argtypes = [*[address] * 4, i64, i32, i64, i32, *[address] * 5]

    def source(self, x, x_type, W, W_type, bias):
        """Arguments that name the operands, and the operands as float32 (float64 for a pair)."""
        code, store, read = TYPES[x_type]
        N, D = x.shape
        rows = self.emulated.array((N, D + 3), store(x).dtype, 1)
        rows[...] = store(np.full((N, D + 3), np.nan))
        rows[:, :D] = store(x)
        low = None
        if W_type == "pair":
            high = to_bfloat16(W)
            rest = to_bfloat16(W - from_bfloat16(high))
            meant, stored, W_code = from_bfloat16(high).astype(np.float64) + from_bfloat16(rest), high, 3
            low = self.emulated.copy(rest)
        else:
            W_code, W_store, W_read = TYPES[W_type]
            stored = W_store(W)
            meant = W_read(stored)
        kept = [rows, self.emulated.copy(stored), low, None if bias is None else self.emulated.copy(bias)]
        pointers = [None if a is None else a.ctypes.data for a in kept]
        call = [pointers[0], code, D + 3, D, pointers[1], pointers[2], W_code, pointers[3]]
        return call, read(store(x)), meant, kept

    def lists(self, listed, F, capacity):
        column = self.emulated.array((len(listed), capacity), np.int32)
        column[...] = -1
        counts = self.emulated.array((len(listed),), np.int32)
        features = np.zeros(F + 1, np.int32)
        for n, row in enumerate(listed):
            counts[n] = -1 if row is None else len(row)
            column[n, : max(counts[n], 0)] = [] if row is None else row
            np.add.at(features, [] if row is None else row, 1)
        return column, counts, features

    def check_scores(self, x, W, bias, listed, *, x_type="float32", W_type="float32", capacity=64, seed=1):
        self.emulated.seed(seed)
        call, x, W, kept = self.source(x, x_type, W, W_type, bias)
        N, F = len(x), len(W)
        column, counts, features = self.lists(listed, F, capacity)
        places = self.emulated.copy(np.cumsum(features, dtype=np.int32))
        pairs = self.emulated.array((int(features.sum()),), np.int32)
        out = self.emulated.array((N, capacity), np.float32)
        out[...] = -77
        assert self.emulated.lib.qscope_exact_group(
            column.ctypes.data, counts.ctypes.data, N, capacity, places.ctypes.data, pairs.ctypes.data, None
        ) == 0  # fmt: skip
        np.testing.assert_array_equal(places, np.cumsum(features) - features)
        for f in range(F):
            of_f = pairs[places[f] : places[f + 1]]
            assert (column.reshape(-1)[of_f] == f).all() and len(set(of_f.tolist())) == len(of_f)
        assert self.emulated.lib.qscope_exact_score(
            *call, N, F, places.ctypes.data, pairs.ctypes.data, capacity, out.ctypes.data, None
        ) == 0  # fmt: skip
        want = np.full((N, capacity), -77, np.float32)
        scores = score(x, W, bias)
        for n, row in enumerate(listed):
            if row:
                want[n, : len(row)] = scores[n, row]
        np.testing.assert_array_equal(out.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])
        assert np.isnan(out[np.isnan(want)]).all()
        del kept
        self.emulated.release()

    def choose(self, scores, columns, counts, taus, k, F, seed=1):
        self.emulated.seed(seed)
        N, capacity = scores.shape
        copy, array = self.emulated.copy, self.emulated.array
        given = [copy(a) for a in (columns, scores, counts, taus)]
        out = [array((N, k), np.float32), array((N, k), np.int32), array((N,), np.int32), array((N,), np.float32)]
        given_, out_ = ([a.ctypes.data for a in arrays] for arrays in (given, out))
        assert self.emulated.lib.qscope_exact_choose(*given_, N, capacity, F, k, *out_, None) == 0
        result = [a.copy() for a in out]
        self.emulated.release()
        return result


@pytest.fixture(scope="module")
def rescore(emulate) -> Rescore:
    return Rescore(emulate("rescore.cu"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def operands(rng, N, D, F):
    return tuple(rng.standard_normal(s).astype(np.float32) for s in ((N, D), (F, D), (F,)))


def some(rng, N, F, most):
    return [rng.permutation(F)[: rng.integers(0, min(most, F) + 1)].tolist() for _ in range(N)]


@pytest.mark.parametrize("W_type", [*TYPES, "pair"])
@pytest.mark.parametrize("x_type", TYPES)
def test_scores_have_the_bits_of_the_fixed_order(rescore, rng, x_type, W_type):
    for D in (0, 1, 15, 16, 17, 100):
        x, W, bias = operands(rng, 7, D, 20)
        rescore.check_scores(x, W, bias, some(rng, 7, 20, 9), x_type=x_type, W_type=W_type)


def test_more_rows_than_slots_and_rows_wider_than_a_segment(rescore, rng):
    x, W, bias = operands(rng, 40, 50, 3)
    rescore.check_scores(x, W, None, [[0, 2]] * 39 + [None])
    rescore.check_scores(x[:, :0], W[:, :0], bias, [[1]] * 40)
    for D in (SEGMENT, SEGMENT + 21):
        x, W, bias = operands(rng, 20, D, 2)
        rescore.check_scores(x, W, bias, [[1]] * 20)


def test_features_of_many_rows_are_shared_out(rescore, rng):
    """Blocks take 256 pairs: 255, 256, 257, 600, 514 and no pairs, next to each other and apart."""
    counts = [255, 256, 257, 0, 600, 514, 0, 3]
    for order in (range(8), [4, 0, 6, 5, 2, 1, 3, 7], [5, 4, 2, 1, 7, 0, 3, 6]):
        x, W, bias = operands(rng, 600, 2, 8)
        listed = [[f for f, place in enumerate(order) if n < counts[place]] for n in range(600)]
        rescore.check_scores(x, W, bias, listed, capacity=8)


def test_the_order_of_additions_is_visible(rescore, rng):
    """2^60, 1 and -2^60 in three places: whether the 1 survives says in what order they were added."""
    x, W = np.ones((1, 48), np.float32), np.zeros((300, 48), np.float32)
    for f in range(300):
        W[f, rng.permutation(48)[:3]] = [2.0**60, 1, -(2.0**60)]
    want = score(x, W, None)
    for other in (W.sum(1, dtype=np.float64), W.reshape(300, 3, 16).sum(2).sum(1), W[:, ::-1].cumsum(1)[:, -1]):
        assert 0 < (want != other).sum() < 300
    rescore.check_scores(x, W, None, [list(range(300))], capacity=300)


def test_special_numbers(rescore, rng):
    x, W, bias = operands(rng, 5, 30, 6)
    x[0, 3], x[1, 4], x[2, 5], x[3] = NAN, INF, 3e38, 1e-45
    W[1, 5], W[2], bias[3] = 3e38, 1e-44, INF
    rescore.check_scores(x, W, bias, [list(range(6))] * 5)


def test_flagged_rows_are_scored_and_selected_in_full(rescore, rng):
    N, D, F, k = 5, 37, 700, 20
    x, W, bias = operands(rng, N, D, F)
    x[3, 0] = NAN
    counts = np.int32([7, -1, 0, -1, -1])
    lib, array = rescore.emulated.lib, rescore.emulated.array
    for edges in ((0, F), (0, 64, 128, F), (0, 640, F)):
        for blocks in (1, 7):
            call, _, _, kept = rescore.source(x, "float32", W, "float32", bias)
            flagged = rescore.emulated.copy(np.int32([3, 4, 1, 3]))
            out = [array((N, k), np.float32), array((N, k), np.int32), array((N,), np.int32), array((N,), np.float32)]
            for a in out:
                a[...] = -5
            status = rescore.emulated.copy(counts)
            for first, end in itertools.pairwise(edges):
                width = end - first
                scores = array((N, width + 1), np.float32)
                scores[...] = 1e30
                assert lib.qscope_exact_score_flagged(
                    *call, flagged.ctypes.data, width, first, scores.ctypes.data, width + 1, blocks, None
                ) == 0  # fmt: skip
                want = np.full((N, width + 1), 1e30, np.float32)
                want[counts < 0, :width] = score(x, W, bias)[counts < 0, first:end]
                np.testing.assert_array_equal(scores, want)
                assert lib.qscope_exact_select_flagged(
                    scores.ctypes.data, N, width + 1, width, k, first > 0, end == F, first, F, status.ctypes.data,
                    *(a.ctypes.data for a in out), None,
                ) == 0  # fmt: skip
            for n in range(N):
                values, indices = best(score(x, W, bias)[n], np.arange(F), k)
                if counts[n] >= 0:
                    values, indices = np.full(k, -5), np.full(k, -5)
                np.testing.assert_array_equal(out[0][n], values)
                np.testing.assert_array_equal(out[1][n], indices)
            assert out[2].tolist() == [-5, F, -5, F, F]
            np.testing.assert_array_equal(out[3], np.float32([-5, INF, -5, NAN, INF]))
            del kept
            rescore.emulated.release()


@pytest.mark.parametrize("k", [1, 20, 256])
def test_the_best_candidates_and_their_margin(rescore, rng, k):
    N, F, capacity = 6, 5000, 512
    columns = np.stack([rng.permutation(F)[:capacity] for _ in range(N)]).astype(np.int32)
    scores = (np.round(rng.standard_normal((N, capacity)) * 8) / 8).astype(np.float32)  # ties, and -0
    counts = np.int32([k, capacity, 300 + k // 8, 400, -1, 500])
    scores[3, 17] = NAN
    scores[5] -= 10
    lasts = [np.sort(scores[n, : counts[n]])[::-1][k - 1] for n in range(N)]
    taus = np.float32([lasts[0] - np.float32(0.25), lasts[1], -INF, 0, 0, lasts[5] - 1])
    values, indices, candidates, margins = rescore.choose(scores, columns, counts, taus, k, F)
    for n in (0, 1, 2, 3, 5):
        want = best(scores[n, : counts[n]], columns[n, : counts[n]], k)
        np.testing.assert_array_equal(values[n], want[0])
        np.testing.assert_array_equal(indices[n], want[1])
        assert not np.signbit(values[n][values[n] == 0]).any()
    kept = [0, 1, 2, 3, 5]
    assert candidates[kept].tolist() == counts[kept].tolist() and np.isnan(margins[3])
    for n, gap in ((0, 0.25), (5, 1.0)):
        assert gap * (1 - 2.0**-20) <= margins[n] <= gap + 2.0**-18  # up to the float below tau, and downwards
    assert 0 <= margins[1] <= 2.0**-20 and margins[2] >= 0
    assert rescore.choose(scores, columns, counts, taus, k, capacity)[3][1] == INF  # all features were scored


def test_order_of_the_list_does_not_reach_the_result(rescore, rng):
    columns = rng.permutation(900)[None, :128].astype(np.int32)
    scores = np.round(rng.standard_normal((1, 128)) * 3).astype(np.float32)
    first = rescore.choose(scores, columns, np.int32([100]), np.float32([-9]), 40, 900)
    for seed in range(8):
        order = np.concatenate([rng.permutation(100), np.arange(100, 128)])
        again = rescore.choose(scores[:, order], columns[:, order], np.int32([100]), np.float32([-9]), 40, 900, seed)
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_the_launchers_refuse(rescore):
    lib = rescore.emulated.lib
    assert lib.qscope_exact_group(None, None, 1 << 20, 2048, None, None, None) == 1
    for x_type, W_type, low in ((3, 0, None), (0, 4, None), (-1, 0, None), (0, 3, None)):
        assert (
            lib.qscope_exact_score(None, x_type, 8, 8, None, low, W_type, None, 3, 9, None, None, 64, None, None) == 1
        )
    for capacity, k in ((100, 5), (8192, 5), (64, 65), (1024, 257), (64, 0)):
        assert lib.qscope_exact_choose(*[None] * 4, 3, capacity, 900, k, *[None] * 5) == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_lists(rescore, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    N, D, F = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 70)), data.draw(st.integers(1, 30))
    x, W, bias = operands(rng, N, D, F)
    listed = [None if rng.random() < 0.1 else row for row in some(rng, N, F, 30)]
    rescore.check_scores(
        x, W, bias if data.draw(st.booleans()) else None, listed, x_type=data.draw(st.sampled_from(list(TYPES))),
        W_type=data.draw(st.sampled_from([*TYPES, "pair"])), seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
