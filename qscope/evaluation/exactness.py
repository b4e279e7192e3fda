"""Recall of the encoder's two precisions against scores of all features in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qscope import ops, reference
from qscope.sae import SAE


@dataclass(frozen=True)
class Exactness:
    """One layer. Recall: the share of the k features of a token whose float64 score, rounded to float32, is at least
    the k-th largest of these; ties in float32 count as right."""

    tokens: int
    nan_rows: int
    """Tokens with a score that is NaN; left out of everything else."""
    recall_exact: float
    recall_bf16: float
    wrong_values: int
    """Values of "exact" that are not the float64 score rounded to float32, by more than one unit in the last place."""
    candidates_mean: float
    """Features that were scored exactly, of d_sae."""
    candidates_max: int
    full_rows: int
    """Tokens that the bound could not serve: all their features were scored exactly."""
    smallest_margin: float | None
    """Least proven distance of a k-th score from the features that were never scored exactly; None if all were."""
    d_sae: int
    k: int


@torch.no_grad()
def exactness(sae: SAE, x: Tensor) -> Exactness:
    """Compare both precisions of sae on x [N, D] with float64 scores of all features."""
    W, b, k = sae.W_enc.detach(), sae.b_enc.detach(), sae.k
    acts, indices, candidates, margin = ops.topk_encode_certified(x, W, b, k)
    rounded = ops.topk_encode(x, W, b, k, "bf16")[1]
    kept = hits = hits_bf16 = wrong = 0
    good = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for rows in torch.arange(len(x), device=x.device).split(reference.rows_per_block(sae.d_sae, 8)):
        scores = float64_scores(x[rows], W, b).float()
        good[rows] = ~scores.isnan().any(1)
        scores, rows = scores[good[rows]], rows[good[rows]]
        kth = scores.topk(k, dim=1).values[:, -1:]
        hits += int((scores.gather(1, indices[rows].long()) >= kth).sum())
        hits_bf16 += int((scores.gather(1, rounded[rows].long()) >= kth).sum())
        want = scores.gather(1, indices[rows].long()).relu()
        wrong += int(((acts[rows] < _below(want)) | (acts[rows] > _above(want))).sum())
        kept += len(rows)
    finite = margin[good][margin[good].isfinite()]
    return Exactness(
        tokens=len(x),
        nan_rows=len(x) - kept,
        recall_exact=hits / max(1, kept * k),
        recall_bf16=hits_bf16 / max(1, kept * k),
        wrong_values=wrong,
        candidates_mean=float(candidates[good].double().mean()) if kept else 0.0,
        candidates_max=int(candidates[good].max()) if kept else 0,
        full_rows=int((candidates[good] == sae.d_sae).sum()),
        smallest_margin=float(finite.min()) if len(finite) else None,
        d_sae=sae.d_sae,
        k=k,
    )


def float64_scores(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x W^T + b in float64, [N, F], from x [N, D] and W [F, D] in blocks of features that fit the workspace."""
    wide = x.double()
    parts = [wide @ part.double().T for part in W.split(reference.rows_per_block(W.shape[1], 8))]
    return torch.cat(parts, dim=1) + b.double()


def _below(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, -torch.inf))


def _above(value: Tensor) -> Tensor:
    return torch.nextafter(value, torch.full_like(value, torch.inf))
