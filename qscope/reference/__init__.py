"""Plain PyTorch meaning of every operator: kernels are tested against it, and it runs where none exists."""

from qscope.reference._workspace import rows_per_block
from qscope.reference.decode_loss import decode_loss
from qscope.reference.feature_penalty import feature_penalty, feature_penalty_grad
from qscope.reference.feature_stats_ import feature_stats_
from qscope.reference.pack_encoder import pack_encoder
from qscope.reference.row_adam_ import row_adam_
from qscope.reference.sparse_decode import sparse_decode
from qscope.reference.sparse_dot import sparse_dot
from qscope.reference.sparse_grads import sparse_grads
from qscope.reference.sparse_outer import sparse_outer
from qscope.reference.steer_add_ import steer_add_
from qscope.reference.topk_encode import topk_encode
from qscope.reference.topk_encode_certified import topk_encode_certified
from qscope.reference.topk_encode_packed import topk_encode_packed
from qscope.reference.topk_select import topk_select

__all__ = [
    "decode_loss",
    "feature_penalty",
    "feature_penalty_grad",
    "feature_stats_",
    "pack_encoder",
    "row_adam_",
    "rows_per_block",
    "sparse_decode",
    "sparse_dot",
    "sparse_grads",
    "sparse_outer",
    "steer_add_",
    "topk_encode",
    "topk_encode_certified",
    "topk_encode_packed",
    "topk_select",
]
