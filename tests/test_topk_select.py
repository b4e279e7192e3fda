import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qscope import native, reference
from qscope.ops import topk_select

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (3, 7, 7),
    (5, 63, 1),
    (4, 64, 64),
    (2, 65, 3),
    (7, 1000, 50),
    (3, 5000, 100),
    (2, 4099, 4099),
]
IMPLS = [topk_select, reference.topk_select]


def oracle(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order spelled out with numpy: value descending, then index ascending; independent of torch.topk."""
    rows = scores.double().numpy() + 0.0
    order = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in rows])
    values = np.take_along_axis(rows, order, 1)
    return torch.from_numpy(values).to(scores.dtype), torch.from_numpy(order).to(torch.int32)


def assert_same(got, want):
    assert got[0].dtype == want[0].dtype and got[1].dtype == torch.int32
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS, ids=["op", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(impl, dtype, shape):
    N, F, k = shape
    torch.manual_seed(0)
    scores = torch.randn(N, F).to(dtype)
    assert_same(impl(scores, k), oracle(scores, k))


@pytest.mark.parametrize("impl", IMPLS, ids=["op", "reference"])
@pytest.mark.parametrize("k", [1, 5, 64, 999])
def test_ties_keep_the_lowest_index(impl, k):
    torch.manual_seed(1)
    few_values = torch.randint(-2, 3, (6, 999)).float()
    zeros = torch.zeros(1, 999)
    signed_zeros = torch.where(torch.rand(1, 999) > 0.5, 0.0, -0.0)
    scores = torch.cat([few_values, zeros, signed_zeros])
    got = impl(scores, k)
    assert_same(got, oracle(scores, k))
    assert not (got[0].signbit() & (got[0] == 0)).any()


@pytest.mark.parametrize("impl", IMPLS, ids=["op", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 17, 199])
def test_nan_condemns_only_its_row(impl, dtype, place):
    scores = torch.randn(3, 200).to(dtype)
    scores[1, place] = torch.nan
    values, indices = impl(scores, 9)
    assert values[1].isnan().all() and indices[1].tolist() == list(range(9))
    rest = scores[[0, 2]]
    assert_same((values[[0, 2]], indices[[0, 2]]), oracle(rest, 9))


@pytest.mark.parametrize("impl", IMPLS, ids=["op", "reference"])
def test_infinities_are_ordinary_values(impl):
    scores = torch.full((2, 300), -torch.inf)
    scores[0, 250] = torch.inf
    scores[1, 7] = -1.0
    assert_same(impl(scores, 20), oracle(scores, 20))


def test_ascending_and_descending_rows():
    """Ascending scores defeat a running threshold: every one of them is a candidate."""
    ramp = torch.arange(20000, dtype=torch.float32)
    scores = torch.stack([ramp, ramp.flip(0)])
    assert_same(topk_select(scores, 77), oracle(scores, 77))


def test_any_strides_and_no_rows():
    base = torch.randn(64, 90)
    for view in (base.t(), base[::2, 1::3], base[:1].expand(5, 90)):
        assert_same(topk_select(view, 4), oracle(view.contiguous(), 4))
    values, indices = topk_select(torch.empty(0, 8), 3)
    assert values.shape == indices.shape == (0, 3)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 300)),
        elements=st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0])),
    ),
    st.integers(1, 300),
)
def test_selection_is_a_prefix_of_the_full_order(scores, k):
    scores = torch.from_numpy(scores)
    k = min(k, scores.shape[1])
    assert_same(topk_select(scores, k), oracle(scores, k))


def test_gradient_scatters_to_the_chosen_scores():
    scores = torch.randn(4, 30)
    scores[2, 3] = torch.nan
    grads = []
    for impl in IMPLS:
        leaf = scores.clone().requires_grad_()
        values, _ = impl(leaf, 5)
        (values.nan_to_num() * torch.arange(20.0).view(4, 5)).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    assert (grads[0][2] == 0).all()


@pytest.mark.parametrize("kind", ["distinct", "ties", "nan"])
def test_reference_works_in_blocks_of_rows(monkeypatch, kind):
    """The plain body also serves GPUs, where [N, F] masks of a large batch would fill the memory."""
    N, F, rows = 64, 100, 4
    scores = torch.randn(N, F) if kind != "ties" else torch.randint(0, 3, (N, F)).float()
    if kind == "nan":
        scores[10, 3] = torch.nan
    want = reference.topk_select(scores, 7)
    monkeypatch.setattr("qscope.reference._workspace.WORKSPACE_BYTES", rows * F * scores.element_size())
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = (t for t in tree_iter(out) if isinstance(t, torch.Tensor) and not t._is_view())
            largest = max([largest, *(t.numel() for t in made)])
            return out

    with Watch():
        got = reference.topk_select(scores, 7)
    assert_same(got, want)
    assert largest == max(rows * F, N * 7)


def test_opcheck_and_compile():
    scores = torch.randn(4, 40, requires_grad=True)
    torch.library.opcheck(torch.ops.qscope.topk_select.default, (scores, 3))
    compiled = torch.compile(lambda s: topk_select(s, 3), fullgraph=True, backend="aot_eager")
    assert_same([t.detach() for t in compiled(scores)], oracle(scores.detach(), 3))


@pytest.mark.parametrize(
    "scores, k, word",
    [
        (torch.zeros(3), 1, r"\[N, F\]"),
        (torch.zeros(2, 3), 0, "1 <= k <= 3"),
        (torch.zeros(2, 3), 4, "1 <= k <= 3"),
        (torch.zeros(2, 3, dtype=torch.float64), 1, "float64"),
        (torch.zeros(2, 3, dtype=torch.int32), 1, "int32"),
    ],
)
def test_refuses(scores, k, word):
    with pytest.raises(ValueError, match=word):
        topk_select(scores, k)


def test_same_bits_for_any_number_of_threads_and_every_run():
    scores = torch.randint(0, 50, (33, 3000)).float()
    first = topk_select(scores, 40)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(4):
                assert_same(topk_select(scores, 40), first)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there are no instruction sets to compare")
@pytest.mark.parametrize("isa", native.ISA_NAMES)
def test_every_instruction_set_agrees(isa, limit_isa):
    limit_isa(isa)
    for dtype in DTYPES:
        scores = torch.randn(4, 1003).to(dtype)
        assert_same(topk_select(scores, 31), oracle(scores, 31))
