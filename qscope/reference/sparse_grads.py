"""The gradients of the four parameters of a sparse autoencoder from the active entries of a batch."""

import torch
from torch import Tensor


def sparse_grads(
    top_acts: Tensor, act_grads: Tensor, top_indices: Tensor, g: Tensor, x: Tensor, d_sae: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_dec [F, D] = sum of top_acts * g[n], W_enc [F, D] = sum of act_grads * x[n], b_enc [F] = sum of act_grads, each
    over the entries of a feature, and b_dec [D] = sum of g[n].

    Terms are added in float32. An entry whose act and act_grad are both 0 is left out.
    """
    indices = top_indices.long()
    live = (top_acts != 0) | (act_grads != 0)
    W_dec, W_enc = (torch.zeros(d_sae, g.shape[1], dtype=torch.float32, device=g.device) for _ in range(2))
    b_enc = torch.zeros(d_sae, dtype=torch.float32, device=g.device)
    for slot in range(indices.shape[1]):
        ids, act, grad, dead = indices[:, slot], top_acts[:, slot], act_grads[:, slot], ~live[:, slot]
        for rows, values, source in ((W_dec, act, g), (W_enc, grad, x)):
            terms = values[:, None].float() * source.float()
            rows.index_add_(0, ids, terms.masked_fill(dead[:, None], 0))
        b_enc.index_add_(0, ids, grad.float())
    return W_dec, W_enc, b_enc, g.sum(0, dtype=torch.float32)
