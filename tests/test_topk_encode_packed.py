"""Packed encoders: the same bits as from the weights they mean. (That they are exact: tests/test_exact_encode.py.)"""

import pytest
import torch

from qscope.ops import pack_encoder, topk_encode_certified, topk_encode_packed


def sample(N=23, D=70, F=300, dtype=torch.float32):
    g = torch.Generator().manual_seed(4)
    W = torch.randn(F, D, generator=g) / D**0.5
    return torch.randn(N, D, generator=g), W.to(dtype), torch.randn(F, generator=g).to(dtype) * 0.1


def meant(W, weights):
    """The weights that each mode stands for, as float32."""
    high = W.bfloat16().float()
    return {"fp32": W.float(), "bf16": high, "bf16x2": high + (W.float() - high).bfloat16().float()}[weights]


@pytest.mark.parametrize("rows", [0, 1, 2, 23])
@pytest.mark.parametrize("weights", ["fp32", "bf16x2", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_the_weights_meant(rows, weights, dtype):
    x, W, b = sample(dtype=dtype)
    x = x[:rows]
    for bias, mu in ((b, None), (None, torch.ones(70))):
        got = topk_encode_packed(x, pack_encoder(W, bias, mu, weights), 7)
        want = topk_encode_certified(x, meant(W, weights), bias, 7)
        torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=0)


def test_bf16x2_keeps_sixteen_bits():
    _, W, b = sample()
    kept = pack_encoder(W, b, weights="bf16x2").W_enc
    assert ((kept - W).abs() <= 2.0**-17 * W.abs()).all() and (kept != W).any()
    assert pack_encoder(W, b).W_enc.data_ptr() == W.data_ptr()  # not copied
    assert pack_encoder(W, b, weights="bf16").W_enc.dtype == torch.bfloat16


def test_opcheck_and_compile():
    x, W, b = sample(N=6)
    for bias in (b, None):
        packed = pack_encoder(W, bias, x[0])
        torch.library.opcheck(torch.ops.qscope.topk_encode_packed.default, (x, *packed, 3))
        torch.library.opcheck(torch.ops.qscope.pack_encoder.default, (W, bias, x[0], False))
    compiled = torch.compile(lambda x: topk_encode_packed(x, packed, 3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), topk_encode_packed(x, packed, 3), rtol=0, atol=0)


def test_codes_of_other_weights_are_refused():
    x, W, b = sample()
    packed, other = pack_encoder(W, b), pack_encoder(W[:100], b[:100])
    if packed.codes and packed.codes[0].numel():
        with pytest.raises(ValueError, match="pack_encoder made of these weights"):
            topk_encode_packed(x, packed._replace(codes=other.codes), 3)


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(W_enc=torch.zeros(9)), r"\[F, D\]"),
        (dict(W_enc=torch.zeros(9, 4, dtype=torch.float64)), "float64"),
        (dict(b_enc=torch.zeros(8)), r"b_enc \[F\]"),
        (dict(mu=torch.zeros(5)), r"mu \[D\]"),
        (dict(weights="int4"), "'fp32', 'bf16x2', 'bf16'"),
        (dict(mu=torch.zeros(4, device="meta")), "one device"),
    ],
)
def test_pack_refuses(change, word):
    args = dict(W_enc=torch.zeros(9, 4), b_enc=torch.zeros(9), mu=None, weights="fp32")
    with pytest.raises(ValueError, match=word):
        pack_encoder(**{**args, **change})


@pytest.mark.parametrize(
    "x, k, word",
    [(torch.zeros(4), 2, r"\[N, D\]"), (torch.zeros(3, 5), 2, "share a letter"), (torch.zeros(3, 4), 10, "k <= 9")],
)
def test_encode_refuses(x, k, word):
    with pytest.raises(ValueError, match=word):
        topk_encode_packed(x, pack_encoder(torch.zeros(9, 4)), k)


def test_later_writes_to_what_was_given():
    """mu and the bias are copies; weights that changed are refused where a score shows it."""
    x, W, b = sample()
    mu = x[0].clone()
    packed = pack_encoder(W, b, mu)
    want = topk_encode_packed(x, packed, 7)
    mu.add_(3)
    b.add_(1)
    torch.testing.assert_close(topk_encode_packed(x, packed, 7), want, rtol=0, atol=0)
    if packed.codes and packed.codes[0].numel():
        W.neg_()
        with pytest.raises(ValueError, match="written to after pack_encoder"):
            topk_encode_packed(x, packed, 7)


def test_no_columns():
    """A score is its bias then."""
    b = torch.tensor([1.0, 3.0, 3.0, -1.0])
    for rows in (1, 6):
        got = topk_encode_packed(torch.zeros(rows, 0), pack_encoder(torch.zeros(4, 0), b), 2)
        assert got[0].tolist() == [[3.0, 3.0]] * rows and got[1].tolist() == [[1, 2]] * rows
