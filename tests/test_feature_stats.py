import math
import random

import pytest
import torch

from qscope import native, reference
from qscope.ops import feature_stats_, fired_bitmap


def tables(F, G=1, M=None):
    """count, total, total_sq, peak, top_values, top_tokens."""
    sums = torch.zeros(2, G, F, dtype=torch.float64)
    tops = (None, None) if M is None else (torch.full((F, M), -math.inf), torch.full((F, M), -1))
    return [torch.zeros(G, F, dtype=torch.int64), sums[0], sums[1], torch.zeros(G, F), *tops]


def codes(N, K, F, G=1, seed=0, dtype=torch.float32, grid=8):
    """Values with zeros, negatives, NaN, infinities and many ties (multiples of 1/grid); ids that repeat."""
    gen = torch.Generator().manual_seed(seed)
    acts = (torch.randn(N, K, generator=gen) * grid).round() / grid if grid else torch.randn(N, K, generator=gen)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    where = torch.rand(N, K, generator=gen) < 0.1
    acts = torch.where(where, special[torch.randint(0, 5, (N, K), generator=gen)], acts).to(dtype)
    indices = (torch.rand(N, K, generator=gen) ** 3 * F).int().clamp(max=F - 1)
    return acts, indices, torch.randint(-1, G + 1, (N,), generator=gen, dtype=torch.int32)


def add(t, acts, indices, groups=None, first_token=0, op=feature_stats_):
    if op is not feature_stats_:
        first_token = torch.tensor(first_token)
    op(acts, indices, *t[:4], groups, t[4], t[5], first_token)


def meaning(t, acts, indices, groups=None, first_token=0):
    """The docstring, one entry at a time; the additions are Python's, which are float64's."""
    count, total, total_sq, peak = (x.tolist() for x in t[:4])
    G, F = t[0].shape
    best = [[] for _ in range(F)]
    for n, row in enumerate(acts.tolist()):
        g = 0 if groups is None else int(groups[n])
        for a, f in zip(row, indices[n].tolist(), strict=True):
            if math.isfinite(a) and a > 0 and 0 <= g < G:
                count[g][f] += 1
                total[g][f] += a
                total_sq[g][f] += a * a
                peak[g][f] = max(peak[g][f], a)
                best[f].append((-a, first_token + n))
    for x, new in zip(t, (count, total, total_sq, peak), strict=False):
        x.copy_(torch.tensor(new, dtype=x.dtype))
    if t[4] is not None:
        M = t[4].shape[1]
        for f in range(F):
            held = [(-v, n) for v, n in zip(t[4][f].tolist(), t[5][f].tolist(), strict=True) if n >= 0]
            kept = (sorted(held + best[f]) + [(math.inf, -1)] * M)[:M]
            t[4][f], t[5][f] = torch.tensor([-v for v, _ in kept]), torch.tensor([n for _, n in kept])


def equal(a, b):
    return all(x is y or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("op", [feature_stats_, reference.feature_stats_], ids=["op", "reference"])
@pytest.mark.parametrize("M", [None, 1, 5, 64])
@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_plain_loop_to_the_bit(op, M, G, dtype):
    got, want = tables(23, G, M), tables(23, G, M)
    for batch in range(3):
        acts, indices, groups = codes(40, 7, 23, G, seed=batch, dtype=dtype, grid=4 if batch else 0)
        groups = groups if G > 1 else None
        add(got, acts, indices if batch else indices.long(), groups, 1000 * batch, op)
        meaning(want, acts, indices, groups, 1000 * batch)
    assert equal(got, want)
    assert got[0].sum() > 200 and got[0].max() > 5


@pytest.mark.parametrize("seed", range(12))
def test_any_cut_of_the_stream_gives_the_same_bits(seed):
    choose = random.Random(seed)
    N, K, F, G, M = choose.randint(1, 90), choose.randint(1, 9), choose.randint(1, 40), choose.randint(1, 4), 6
    acts, indices, groups = codes(N, K, F, G, seed=seed, grid=choose.choice([0, 2]))
    whole, pieces = tables(F, G, M), tables(F, G, M)
    add(whole, acts, indices, groups, 2**40)
    cuts = sorted(choose.randint(0, N) for _ in range(choose.randint(1, 12)))
    for first, end in zip([0, *cuts], [*cuts, N], strict=True):
        add(pieces, acts[first:end], indices[first:end], groups[first:end], 2**40 + first)
    assert equal(whole, pieces)


def test_the_best_contexts_do_not_depend_on_the_order_of_batches():
    acts, indices, _ = codes(60, 5, 12, grid=2)
    forward, backward = tables(12, 1, 4), tables(12, 1, 4)
    add(forward, acts, indices)
    for first in (40, 20, 0):
        add(backward, acts[first : first + 20], indices[first : first + 20], first_token=first)
    assert equal([forward[0], forward[3], *forward[4:]], [backward[0], backward[3], *backward[4:]])


def test_sums_are_float64_in_token_order():
    """2^53 swallows a following 1 but keeps 2; in the other order 1 + 1 are counted first."""
    acts = torch.tensor([[1.0], [1.0], [2.0**53]])
    t = tables(1)
    add(t, acts, torch.zeros(3, 1, dtype=torch.int32))
    assert t[1].item() == 2.0**53 + 2 and t[2].item() == 2.0**106 + 0.0
    t = tables(1)
    add(t, acts.flip(0), torch.zeros(3, 1, dtype=torch.int32))
    assert t[1].item() == 2.0**53


def test_what_does_not_count():
    """NaN, infinities, zeros and negatives with ids of any kind, and tokens of no group, change nothing."""
    acts = torch.tensor([[math.nan, math.inf, -1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    indices, groups = torch.tensor([[0, 1, -7, 999], [0, 1, 2, 0]]), torch.tensor([0, -1], dtype=torch.int32)
    for label in (-1, 2, 2**31 - 1, -(2**31)):
        t = tables(3, 2, 2)
        groups[1] = label
        add(t, acts, indices, groups)
        assert equal(t, tables(3, 2, 2))
    add(t, acts, indices, torch.tensor([0, 1], dtype=torch.int32), 5)
    assert t[0].tolist() == [[0, 0, 0], [2, 1, 1]]
    assert t[5].tolist() == [[6, 6], [6, -1], [6, -1]]  # feature 0 twice in token 6


def test_ties_go_to_the_lowest_token():
    acts, indices = torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int32)
    t = tables(1, 1, 3)
    add(t, acts, indices, first_token=100)
    assert t[5].tolist() == [[100, 101, 102]]
    add(t, acts, indices, first_token=7)
    assert t[5].tolist() == [[7, 8, 9]]


def test_any_strides_empty_and_gradients():
    acts, indices, groups = codes(20, 6, 9, 2)
    want, got = tables(9, 2, 3), tables(9, 2, 3)
    add(want, acts[::2, ::3].contiguous(), indices[::2, ::3].contiguous(), groups[::2].contiguous())
    add(got, acts.clone().requires_grad_()[::2, ::3], indices[::2, ::3], groups[::2])
    assert equal(want, got)
    for empty in ((slice(0, 0), slice(None)), (slice(None), slice(0, 0))):
        add(got, acts[empty], indices[empty], groups[empty[0]])
    add(tables(0, 1, 3), acts[:, :0], indices[:, :0])
    assert equal(want, got)


def test_a_feature_out_of_range_raises_before_anything_is_written():
    for bad in (-1, 9):
        t = tables(9, 1, 3)
        with pytest.raises(IndexError, match=r"0\.\.8"):
            add(t, torch.ones(2, 2), torch.tensor([[0, 1], [bad, 2]]))
        assert equal(t, tables(9, 1, 3))


def test_same_bits_for_any_thread_count():
    acts, indices, groups = codes(3000, 20, 50, 2, grid=0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tables(50, 2, 8))
            for first in range(0, 3000, 1000):
                part = slice(first, first + 1000)
                add(results[-1], acts[part], indices[part], groups[part], first)
    finally:
        torch.set_num_threads(before)
    assert equal(results[0], results[1]) and equal(results[0], results[2])
    want = tables(50, 2, 8)
    meaning(want, acts, indices, groups)
    assert equal(results[0], want)


@pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: there is no native kernel")
@pytest.mark.parametrize(
    ("F", "G", "M", "dtype", "grid"),
    [(1000, 1, None, torch.float32, 0), (331, 3, 7, torch.bfloat16, 0), (40, 2, 64, torch.float32, 8)],
    ids=str,
)
def test_native_has_the_bits_of_the_reference_for_any_thread_count(F, G, M, dtype, grid):
    """Batches of over 100000 entries, which several threads share; the second of lower token ids than the first."""
    batches = [(codes(2700, 41, F, G, seed, dtype, grid), first) for seed, first in enumerate((10_000, 0))]
    want, before = tables(F, G, M), torch.get_num_threads()
    for (acts, indices, groups), first in batches:
        add(want, acts, indices, groups if G > 1 else None, first, reference.feature_stats_)
    assert native.load("cpu") and native.implements("feature_stats_", "cpu") and int(want[0].max()) > 1000
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            got = tables(F, G, M)
            for (acts, indices, groups), first in batches:
                add(got, acts, indices if first else indices.long(), groups if G > 1 else None, first)
            assert equal(got, want), threads
    finally:
        torch.set_num_threads(before)


def test_merging_goes_by_blocks(monkeypatch):
    from qscope.reference import feature_stats_ as function

    acts, indices, _ = codes(50, 6, 31, grid=3)
    want, got = tables(31, 1, 4), tables(31, 1, 4)
    add(want, acts, indices)
    module = __import__("sys").modules[function.__module__]
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 96 * 4 * 7)  # 7 features at a time
    add(got, acts, indices)
    assert equal(want, got)


@pytest.mark.parametrize("F", [1, 31, 32, 33, 70])
def test_fired_bitmap(F):
    count = torch.randint(0, 3, (2, F), generator=torch.Generator().manual_seed(F)) * 2**40
    words = fired_bitmap(count)
    assert words.dtype == torch.int32 and words.shape == (2, -(-F // 32))
    for g in range(2):
        for f in range(words.shape[1] * 32):
            bit = words[g, f // 32].item() >> (f % 32) & 1
            assert bit == (f < F and count[g, f].item() > 0)
    with pytest.raises(ValueError, match=r"\[G, F\]"):
        fired_bitmap(count[0])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"top_acts": torch.ones(4, 2)}, "share a letter"),
        ({"top_acts": torch.ones(4, 3, dtype=torch.float64)}, "float64"),
        ({"top_indices": torch.ones(4, 3)}, "int32 and int64"),
        ({"count": torch.zeros(9, dtype=torch.int64)}, "count has shape"),
        ({"count": torch.zeros(2, 9)}, "count is"),
        ({"total": torch.zeros(2, 9)}, "total is"),
        ({"total_sq": torch.zeros(2, 8, dtype=torch.float64)}, "total_sq is"),
        ({"peak": torch.zeros(9, 2).T}, "peak has strides"),
        ({"groups": None}, "groups is None"),
        ({"groups": torch.zeros(4, dtype=torch.int64)}, "groups is"),
        ({"groups": torch.zeros(3, dtype=torch.int32)}, "groups is"),
        ({"top_tokens": None}, "both or neither"),
        ({"top_tokens": torch.zeros(9, 4)}, "top_tokens is"),
        ({"top_values": torch.zeros(9, 65)}, "at most 64"),
        ({"top_values": torch.zeros(9)}, "top_values is"),
        ({"first_token": torch.tensor(1, dtype=torch.int32)}, "first_token is"),
        ({"peak": torch.zeros(2, 9, device="meta")}, "move them to one device"),
    ],
)
def test_refuses(change, word):
    names = ("count", "total", "total_sq", "peak", "top_values", "top_tokens")
    args = dict(zip(names, tables(9, 2, 4), strict=True))
    args |= dict(
        top_acts=torch.ones(4, 3), top_indices=torch.ones(4, 3, dtype=torch.int32), groups=torch.zeros(4).int()
    )
    with pytest.raises(ValueError, match=word):
        feature_stats_(**(args | change))


@pytest.mark.parametrize("full", [False, True])
def test_opcheck_and_compile(full):
    G, M = (2, 4) if full else (1, None)
    acts, indices, groups = codes(10, 4, 9, G)
    t = tables(9, G, M)
    args = (acts.nan_to_num(1.0), indices, *t[:4], groups if full else None, *t[4:], torch.tensor(3))
    torch.library.opcheck(torch.ops.qscope.feature_stats_.default, args)
    got, want = tables(9, G, M), tables(9, G, M)

    def add_and_read(t):
        add(t, acts, indices, groups if full else None, 3)
        return t[1] / t[0].clamp(min=1), fired_bitmap(t[0])

    means = torch.compile(add_and_read, fullgraph=True, backend="aot_eager")(got)
    assert all(torch.equal(a, b) for a, b in zip(means, add_and_read(want), strict=True))
    assert equal(got, want) and int(want[0].sum()) > 0
