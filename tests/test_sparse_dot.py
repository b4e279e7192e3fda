import pytest
import torch

from qscope import native, reference
from qscope.ops import sparse_dot

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (5, 8, 200, 64), (3, 7, 257, 33), (9, 50, 96, 1000), (2, 5, 31, 3)]  # N, K, D, F
needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there are no native kernels")


def inputs(shape, dtype=torch.float32, index_dtype=torch.int32):
    N, K, D, F = shape
    torch.manual_seed(0)
    return (
        torch.randn(N, D).to(dtype),
        torch.randint(0, F, (N, K), dtype=index_dtype),
        torch.randn(F, D).to(dtype),
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", [sparse_dot, reference.sparse_dot], ids=["op", "reference"])
def test_matches_float64(impl, shape, dtype, index_dtype):
    g, indices, W = inputs(shape, dtype, index_dtype)
    rows = W[indices.long()].double()
    want = torch.einsum("nd,nkd->nk", g.double(), rows)
    bound = shape[2] * 2.0**-24 * torch.einsum("nd,nkd->nk", g.double().abs(), rows.abs()).max().item()
    got = impl(g, indices, W)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2.0**-23, atol=bound)


def test_any_strides_mixed_dtypes_and_empty():
    g, indices, W = inputs((8, 6, 40, 30))
    want = sparse_dot(g[::2].contiguous(), indices[::2].contiguous(), W)
    got = sparse_dot(g[::2], indices[::2], W.T.contiguous().T)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    expanded = sparse_dot(torch.ones(1, 1).expand(8, 40), indices, W.bfloat16())
    torch.testing.assert_close(expanded, W.bfloat16().float().sum(1)[indices.long()], rtol=1e-5, atol=1e-5)
    assert sparse_dot(g[:0], indices[:0], W).shape == (0, 6)
    assert sparse_dot(g, indices[:, :0], W).shape == (8, 0)


@pytest.mark.parametrize("bad", [-1, 30])
def test_index_out_of_range_raises(bad):
    g, indices, W = inputs((4, 6, 40, 30))
    indices[0, 0] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of|outside"):
        sparse_dot(g, indices, W)


def test_refuses():
    g, indices, W = inputs((4, 6, 40, 30))
    for args, word in [
        ((g[:3], indices, W), "share a letter"),
        ((g[:, :39], indices, W), "share a letter"),
        ((g.double(), indices, W), "float64"),
        ((g, indices.float(), W), "int32 and int64"),
    ]:
        with pytest.raises(ValueError, match=word):
            sparse_dot(*args)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_instruction_set_thread_count_and_run(dtype, limit_isa):
    args = inputs((33, 19, 75, 120), dtype)
    results = []
    for isa in native.ISA_NAMES:
        limit_isa(isa)
        results.append(sparse_dot(*args))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [sparse_dot(*args) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_opcheck_and_compile():
    args = inputs((5, 8, 33, 20))
    torch.library.opcheck(torch.ops.qscope.sparse_dot.default, args)
    compiled = torch.compile(lambda *a: sparse_dot(*a) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), sparse_dot(*args) + 1, rtol=0, atol=0)
