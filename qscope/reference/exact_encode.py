"""The certified encoder in plain PyTorch: the exact scores, the error bound and the method (docs/exact.md)."""

import torch
from torch import Tensor

CHAINS = 16  # float64 sums per score
UNIT = 2.0**-24
SAFE = 1 + 2.0**-17  # above every rounding in the evaluation of the bound itself
PAIR_BYTES = 64 << 20


def exact_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, rows: Tensor, features: Tensor) -> Tensor:
    """The scores that "exact" ranks, bit for bit: of rows[p] of x [N, D] with features[p] of W_enc [F, D], float32.

    Element d goes to float64 chain d mod 16, in ascending d; the chains are added as a tree (c and c + 8, then c
    and c + 4, ...), then the bias; one rounding to float32. A product of two float32 numbers is exact in float64, so
    a product and a sum are a fused multiply-add.
    """
    D = x.shape[1]
    steps = -(-D // CHAINS)
    step = max(1, PAIR_BYTES // (8 * CHAINS * max(1, steps)))
    out = [x.new_empty(0, dtype=torch.float32)]
    for row, feature in zip(rows.split(step), features.split(step), strict=True):
        products = x[row].double() * W_enc[feature].double()
        products = torch.nn.functional.pad(products, (0, steps * CHAINS - D)).view(-1, steps, CHAINS)
        chains = products.new_zeros(len(row), CHAINS)
        for i in range(steps):
            chains = chains + products[:, i]
        for width in (8, 4, 2, 1):
            chains = chains[:, :width] + chains[:, width:]
        score = chains[:, 0]
        out.append((score if b_enc is None else score + b_enc[feature].double()).float())
    return torch.cat(out)


def all_exact_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """exact_scores of every row with every feature: [N, F] float32."""
    N, F = x.shape[0], W_enc.shape[0]
    pairs = torch.arange(N * F, device=x.device)
    return exact_scores(x, W_enc, b_enc, pairs // F, pairs % F).view(N, F)


def error_bound(
    q: Tensor, lost_x: Tensor, norm_w: Tensor, lost_w: Tensor, beta: Tensor, mean: Tensor, D: int
) -> Tensor:
    """eps [N, F] with |exact score - (product of the rounded operands + beta)| <= eps: the theorem of docs/exact.md.

    q, lost_x [N]: norms of the rounded centred rows, and of what rounding lost; norm_w, lost_w [F]: norms of the
    features, and of what rounding lost; beta [F]: mu . w + b; mean: the norm of mu; all float64.
    """
    gamma = (D + 2) * UNIT / (1 - (D + 2) * UNIT)
    delta = (D // 16 + 16) * 2.0**-52
    tiny = (4 * D + 16) * 2.0**-126
    A = lost_x + (gamma + 8 * UNIT) * q + delta * (q + lost_x + mean)
    B = (1 + gamma + 8 * UNIT) * q
    C = 64 * UNIT * mean * norm_w + 8 * UNIT * beta.abs() + tiny
    return (A[:, None] * norm_w + B[:, None] * lost_w + C) * SAFE


def certified_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top-k of the exact scores by a bfloat16 pass, its bound and exact scores of what the bound cannot exclude.

    x [N, D], W_enc [F, D], b_enc [F] -> values [N, k] float32 (no ReLU), indices [N, k] int32, candidates [N] int32 and
    margin [N] float32 as topk_encode_certified returns them. `scale` below 1 weakens the bound, and the answer may
    be wrong: for tests. The pass is a float64 product rounded to float32, whose error is within that of any float32
    summation; rows are taken a block at a time.
    """
    step = max(1, PAIR_BYTES // (8 * W_enc.shape[0]))
    parts = [_certified_block(block, W_enc, b_enc, k, scale) for block in x.split(step)]
    values, indices, candidates, margin = (torch.cat(column) for column in zip(*parts, strict=True))
    return values, indices, candidates, margin


def _certified_block(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, (F, D) = x.shape[0], W.shape
    x, w = x.float(), W.double()
    plain = x.isfinite().all(1)
    mu = x[plain].mean(0) if bool(plain.any()) else x.new_zeros(D)
    mu = mu.nan_to_num(0.0, 0.0, 0.0)
    q, v = (x - mu).bfloat16().double(), W.bfloat16().double()
    beta = w @ mu.double() + (0.0 if b is None else b.double())
    lost_x = (x.double() - mu.double() - q).norm(dim=1)
    eps = error_bound(q.norm(dim=1), lost_x, w.norm(dim=1), (w - v).norm(dim=1), beta, mu.double().norm(), D)
    middle = (q @ v.T).float().double() + beta
    usable = middle.isfinite() & eps.isfinite()
    high = torch.where(usable, middle + scale * eps, torch.inf)
    low = torch.where(usable, middle - scale * eps, -torch.inf)
    tau = low.topk(k, dim=1).values[:, -1:]
    wanted = high >= tau
    rows, features = wanted.nonzero(as_tuple=True)
    scores = torch.full((N, F), -torch.inf, device=x.device)
    scores[rows, features] = exact_scores(x, W, b, rows, features) + 0.0  # -0 becomes +0
    return _choose(scores, wanted, tau[:, 0], k)


def _choose(scores: Tensor, wanted: Tensor, tau: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores [N, F] with -inf where not wanted; an unwanted feature cannot precede a wanted one that scores -inf."""
    F = scores.shape[1]
    candidates = wanted.sum(1)
    first = wanted.int().sort(dim=1, descending=True, stable=True).indices
    ordered = scores.gather(1, first).sort(dim=1, descending=True, stable=True)
    values, indices = ordered.values[:, :k], first.gather(1, ordered.indices[:, :k])
    nan = scores.isnan().any(1)
    values = values.masked_fill(nan[:, None], torch.nan)
    indices = torch.where(nan[:, None], torch.arange(k, device=scores.device), indices)
    gap = (values[:, -1].double() - tau).clamp(min=0).float()
    below = torch.nextafter(gap, torch.full_like(gap, -torch.inf)).clamp(min=0)
    margin = torch.where(candidates == F, torch.inf, below).masked_fill(nan, torch.nan)
    return values, indices.int(), candidates.int(), margin
