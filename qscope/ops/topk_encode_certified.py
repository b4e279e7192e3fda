"""TopK-SAE encoder with a certificate: which features could not be excluded, and by how much the others were."""

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import call, check_devices, check_float, check_k, check_sizes, operator, shape_of


def topk_encode_certified(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`topk_encode(precision="exact")`, and for each row the proof's figures. No gradient.

    A low-precision pass bounds every score; features that the bound cannot exclude are scored exactly
    (docs/exact.md). A row whose bound excludes too few, or whose numbers are out of range, is scored in full.

    Args:
        x: residuals, [N, D], float32, bfloat16 or float16; any strides.
        W_enc: encoder rows, [F, D], same dtypes.
        b_enc: encoder bias, [F], or None.
        k: how many features to keep, 1 <= k <= F; on a GPU at most 256.

    Returns:
        top_acts [N, k] float32 and top_indices [N, k] int32, as topk_encode returns them;
        candidates [N] int32: how many features were scored exactly, F for a row scored in full;
        margin [N] float32: the k-th largest score (before ReLU) exceeds the score of every feature that is not a
        candidate by at least this much, in exact arithmetic on the rounded scores; infinite if there is none,
        NaN for a row with a NaN score.
        The first two do not depend on which rows are encoded together; candidates and margin do.

    Raises:
        ValueError: shapes, dtypes, devices or k that do not fit.
    """
    op = "topk_encode_certified"
    check_float(op, "x", x, "[N, D]")
    check_float(op, "W_enc", W_enc, "[F, D]")
    check_sizes(op, f"x [N, D] is {shape_of(x)}, W_enc [F, D] is {shape_of(W_enc)}", (x.shape[1], W_enc.shape[1]))
    if b_enc is not None:
        check_float(op, "b_enc", b_enc, "[F]")
        rule = f"W_enc [F, D] is {shape_of(W_enc)}, b_enc [F] is {shape_of(b_enc)}"
        check_sizes(op, rule, (b_enc.shape[0], W_enc.shape[0]))
    check_k(op, k, W_enc.shape[0], x)
    check_devices(op, x, W_enc, b_enc)
    return call(_op, x, W_enc, b_enc, k)


_op = operator(
    reference.topk_encode_certified,
    schema="(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k) -> (Tensor, Tensor, Tensor, Tensor)",
)


def fake(x: Tensor, W_enc: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of a certified answer."""
    torch._check(x.dim() == 2 and W_enc.dim() == 2, lambda: "x must be [N, D] and W_enc [F, D]")
    torch._check(x.shape[1] == W_enc.shape[1], lambda: "x [N, D] and W_enc [F, D] must share D")
    torch._check(1 <= k <= W_enc.shape[0], lambda: f"k={k} must be in 1..{W_enc.shape[0]}")
    N = x.shape[0]
    return (
        x.new_empty((N, k), dtype=torch.float32),
        x.new_empty((N, k), dtype=torch.int32),
        x.new_empty((N,), dtype=torch.int32),
        x.new_empty((N,), dtype=torch.float32),
    )


@_op.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake(x, W_enc, k)


@_op.register_kernel("cuda")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from qscope_kernels.exact_encode import available, exact_topk_encode_fwd

    if not available(x):
        return reference.topk_encode_certified(x, W_enc, b_enc, k)
    values, indices, certificate = exact_topk_encode_fwd(x, W_enc, b_enc, k, return_certificate=True)
    return values, indices, certificate.candidates, certificate.margin
