import pytest
import torch

from qscope import native, reference
from qscope.ops import sparse_outer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (5, 8, 200, 64), (30, 7, 57, 3), (9, 50, 96, 1000), (70, 5, 31, 1)]  # N, K, D, F
needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there are no native kernels")


def inputs(shape, dtype=torch.float32, index_dtype=torch.int32):
    N, K, D, F = shape
    torch.manual_seed(0)
    indices = torch.randint(0, F, (N, K), dtype=index_dtype)
    return torch.randn(N, K).to(dtype), indices, torch.randn(N, D).to(dtype), F


def exact(values, indices, g, F):
    spread = torch.zeros(values.shape[0], F, dtype=torch.float64)
    spread.scatter_add_(1, indices.long(), values.double())
    return spread.T @ g.double(), spread.sum(0), (spread.abs().T @ g.double().abs()).max().item()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", [sparse_outer, reference.sparse_outer], ids=["op", "reference"])
def test_matches_float64(impl, shape, dtype, index_dtype):
    args = inputs(shape, dtype, index_dtype)
    rows, sums = impl(*args)
    want_rows, want_sums, magnitude = exact(*args)
    assert rows.dtype == sums.dtype == torch.float32
    terms = shape[0] * shape[1]
    torch.testing.assert_close(rows.double(), want_rows, rtol=2.0**-23, atol=terms * 2.0**-23 * (magnitude + 1))
    bound = terms * 2.0**-23 * args[0].abs().float().sum().item()
    torch.testing.assert_close(sums.double(), want_sums, rtol=2.0**-23, atol=bound)


@needs_native
def test_terms_are_added_in_ascending_n():
    """2^24 swallows a following 1 in float32 but keeps 2: only one order of the three rows gives 2^24 + 2."""
    g = torch.tensor([[1.0], [1.0], [2.0**24]])
    ones, zeros = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    assert sparse_outer(ones, zeros, g, 1)[0].item() == 2.0**24 + 2
    assert sparse_outer(ones, zeros, g.flip(0), 1)[0].item() == 2.0**24


def test_absent_features_are_zero_and_repeats_add_up():
    values = torch.tensor([[1.0, 2.0, 4.0]])
    rows, sums = sparse_outer(values, torch.tensor([[5, 2, 5]]), torch.tensor([[1.0, -3.0]]), 9)
    want = torch.zeros(9, 2)
    want[5], want[2] = torch.tensor([5.0, -15.0]), torch.tensor([2.0, -6.0])
    torch.testing.assert_close(rows, want, rtol=0, atol=0)
    assert sums.tolist() == [0, 0, 2, 0, 0, 5, 0, 0, 0]


def test_any_strides_and_empty():
    values, indices, g, F = inputs((8, 6, 40, 30))
    want = sparse_outer(values[::2, ::3].contiguous(), indices[::2, ::3].contiguous(), g[::2].contiguous(), F)
    got = sparse_outer(values[::2, ::3], indices[::2, ::3], g.T.contiguous().T[::2], F)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for empty in (slice(0, 0), slice(None)):
        rows, sums = sparse_outer(values[empty, :0], indices[empty, :0], g[empty], F)
        assert rows.shape == (30, 40) and (rows == 0).all() and (sums == 0).all()


@pytest.mark.parametrize("bad", [-1, 30])
def test_index_out_of_range_raises(bad):
    values, indices, g, F = inputs((4, 6, 40, 30))
    indices[3, 5] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of|outside"):
        sparse_outer(values, indices, g, F)


def test_refuses():
    values, indices, g, F = inputs((4, 6, 40, 30))
    for args, word in [
        ((values[:3], indices, g, F), "share a letter"),
        ((values, indices, g[:3], F), "share a letter"),
        ((values, indices, g.double(), F), "float64"),
        ((values, indices, g, 0), "d_sae=0"),
    ]:
        with pytest.raises(ValueError, match=word):
            sparse_outer(*args)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_instruction_set_thread_count_and_run(dtype, limit_isa):
    args = inputs((133, 19, 75, 40), dtype)
    results = []
    for isa in native.ISA_NAMES:
        limit_isa(isa)
        results.append(sparse_outer(*args))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [sparse_outer(*args) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    for rows, sums in results[1:]:
        torch.testing.assert_close(rows, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(sums, results[0][1], rtol=0, atol=0)


def test_opcheck_and_compile():
    args = inputs((5, 8, 33, 20))
    torch.library.opcheck(torch.ops.qscope.sparse_outer.default, args)
    compiled = torch.compile(lambda *a: sparse_outer(*a), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*args), sparse_outer(*args), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
