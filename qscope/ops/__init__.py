"""The operators, registered with torch.library under `qscope::`; one file each, with shapes and gradients."""

from qscope.ops.decode_loss import decode_loss
from qscope.ops.feature_penalty import FeatureExcess, feature_penalty
from qscope.ops.feature_stats_ import feature_stats_, fired_bitmap
from qscope.ops.pack_encoder import PackedEncoder, pack_encoder
from qscope.ops.row_adam_ import row_adam_
from qscope.ops.sparse_decode import sparse_decode
from qscope.ops.sparse_dot import sparse_dot
from qscope.ops.sparse_grads import sparse_grads
from qscope.ops.sparse_outer import sparse_outer
from qscope.ops.steer_add_ import SteerSetting, settings_tensor, steer_add_
from qscope.ops.topk_encode import topk_encode
from qscope.ops.topk_encode_certified import topk_encode_certified
from qscope.ops.topk_encode_packed import topk_encode_packed
from qscope.ops.topk_select import topk_select

__all__ = [
    "FeatureExcess",
    "PackedEncoder",
    "SteerSetting",
    "decode_loss",
    "feature_penalty",
    "feature_stats_",
    "fired_bitmap",
    "pack_encoder",
    "row_adam_",
    "settings_tensor",
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
