import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qscope import native, reference
from qscope.ops import sparse_decode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (5, 8, 200, 64), (3, 7, 257, 33), (9, 50, 96, 1000), (2, 5, 33, 3)]  # N, K, D, F
needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there are no native kernels")


def inputs(shape, dtype=torch.float32, index_dtype=torch.int32):
    N, K, D, F = shape
    torch.manual_seed(0)
    indices = torch.randint(0, F, (N, K), dtype=index_dtype)
    return torch.randn(N, K).to(dtype), indices, torch.randn(F, D).to(dtype), torch.randn(D).to(dtype)


def exact(values, indices, W, b=None):
    y = torch.einsum("nk,nkd->nd", values.double(), W[indices.long()].double())
    return y if b is None else y + b.double()


def rounding(dtype, values, W):
    """K fused multiply-adds in float32, then one rounding to the dtype of W."""
    K = values.shape[1]
    magnitude = (values.double().abs().sum(1).max() + 1) * W.double().abs().max().item()
    return dict(rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=K * 2.0**-24 * magnitude.item())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", [sparse_decode, reference.sparse_decode], ids=["op", "reference"])
def test_matches_float64(impl, shape, dtype, index_dtype):
    values, indices, W, b = inputs(shape, dtype, index_dtype)
    for bias in (None, b):
        y = impl(values, indices, W, bias)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact(values, indices, W, bias), **rounding(dtype, values, W))


def test_mixed_dtypes_keep_the_dtype_of_the_weights():
    values, indices, W, b = inputs((4, 6, 40, 30))
    y = sparse_decode(values, indices, W.bfloat16(), b)
    want = exact(values, indices, W.bfloat16(), b)
    torch.testing.assert_close(y.double(), want, **rounding(torch.bfloat16, values, W))
    y = sparse_decode(values.bfloat16(), indices, W, b.half())
    assert y.dtype == torch.float32


def test_any_strides_empty_and_repeated():
    values, indices, W, b = inputs((8, 6, 40, 30))
    want = sparse_decode(values[::2, 1::2].contiguous(), indices[::2, 1::2].contiguous(), W, b)
    strided = sparse_decode(values[::2, 1::2], indices[::2, 1::2], W.T.contiguous().T, b.repeat_interleave(2)[::2])
    torch.testing.assert_close(strided, want, rtol=0, atol=0)
    assert sparse_decode(values[:0], indices[:0], W, b).shape == (0, 40)
    torch.testing.assert_close(sparse_decode(values[:, :0], indices[:, :0], W, b), b.expand(8, 40), rtol=0, atol=0)
    ones = torch.ones(1, 6)
    torch.testing.assert_close(sparse_decode(ones, torch.full((1, 6), 3), W.round(), None)[0], 6 * W[3].round())


def test_low_precision_is_rounded_once():
    """Sums of 1/256 in bfloat16 would stop growing at 1; float32 accumulation must not."""
    W = torch.full((1, 64), 1 / 256).bfloat16()
    y = sparse_decode(torch.ones(1, 512).bfloat16(), torch.zeros(1, 512, dtype=torch.int32), W)
    assert (y == 2.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(dtype):
    """Every exponent, subnormal, overflow and NaN of the output type, against torch's own conversion."""
    bits = torch.arange(0, 2**31, 40961, dtype=torch.int64).to(torch.int32)
    source = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    source = source[: source.numel() // 2 * 2]
    W = torch.ones(1, source.numel(), dtype=dtype)
    y = sparse_decode(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int32), W, source)[0]
    torch.testing.assert_close(y, source.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_weight_of_sixteen_bits_is_read_exactly(dtype):
    W = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    W = W[W.isfinite()][None]
    y = sparse_decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), W)
    torch.testing.assert_close(y, W + 0.0, rtol=0, atol=0)


def test_gradients_match_reference():
    values, indices, W, b = inputs((6, 8, 33, 20))
    weights = torch.randn(6, 33)
    grads = []
    for impl in (sparse_decode, reference.sparse_decode):
        leaves = [t.clone().requires_grad_() for t in (values, W, b)]
        (impl(leaves[0], indices, leaves[1], leaves[2]).sin() * weights).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[0], grads[1])


def test_reference_gradient_is_right():
    values, indices, W, b = (t.double() if t.is_floating_point() else t for t in inputs((3, 4, 5, 6)))
    leaves = [t.requires_grad_() for t in (values, W, b)]
    assert torch.autograd.gradcheck(lambda v, W, b: reference.sparse_decode(v, indices, W, b), leaves)


def test_gradient_of_a_sum():
    """sum() hands the backward pass a tensor of stride 0."""
    values, indices, W, b = inputs((4, 3, 10, 12))
    values.requires_grad_()
    sparse_decode(values, indices, W, b).sum().backward()
    torch.testing.assert_close(values.grad, W.sum(1)[indices.long()])


@needs_native
def test_backward_makes_no_tensor_of_all_gathered_rows():
    values, indices, W, b = inputs((64, 32, 48, 100))
    leaves = [t.requires_grad_() for t in (values, W, b)]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_iter(out) if isinstance(t, torch.Tensor))])
            return out

    with Watch():
        sparse_decode(leaves[0], indices, leaves[1], leaves[2]).sum().backward()
    assert largest == W.numel() < 64 * 32 * 48


@pytest.mark.parametrize("bad", [-1, 30, 2**31 + 5])
def test_index_out_of_range_raises(bad):
    values, indices, W, b = inputs((4, 6, 40, 30), index_dtype=torch.int64)
    indices[2, 3] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"out of|outside"):
        sparse_decode(values, indices, W, b)


@pytest.mark.parametrize(
    "position, tensor, word",
    [
        (0, torch.zeros(4), r"\[N, K\]"),
        (0, torch.zeros(4, 5), "share a letter"),
        (0, torch.zeros(4, 6, dtype=torch.float64), "float64"),
        (1, torch.zeros(4, 6), "int32 and int64"),
        (2, torch.zeros(30, 40, dtype=torch.int8), "int8"),
        (3, torch.zeros(41), r"b_dec \[D\]"),
        (3, torch.zeros(40, device="meta"), "one device"),
    ],
)
def test_refuses(position, tensor, word):
    args = list(inputs((4, 6, 40, 30)))
    args[position] = tensor
    with pytest.raises(ValueError, match=word):
        sparse_decode(*args)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_every_instruction_set_thread_count_and_run(dtype, limit_isa):
    args = inputs((33, 19, 75, 120), dtype)
    results = []
    for isa in native.ISA_NAMES:
        limit_isa(isa)
        results.append(sparse_decode(*args))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [sparse_decode(*args) for _ in range(4)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def test_opcheck():
    values, indices, W, b = inputs((5, 8, 33, 20))
    leaves = values.requires_grad_(), indices, W.requires_grad_(), b.requires_grad_()
    torch.library.opcheck(torch.ops.qscope.sparse_decode.default, leaves)
    torch.library.opcheck(torch.ops.qscope.sparse_decode.default, (*leaves[:3], None))


def test_compiles_without_graph_break():
    """The one test that goes through inductor; the other operators use aot_eager, which is faster."""
    args = inputs((5, 8, 33, 20))
    compiled = torch.compile(lambda *a: sparse_decode(*a) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*args), sparse_decode(*args) * 2, rtol=0, atol=0)
