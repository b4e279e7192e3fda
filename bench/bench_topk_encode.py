"""topk_encode against linear + relu + torch.topk (eager, TF32, compiled) and the encoders of other SAE libraries."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope.ops import pack_encoder, topk_encode, topk_encode_certified, topk_encode_packed

from . import _floors, _peers
from ._case import (
    OURS,
    QWEN_SCOPE,
    YARDSTICK,
    Case,
    Provider,
    Sizes,
    actives,
    compiled,
    dictionary,
    generator,
    name_of,
    tokens,
    widths,
)
from ._checks import check_topk, close, float32_scores, matmul_precision, score_tolerance

ROWS_PER_PRODUCT = 2048  # the matrix product alone runs in chunks of this many tokens, as an encoder would call it
GEMM = "matrix product alone"
Inputs = tuple[Tensor, Tensor, Tensor]


def cases(device: str, quick: bool = False) -> list[Case]:
    """The large batch at every shape; 1 and a few tokens, where streaming W_enc is all there is to do."""
    gpu = device.startswith("cuda")
    found = []
    for D, d_sae in widths(device, quick):
        batches = [(tokens(device, quick), k) for k in actives(device, quick)]
        if not quick and (gpu or (D, d_sae) == widths(device, quick)[0]):
            batches += [(n, 50) for n in ((1, 16) if gpu else (1, 16, 64))]
        for dtype in (torch.bfloat16, torch.float32):
            for N, k in batches:
                if dtype == torch.float32 and gpu and (k != 50 or N == 16):
                    continue  # the float32 product takes 20 to 140 ms and does not depend on k
                found.append(_case(device, Sizes(N, D, d_sae, k), dtype))
    if not gpu and not quick:
        found.append(_case(device, Sizes(256, *QWEN_SCOPE["B"], 50), torch.float32))
    return found


def _case(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    N, D, d_sae, k = sizes
    bf16 = dtype == torch.bfloat16

    def inputs(seed: int) -> Inputs:
        gen = generator(device, seed)
        x = torch.randn(N, D, generator=gen, device=device).to(dtype)
        b = (torch.randn(d_sae, generator=gen, device=device) * 0.1).to(dtype)
        return x, dictionary(device, seed, D, d_sae, dtype), b

    def check(result: tuple[Tensor, Tensor], scores: Tensor, precision: str) -> None:
        check_topk(result, scores, k, score_tolerance(scores, D, precision))

    floor = _floors.encode(N, D, d_sae, k, dtype.itemsize, 2 if bf16 else 4)
    return Case(
        "topk_encode",
        sizes,
        "bfloat16" if bf16 else "float32",
        inputs,
        lambda i: float32_scores(*i),
        check,
        (_bf16_providers if bf16 else _float32_providers)(device, sizes),
        floor,
        gemm=GEMM,
    )


def _bf16_providers(device: str, sizes: Sizes) -> dict[str, Provider]:
    held = partial(Provider, precision="bfloat16")
    methods = _methods(device, sizes.K).items()
    return {
        "qscope bf16": held(lambda i: lambda: topk_encode(*i, sizes.K, "bf16"), OURS),
        **{f"qscope bf16 {name}": held(make, OURS, optional=True) for name, make in methods},
        **_exact_providers(sizes.K),
        "torch linear+topk": held(lambda i: lambda: _linear_topk(*i, sizes.K)),
        **_compiled_provider(device, sizes, "bfloat16"),
        **_library_providers(sizes, "bfloat16"),
        GEMM: _gemm_provider(torch.bfloat16, sizes.D),
    }


def _float32_providers(device: str, sizes: Sizes) -> dict[str, Provider]:
    k = sizes.K
    providers = {
        **_exact_providers(k),
        "torch linear+topk": Provider(lambda i: lambda: _linear_topk(*i, k)),
        "torch linear+topk, cast to bf16 before": Provider(_cast_before(k), precision="bfloat16"),
        **_compiled_provider(device, sizes, "float32"),
        **_library_providers(sizes, "float32"),
        # An exact answer needs one tensor-core pass at least: its rate, not that of float32, is the floor.
        GEMM: _gemm_provider(torch.bfloat16, sizes.D),
    }
    if device.startswith("cuda"):
        providers["torch linear+topk TF32"] = Provider(lambda i: lambda: _tf32(*i, k), precision="tf32")
    return providers


def _exact_providers(k: int) -> dict[str, Provider]:
    """The operator, which rounds the weights in every call, and what a frozen SAE does: weights packed once."""

    def packed(i: Inputs) -> Any:
        x, W, b = i
        weights = pack_encoder(W, b)
        return lambda: topk_encode_packed(x, weights, k)[:2]

    return {
        "qscope exact": Provider(
            lambda i: lambda: topk_encode(*i, k, "exact"),
            OURS,
            note=lambda i: _counts(topk_encode_certified(*i, k)[2], i),
        ),
        "qscope exact, packed": Provider(
            packed, OURS, note=lambda i: _counts(topk_encode_packed(i[0], pack_encoder(*i[1:]), k)[2], i)
        ),
    }


def _counts(candidates: Tensor, i: Inputs) -> str:
    full = int((candidates == len(i[1])).sum())
    return f"{candidates.float().mean():.1f} candidates a row, {full} of {len(candidates)} rows in full"


def _cast_before(k: int) -> Any:
    """What a bfloat16 answer costs: the cast is not timed."""

    def make(i: Inputs) -> Any:
        low = [t.bfloat16() for t in i]
        return lambda: _linear_topk(*low, k)

    return make


def _methods(device: str, k: int) -> dict[str, Any]:
    """The two designs of the bfloat16 encoder, whichever the operator chooses; group refuses some shapes."""
    if not device.startswith("cuda"):
        return {}
    from qscope_kernels.topk_encode import topk_encode_fwd

    return {name: lambda i, m=name: lambda: topk_encode_fwd(*i, k, method=m) for name in ("cublas", "group")}


def _linear_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return F.linear(x, W, b).relu().topk(k)


def _tf32(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with matmul_precision("tf32"):
        return _linear_topk(x, W, b, k)


def _compiled_provider(device: str, sizes: Sizes, precision: str) -> dict[str, Provider]:
    """One shape on a CPU and three on a GPU: compiling takes longer than all the timing."""
    measured = {
        ("cpu", "float32", 512, 2048, 50),
        ("cpu", "float32", 64, 256, 50),
        ("cuda", "bfloat16", 8192, 2048, 50),
        ("cuda", "bfloat16", 8192, 4096, 50),
        ("cuda", "float32", 8192, 2048, 50),
    }
    if (device.partition(":")[0], precision, sizes.N, sizes.D, sizes.K) not in measured or sizes.F > 65536:
        return {}

    def make(i: Inputs) -> Any:
        call = compiled(_linear_topk)
        return lambda: call(*i, sizes.K)

    return {"torch.compile linear+topk": Provider(make, precision=precision)}


def _library_providers(sizes: Sizes, precision: str) -> dict[str, Provider]:
    k = sizes.K

    def encoder(build: Any) -> Any:
        def make(i: Inputs) -> Any:
            encode = build(i[1], i[2], k)
            return _peers.no_grad(lambda: encode(i[0]))

        return make

    def sparsify(W: Tensor, b: Tensor, k: int) -> Any:
        return _peers.sparsify_coder(W, b, None, None, k).encode

    def dense(result: Tensor) -> tuple[Tensor, Tensor]:
        return result.topk(k)

    return {
        "sae-lens encode": _peers.provider("sae-lens", encoder(_peers.sae_lens_encode), precision, dense),
        "dictionary_learning encode": _peers.provider(
            "dictionary_learning", encoder(_peers.dictionary_learning_encode), precision, dense
        ),
        "eai-sparsify encode": _peers.provider("eai-sparsify", encoder(sparsify), precision, lambda out: out[:2]),
    }


def gemm_call(x: Tensor, W: Tensor) -> Any:
    """x W^T without bias, in chunks of rows into one preallocated block; returns the last block."""
    parts = x.split(ROWS_PER_PRODUCT)
    out = torch.empty(len(parts[0]), len(W), dtype=x.dtype, device=x.device)
    return lambda: [torch.mm(part, W.T, out=out[: len(part)]) for part in parts][-1]


def _gemm_provider(dtype: torch.dtype, D: int) -> Provider:
    def make(i: Inputs) -> Any:
        product = gemm_call(i[0].to(dtype), i[1].to(dtype))
        return lambda: (product(), i[2])

    def check(result: tuple[Tensor, Tensor], scores: Tensor, precision: str) -> None:
        last, b = result
        want = scores[-len(last) :]
        close("the matrix product", last.float() + b.float(), want, score_tolerance(want, D, precision))

    return Provider(make, YARDSTICK, name_of(dtype), check=check)
