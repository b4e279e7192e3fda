"""The SAE module against the formulas of its docstring, written out in float64."""

import copy
import dataclasses
import hashlib
import io

import pytest
import torch

import qscope
from qscope import ops
from qscope.errors import InputError
from qscope.sae import SAE, EncoderOutput, SAECard

F, D, K = 40, 12, 5


def make(dtype: torch.dtype = torch.float32, k: int = K, seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((F, D), (F, D), (F,), (D,))
    return SAE(
        *(torch.randn(shape, generator=generator).to(dtype) for shape in shapes),
        k=k,
        card=SAECard(model="m", layer=3),
    )


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense activations and reconstruction in float64, straight from the formulas."""
    pre = x.double() @ sae.W_enc.double().T + sae.b_enc.double()
    values, indices = pre.topk(sae.k, dim=-1)
    dense = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    return dense, dense @ sae.W_dec.double() + sae.b_dec.double()


# float32 sums of D + 1 <= 13 products of magnitude below 30: about 13 * 2^-24 * 30.
TOL = {"rtol": 1e-5, "atol": 3e-5}


@pytest.mark.parametrize("shape", [(D,), (7, D), (2, 3, D), (2, 1, 3, D), (0, D), (2, 0, D)], ids=str)
def test_all_ways_agree_with_the_formula(shape):
    sae, x = make(), inputs(*shape)
    dense, x_hat = plain(sae, x)
    top = sae.encode_topk(x)
    assert isinstance(top, EncoderOutput)
    assert top.top_acts.shape == top.top_indices.shape == (*shape[:-1], K)
    assert top.top_indices.dtype == torch.int32
    torch.testing.assert_close(dense.gather(-1, top.top_indices.long()), top.top_acts.double(), **TOL)
    torch.testing.assert_close(sae.encode(x).double(), dense, **TOL)
    torch.testing.assert_close(sae.decode(*top).double(), x_hat, **TOL)
    torch.testing.assert_close(sae.decode(top.top_acts, top.top_indices.long()).double(), x_hat, **TOL)
    torch.testing.assert_close(sae.decode(sae.encode(x)).double(), x_hat, **TOL)
    torch.testing.assert_close(sae(x).double(), x_hat, **TOL)


def test_fewer_than_k_positive_gives_zeros_not_negatives():
    sae = make()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
        sae.b_enc[4] = 100.0
    top = sae.encode_topk(inputs(6, D))
    assert (top.top_indices[:, 0] == 4).all() and (top.top_acts[:, 0] > 0).all()
    assert torch.equal(top.top_acts[:, 1:], torch.zeros(6, K - 1))
    assert (sae.encode(inputs(6, D)) != 0).sum() == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    sae, x = make(dtype), inputs(9, D).to(dtype)
    dense, x_hat = plain(sae, x)
    top = sae.encode_topk(x)
    assert top.top_acts.dtype == torch.float32
    torch.testing.assert_close(top.top_acts.double(), dense.gather(-1, top.top_indices.long()), **TOL)
    assert sae.encode(x).dtype == dtype and sae(x.float()).dtype == torch.float32 and sae(x).dtype == dtype
    # One rounding of the result to the dtype of the weights: relative 2^-8 for bfloat16, with cancellation
    # headroom.
    torch.testing.assert_close(sae(x).double(), x_hat, rtol=2**-8, atol=1e-3)
    bf16 = sae.encode_topk(x, precision="bf16")
    assert bf16.top_acts.dtype == torch.bfloat16


def test_gradients_are_those_of_the_formula():
    sae, x = make(), inputs(5, D).requires_grad_()
    weight = inputs(5, D, seed=7)
    (sae(x) * weight).sum().backward()
    twin = {name: value.detach().double().requires_grad_() for name, value in sae.named_parameters()}
    y = x.detach().double().requires_grad_()
    pre = y @ twin["W_enc"].T + twin["b_enc"]
    values, indices = pre.topk(K, dim=-1)
    dense = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    ((dense @ twin["W_dec"] + twin["b_dec"]) * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=2e-4)
    for name, value in sae.named_parameters():
        torch.testing.assert_close(value.grad.double(), twin[name].grad, rtol=1e-5, atol=2e-4)
    x.grad, grad = None, x.grad.clone()
    (sae.decode(sae.encode(x)) * weight).sum().backward()
    torch.testing.assert_close(x.grad, grad, rtol=1e-5, atol=2e-4)


def test_inputs_that_do_not_fit():
    sae = make()
    with pytest.raises(InputError, match=r"\[3, 13\].*must be 12"):
        sae.encode_topk(inputs(3, 13))
    with pytest.raises(InputError, match="must be 12"):
        sae.encode(torch.tensor(1.0))
    with pytest.raises(InputError, match="on meta, the SAE on cpu"):
        sae.encode_topk(torch.empty(3, D, device="meta"))
    with pytest.raises(InputError, match="int64; accepted are float32, bfloat16, float16"):
        sae.encode_topk(torch.ones(3, D, dtype=torch.int64))
    with pytest.raises(InputError, match="'fp8' was asked for"):
        sae.encode_topk(inputs(3, D), precision="fp8")
    with pytest.raises(InputError, match="last dimension must be 40"):
        sae.decode(inputs(3, D))
    with pytest.raises(InputError, match="must be equal"):
        sae.decode(torch.ones(3, K), torch.zeros(3, K - 1, dtype=torch.int32))
    with pytest.raises(InputError, match="float32; accepted are int32 and int64"):
        sae.decode(torch.ones(3, K), torch.zeros(3, K))


@pytest.mark.parametrize("k", [0, -1, F + 1, 2.0, True, None])
def test_bad_k(k):
    with pytest.raises(InputError, match=str(k)):
        make(k=k)


def test_tensors_that_do_not_fit():
    good = dict(W_enc=torch.ones(F, D), W_dec=torch.ones(F, D), b_enc=torch.ones(F), b_dec=torch.ones(D), k=K)
    SAE(**good)
    for name, bad, text in [
        ("W_dec", torch.ones(D, F), r"W_dec has the shape \[12, 40\]"),
        ("b_enc", torch.ones(D), r"b_enc has the shape \[12\]"),
        ("b_dec", torch.ones(F), r"b_dec has the shape \[40\]"),
        ("W_enc", torch.ones(F), r"W_enc has the shape \[40\]"),
        ("W_enc", torch.ones(0, D), r"W_enc has the shape \[0, 12\]"),
        ("b_enc", torch.ones(F).double(), "float32, float64"),
        ("b_dec", torch.ones(D, device="meta"), "cpu, meta"),
    ]:
        with pytest.raises(InputError, match=text):
            SAE(**{**good, name: bad})


def test_constructor_shares_contiguous_tensors_and_straightens_others():
    W_enc, W_dec = torch.ones(F, D), torch.ones(D, F).T
    sae = SAE(W_enc, W_dec, torch.zeros(F), torch.zeros(D), K)
    assert sae.W_enc.data_ptr() == W_enc.data_ptr()
    assert sae.W_dec.is_contiguous() and sae.W_dec.requires_grad


def test_card_is_completed_and_not_shared():
    card = SAECard(model="m", layer=3)
    assert card.hook_point == "model.layers.3"
    sae = SAE(torch.ones(F, D), torch.ones(F, D), torch.ones(F), torch.ones(D), K, card)
    assert (sae.card.k, sae.card.d_in, sae.card.d_sae, sae.card.dtype) == (K, D, F, "float32")
    assert dataclasses.asdict(card)["k"] == 0
    assert "d_in=12, d_sae=40, k=5" in repr(sae) and "model.layers.3" in repr(sae)


def test_weight_hash_is_the_stated_one_and_sees_every_part(monkeypatch):
    sae = make()
    digest = hashlib.sha256()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        array = getattr(sae, name).detach().numpy()
        digest.update(f"{name} float32 {list(array.shape)}\n".encode() + array.tobytes())
    digest.update(f"k {K}\n".encode())
    assert sae.weight_hash() == digest.hexdigest()
    monkeypatch.setattr("qscope.sae.CHUNK", 7)
    assert sae.weight_hash() == digest.hexdigest(), "chunking must not show"
    seen = {
        sae.weight_hash(),
        make(seed=2).weight_hash(),
        make(torch.bfloat16).weight_hash(),
        make(k=K + 1).weight_hash(),
    }
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        other = make()
        with torch.no_grad():
            getattr(other, name).view(-1)[-1] += 1e-3
        seen.add(other.weight_hash())
    assert len(seen) == 8


def test_it_is_a_module():
    sae, x = make(), inputs(4, D)
    other = make(seed=3)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other(x), sae(x)) and other.weight_hash() == sae.weight_hash()
    assert sae.to(torch.bfloat16).dtype == torch.bfloat16 and sae.device.type == "cpu"
    assert qscope.SAE is SAE


@pytest.mark.parametrize("shape", [(7, D), (2, 3, D), (0, D)], ids=str)
def test_a_certificate_belongs_to_each_token(shape):
    sae, x = make(), inputs(*shape)
    certified, plain_output = sae.encode_topk(x, return_certificate=True), sae.encode_topk(x)
    assert torch.equal(certified.top_acts, plain_output.top_acts)
    assert torch.equal(certified.top_indices, plain_output.top_indices)
    assert certified.candidates.shape == certified.margin.shape == shape[:-1]
    scores = (x.double() @ sae.W_enc.double().T + sae.b_enc.double()).sort(-1, descending=True).values
    # Among the c + 1 best features one is no candidate: the best of those that are not is no further down.
    next_best = scores.gather(-1, certified.candidates.long().clamp(max=F - 1)[..., None])[..., 0]
    gap = scores[..., K - 1] - next_best
    everything = certified.candidates == F
    assert bool((everything | ((certified.candidates >= K) & (certified.margin <= gap + 1e-5))).all())
    assert bool(certified.margin[everything].isinf().all())
    with pytest.raises(InputError, match="only 'exact' has one"):
        sae.encode_topk(x, precision="bf16", return_certificate=True)


def test_frozen_weights_are_packed_once_and_again_when_they_change():
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(300, 64, generator=g), torch.randn(5, 7, 64, generator=g)
    sae = SAE(W.clone(), W.clone(), torch.zeros(300), torch.ones(64), 8).requires_grad_(False)

    def right(W_enc):
        want = ops.topk_encode(x.reshape(-1, 64), W_enc.float(), torch.zeros(300), 8)
        got = sae.encode_topk(x)
        assert torch.equal(got.top_acts.view(-1, 8), want[0]) and torch.equal(got.top_indices.view(-1, 8), want[1])
        return sae._packed

    first = right(W)
    assert right(W) is first
    with torch.no_grad():
        sae.W_enc.neg_()
    assert right(-W) is not first
    right(sae.bfloat16().W_enc)  # a cast
    with pytest.raises(InputError, match="Freeze the SAE"):
        sae.requires_grad_(True).pack()


def test_packed_weights_never_answer_for_others():
    """Whatever is written to or swapped, answers are those of the weights as they are."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(35, 64, generator=g)

    def fresh(**more):
        W = torch.randn(300, 64, generator=g)
        sae = SAE(W, W.clone(), torch.zeros(300), torch.ones(64), 8).requires_grad_(False)
        sae.encode_topk(x)
        return sae

    def right(sae, encode=None):
        want = ops.topk_encode(x, sae.W_enc.detach(), sae.b_enc.detach(), 8)
        torch.testing.assert_close(tuple((encode or sae.encode_topk)(x)), want, rtol=0, atol=0)

    sae = fresh()
    with torch.no_grad():
        sae.b_dec.add_(3 * torch.randn(64, generator=g))  # where the pass is centred, and part of its codes
    right(sae)
    sae = fresh()
    sae.load_state_dict(fresh().state_dict())
    right(sae)
    sae.W_enc = fresh().W_enc
    right(sae)
    sae.W_enc.data = fresh().W_enc.data
    right(sae)
    copied = copy.deepcopy(sae)
    with torch.no_grad():
        copied.W_enc.neg_()
    right(copied)
    right(sae)
    sae.W_enc.data.neg_()  # not counted by torch
    right(sae.unpack())
    compiled = torch.compile(sae.encode_topk, fullgraph=True, backend="aot_eager")
    right(sae, compiled)
    with torch.no_grad():
        sae.W_enc.neg_()
    right(sae, compiled)
    with torch.inference_mode():
        sae = fresh()
        sae.W_enc.neg_()
        right(sae)
    buffer = io.BytesIO()
    sae = fresh()
    torch.save(sae, buffer)
    assert len(buffer.getvalue()) < 1.1 * sum(4 * p.numel() for p in sae.parameters())  # codes are not kept on disk


def test_a_frozen_sae_under_vmap_and_with_fake_tensors():
    W, x = torch.randn(50, 16), torch.randn(3, 9, 16)
    sae = SAE(W, W.clone(), torch.zeros(50), torch.zeros(16), 4).requires_grad_(False)
    want = sae.encode_topk(x)
    torch.testing.assert_close(tuple(torch.vmap(lambda rows: tuple(sae.encode_topk(rows)))(x)), tuple(want))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert sae.encode_topk(mode.from_tensor(x)).top_acts.shape == (3, 9, 4)


def test_encode_compiles_with_and_without_packed_weights():
    W, x = torch.randn(50, 16), torch.randn(9, 16)
    sae = SAE(W, W.clone(), torch.zeros(50), torch.zeros(16), 4).requires_grad_(False)
    for _ in range(2):
        compiled = torch.compile(sae.encode_topk, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(tuple(compiled(x)), tuple(sae.encode_topk(x)), rtol=0, atol=0)
        sae.pack()
