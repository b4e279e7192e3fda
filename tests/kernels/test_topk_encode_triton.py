"""The launcher of topk_encode and its tile plan, and the product with group maxima in Triton's interpreter.

The launcher runs here on CPU tensors with a plain select in place of the CUDA kernels: what is tested is that tiles
cover everything, are merged in the right order, and stay within the workspace.
"""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels import group_encode, topk_encode, topk_select
from qscope_kernels.group_encode import GroupConfig, group_config, group_scores
from qscope_kernels.topk_encode import EncodePlan, GroupWin, choose_method, encode_plan, topk_encode_fwd

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
TINY = GroupConfig(
    block_n=16, block_f=32, block_d=16, num_warps=4, num_stages=2, row_tiles=2, programs=3, group=16
)  # 3 programs: each walks over several tiles


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that scores or results that are not written are seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def best(scores: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """Stable sort of whole rows; -0 is +0, a row with NaN is NaN."""
    full = (scores.float() + 0.0).sort(dim=1, descending=True, stable=True)
    values = full.values[:, :k].relu() if relu else full.values[:, :k]
    nan = scores.isnan().any(1, keepdim=True)
    first = torch.arange(k).expand(len(scores), k)
    return (
        torch.where(nan, torch.nan, values).to(scores.dtype),
        torch.where(nan, first, full.indices[:, :k]).int(),
    )


def plain_select(
    scores: Tensor,
    k: int,
    *,
    relu: bool = False,
    out: tuple[Tensor, Tensor],
    first_column: int = 0,
    merge: bool = False,
) -> tuple[Tensor, Tensor]:
    """topk_select_fwd as its docstring says it, by sorting."""
    values, indices = out
    assert scores.is_contiguous() and values.is_contiguous() and indices.is_contiguous()
    assert merge == (first_column > 0) and (merge or scores.shape[1] >= k)
    columns = torch.arange(first_column, first_column + scores.shape[1], dtype=torch.int32).expand_as(scores)
    if merge:  # what was found before comes first: it has the lower columns
        scores, columns = torch.cat([values, scores], 1), torch.cat([indices, columns], 1)
    got_values, places = best(scores, k, relu)
    nan = got_values.isnan().any(1, keepdim=True)
    values.copy_(got_values)
    indices.copy_(torch.where(nan, torch.arange(k).expand_as(places), columns.gather(1, places.long())))
    return out


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_encode, "topk_select_fwd", plain_select)


def integers(N: int, D: int, d_sae: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of -2..2, at most 60 of them per sum: |score| <= 242 is exact in bfloat16, and ties are everywhere."""
    assert D <= 60
    gen = torch.Generator().manual_seed(N + D)
    x, W, b = (torch.randint(-2, 3, s, generator=gen).to(dtype) for s in ((N, D), (d_sae, D), (d_sae,)))
    return x, W, b


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], want[1]) and not got[0].signbit().any()


sizes = st.tuples(st.integers(0, 100_000), st.integers(1, 1 << 21), st.integers(1, 256), st.integers(0, 6000))
copies = st.tuples(st.booleans(), st.booleans())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(sizes, st.sampled_from([2, 4]), st.integers(10, 32), copies)
def test_a_plan_stays_within_the_workspace(
    size: tuple[int, int, int, int], itemsize: int, log2_bytes: int, copied: tuple[bool, bool]
) -> None:
    N, d_sae, k, D = size
    k, (copies_x, copies_W) = min(k, d_sae), copied

    def used(rows: int, columns: int) -> int:
        return itemsize * (rows * columns + copies_x * rows * D + copies_W * columns * D)

    narrowest = min(d_sae, -(-k // 64) * 64)
    args = (N, d_sae, k, D, itemsize, 1 << log2_bytes)
    if used(1, narrowest) > 1 << log2_bytes:
        with pytest.raises(ValueError, match="workspace_bytes"):
            encode_plan(*args, copies_x=copies_x, copies_W=copies_W)
        return
    plan = encode_plan(*args, copies_x=copies_x, copies_W=copies_W)
    assert used(plan.rows, plan.columns) <= 1 << log2_bytes
    assert 1 <= plan.rows <= max(N, 1) and narrowest <= plan.columns <= d_sae
    whole_rows = used(min(max(N, 1), 256), d_sae) <= 1 << log2_bytes
    assert (plan.columns == d_sae) or (plan.columns % 64 == 0 and not whole_rows)
    if whole_rows:
        assert plan.columns == d_sae and (plan.rows == max(N, 1) or plan.rows % 256 == 0)
        more = min(plan.rows + 256, max(N, 1))
        assert more == plan.rows or used(more, d_sae) > 1 << log2_bytes


def test_plans_of_the_qwen_scope_shapes() -> None:
    """256 MiB hold 2048 rows of a 64K dictionary; a million features are cut into columns, as is a small workspace."""
    default = topk_encode.DEFAULT_WORKSPACE_BYTES
    assert encode_plan(8192, 65536, 100, 4096, 2, default) == EncodePlan(2048, 65536)
    assert encode_plan(8192, 32768, 50, 2048, 2, default) == EncodePlan(4096, 32768)
    assert encode_plan(8192, 81920, 100, 5120, 2, default) == EncodePlan(1536, 81920)
    assert encode_plan(8192, 131072, 50, 2048, 2, default) == EncodePlan(1024, 131072)
    assert encode_plan(8192, 1 << 20, 100, 4096, 2, default) == EncodePlan(2048, 65536)
    assert encode_plan(100_000, 1 << 20, 100, 4096, 2, 33 << 20) == EncodePlan(2048, 8448)
    assert encode_plan(100, 1 << 20, 100, 4096, 2, default) == EncodePlan(100, 1 << 20)
    # "exact" with bfloat16 weights: the upcast block of them shares the workspace with the scores.
    assert encode_plan(8192, 65536, 100, 4096, 4, default, copies_x=True, copies_W=True) == EncodePlan(2048, 9408)


PLANS = [EncodePlan(1000, 1000), EncodePlan(8, 300), EncodePlan(7, 64), EncodePlan(40, 128), EncodePlan(1, 192)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "exact"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_every_plan_gives_the_top_k_of_whole_rows(plan: EncodePlan, precision: str, bias: bool, on_cpu: None) -> None:
    x, W, b = integers(37, 40, 300)
    values, indices = topk_encode_fwd(x, W, b if bias else None, 33, precision=precision, config=plan)
    assert values.dtype == topk_encode.DTYPES[precision]
    scores = x.double() @ W.double().T + (b.double() if bias else 0)
    want = best(scores.float(), 33, relu=True)
    assert_same((values, indices), (want[0].to(values.dtype), want[1]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the emulated kernel")
def test_blocks_are_merged_by_the_cuda_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the select that it calls on a GPU, in the emulator: same arguments, same merging."""
    source = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "topk_select.cu"
    flags = ["-O1", "-std=c++17", "-DQSCOPE_EMULATED", "-shared", "-fPIC", "-x", "c++"]
    subprocess.run(["g++", *flags, str(source), "-o", str(tmp_path / "select.so")], check=True, capture_output=True)
    library = ctypes.CDLL(str(tmp_path / "select.so"))

    def emulated(
        scores: Tensor, k: int, *, relu: bool, out: tuple[Tensor, Tensor], first_column: int, merge: bool
    ) -> None:
        arguments = topk_select.cuda_arguments(scores, k, relu, first_column, merge, *out, 256)
        assert library.qscope_topk_select(*arguments, None) == 0

    monkeypatch.setattr(topk_encode, "topk_select_fwd", emulated)
    x, W, b = integers(9, 40, 300)
    x[2] = torch.nan
    want = best((x.double() @ W.double().T + b.double()).float(), 33, relu=True)
    for plan in PLANS:
        for precision in ("bf16", "exact"):
            values, indices = topk_encode_fwd(x, W, b, 33, precision=precision, config=plan)
            assert torch.equal(indices, want[1])
            torch.testing.assert_close(values.float(), want[0], rtol=0, atol=0, equal_nan=True)


def test_relu_waits_for_the_last_block(on_cpu: None) -> None:
    """Fewer than k positive scores: negative ones compete for the last places until all columns are seen."""
    x, W, b = integers(37, 40, 300)
    want = best((x.double() @ W.double().T + b.double() - 50).float(), 33, relu=True)
    assert bool((want[0] == 0).any())
    for plan in PLANS:
        values, indices = topk_encode_fwd(x, W, b - 50, 33, config=plan)
        assert_same((values.float(), indices), want)


def test_bf16_scores_are_those_of_linear(on_cpu: None) -> None:
    gen = torch.Generator().manual_seed(3)
    x, W, b = (torch.randn(s, generator=gen) for s in ((21, 77), (300, 77), (300,)))
    low = [t.bfloat16() for t in (x, W, b)]
    for bias in (low[2], None):
        want = best(F.linear(low[0], low[1], bias), 20, relu=True)
        assert_same(topk_encode_fwd(low[0], low[1], bias, 20), want)
        assert_same(topk_encode_fwd(x, W, None if bias is None else b, 20), want)


def test_nan_rows_zero_rows_and_infinity(on_cpu: None) -> None:
    x, W, b = integers(9, 40, 300)
    x[1, 3], x[4, 0], W[299, 5] = torch.nan, torch.inf, torch.inf
    x[:, 5] = torch.tensor([1, 1, 0, -1, 1, 1, 1, 1, 1])  # inf in the last block; row 2 gets 0 * inf, row 4 inf - inf
    scores = F.linear(x.float(), W.float(), b.float())
    assert scores[[1, 2]].isnan().any(1).all() and not scores[[0, 3, 5]].isnan().any()
    want = best(scores, 12, relu=True)
    for plan in PLANS:
        got = topk_encode_fwd(x, W, b, 12, precision="exact", config=plan)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[1], want[1])
    values, indices = topk_encode_fwd(x[:0], W, b, 12)
    assert values.shape == indices.shape == (0, 12)
    values, indices = topk_encode_fwd(x[:, :0], W[:, :0], b, 12)
    assert_same((values, indices), best(b.expand(9, 300), 12, relu=True))


def test_strides_and_dtypes_are_copied_a_tile_at_a_time(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = integers(37, 40, 300)
    want = topk_encode_fwd(x, W, b, 9)
    wide = torch.stack([x, x + 1], -1)[..., 0]
    for arguments in ((wide, W.T.contiguous().T, b.repeat_interleave(2)[::2]), (x.float(), W.half(), b.float())):
        assert not (arguments[0].is_contiguous() and arguments[0].dtype == torch.bfloat16)
        for workspace in (None, 40_000):
            assert_same(topk_encode_fwd(*arguments, 9, workspace_bytes=workspace), want)
    assert encode_plan(37, 300, 9, 40, 2, 40_000, copies_x=True, copies_W=True).columns < 300


@pytest.mark.parametrize("workspace", [9_000, 20_000, 1 << 28])
@pytest.mark.parametrize("precision", ["bf16", "exact"])
def test_what_is_allocated_fits_the_workspace(
    workspace: int, precision: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = integers(37, 20, 300, torch.float16)
    allocated = []
    new_empty = Tensor.new_empty

    def counted(self: Tensor, *args: object, **options: object) -> Tensor:
        tensor = new_empty(self, *args, **options)
        allocated.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(Tensor, "new_empty", counted)
    values, indices = topk_encode_fwd(x, W, b, 9, precision=precision, workspace_bytes=workspace)
    results = values.numel() * values.element_size() + indices.numel() * 4
    assert results < sum(allocated) <= workspace + results


def test_matmul_settings_are_fixed_inside_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision
    seen = []

    def spy(scores: Tensor, k: int, *, out: tuple[Tensor, Tensor], **_: object) -> None:
        seen.append((matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision))
        if len(seen) > 2:
            raise RuntimeError("stop")

    monkeypatch.setattr(topk_encode, "topk_select_fwd", spy)
    try:
        matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision = True, "tf32"
        with pytest.raises(RuntimeError, match="stop"):
            topk_encode_fwd(*integers(9, 8, 70), 4, config=EncodePlan(2, 70))
        assert seen == [(False, "ieee")] * 3
        assert (matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision) == (True, "tf32")
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.fp32_precision = before


def test_an_inherited_tf32_setting_stays_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written into the setting of the matrix product, it would hide what the caller sets for all backends later."""
    matmul = torch.backends.cuda.matmul
    seen = []
    monkeypatch.setattr(topk_encode, "topk_select_fwd", lambda *_, **__: seen.append(matmul.fp32_precision))
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        topk_encode_fwd(*integers(9, 8, 70), 4)
        assert seen == ["ieee"] and matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_older_setting_is_restored_too(precision: str, on_cpu: None) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        allowed = torch.backends.cuda.matmul.allow_tf32
        topk_encode_fwd(*integers(9, 8, 70), 4)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed is (precision == "high")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_two_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock one thread could restore the setting while the other still computes."""
    inside, worst = [], []

    def slow(scores: Tensor, k: int, **_: object) -> None:
        inside.append(1)
        worst.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()

    monkeypatch.setattr(topk_encode, "topk_select_fwd", slow)
    threads = [threading.Thread(target=topk_encode_fwd, args=(*integers(9, 8, 70), 4)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1, 1, 1]


def test_gradients_are_left_to_the_operator(on_cpu: None) -> None:
    x, W, b = integers(5, 8, 70)
    values, _ = topk_encode_fwd(x.requires_grad_(), W.requires_grad_(), b, 4)
    assert not values.requires_grad


def test_bad_input_is_refused() -> None:
    x, W, b = integers(5, 8, 300)
    with pytest.raises(ValueError, match=r"x \[N, D\] and W_enc \[F, D\]"):
        topk_encode_fwd(x[:, 1:], W, b, 4)
    with pytest.raises(ValueError, match=r"b_enc \[F\]"):
        topk_encode_fwd(x, W, b[1:], 4)
    with pytest.raises(ValueError, match="float64"):
        topk_encode_fwd(x.double(), W, b, 4)
    with pytest.raises(ValueError, match="meta"):
        topk_encode_fwd(x, W.to("meta"), b, 4)
    for k in (0, 257):
        with pytest.raises(ValueError, match="1 <= k <= 256"):
            topk_encode_fwd(x, W, b, k)
    with pytest.raises(ValueError, match="1 <= k <= 7"):
        topk_encode_fwd(x, W[:7], b[:7], 8)
    with pytest.raises(ValueError, match="precision='fp8'"):
        topk_encode_fwd(x, W, b, 4, precision="fp8")
    with pytest.raises(ValueError, match="method='cutlass'"):
        topk_encode_fwd(x, W, b, 4, method="cutlass")
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        topk_encode_fwd(x, W, b, 4, method="group")
    with pytest.raises(ValueError, match="'exact' is not 'bf16'"):
        topk_encode_fwd(x, W, b, 4, method="group", precision="exact")
    with pytest.raises(ValueError, match="one token needs 128 bytes"):
        topk_encode_fwd(x, W, b, 4, workspace_bytes=127)


def test_the_table_chooses_by_shape_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {"capability": (9, 0), "N": 1024, "F": 65536, "D": 4096, "k": 100}
    assert choose_method(**inside) == "cublas"
    win = GroupWin((9, 0), N=(1024, 8192), D=(2048, 4096), F=(65536, 65536), k=(1, 100))
    monkeypatch.setattr(topk_encode, "ENCODE_TABLE", (win,))
    assert choose_method(**inside) == "group"
    for change in ({"capability": (8, 9)}, {"N": 1023}, {"N": 8193}, {"F": 65535}, {"D": 4097}, {"k": 101}):
        assert choose_method(**inside | change) == "cublas", change


def maxima_of(scores: Tensor, group: int) -> Tensor:
    padded = F.pad(scores.float(), (0, -scores.shape[1] % group), value=-torch.inf)
    return padded.view(len(scores), -1, group).amax(2).to(scores.dtype)


# (N, D, F): below, at and above a tile and a step in each direction; F that ends inside a group and inside a half.
PRODUCTS = [(1, 8, 8), (16, 16, 32), (17, 24, 72), (45, 40, 104), (33, 16, 160)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_product_and_group_maxima(shape: tuple[int, int, int], bias: bool) -> None:
    x, W, b = (t.to(DEVICE) for t in integers(*shape))
    b = b - 100  # no score reaches 0, what TMA reads beyond F
    scores, maxima = group_scores(x, W, b if bias else None, config=TINY)
    want = x.double() @ W.double().T + (b.double() if bias else 0)
    assert torch.equal(scores.double(), want)  # integers below 256: exact whatever the rounding
    assert torch.equal(maxima, maxima_of(scores, TINY.group))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NaN is meant, numpy mentions it
def test_maxima_are_those_of_the_rounded_scores_and_keep_nan() -> None:
    gen = torch.Generator().manual_seed(11)
    x, W, b = (torch.randn(s, generator=gen).bfloat16().to(DEVICE) for s in ((20, 40), (104, 40), (104,)))
    x[3, 7], W[50, 0], W[60, 1] = torch.nan, torch.inf, torch.nan
    scores, maxima = group_scores(x, W, b, config=TINY)
    want = x.double() @ W.double().T + b.double()
    known = want.isfinite()
    # One whole unit: the interpreter truncates where the GPU rounds; and a float32 sum of 41 terms.
    size = x.double().abs() @ W.double().abs().T + b.double().abs()
    bound = (want.abs() * 2.0**-7 + size * 41 * 2.0**-24)[known]
    assert bool(((scores.double() - want)[known].abs() <= bound).all())
    assert torch.equal(scores.isnan(), want.isnan()) and torch.equal(scores.isposinf(), want.isposinf())
    torch.testing.assert_close(maxima, maxima_of(scores, TINY.group), rtol=0, atol=0, equal_nan=True)
    assert maxima[3].isnan().all() and maxima[2].isnan().sum() == 1


def test_scores_go_into_the_workspace_and_repeat_to_the_bit() -> None:
    x, W, b = (t.to(DEVICE) for t in integers(20, 24, 72))
    workspace = torch.full((20 * 72 + 5,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    scores, maxima = group_scores(x, W, b, scores=workspace, config=TINY)
    assert scores.data_ptr() == workspace.data_ptr() and bool((workspace[-5:] == 7).all())
    again = group_scores(x, W, b, config=TINY)
    assert torch.equal(scores, again[0]) and torch.equal(maxima, again[1])


def test_the_launcher_hands_whole_rows_to_the_group_design(monkeypatch: pytest.MonkeyPatch) -> None:
    def sorted_groups(scores: Tensor, maxima: Tensor, k: int, group: int, *, relu: bool, out: tuple) -> None:
        torch.testing.assert_close(maxima, maxima_of(scores, group), rtol=0, atol=0)
        for have, want in zip(out, best(scores, k, relu), strict=True):
            have.copy_(want)

    monkeypatch.setattr(group_encode, "group_select_fwd", sorted_groups)
    monkeypatch.setattr(group_encode, "group_config", lambda N, multiprocessors: TINY)
    monkeypatch.setattr(group_encode, "_multiprocessors", lambda device: 1)
    monkeypatch.setattr(topk_encode, "group_problem", lambda x, W, k: None)
    x, W, b = integers(37, 24, 72)
    want = best(F.linear(x, W, b), 9, relu=True)
    assert_same(topk_encode_fwd(x.float(), W, b, 9, method="group", config=EncodePlan(16, 72)), want)
    with pytest.raises(ValueError, match="whole rows"):
        topk_encode_fwd(x, W, b, 9, method="group", config=EncodePlan(16, 64))
    monkeypatch.setattr(topk_encode, "choose_method", lambda *_: "group")
    monkeypatch.setattr(topk_encode, "group_problem", lambda x, W, k: "no library")
    monkeypatch.setattr(topk_encode, "topk_select_fwd", plain_select)
    assert_same(topk_encode_fwd(x, W, b, 9), want)  # chosen by the table, impossible: the other method


def test_group_scores_refuses_what_tma_cannot_take() -> None:
    x, W, _ = integers(20, 24, 72)
    for bad in ((x[:, :20].contiguous(), W[:, :20].contiguous()), (x, W[:70]), (x.float(), W), (x, W.T.contiguous().T)):
        with pytest.raises(ValueError, match="multiples of 8"):
            group_scores(*bad, None, config=TINY)


def test_group_config_fits_an_sm() -> None:
    for N in (1, 128, 129, 8192):
        cfg = group_config(N, 132)
        operands = cfg.num_stages * (cfg.block_n + cfg.block_f) * cfg.block_d * 2
        assert operands + cfg.block_n * cfg.block_f // 2 * 2 <= 227 << 10
        assert cfg.block_f // 2 % cfg.group == 0 and cfg.programs == 132
