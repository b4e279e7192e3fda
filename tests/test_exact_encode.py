"""precision="exact" against its definition: float64 scores in a fixed order, rounded once, ranked exactly."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope import native
from qscope.ops import pack_encoder, topk_encode, topk_encode_certified, topk_encode_packed
from qscope.reference.exact_encode import all_exact_scores, certified_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(native.mode() == "off", reason="QSCOPE_NATIVE=off: the reference promises no bits")


def library():
    assert native.load("cpu")
    lib = ctypes.CDLL(native.status().library)
    lib.qscope_exact_bound_scale.restype = ctypes.c_double
    lib.qscope_exact_bound_scale.argtypes = [ctypes.c_double]
    return lib


PASSES = {"int8": 2, "bf16": 1, "float32": 0}  # as qscope_exact_passes counts them
ALL_PASSES = 3


@pytest.fixture(params=PASSES)
def each_pass(request):
    """Every test with each low-precision pass that the CPU has, and with the float32 pass."""
    lib = library()
    if lib.qscope_exact_passes(PASSES[request.param]) != PASSES[request.param]:
        lib.qscope_exact_passes(ALL_PASSES)
        pytest.skip(f"this CPU has no instructions for the {request.param} pass; the float32 pass is tested")
    yield request.param
    lib.qscope_exact_passes(ALL_PASSES)


@pytest.fixture
def bound_scale():
    """Weaken the bound for one test."""
    yield library().qscope_exact_bound_scale
    library().qscope_exact_bound_scale(1.0)


def oracle(x, W, b, k):
    """The k best of the full matrix of exact scores: values after ReLU, indices, and whether a row has a NaN."""
    scores = all_exact_scores(x, W, b) + 0.0
    ranked = scores.sort(dim=1, descending=True, stable=True)
    values, indices = ranked.values[:, :k].relu(), ranked.indices[:, :k].int()
    nan = scores.isnan().any(1)
    values[nan] = torch.nan
    indices[nan] = torch.arange(k, dtype=torch.int32)
    return values, indices, scores


def check(x, W, b, k):
    """Bits of the answer, and what the certificate says."""
    values, indices, scores = oracle(x, W, b, k)
    got = topk_encode_certified(x, W, b, k)
    torch.testing.assert_close(got[0], values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[1], indices, rtol=0, atol=0)
    _, _, candidates, margin = got
    F = W.shape[0]
    assert ((candidates >= k) & (candidates <= F)).all()
    fine = ~scores.isnan().any(1)
    assert (margin[fine] >= 0).all() and margin[~fine].isnan().all()
    # At most candidates[n] features lie above the proven gap: all others are not nearer to the k-th score.
    kth = scores.sort(dim=1, descending=True).values[:, k - 1]
    near = (scores.double() > (kth.double() - margin.double())[:, None]).sum(1)
    assert (near <= candidates)[fine & margin.isfinite()].all()
    plain = topk_encode(x, W, b, k)
    torch.testing.assert_close(plain, got[:2], rtol=0, atol=0, equal_nan=True)
    for mu in (None, x[-1].float()):  # any mu gives the same bits, a useless one too
        packed = topk_encode_packed(x, pack_encoder(W, b, mu), k)
        torch.testing.assert_close(packed[:2], got[:2], rtol=0, atol=0, equal_nan=True)
        assert ((packed[2] >= k) & (packed[2] <= F)).all() and packed[3][~fine].isnan().all()
    return candidates


def sae_like(N, D, F, k, seed=0):
    """Rows made of k features with heavy-tailed strengths, noise and a mean; the bias removes the mean."""
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g))
    z = torch.zeros(N, F)
    z.scatter_(1, torch.randint(F, (N, k), generator=g), torch.exp(0.7 * torch.randn(N, k, generator=g)) * 4)
    mu = torch.randn(D, generator=g)
    return z @ W + 0.3 * torch.randn(N, D, generator=g) + mu, W, -(W @ mu)


def sinks(x, W, b):
    x = x.clone()
    x[::7] *= 1000
    return x, W, b


def constant_rows(x, W, b):
    return torch.full_like(x, 1.5), W, b


def outlier_dims(x, W, b):
    x = x.clone()
    x[:, ::50] += 300
    return x, W, b


def heavy_tails(x, W, b):
    return x.sign() * x.abs() ** 4, W, b


def near_ties(x, W, b):
    """Every feature four times, three of them moved by one part in 2^22 of one element."""
    W = W[: len(W) // 4].repeat(4, 1)
    W[len(W) // 4 :, 3] *= 1 + 2.0**-22
    return x, W, b


def all_equal(x, W, b):
    return x, W[:1].expand_as(W), torch.zeros_like(b)


def huge(x, W, b):
    return x * 2.0**70, W * 2.0**40, b * 2.0**100


def overflowing(x, W, b):
    return x * 2.0**70, W * 2.0**60, b


def tiny(x, W, b):
    return x * 2.0**-70, W * 2.0**-60, b * 2.0**-130


def denormal_weights(x, W, b):
    return x, W * 2.0**-130, b * 2.0**-135


def denormal_rows(x, W, b):
    return x * 2.0**-132, W, b * 2.0**-130


def mixed_scales(x, W, b):
    return (
        x * 2.0 ** torch.linspace(-100, 60, len(x)).round()[:, None],
        W * 2.0 ** torch.linspace(-60, 20, len(W)).round()[:, None],
        torch.zeros_like(b),
    )


def integers(x, W, b):
    return x.clamp(-3, 3).round(), (W * 16).round(), b.round()


def negative_only(x, W, b):
    return x, W, b - 1000


def no_bias(x, W, b):
    return x, W, None


CASES = [
    sinks,
    constant_rows,
    outlier_dims,
    heavy_tails,
    near_ties,
    all_equal,
    huge,
    overflowing,
    tiny,
    denormal_weights,
    denormal_rows,
    mixed_scales,
    integers,
    negative_only,
    no_bias,
]


@needs_native
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_bits_of_the_definition(case, each_pass):
    check(*case(*sae_like(29, 163, 900, 12)), 12)


@needs_native
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_every_pair_of_dtypes(dtypes, each_pass):
    x, W, b = sae_like(17, 96, 500, 9)
    check(x.to(dtypes[0]), W.to(dtypes[1]), b.to(dtypes[1]), 9)


@needs_native
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (5, 7, 33, 4), (13, 64, 100, 100), (6, 2500, 96, 5), (530, 33, 257, 9), (7, 16, 5000, 256)],
    ids=str,
)
def test_odd_sizes(shape, each_pass):
    N, D, F, k = shape
    g = torch.Generator().manual_seed(1)
    check(torch.randn(N, D, generator=g), torch.randn(F, D, generator=g), torch.randn(F, generator=g), k)


@needs_native
def test_a_large_dictionary(each_pass):
    candidates = check(*sae_like(6, 24, 131072, 32), 256)
    assert (candidates < 5000).all()


@needs_native
def test_nan_and_infinity(each_pass):
    x, W, b = sae_like(20, 40, 300, 8)
    x[1, 3], x[2, 3], x[3, 3], x[4] = torch.nan, torch.inf, -torch.inf, torch.inf
    x[5] = torch.finfo(torch.float32).max
    check(x, W, b, 8)
    for bad in (torch.inf, -torch.inf):
        broken = W.clone()
        broken[7, 5] = bad  # candidates of every row, scores of every sign
        check(x, broken, b, 8)
    b[9] = torch.inf
    check(x, W, b, 8)
    W[11, 2] = torch.nan  # a NaN in every row
    assert topk_encode(x, W, b, 8)[0].isnan().all()


@needs_native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_numbers(data):
    N, D, F = (data.draw(st.integers(1, n)) for n in (20, 40, 70))
    k = data.draw(st.integers(1, F))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))

    def numbers(*shape):
        spread, centre = data.draw(st.integers(0, 30)), data.draw(st.integers(-120, 110))
        exponents = torch.randint(-spread, spread + 1, shape, generator=g) + centre
        values = torch.randn(shape, generator=g) * 2.0 ** exponents.clamp(-140, 120)
        if data.draw(st.booleans()):
            values[torch.rand(shape, generator=g) < 0.3] = 0
        return values.to(data.draw(st.sampled_from(DTYPES)))

    bias = numbers(F) if data.draw(st.booleans()) else None
    x, W = numbers(N, D), numbers(F, D)
    lib = library()
    try:
        for passes in (*PASSES.values(), ALL_PASSES):
            lib.qscope_exact_passes(passes)
            check(x, W, bias, k)
    finally:
        lib.qscope_exact_passes(ALL_PASSES)


def edge_of_bfloat16(pairs=6, D=256, k=4):
    """For each row (and its negative: the mean is zero) one feature whose rounding loses nearly half a unit: the pass
    sees 1 for 1.0039. And k impostors whose rounding gains as much, with one element a little smaller."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (pairs, D), generator=g) * 2.0 - 1
    x = torch.cat([x, -x])
    true = x * (1 + 2.0**-8 * 0.998)
    impostor = x * (1 + 2.0**-8 * 1.002)
    impostor[:, 0] = x[:, 0] * (31 / 32)
    W = torch.cat([impostor.repeat_interleave(k, 0), true, torch.zeros(40, D)])
    return x, W, torch.zeros(len(W)), k


def edge_of_int8(pairs=6, D=256, k=4):
    """The same for codes: a first element of 127 makes the step one; 10.498 becomes 10, an impostor's 10.502 11."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (pairs, D), generator=g) * 2.0 - 1
    x = torch.cat([x, -x])
    true, impostor = x * 10.498, x * 10.502
    impostor[:, 1] = x[:, 1] * 8
    true[:, 0] = impostor[:, 0] = x[:, 0] * 127
    W = torch.cat([impostor.repeat_interleave(k, 0), true, torch.zeros(40, D)])
    return x, W, torch.zeros(len(W)), k


def edge_of_float16(D=256, k=4):
    """Rows whose rounding to float16 loses delta of every element, which is all that the true feature (all ones) has;
    the impostors (minus one) gain it, and a bias brings them just below. The other half of the rows makes mu zero."""
    delta = 0.498 * 2.0**-10
    x = torch.full((D,), 1.5)
    x[::2] = -1.5
    x = torch.stack([x + delta] * 3 + [-x - delta] * 3)
    W = torch.cat([-torch.ones(k, D), torch.ones(1, D), torch.zeros(40, D)])
    b = torch.zeros(len(W))
    b[:k] = 2 * delta * D * 0.99
    return x, W, b, k


EDGES = {"int8": edge_of_int8, "bf16": edge_of_bfloat16, "float16": edge_of_float16}


@needs_native
@pytest.mark.parametrize("edge", EDGES)
def test_the_edge_of_the_bound(edge, each_pass):
    check(*EDGES[edge]())


@needs_native
@pytest.mark.parametrize("scale", [0.95, 0.5])
@pytest.mark.parametrize("edge", EDGES)
def test_a_weaker_bound_misses(bound_scale, scale, edge):
    """Each bound is used, and is not larger than it has to be by more than a twentieth here."""
    lib, wanted = library(), PASSES.get(edge, PASSES["int8"])
    x, W, b, k = EDGES[edge]()
    want = oracle(x, W, b, k)[1]
    try:
        if lib.qscope_exact_passes(wanted) != wanted:
            pytest.skip(f"this CPU has no instructions for this pass: {edge}")
        assert torch.equal(topk_encode(x, W, b, k)[1], want)
        bound_scale(scale)
        half = slice(len(x) // 2)
        assert (topk_encode(x, W, b, k)[1] != want)[half].any(1).all()
        assert edge == "bf16" or (topk_encode_packed(x, pack_encoder(W, b), k)[1] != want)[half].any(1).all()
    finally:
        lib.qscope_exact_passes(ALL_PASSES)


@needs_native
def test_the_margin_is_near_the_gap(each_pass):
    """The proven margin is at most the gap between the k-th score and the next, and most of it."""
    x, W, b = sae_like(40, 128, 2000, 10)
    scores = all_exact_scores(x, W, b).sort(dim=1, descending=True).values
    gap = scores[:, 9] - scores[:, 10]
    candidates, margin = topk_encode_certified(x, W, b, 10)[2:]
    within = (candidates == 10).nonzero().flatten()
    assert (margin[within] <= gap[within]).all() and (margin >= 0).all()
    assert (margin / gap).median() > (0.3 if each_pass != "float32" else 0)  # its lists are final: the k-th bound


@needs_native
def test_a_float32_pass_without_bound_misses(bound_scale):
    """Permutations of one feature: exact scores tie, float32 sums do not."""
    lib = library()
    try:
        lib.qscope_exact_passes(PASSES["float32"])
        g = torch.Generator().manual_seed(5)
        x = torch.cat([torch.ones(6, 512), -torch.ones(6, 512)])
        row = torch.randn(512, generator=g)
        W = torch.stack([row[torch.randperm(512, generator=g)] for _ in range(300)])
        W *= W.sum(1, keepdim=True).sign()
        check(x, W, None, 5)
        want = oracle(x, W, None, 5)[1]
        bound_scale(0.0)
        assert (topk_encode(x, W, None, 5)[1] != want).any()
    finally:
        lib.qscope_exact_passes(ALL_PASSES)


def test_the_reference_method():
    for args in (sae_like(9, 80, 400, 7), edge_of_bfloat16()[:3], sinks(*sae_like(15, 60, 300, 7))):
        values, indices, _ = oracle(*args, 4)
        got = certified_topk(*args, 4)
        torch.testing.assert_close((got[0].relu(), got[1]), (values, indices), rtol=0, atol=0)
        assert (got[2] >= 4).all() and (got[2] < len(args[1])).any() and (got[3] >= 0).all()
    x, W, b, k = edge_of_bfloat16()
    assert (certified_topk(x, W, b, k, scale=0.95)[1] != oracle(x, W, b, k)[1]).any(1).all()


def test_the_definition_is_a_rounded_float64_product():
    """Within one unit of the last place of a float64 product rounded to float32: float64's own error is far below."""
    x, W, b = sae_like(5, 333, 64, 3)
    scores = all_exact_scores(x, W, b)
    want = (x.double() @ W.double().T + b.double()).float()
    gap = (scores.view(torch.int32) - want.view(torch.int32)).abs()
    assert gap.max() <= 1 and (gap == 0).float().mean() > 0.99


@needs_native
def test_same_bits_for_every_instruction_set_thread_count_and_batch(limit_isa):
    x, W, b = sinks(*sae_like(65, 131, 700, 11))
    first = topk_encode(x, W, b, 11)
    lib, threads = library(), torch.get_num_threads()
    try:
        for isa in native.ISA_NAMES:
            limit_isa(isa)
            for passes in PASSES.values():
                lib.qscope_exact_passes(passes)
                torch.set_num_threads(1)
                figures = topk_encode_certified(x, W, b, 11)
                torch.testing.assert_close(figures[:2], first, rtol=0, atol=0)
                torch.set_num_threads(3)  # candidates and margin too do not depend on which thread listed what
                for _ in range(3):
                    torch.testing.assert_close(topk_encode_certified(x, W, b, 11), figures, rtol=0, atol=0)
            for rows in (slice(0, 1), slice(3, 6), slice(20, 33)):  # in full, and certified with another mean
                part = topk_encode(x[rows], W, b, 11)
                torch.testing.assert_close(part, (first[0][rows], first[1][rows]), rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
        lib.qscope_exact_passes(ALL_PASSES)


@needs_native
def test_flushing_subnormals_changes_nothing():
    x, W, b = denormal_rows(*sae_like(9, 50, 200, 5))
    want = topk_encode(x, W, b, 5)
    threads = torch.get_num_threads()
    assert (want[0] > 0).any()
    try:
        torch.set_num_threads(1)  # the setting is the calling thread's
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot flush subnormals")
        got = topk_encode(x, W, b, 5)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@needs_native
def test_what_the_certificate_counts(each_pass):
    x, W, b = sae_like(40, 128, 2000, 10)
    candidates = topk_encode_certified(x, W, b, 10)[2]
    assert (candidates < 200).all()
    few = topk_encode_certified(x[:2], W, b, 10)  # bound by reading W: scored in full
    assert (few[2] == 2000).all() and (few[3] == torch.inf).all()
    x[5] = torch.finfo(torch.float32).max / 4  # out of the bound's range
    _, _, candidates, margin = topk_encode_certified(x, W, b, 10)
    assert (candidates == 2000).nonzero().flatten().tolist() == [5] and margin[5] == torch.inf


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_list_of_contenders_ends_in_full_rows(threads, each_pass):
    """5,000 equal features exceed what one thread's list may hold, or what two together may."""
    x, W, b = sae_like(8, 20, 5000, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert (check(x, W[:1].expand(5000, 20), b * 0, 4) == 5000).all()
    finally:
        torch.set_num_threads(before)


@needs_native
def test_what_a_float32_sum_loses(each_pass):
    """1 + 4095 parts of 2^-26 stays 1 in float32. An impostor of 1 + 2^-15 is larger there, and smaller in truth."""
    x = torch.cat([torch.ones(4, 4096), -torch.ones(4, 4096)])
    true, impostor = torch.full((4096,), 2.0**-26), torch.zeros(4096)
    true[0] = impostor[0] = 1
    impostor[1] = 2.0**-15
    W = torch.stack([impostor, impostor, true])
    W = torch.cat([W, -W, torch.zeros(50, 4096)])
    check(x, W, None, 1)
    assert topk_encode(x, W, None, 1)[1].flatten().tolist() == [2] * 4 + [5] * 4


@needs_native
@pytest.mark.parametrize("exponents", [(70, 58), (58, 70)], ids=["row", "feature"])
def test_sums_that_overflow_on_the_way(exponents, each_pass):
    """A float32 sum that has reached minus infinity stays there; the score is 2^126."""
    x = torch.zeros(6, 16)
    x[:3, :4] = 2.0 ** exponents[0]
    x[3:, :4] = -(2.0 ** exponents[0])
    W = torch.zeros(70, 16)
    W[:, 0] = 2.0 ** (exponents[1] - 10)
    W[40, :4] = 2.0 ** exponents[1] * torch.tensor([-1, 0.5, 0.5, 0.25])
    W[41] = -W[40]
    check(x, W, None, 1)
    assert topk_encode(x, W, None, 1)[1].flatten().tolist() == [40] * 3 + [41] * 3


def test_opcheck_and_compile():
    x, W, b = sae_like(6, 16, 80, 5)
    for bias in (b, None):
        torch.library.opcheck(torch.ops.qscope.topk_encode_certified.default, (x, W, bias, 3))
    compiled = torch.compile(lambda *a: topk_encode_certified(*a, 3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, W, b), topk_encode_certified(x, W, b, 3), rtol=0, atol=0)


def test_no_rows():
    values, indices, candidates, margin = topk_encode_certified(torch.zeros(0, 4), torch.zeros(9, 4), None, 2)
    assert values.shape == indices.shape == (0, 2) and candidates.shape == margin.shape == (0,)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(x=torch.zeros(3)), r"\[N, D\]"),
        (dict(x=torch.zeros(3, 5)), "share a letter"),
        (dict(W_enc=torch.zeros(9, 4, dtype=torch.float64)), "float64"),
        (dict(b_enc=torch.zeros(8)), r"b_enc \[F\]"),
        (dict(k=10), "1 <= k <= 9"),
        (dict(b_enc=torch.zeros(9, device="meta")), "one device"),
    ],
)
def test_refuses(change, word):
    args = dict(x=torch.zeros(3, 4), W_enc=torch.zeros(9, 4), b_enc=torch.zeros(9), k=2)
    with pytest.raises(ValueError, match=word):
        topk_encode_certified(**{**args, **change})


def test_math_of_the_edge_case():
    low, high = (torch.tensor(1 + 2.0**-8 * f).bfloat16().item() for f in (0.998, 1.002))
    assert low == 1 and high == 1 + 2.0**-7
