"""The operators, registered with torch.library under `qscope::`; one file each, with shapes and gradients."""

from qscope.ops.sparse_decode import sparse_decode
from qscope.ops.sparse_dot import sparse_dot
from qscope.ops.sparse_outer import sparse_outer
from qscope.ops.topk_encode import topk_encode
from qscope.ops.topk_select import topk_select

__all__ = ["sparse_decode", "sparse_dot", "sparse_outer", "topk_encode", "topk_select"]
