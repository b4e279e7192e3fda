"""Sum of outer products by feature: the gradient of a sparse decode's (or encode's) weight rows."""

import torch
from torch import Tensor

from qscope import reference
from qscope.ops._common import (
    call,
    check_devices,
    check_float,
    check_index_range,
    check_indices,
    check_sizes,
    operator,
    shape_of,
)


def sparse_outer(values: Tensor, indices: Tensor, g: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """rows[f] = sum of values[n, k] * g[n] over all (n, k) with indices[n, k] == f; sums[f] = the values
    alone.

    Accumulates in float32 in ascending n order, without atomics: the same bits for any number of threads.
    Has no gradient of its own.

    Args:
        values: [N, K], float32, bfloat16 or float16.
        indices: features, [N, K], int32 or int64, each in 0..d_sae-1.
        g: [N, D], float32, bfloat16 or float16.
        d_sae: number of features F.

    Returns:
        rows [F, D] float32 and sums [F] float32; zero for features that do not occur.

    Raises:
        ValueError: shapes, dtypes, devices or d_sae that do not fit.
        IndexError: an index outside 0..d_sae-1, on a CPU or with QSCOPE_DEBUG=1. On a GPU, where finding it would
            have to wait for the device, the entry is left out.
    """
    op = "sparse_outer"
    check_float(op, "values", values, "[N, K]")
    check_indices(op, "indices", indices)
    check_float(op, "g", g, "[N, D]")
    check_sizes(
        op,
        f"values [N, K] is {shape_of(values)}, indices [N, K] is {shape_of(indices)}, g [N, D] is {shape_of(g)}",
        *zip(values.shape, indices.shape, strict=True),
        (values.shape[0], g.shape[0]),
    )
    if d_sae < 1:
        raise ValueError(f"{op}: d_sae={d_sae}; it must be at least 1.")
    check_devices(op, values, indices, g)
    check_index_range(op, "indices", indices, d_sae)
    return call(_op, values, indices, g, d_sae)


_op = operator(reference.sparse_outer)


@_op.register_fake
def _(values: Tensor, indices: Tensor, g: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    torch._check(values.shape == indices.shape, lambda: "values and indices must both be [N, K]")
    torch._check(values.shape[0] == g.shape[0], lambda: "values [N, K] and g [N, D] must share N")
    return g.new_empty(d_sae, g.shape[1], dtype=torch.float32), g.new_empty(d_sae, dtype=torch.float32)


@_op.register_kernel("cuda")
def _(values: Tensor, indices: Tensor, g: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    from qscope_kernels.sparse_decode import sparse_outer_fwd  # triton is imported only when a GPU is used

    return sparse_outer_fwd(values, indices, g, d_sae)
