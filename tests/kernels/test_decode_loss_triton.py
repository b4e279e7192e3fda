"""The fused decode and loss kernel against float64, in Triton's interpreter or, if there is one, on the GPU.

Bounds are the rigorous ones of a float32 sum in any order: n rounded products and additions give at most (n + 1) u
times the sum of absolute terms (u = 2^-24, Higham 2002, section 3.1). The error r - x inherits that of r, and the sums
over D inherit the error's.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need the triton package")
from qscope_kernels.decode_loss import MAX_SLOTS, LossConfig, decode_loss_fwd, loss_config, total_variance_fwd
from qscope_kernels.sparse_decode import sparse_decode_fwd

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
U32 = 2.0**-24
# Rounding to the output's type: half a unit, but a whole one for bfloat16 because the interpreter truncates.
ROUND = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
TINY = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
SMALL = LossConfig(block_d=32, rows=4, num_warps=1, variance_chunks=3)
# (N, K, D, F): K below, at and above a tile, D below, at and above a slice, all odd somewhere.
SHAPES = [(5, 7, 33, 29), (3, 8, 64, 11), (1, 1, 1, 1), (4, 13, 70, 61), (6, 3, 17, 2)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output or partial sum that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """top_acts with zeros and negatives, ids with repeats inside a row, W_dec, b_dec, x."""
    N, K, D, F = shape
    gen = torch.Generator().manual_seed(N * 1000 + K)
    acts = torch.randn(N, K, generator=gen)
    acts[:, ::5] = 0.0
    indices = torch.randint(0, F, (N, K), generator=gen, dtype=torch.int32)
    indices[:, K // 2] = indices[:, 0]
    floats = torch.randn(F, D, generator=gen), torch.randn(D, generator=gen), torch.randn(N, D, generator=gen)
    W, b, x = (t.to(dtype).to(DEVICE) for t in floats)
    return acts.to(dtype).to(DEVICE), indices.to(DEVICE), W, b, x


def below(got: Tensor, want: Tensor, bound: Tensor) -> None:
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"{(error - bound).max().item():.3e} above the bound"


def check(args: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], config: LossConfig | None) -> None:
    """Every output but the variance against float64, and again to the bit."""
    acts, indices, W, b, x = args
    got = decode_loss_fwd(*args, config=config)
    (K, D), dtype = (acts.shape[1], W.shape[1]), W.dtype
    rows = W.double()[indices.long()]
    terms = acts.double()[..., None] * rows
    bias = torch.zeros(D, dtype=torch.float64, device=DEVICE) if b is None else b.double()
    r = terms.sum(1) + bias
    off_r = (K + 2) * U32 * (terms.abs().sum(1) + bias.abs())
    below(got.x_hat, r, off_r + (r.abs() + off_r) * ROUND[dtype] + TINY[dtype])
    e = r - x.double()
    off_e = off_r + U32 * (e.abs() + off_r)
    below(got.error, e, off_e)
    size = e.abs() + off_e
    below(got.sq_err, e.square().sum(1), (2 * e.abs() * off_e + off_e**2 + (D + 1) * U32 * size**2).sum(1))
    off_dots = ((off_e + (D + 1) * U32 * size)[:, None] * rows.abs()).sum(-1)
    below(got.act_grads, 2 * (e[:, None] * rows).sum(-1), 2 * off_dots)
    assert got.x_hat.dtype == dtype and {t.dtype for t in got[1:]} == {torch.float32}
    again = decode_loss_fwd(*args, config=config)
    assert all(torch.equal(first, second) for first, second in zip(got, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    acts, indices, W, b, x = inputs(shape, dtype)
    check((acts, indices, W, None if shape[0] == 3 else b, x), SMALL)


@pytest.mark.parametrize(("K", "D"), [(3, 20), (9, 70), (140, 70), (MAX_SLOTS, 33)])
def test_default_configuration(K: int, D: int) -> None:
    """Few, many and the most slots of one gather."""
    check(inputs((2, K, D, 50)), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_slots_than_one_gather_holds_give_the_bits_of_sparse_decode(dtype: torch.dtype) -> None:
    acts, indices, W, b, x = inputs((1, MAX_SLOTS + 3, 16, 9), dtype)
    args = acts.float(), indices.long(), W, b, x.half()
    check(args, None)
    if dtype == torch.float32 or DEVICE == "cuda":  # the interpreter truncates where torch rounds
        assert torch.equal(decode_loss_fwd(*args).x_hat, sparse_decode_fwd(*args[:4]))


def test_slots_are_added_tile_by_tile() -> None:
    """Powers of two make every product exact: each of the tile's rows is a chain over the tiles, then a tree."""
    _, indices, W, _, x = inputs((4, 11, 33, 300))
    acts = 2.0 ** torch.randint(-3, 4, (4, 11), generator=torch.Generator().manual_seed(1)).float().to(DEVICE)
    chains = torch.zeros(4, 4, 33, device=DEVICE)
    for k in range(11):
        chains[:, k % 4] += acts[:, k, None] * W[indices[:, k].long()]
    orders = [(c[0] + c[1]) + (c[2] + c[3]) for c in (chains.unbind(1), chains[:, [0, 2, 1, 3]].unbind(1))]
    orders.append(chains[:, 0] + chains[:, 1] + chains[:, 2] + chains[:, 3])
    got = decode_loss_fwd(acts, indices, W, None, torch.zeros_like(x), SMALL).x_hat
    assert any(torch.equal(got, want) for want in orders)


def test_sums_of_slices_are_added_in_order_and_launches_in_pieces_give_the_same_bits() -> None:
    args = inputs((7, 5, 70, 29))
    whole = decode_loss_fwd(*args, config=SMALL)
    # 3 slices x (5 + 1) sums x 4 bytes per token: two tokens per launch, the last one short.
    pieces = decode_loss_fwd(*args, config=LossConfig(32, 4, 1, 2 * 3 * 6 * 4, 3))
    assert all(torch.equal(first, second) for first, second in zip(whole, pieces, strict=True))


def variance(x: Tensor) -> Tensor:
    return (x.double() - x.double().mean(0)).square().sum()


@pytest.mark.parametrize("N", [1, 2, 31, 128, 129, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_total_variance_where_the_mean_is_thousands_of_deviations_away(N: int, dtype: torch.dtype, mean: float) -> None:
    """The sum of squares minus the square of the sum would lose all its digits here.

    After the shift by the first token every value is a few deviations large and subtracting is exact, so what
    remains is the rounding of about 32 terms per tile and of one merge per tile and chunk: 100 u, relative.
    """
    x = (mean + torch.randn(N, 20, generator=torch.Generator().manual_seed(N))).to(dtype).to(DEVICE)
    got = total_variance_fwd(x, max_chunks=3)
    assert got.shape == () and (got.double() - variance(x)).abs() <= 100 * U32 * variance(x)


def test_total_variance_when_the_first_token_is_an_attention_sink() -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    x[0, 7], x[0, 11] = 30_000.0, -5_000.0
    x[:, 3] += 500.0
    x = x.to(DEVICE)
    got = total_variance_fwd(x)
    assert (got.double() - variance(x)).abs() <= 100 * U32 * variance(x)


def test_the_variance_of_the_batch_is_among_the_results() -> None:
    args = inputs((6, 3, 17, 2))
    assert torch.equal(decode_loss_fwd(*args).total_variance, total_variance_fwd(args[-1]))


def test_an_id_outside_the_dictionary_counts_as_a_row_of_zeros() -> None:
    acts, indices, W, b, x = inputs((3, 9, 33, 29))
    want = decode_loss_fwd(acts.index_fill(1, torch.tensor([4], device=DEVICE), 0.0), indices, W, b, x)
    for bad in (-1, 29, 2**31 - 1):
        got = decode_loss_fwd(acts, indices.index_fill(1, torch.tensor([4], device=DEVICE), bad), W, b, x)
        assert torch.equal(got.x_hat, want.x_hat) and bool((got.act_grads[:, 4] == 0).all())


@pytest.mark.parametrize(("N", "K", "D"), [(0, 4, 8), (3, 0, 8), (3, 4, 0)])
def test_empty(N: int, K: int, D: int) -> None:
    acts, indices = torch.ones(N, K, device=DEVICE), torch.zeros(N, K, dtype=torch.int32, device=DEVICE)
    W, b, x = torch.ones(5, D, device=DEVICE), torch.full((D,), 2.0, device=DEVICE), torch.ones(N, D, device=DEVICE)
    got = decode_loss_fwd(acts, indices, W, b, x)
    assert torch.equal(got.x_hat, (b + K).expand(N, D)) and torch.equal(got.error, got.x_hat - 1)
    assert got.sq_err.tolist() == [D * (K + 1.0) ** 2] * N
    assert torch.equal(got.act_grads, torch.full((N, K), 2.0 * D * (K + 1), device=DEVICE))
    assert got.total_variance.item() == 0.0


def test_ids_may_be_int64_and_inputs_strided() -> None:
    acts, indices, W, b, x = inputs((5, 7, 33, 29))
    want = decode_loss_fwd(acts, indices, W, b, x)
    got = decode_loss_fwd(acts.T.contiguous().T, indices.long(), W.T.contiguous().T, b, x.T.contiguous().T)
    assert all(torch.equal(first, second) for first, second in zip(want, got, strict=True))


def test_nan_and_infinity_pass_through_and_touch_no_other_token() -> None:
    acts, _, W, b, x = inputs((4, 5, 33, 29))
    indices = torch.arange(20, dtype=torch.int32, device=DEVICE).view(4, 5)
    W[7, 2], x[2, 3], acts[3, 4] = float("nan"), float("inf"), float("inf")
    got = decode_loss_fwd(acts, indices, W, b, x, SMALL)
    assert torch.nonzero(got.x_hat.isnan()).tolist() == [[1, 2]]
    assert bool(got.x_hat[3].isinf().all()) and bool(got.error[2, 3].isinf())
    assert got.sq_err.isnan().tolist() == [False, True, False, False]
    assert got.sq_err.isinf().tolist() == [False, False, True, True]
    assert bool(got.act_grads[1].isnan().all()) and bool(got.act_grads[0].isfinite().all())
    assert bool(got.total_variance.isnan())


def test_launch_shapes_cover_every_slot_within_the_registers() -> None:
    for itemsize in (2, 4):
        for K in (1, 7, 50, 64, 100, 128, 255, 256):
            config = loss_config(K, 4096, itemsize)
            tiles = config.tiles(K)
            assert (tiles["TILES"] - 1) * config.rows < K <= tiles["TILES"] * config.rows
            assert config.rows * config.block_d * itemsize == 512 * config.num_warps  # a tile: 16 bytes per thread
            assert tiles["TILES"] * 16 // itemsize <= 128 and tiles["TILES"] <= tiles["COLS"]


def test_wrong_input_is_refused_with_what_was_given() -> None:
    acts, indices, W, b, x = inputs((5, 7, 33, 29))
    with pytest.raises(ValueError, match=r"W_dec \[29, 33\]"):
        decode_loss_fwd(acts[:, :-1], indices, W, b, x)
    with pytest.raises(ValueError, match=r"x \[5, 32\]"):
        decode_loss_fwd(acts, indices, W, b, x[:, :-1])
    with pytest.raises(ValueError, match=r"b_dec \[32\]"):
        decode_loss_fwd(acts, indices, W, b[:-1], x)
    with pytest.raises(ValueError, match="int32 or int64"):
        decode_loss_fwd(acts, indices.float(), W, b, x)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        decode_loss_fwd(acts, indices, W, b, x.double())
    with pytest.raises(ValueError, match="one device"):
        decode_loss_fwd(acts, indices, W, b, x.to("meta"))
