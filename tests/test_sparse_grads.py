import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qscope import native, reference
from qscope.ops import decode_loss, sparse_grads, sparse_outer, topk_encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (5, 8, 200, 64), (3, 7, 257, 33), (40, 9, 96, 20), (2, 5, 33, 3)]  # N, K, D, F
U32 = 2.0**-24
needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there are no native kernels")


def inputs(shape, dtype=torch.float32, index_dtype=torch.int32):
    N, K, D, F = shape
    torch.manual_seed(0)
    acts = torch.randn(N, K).relu()
    grads = torch.randn(N, K) * (acts > 0)
    indices = torch.randint(0, F, (N, K), dtype=index_dtype)
    return acts.to(dtype), grads.to(dtype), indices, torch.randn(N, D).to(dtype), torch.randn(N, D).to(dtype), F


def exact(acts, grads, indices, g, x, F):
    dense = torch.zeros(2, len(indices), F, dtype=torch.float64)
    dense[0].scatter_add_(1, indices.long(), acts.double())
    dense[1].scatter_add_(1, indices.long(), grads.double())
    return dense[0].T @ g.double(), dense[1].T @ x.double(), dense[1].sum(0), g.double().sum(0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", [sparse_grads, reference.sparse_grads], ids=["op", "reference"])
def test_matches_float64(impl, shape, dtype, index_dtype):
    """Bounds of float32 sums in any order: (terms + 1) u times the sum of absolute terms, u = 2^-24."""
    args = inputs(shape, dtype, index_dtype)
    count = torch.bincount(args[2].flatten().long(), minlength=shape[3])
    size = exact(args[0].abs(), args[1].abs(), args[2], args[3].abs(), args[4].abs(), args[5])
    terms = count[:, None], count[:, None], count, shape[0]
    for got, want, scale, n in zip(impl(*args), exact(*args), size, terms, strict=True):
        assert got.dtype == torch.float32
        assert bool(((got.double() - want).abs() <= (n + 1) * U32 * scale).all())


def test_is_what_autograd_gives_for_a_training_step():
    """topk_encode, decode_loss and their backward passes against the parts put together by hand."""
    torch.manual_seed(0)
    N, K, D, F = 24, 6, 33, 40
    x, W_enc, W_dec = torch.randn(N, D), torch.randn(F, D), torch.randn(F, D)
    b_enc, b_dec = torch.randn(F) - 4, torch.randn(D)
    leaves = [t.requires_grad_() for t in (W_dec, W_enc, b_enc, b_dec)]
    acts, ids = topk_encode(x, W_enc, b_enc, K)
    assert bool((acts == 0).any())
    loss = decode_loss(acts, ids, W_dec, b_dec, x).sq_err.sum()
    want = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        _, _, _, error, act_grads = torch.ops.qscope.decode_loss(acts, ids, W_dec, b_dec, x)
        got = sparse_grads(acts, act_grads * (acts > 0), ids, 2 * error, x, F)
    torch.testing.assert_close(tuple(got), want, rtol=0, atol=0)


@needs_native
def test_has_the_bits_of_sparse_outer():
    acts, grads, indices, g, x, F = inputs((40, 9, 96, 20))
    got = sparse_grads(acts, grads, indices, g, x, F)
    torch.testing.assert_close(got.W_dec, sparse_outer(acts, indices, g, F)[0], rtol=0, atol=0)
    torch.testing.assert_close((got.W_enc, got.b_enc), sparse_outer(grads, indices, x, F), rtol=0, atol=0)


@pytest.mark.parametrize("impl", [sparse_grads, reference.sparse_grads], ids=["op", "reference"])
def test_a_dead_entry_reads_neither_row(impl):
    """0 times a NaN of a token must not reach a feature that the token did not activate."""
    acts, grads, g, x = torch.ones(4, 5), torch.ones(4, 5), torch.randn(4, 8), torch.randn(4, 8)
    indices = torch.arange(20, dtype=torch.int32).view(4, 5)
    acts[2, 3] = grads[2, 3] = 0.0
    acts[2, 4], grads[2, 0] = 0.0, 0.0  # alive: only one of the two is 0
    g[2], x[2, 7] = float("nan"), float("inf")
    got = impl(acts, grads, indices, g, x, 40)
    assert got[0].isnan().all(1).nonzero().flatten().tolist() == [10, 11, 12, 14]
    assert got[1].isnan().any(1).nonzero().flatten().tolist() == [10]  # 0 times infinity
    assert torch.nonzero(got[1].isinf()).tolist() == [[11, 7], [12, 7], [14, 7]]
    untouched = [13, *range(20, 40)]
    assert all(bool((part[untouched] == 0).all()) for part in got[:3]) and bool(got[3].isnan().all())


def test_any_strides_mixed_dtypes_and_empty():
    acts, grads, indices, g, x, F = inputs((8, 6, 40, 30))
    half = (slice(None, None, 2), slice(1, None, 2))
    want = sparse_grads(*(t[half].contiguous() for t in (acts, grads, indices)), g[::2].contiguous(), x[::2], F)
    got = sparse_grads(acts[half], grads[half], indices[half], g[::2], x[::2].T.contiguous().T, F)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0)
    mixed = sparse_grads(acts.bfloat16(), grads, indices.long(), g, x.half(), F)
    torch.testing.assert_close(mixed.W_enc, sparse_grads(acts, grads, indices, g, x.half(), F).W_enc, rtol=0, atol=0)
    for nothing in (
        sparse_grads(acts[:0], grads[:0], indices[:0], g[:0], x[:0], F),
        sparse_grads(acts[:, :0], grads[:, :0], indices[:, :0], 0 * g, x, F),
    ):
        assert [list(t.shape) for t in nothing] == [[30, 40], [30, 40], [30], [40]]
        assert all(bool((t == 0).all()) for t in nothing)


@needs_native
def test_no_tensor_of_all_gathered_rows():
    N, K, D, F = 64, 32, 48, 100
    args = inputs((N, K, D, F))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_iter(out) if isinstance(t, torch.Tensor))])
            return out

    from qscope.ops.sparse_grads import _on_cpu  # what an operator does inside is hidden from a dispatch mode

    with Watch():
        got = _on_cpu(*args)
    assert largest == (F + 1) * D < N * F < N * K * D
    torch.testing.assert_close(got, tuple(sparse_grads(*args)), rtol=0, atol=0)


@needs_native
def test_same_bits_for_every_instruction_set_thread_count_and_run(limit_isa):
    args = inputs((400, 5, 200, 120))
    results = []
    for isa in native.ISA_NAMES:
        limit_isa(isa)
        results.append(tuple(sparse_grads(*args)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [tuple(sparse_grads(*args)) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1, 30, 2**31 + 5])
def test_index_out_of_range_raises(bad):
    acts, grads, indices, g, x, F = inputs((4, 6, 40, 30), index_dtype=torch.int64)
    indices[2, 3] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of|outside"):
        sparse_grads(acts, grads, indices, g, x, F)


@pytest.mark.parametrize(
    "position, value, word",
    [
        (0, torch.zeros(4), r"\[N, K\]"),
        (1, torch.zeros(4, 5), r"act_grads \[N, K\] is \[4, 5\]"),
        (2, torch.zeros(4, 6), "int32 and int64"),
        (3, torch.zeros(4, 41), r"g \[N, D\] is \[4, 41\]"),
        (3, torch.zeros(4, 40, dtype=torch.int8), "int8"),
        (4, torch.zeros(4, 40, device="meta"), "one device"),
        (5, 0, "at least 1"),
    ],
)
def test_refuses(position, value, word):
    args = list(inputs((4, 6, 40, 30)))
    args[position] = value
    with pytest.raises(ValueError, match=word):
        sparse_grads(*args)


def test_has_no_gradient_of_its_own():
    acts, *rest = inputs((4, 6, 40, 30))
    out = sparse_grads(acts.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.W_dec.sum().backward()


def test_opcheck():
    torch.library.opcheck(torch.ops.qscope.sparse_grads.default, inputs((5, 8, 33, 20)))


def test_compiles_without_graph_break():
    args = inputs((5, 8, 33, 20))
    compiled = torch.compile(lambda *a: sparse_grads(*a).W_enc * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), sparse_grads(*args).W_enc * 2, rtol=0, atol=0)
