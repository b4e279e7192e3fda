"""TopK-SAE encoder with a certificate per row, in plain PyTorch."""

import torch
from torch import Tensor

from qscope.reference.exact_encode import certified_topk


def topk_encode_certified(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """relu(topk(x W_enc^T + b_enc)) in exact scores, with what is known about each row: `certified_topk` after ReLU."""
    values, indices, candidates, margin = certified_topk(x, W_enc, b_enc, k)
    return torch.relu(values), indices, candidates, margin
