"""Dot products of each row with the rows it selected: the gradient of a sparse decode's values."""

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


def sparse_dot(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """out[n, k] = <g[n], W[indices[n, k]]>, accumulated in float32. Has no gradient of its own.

    Args:
        g: [N, D], float32, bfloat16 or float16.
        indices: rows of W, [N, K], int32 or int64, each in 0..F-1.
        W: [F, D], float32, bfloat16 or float16.

    Returns:
        [N, K] float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: an index outside 0..F-1, on a CPU or with QSCOPE_DEBUG=1. On a GPU, where finding it would have
            to wait for the device, its result is 0.
    """
    op = "sparse_dot"
    check_float(op, "g", g, "[N, D]")
    check_indices(op, "indices", indices)
    check_float(op, "W", W, "[F, D]")
    check_sizes(
        op,
        f"g [N, D] is {shape_of(g)}, indices [N, K] is {shape_of(indices)}, W [F, D] is {shape_of(W)}",
        (g.shape[0], indices.shape[0]),
        (g.shape[1], W.shape[1]),
    )
    check_devices(op, g, indices, W)
    check_index_range(op, "indices", indices, W.shape[0])
    return call(_op, g, indices, W)


_op = operator(reference.sparse_dot)


@_op.register_fake
def _(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    torch._check(g.shape[0] == indices.shape[0], lambda: "g [N, D] and indices [N, K] must share N")
    torch._check(g.shape[1] == W.shape[1], lambda: "g [N, D] and W [F, D] must share D")
    return g.new_empty(indices.shape, dtype=torch.float32)


@_op.register_kernel("cuda")
def _(g: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    from qscope_kernels.sparse_decode import sparse_dot_fwd  # triton is imported only when a GPU is used

    return sparse_dot_fwd(g, indices, W)
