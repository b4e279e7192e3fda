"""Other SAE libraries, found once. Each is optional; a row of the table says when one is not installed.

eai-sparsify's `encode`, `decode` and `forward` are called as its users call them.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._case import Provider

PACKAGES = {"sae-lens": "sae_lens", "eai-sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
Make = Callable[[Any], Callable[[], Any]]


def problem(peer: str) -> str:
    """Why a peer cannot be used here; "" if it can."""
    module = PACKAGES[peer]
    if importlib.util.find_spec(module) is None:
        return "not installed"
    if not torch.cuda.is_available():
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # else it decodes with Triton, without a GPU too
    try:
        with contextlib.redirect_stdout(sys.stderr), _untouched_fake_tensors():
            importlib.import_module(module)
    except Exception as error:  # importing another library may raise anything; its row in the table says what
        return f"does not import: {type(error).__name__}: {str(error)[:120]}"
    return ""


@contextlib.contextmanager
def _untouched_fake_tensors() -> Iterator[None]:
    """nnsight, which dictionary_learning imports, replaces methods of FakeTensor; torch.compile then falls back."""
    from torch._subclasses.fake_tensor import FakeTensor

    names = ("__new__", "__bool__")
    before = {name: vars(FakeTensor).get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                setattr(FakeTensor, name, value)
            elif name in vars(FakeTensor):
                delattr(FakeTensor, name)


def provider(peer: str, make: Make, precision: str = "float32", adapt: Callable[[Any], Any] | None = None) -> Provider:
    """A provider of an optional package."""
    return Provider(make, precision=precision, adapt=adapt, missing=problem(peer))


def sae_lens_encode(W: Tensor, b: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """TopKSAE.encode: x [N, D] -> dense [N, F]. W [F, D] is stored as it stores it, [D, F]."""
    from sae_lens import TopKSAE, TopKSAEConfig

    (F, D), dtype = W.shape, str(W.dtype).removeprefix("torch.")
    config = TopKSAEConfig(D, F, dtype=dtype, device=str(W.device), apply_b_dec_to_input=False, k=k)
    sae = TopKSAE(config).requires_grad_(False)
    sae.W_enc.data, sae.b_enc.data = W.T.contiguous(), b.clone()
    return sae.encode


def dictionary_learning_encode(W: Tensor, b: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """AutoEncoderTopK.encode: x [N, D] -> dense [N, F]."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    # Built at a tiny size: its initialisation of a large one takes longer than the benchmark.
    autoencoder = AutoEncoderTopK(8, 16, k).to(W.device, W.dtype).requires_grad_(False)
    autoencoder.encoder.weight.data, autoencoder.encoder.bias.data = W, b
    autoencoder.b_dec.data = torch.zeros(W.shape[1], device=W.device, dtype=W.dtype)
    return autoencoder.encode


def sparsify_coder(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor | None, b_dec: Tensor | None, k: int) -> Any:
    """A SparseCoder with these weights; it subtracts b_dec before it encodes, so encode cases pass zeros."""
    from sparsify import SparseCoder, SparseCoderConfig

    F, D = W_enc.shape
    config = SparseCoderConfig(num_latents=F, k=k, normalize_decoder=False)
    coder = SparseCoder(D, config, device=W_enc.device, dtype=W_enc.dtype, decoder=W_dec is not None)
    coder.encoder.weight.data.copy_(W_enc)
    coder.encoder.bias.data.copy_(b_enc)
    if W_dec is not None:
        coder.W_dec.data.copy_(W_dec)
    if b_dec is not None:
        coder.b_dec.data.copy_(b_dec)
    return coder


def no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call without autograd, as inference uses it."""

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run
