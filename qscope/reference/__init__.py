"""Plain PyTorch meaning of every operator: kernels are tested against it, and it runs where none exists."""

from qscope.reference._workspace import rows_per_block
from qscope.reference.sparse_decode import sparse_decode
from qscope.reference.sparse_dot import sparse_dot
from qscope.reference.sparse_outer import sparse_outer
from qscope.reference.topk_encode import topk_encode
from qscope.reference.topk_select import topk_select

__all__ = ["rows_per_block", "sparse_decode", "sparse_dot", "sparse_outer", "topk_encode", "topk_select"]
