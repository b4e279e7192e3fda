"""Packed encoders on a GPU: the bits of the CPU, for every meaning of the weights."""

import pytest
import torch

pytest.importorskip("triton", reason="qscope_kernels is tested where Triton is installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

from qscope.ops import pack_encoder, topk_encode_packed  # noqa: E402  (after the check that Triton is there)


@pytest.mark.parametrize("weights", ["fp32", "bf16x2", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [1, 2, 3, 400])
def test_same_bits_as_the_cpu(N: int, dtype: torch.dtype, weights: str) -> None:
    g = torch.Generator().manual_seed(6)
    x, W = torch.randn(N, 768, generator=g), (torch.randn(4096, 768, generator=g) / 768**0.5).to(dtype)
    b, mu = torch.randn(4096, generator=g) * 0.1, torch.randn(768, generator=g)
    want = topk_encode_packed(x, pack_encoder(W, b, mu, weights), 50)
    packed = pack_encoder(W.cuda(), b.cuda(), mu.cuda(), weights)
    values, indices, candidates, margin = (t.cpu() for t in topk_encode_packed(x.cuda(), packed, 50))
    assert torch.equal(values, want[0]) and torch.equal(indices, want[1])
    assert ((candidates >= 50) & (candidates <= 4096)).all() and (margin >= 0).all()


def test_bf16x2_needs_no_float32_weights() -> None:
    W = torch.randn(4096, 768, device="cuda")
    packed = pack_encoder(W, weights="bf16x2")
    kept = {t.data_ptr(): t.numel() * t.element_size() for t in (packed.W_enc, *packed.codes)}
    assert sum(kept.values()) < 4 * W.numel() + 40 * 4096
