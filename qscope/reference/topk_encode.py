"""TopK-SAE encoder: linear map, keep the k largest, ReLU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope.reference._workspace import rows_per_block
from qscope.reference.topk_select import topk_select


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, precision: str = "exact"
) -> tuple[Tensor, Tensor]:
    """relu(topk(x W_enc^T + b_enc)), x [N, D], W_enc [F, D], b_enc [F] -> values, indices [N, k].

    "exact" computes the scores in float32 (float64 for float64 inputs) from the upcast inputs; "bf16" casts
    the inputs to bfloat16 and ranks the bfloat16 output of the matrix product. Differentiable: the gradient
    flows through the selected entries whose value is positive.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.promote_types(x.dtype, torch.float32)
    W = W_enc.to(dtype)
    b = None if b_enc is None else b_enc.to(dtype)
    step = rows_per_block(W.shape[0], W.element_size())
    values, indices = [], []
    for begin in range(0, max(1, x.shape[0]), step):
        scores = F.linear(x[begin : begin + step].to(dtype), W, b)
        block_values, block_indices = topk_select(scores, k)
        values.append(torch.relu(block_values))
        indices.append(block_indices)
    return torch.cat(values), torch.cat(indices)
