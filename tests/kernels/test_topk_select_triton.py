"""The row select's Triton fallback against a stable sort, in Triton's interpreter or, if there is one, on the GPU."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels import cuda_library
from qscope_kernels.topk_select import LaunchConfig, topk_select_fwd

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Small blocks make several steps of short rows; seven rows per launch make several launches, the last one ragged.
SMALL = LaunchConfig(block=256, num_warps=4, rows=7)


@pytest.fixture(autouse=True)
def without_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "load", lambda: None)


def oracle(scores: Tensor, k: int, relu: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    values = values.relu() if relu else values
    broken = scores.isnan().any(1, keepdim=True)
    first = torch.arange(k, device=scores.device).expand_as(indices)
    return torch.where(broken, torch.nan, values), torch.where(broken, first, indices).int()


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[0].dtype == want[0].dtype and got[1].dtype == torch.int32
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], want[1])
    assert not bool((got[0].signbit() & (got[0] == 0)).any())


def rows(F: int, dtype: torch.dtype) -> Tensor:
    """One row of each kind that stresses another path."""
    gen = torch.Generator().manual_seed(F)
    x = torch.randn(F, generator=gen)
    ramp = torch.arange(F, dtype=torch.float32) - F // 2
    nan, infinite = x.clone(), x.clone()
    nan[F // 2], infinite[::7], infinite[1::5] = torch.nan, torch.inf, -torch.inf
    signed_zeros = torch.where(x > 0, 0.0, -0.0)
    kinds = [
        x, (x * 2).round() / 2, torch.full((F,), -2.5), (x - 2.0).relu(), ramp, -ramp, nan, torch.full((F,), torch.nan),
        infinite, torch.full((F,), -torch.inf), signed_zeros,
    ]  # fmt: skip
    return torch.stack(kinds).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("F", "k"), [(1, 1), (7, 5), (256, 256), (1000, 30), (1283, 200)])
def test_every_kind_of_row(F: int, k: int, dtype: torch.dtype) -> None:
    scores = rows(F, dtype)
    relu = F % 2 == 0
    assert_same(topk_select_fwd(scores, k, relu=relu, config=SMALL), oracle(scores, k, relu))


def test_scores_that_outgrow_the_candidate_list_raise_the_level() -> None:
    """All large scores in one lane's columns: its maximum alone says nothing about how many there are."""
    gen = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 256 * 16, generator=gen).to(DEVICE)
    lanes = scores.view(2, 16, 256)
    lanes[:, :, :90] += 10  # 1440 scores above all others; with k=100 the level lies below them
    assert_same(topk_select_fwd(scores, 100, config=SMALL), oracle(scores, 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_blocks_merge_into_the_result_of_the_whole(dtype: torch.dtype) -> None:
    scores, k = rows(900, dtype), 40
    out = topk_select_fwd(scores[:, :40], k, config=SMALL)
    for start, end in [(40, 41), (41, 900)]:
        again = topk_select_fwd(
            scores[:, start:end], k, relu=end == 900, out=out, first_column=start, merge=True, config=SMALL
        )
        assert again[0] is out[0] and again[1] is out[1]
    assert_same(out, oracle(scores, k, relu=True))


def test_default_configuration_strides_and_no_rows() -> None:
    base = rows(2500, torch.float32)
    for view in (base[::10, 1:], base.t()[:70, :].contiguous().t()[:1], base[:1, :600].expand(2, 600)):
        assert_same(topk_select_fwd(view, 30), oracle(view, 30))
    values, indices = topk_select_fwd(base[:0], 30)
    assert values.shape == indices.shape == (0, 30)


def test_an_empty_last_block_still_applies_relu() -> None:
    scores = rows(64, torch.float32)
    out = topk_select_fwd(scores, 60, config=SMALL)
    topk_select_fwd(scores[:, :0], 60, relu=True, out=out, first_column=64, merge=True, config=SMALL)
    assert_same(out, oracle(scores, 60, relu=True))


def test_wrong_input_is_refused_with_what_was_given() -> None:
    scores = torch.zeros(3, 50, device=DEVICE)
    values, indices = torch.zeros(3, 5, device=DEVICE), torch.zeros(3, 5, dtype=torch.int32, device=DEVICE)
    for call, said in [
        (lambda: topk_select_fwd(scores[0], 5), r"got scores \[50\]"),
        (lambda: topk_select_fwd(scores.double(), 5), "float64"),
        (lambda: topk_select_fwd(scores, 0), "k=0"),
        (lambda: topk_select_fwd(scores.expand(3, 50), 257), "k=257"),
        (lambda: topk_select_fwd(scores, 51), "k=51"),
        (lambda: topk_select_fwd(scores, 5, first_column=-1), "column -1"),
        (lambda: topk_select_fwd(scores, 5, first_column=2**31 - 50), "int32"),
        (lambda: topk_select_fwd(scores, 5, merge=True), "pass it as out"),
        (lambda: topk_select_fwd(scores, 5, out=(values[:2], indices)), r"\[2, 5\]"),
        (lambda: topk_select_fwd(scores, 5, out=(values, indices.long())), "int64"),
        (lambda: topk_select_fwd(scores, 5, out=(values.half(), indices)), "float16"),
        (lambda: topk_select_fwd(scores, 5, out=(values.T.contiguous().T, indices)), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
