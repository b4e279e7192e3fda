"""The CUDA row select on the emulator, compared bit for bit with a stable sort."""

import ctypes
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
NAN, INF = float("nan"), float("inf")


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to the scores' storage; bfloat16 is rounded to nearest even by hand, numpy has none."""
    if dtype != "bfloat16":
        return values.astype(STORAGE[dtype])
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def oracle(scores: np.ndarray, k: int, relu: bool) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-(scores + 0.0), axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores + 0.0, order, 1)
    values = np.maximum(values, 0.0) if relu else values
    nan_rows = np.isnan(scores).any(1, keepdims=True)
    return np.where(nan_rows, NAN, values), np.where(nan_rows, np.arange(k), order).astype(np.int32)


class Select:
    """Calls the kernel on arrays that are guarded, poisoned and as unaligned as asked."""

    def __init__(self, emulated) -> None:
        self.emulated = emulated
        i64, i32, address = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
        self.call = emulated.lib.qscope_topk_select
        self.call.argtypes = [address, i32, i64, i64, i64, i32, i32, i32, i64, address, address, i32, address]

    def launch(self, scores, columns, dtype, k, out, *, threads, relu=False, merge=False, first=0) -> int:
        pointers = [a.ctypes.data for a in (scores, *out)]
        N, stride = scores.shape[0], scores.strides[0] // scores.itemsize
        return self.call(
            pointers[0], DTYPES[dtype], N, stride, columns, k, relu, merge, first, *pointers[1:], threads, None
        )

    def outputs(self, N: int, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        # Odd offsets: results need no alignment beyond their element.
        return self.emulated.array((N, k), STORAGE[dtype], 1), self.emulated.array((N, k), np.int32, 1)

    def place(self, scores: np.ndarray, dtype: str, padding: int, offset: int) -> np.ndarray:
        """Rows `padding` elements apart; what lies between them is NaN, which a kernel may not look at."""
        N, F = scores.shape
        flat = self.emulated.array((N * F + (N - 1) * padding,), STORAGE[dtype], offset)
        flat[...] = encode(np.full(flat.shape, NAN), dtype)
        step = (F + padding) * flat.itemsize
        rows = np.lib.stride_tricks.as_strided(flat, (N, F), (step, flat.itemsize))
        rows[...] = encode(scores, dtype)
        return rows

    def check(self, scores, dtype, k, *, threads=64, relu=False, padding=0, offset=0, blocks=(), seed=1) -> None:
        """`blocks` are the first columns of the second and later column blocks of a merge."""
        self.emulated.seed(seed)
        N, F = scores.shape
        rows = self.place(scores, dtype, padding, offset)
        values, indices = self.outputs(N, k, dtype)
        edges = [0, *blocks, F]
        for start, end in itertools.pairwise(edges):
            last = end == F
            code = self.launch(
                rows[:, start:end], end - start, dtype, k, (values, indices),
                threads=threads, relu=relu and last, merge=start > 0, first=start,
            )  # fmt: skip
            assert code == 0
        want_values, want_indices = oracle(decode(np.array(rows), dtype), k, relu)
        np.testing.assert_array_equal(indices, want_indices)
        got = decode(values, dtype)
        np.testing.assert_array_equal(got, want_values)
        assert not np.signbit(got[got == 0]).any()
        self.emulated.release()


@pytest.fixture(scope="module")
def select(emulate) -> Select:
    return Select(emulate("topk_select.cu"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def kinds(rng: np.random.Generator, N: int, F: int) -> Iterator[tuple[str, np.ndarray]]:
    """Scores that stress different paths; values stay exact or ordered in bfloat16 where that is the point."""
    x = rng.standard_normal((N, F)).astype(np.float32)
    up = np.broadcast_to(np.arange(F, dtype=np.float32) - F // 2, (N, F))
    yield "random", x
    yield "ties", np.round(x * 2) / 2
    yield "integers", rng.integers(-3, 4, (N, F)).astype(np.float32)
    yield "equal", np.full((N, F), -2.5, np.float32)
    yield "few above", np.maximum(x - 2.5, 0)
    yield "ascending", up
    yield "descending", -up
    yield "one nan", np.where(np.arange(F) == rng.integers(0, F, (N, 1)), NAN, x)
    yield "all nan", np.full((N, F), NAN, np.float32)
    yield "infinities", np.choose(rng.integers(0, 3, (N, F)), [x, np.full_like(x, INF), np.full_like(x, -INF)])
    yield "minus infinity", np.full((N, F), -INF, np.float32)
    yield "zeros", np.where(rng.random((N, F)) < 0.5, 0.0, -0.0).astype(np.float32)
    yield "tiny", x * 2.0**-24 if F % 2 else x * 2.0**-140  # subnormal in float16, in the others
    yield "step up", np.where(np.arange(F) > F // 2, x + 10, x)


# (F, k): F = k, one more, not a multiple of anything, several chunks; k at the limits of the list's capacity.
SHAPES = [
    (1, 1), (2, 2), (7, 5), (64, 50), (255, 255), (256, 256), (257, 256), (1000, 50), (1021, 99), (1027, 100),
    (2048, 128), (2051, 127), (4096, 256), (5003, 64), (9001, 200), (40000, 100),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_row(select, rng, shape, dtype):
    F, k = shape
    for number, (_, scores) in enumerate(kinds(rng, 2, F)):
        select.check(scores, dtype, k, padding=number % 3 * 3, offset=number % 4, relu=number % 2 == 1, seed=number + 1)


@pytest.mark.parametrize("threads", [256, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_launch_shapes_of_a_gpu(select, rng, dtype, threads):
    """The tests with 64 threads reach all paths with short rows; these are the shapes that are shipped."""
    chunk = threads * 4 * 16 // np.dtype(STORAGE[dtype]).itemsize
    for k in (50, 256):
        for number, (_, scores) in enumerate(kinds(rng, 1, chunk + 1001)):
            select.check(scores, dtype, k, threads=threads, offset=number % 4, seed=number)


@pytest.mark.parametrize("k", [1, 2, 50, 64, 100, 127, 255, 256])
def test_k_over_many_chunks_with_a_list_that_is_cut(select, rng, k):
    trend = np.linspace(0, 6, 20000, dtype=np.float32)  # rises: candidates keep coming
    scores = rng.standard_normal((2, 20000)).astype(np.float32)
    for slope in (0, 0.2, 1, -1):
        select.check(scores + slope * trend, "float32", k, offset=3)
        select.check(scores + slope * trend, "bfloat16", k, padding=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_blocks_merge_into_the_result_of_the_whole(select, rng, dtype):
    for F, k, blocks in [(700, 50, (50, 51, 333)), (3000, 100, (1024, 2048)), (9000, 256, (256, 5000)), (9, 1, (1, 8))]:
        for number, (_, scores) in enumerate(kinds(rng, 2, F)):
            select.check(scores, dtype, k, blocks=blocks, relu=number % 2 == 0, offset=number % 5, seed=number)


def test_a_nan_in_any_column_block_condemns_the_row(select, rng):
    for place in (0, 49, 50, 699):
        scores = rng.standard_normal((2, 700)).astype(np.float32)
        scores[1, place] = NAN
        select.check(scores, "bfloat16", 40, blocks=(50, 400))


def test_every_alignment_of_base_and_stride(select, rng):
    scores = rng.standard_normal((9, 1101)).astype(np.float32)
    for dtype in DTYPES:
        for offset in range(8):
            select.check(scores, dtype, 33, padding=offset % 4, offset=offset)


def test_thread_order_does_not_reach_the_result(select, rng):
    scores = np.round(rng.standard_normal((1, 6000)) * 4).astype(np.float32) / 4
    rising = np.arange(6000, dtype=np.float32)[None]
    for seed in range(25):
        select.check(scores, "bfloat16", 70, seed=seed)
        select.check(rising, "bfloat16", 70, seed=seed)


def test_only_the_result_is_written(select, rng):
    scores = rng.standard_normal((3, 500)).astype(np.float32)
    rows = select.place(scores, "float32", 2, 1)
    before = np.array(rows)
    frame = [select.emulated.array((5, 20), dtype, 1) for dtype in (np.float32, np.int32)]
    poison = [a.tobytes() for a in frame]
    out = tuple(a[1:4] for a in frame)
    assert select.launch(rows, 500, "float32", 20, out, threads=64) == 0
    for array, old in zip(frame, poison, strict=True):
        assert array[[0, 4]].tobytes() == old[: 20 * 4] + old[-20 * 4 :]
        assert array[1:4].tobytes() != old[20 * 4 : -20 * 4]
    assert rows.tobytes() == before.tobytes()
    select.emulated.release()


def test_the_python_launcher_passes_what_the_kernel_takes(emulate):
    pytest.importorskip("triton", reason="the launcher's module holds the Triton fallback")
    import torch
    from qscope_kernels.topk_select import LaunchConfig, cuda_arguments, launch_config

    library = emulate("topk_select.cu").lib
    assert launch_config(100, 132).threads == 1024 and launch_config(8192, 132) == LaunchConfig(threads=256)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scores = torch.randint(-9, 9, (3, 700), generator=torch.Generator().manual_seed(1)).to(dtype)
        want = scores.sort(dim=1, descending=True, stable=True)
        values, indices = scores.new_empty(3, 33), torch.empty(3, 33, dtype=torch.int32)
        for first, end in ((0, 300), (300, 700)):
            block = scores[:, first:end]
            arguments = cuda_arguments(block, 33, end == 700, first, first > 0, values, indices, 256)
            assert library.qscope_topk_select(*arguments, None) == 0
        assert torch.equal(values, want.values[:, :33].relu()) and torch.equal(indices, want.indices[:, :33].int())


def test_the_launcher_of_a_gpu_runs_on_the_emulator(emulate, monkeypatch):
    """topk_select_fwd itself, on tensors that say they are on a GPU: strides, blocks, what is allocated, errors."""
    pytest.importorskip("triton", reason="the launcher's module holds the Triton fallback")
    import torch
    from qscope_kernels import cuda_library, topk_select
    from torch.overrides import TorchFunctionMode

    class OnGpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return True if function == torch.Tensor.is_cuda.__get__ else function(*args, **(kwargs or {}))

    library = emulate("topk_select.cu").lib
    monkeypatch.setattr(cuda_library, "load", lambda: library)
    monkeypatch.setattr(cuda_library, "stream", lambda tensor: None)
    monkeypatch.setattr(topk_select, "_processors", lambda tensor: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    base = torch.randint(-9, 9, (700, 5), generator=torch.Generator().manual_seed(1)).bfloat16()
    rows = base.t()  # columns that are not contiguous
    want = rows.sort(dim=1, descending=True, stable=True)
    with OnGpu():
        got = topk_select.topk_select_fwd(rows, 33)
        out = topk_select.topk_select_fwd(rows.contiguous()[:, :300], 33)
        topk_select.topk_select_fwd(rows.contiguous()[:, 300:], 33, out=out, first_column=300, merge=True, relu=True)
        assert topk_select.topk_select_fwd(rows[:0], 33)[0].shape == (0, 33)
        with pytest.raises(RuntimeError, match=r"CUDA error 1 \(a GPU\)"):
            topk_select.topk_select_fwd(rows, 33, config=topk_select.LaunchConfig(threads=512))
    assert torch.equal(got[0], want.values[:, :33]) and torch.equal(got[1], want.indices[:, :33].int())
    assert torch.equal(out[0], got[0].relu()) and torch.equal(out[1], got[1])


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0}, {"k": 257}, {"columns": 19}, {"threads": 512}, {"first": -1}, {"first": 2**31 - 500}, {"dtype": 3},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_launcher_refuses(select, change):
    given = {"dtype": 0, "columns": 500, "k": 20, "first": 0, "threads": 64} | change
    assert select.call(None, given["dtype"], 3, 500, given["columns"], given["k"], 0, 0, given["first"], None, None,
                       given["threads"], None) == 1  # fmt: skip
    # No rows: nothing is launched, so the null pointers are never read.
    assert select.call(None, 0, 0, 500, 500, 20, 0, 0, 0, None, None, 64, None) == 0


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_row_any_split(select, data):
    """Few distinct values over few columns: ties, NaN, infinities and column blocks in every mixture."""
    F = data.draw(st.integers(1, 1400))
    k = data.draw(st.integers(1, min(F, 256)))
    pool = data.draw(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, INF, -INF, 0.5, NAN]), min_size=1, max_size=4)
    )
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).choice(np.array(pool, np.float32), (1, F))
    blocks = sorted(data.draw(st.sets(st.integers(k, F - 1), max_size=3))) if k < F else []
    select.check(
        scores, data.draw(st.sampled_from(list(DTYPES))), k, blocks=blocks, relu=data.draw(st.booleans()),
        offset=data.draw(st.integers(0, 7)), seed=data.draw(st.integers(0, 1000)),
    )  # fmt: skip
