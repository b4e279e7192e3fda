"""The exact TopK-SAE encoder on weights that were packed once."""

from torch import Tensor

from qscope import reference
from qscope.ops._common import call, check_devices, check_float, check_k, check_sizes, operator, shape_of
from qscope.ops.pack_encoder import PackedEncoder
from qscope.ops.topk_encode_certified import fake


def topk_encode_packed(x: Tensor, packed: PackedEncoder, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `topk_encode_certified` returns for the packed weights, bit for bit but for candidates and margin, sooner.

    A call neither rounds the weights nor takes their norms. Most is won where few rows are encoded (generation): the
    pass then reads the packed weights only, a quarter of float32's bytes on a CPU, half of them on a GPU.

    Args:
        x: residuals, [N, D], float32, bfloat16 or float16; any strides.
        packed: from `pack_encoder`, on the same device.
        k: how many features to keep, 1 <= k <= F; on a GPU at most 256.

    Returns:
        top_acts [N, k] float32, top_indices [N, k] int32, candidates [N] int32, margin [N] float32. No gradient.

    Raises:
        ValueError: shapes, dtypes, devices or k that do not fit.
    """
    op = "topk_encode_packed"
    check_float(op, "x", x, "[N, D]")
    W = packed.W_enc
    check_sizes(op, f"x [N, D] is {shape_of(x)}, W_enc [F, D] is {shape_of(W)}", (x.shape[1], W.shape[1]))
    check_k(op, k, W.shape[0], x)
    check_devices(op, x, W)
    return call(_op, x, W, packed.b_enc, packed.mu, packed.codes, k)


_op = operator(
    reference.topk_encode_packed,
    schema="(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor mu, Tensor[] codes, SymInt k)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, mu: Tensor, codes: list[Tensor], k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake(x, W_enc, k)


@_op.register_kernel("cuda")
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, mu: Tensor, codes: list[Tensor], k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from qscope_kernels.exact_encode import exact_encode_fwd, from_packed

    if not codes:
        return reference.topk_encode_packed(x, W_enc, b_enc, mu, codes, k)
    prepared = from_packed(W_enc, b_enc, mu, codes)
    values, indices, certificate = exact_encode_fwd(x, prepared, k, return_certificate=True)
    return values, indices, certificate.candidates, certificate.margin
