"""What the exact encoder makes of its weights, once for many calls."""

from typing import NamedTuple

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import call, check_devices, check_float, check_sizes, operator, shape_of

WEIGHTS = ("fp32", "bf16x2", "bf16")


class PackedEncoder(NamedTuple):
    """Weights and what `pack_encoder` made of them, for `topk_encode_packed`."""

    W_enc: Tensor
    """[F, D]: the weights that scores are computed from; for "fp32" the tensor that was given, not a copy."""
    b_enc: Tensor | None
    """[F], a copy: the codes hold it."""
    mu: Tensor
    """[D] float32, a copy: subtracted before rounding."""
    codes: list[Tensor]
    """Of the device and of this version of qscope: not for keeping on disk."""


def pack_encoder(
    W_enc: Tensor, b_enc: Tensor | None = None, mu: Tensor | None = None, weights: str = "fp32"
) -> PackedEncoder:
    """Round an encoder's weights for the low-precision pass of `topk_encode_packed`, reading them once.

    Args:
        W_enc: [F, D], float32, bfloat16 or float16. With "fp32" it is kept, and must not be written to afterwards: an
            answer from codes of other weights would be wrong (most such answers are refused, not all).
        b_enc: [F], or None.
        mu: [D], a typical row of x (an SAE's b_dec, a mean); None is zero. It makes the pass tight, not the answer
            right: any mu gives the same answer.
        weights: which weights are meant, and what is kept of F D numbers each.
            "fp32": W_enc as given, which is kept, not copied. Added: on a CPU with AVX512-VNNI int8 codes, F D bytes
            (on others nothing), on a GPU a bfloat16 copy, 2 F D bytes, unless W_enc is bfloat16 itself.
            "bf16x2": the sum of two bfloat16 numbers, 16 to 17 bits of each weight. On a GPU 4 F D bytes in place
            of W_enc, which is not needed any more; on a CPU they are kept as float32.
            "bf16": W_enc rounded to bfloat16, 2 F D bytes in place of W_enc, on a CPU with the int8 codes 3 F D.
            The last two are exact for the weights they mean, not for W_enc.

    Raises:
        ValueError: shapes, dtypes, devices or weights that do not fit.
    """
    op = "pack_encoder"
    check_float(op, "W_enc", W_enc, "[F, D]")
    if weights not in WEIGHTS:
        raise ValueError(f"{op}: weights={weights!r}; accepted are {', '.join(map(repr, WEIGHTS))}.")
    if b_enc is not None:
        check_float(op, "b_enc", b_enc, "[F]")
        rule = f"W_enc [F, D] is {shape_of(W_enc)}, b_enc [F] is {shape_of(b_enc)}"
        check_sizes(op, rule, (b_enc.shape[0], W_enc.shape[0]))
    if mu is not None:
        check_float(op, "mu", mu, "[D]")
        check_sizes(op, f"W_enc [F, D] is {shape_of(W_enc)}, mu [D] is {shape_of(mu)}", (mu.shape[0], W_enc.shape[1]))
    check_devices(op, W_enc, b_enc, mu)
    with torch.no_grad():
        centre = W_enc.new_zeros(W_enc.shape[1], dtype=torch.float32) if mu is None else mu.detach().float().clone()
        bias = None if b_enc is None else b_enc.detach().clone()
        meant, pair = _meant(W_enc.detach(), weights)
        codes = call(_op, meant, bias, centre, pair)
        return PackedEncoder(codes[0] if pair else meant, bias, centre, codes)


def _meant(W: Tensor, weights: str) -> tuple[Tensor, bool]:
    """The weights to pack, and whether the kernel is to split them in two."""
    if weights == "fp32" or (weights == "bf16x2" and W.dtype == torch.bfloat16):
        return W.contiguous(), False
    high = W.to(torch.bfloat16)
    if weights == "bf16":
        return high.contiguous(), False
    if W.is_cuda:
        from qscope_kernels.exact_encode import available

        if available(W):
            return W.contiguous(), True
    return (high.float() + (W.float() - high.float()).bfloat16().float()).contiguous(), False


_op = operator(reference.pack_encoder, schema="(Tensor W_enc, Tensor? b_enc, Tensor mu, bool pair) -> Tensor[]")


@_op.register_fake
def _(W_enc: Tensor, b_enc: Tensor | None, mu: Tensor, pair: bool) -> list[Tensor]:
    if W_enc.device.type == "cpu":  # as many bytes as this CPU has use for
        return [W_enc.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)]
    F, D = W_enc.shape
    padded = (F + 63) // 64 * 64
    high = W_enc.new_empty((0 if W_enc.dtype == torch.bfloat16 else F, D), dtype=torch.bfloat16)
    low = W_enc.new_empty((F if pair else 0, D), dtype=torch.bfloat16)
    floats = [W_enc.new_empty(s, dtype=torch.float32) for s in ((padded, 4), (padded,), (padded // 64, 4))]
    return [high, low, W_enc.new_empty(1, dtype=torch.float64), *floats]


@_op.register_kernel("cuda")
def _(W_enc: Tensor, b_enc: Tensor | None, mu: Tensor, pair: bool) -> list[Tensor]:
    from qscope_kernels.exact_encode import available, packed_tensors, prepare_encoder

    if not available(W_enc):
        return reference.pack_encoder(W_enc, b_enc, mu, pair)
    return packed_tensors(prepare_encoder(W_enc, b_enc, mu, "bf16x2" if pair else "fp32"), W_enc)
