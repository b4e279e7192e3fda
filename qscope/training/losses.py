"""The objectives on the sparse operators: each gives the loss of a batch and the gradients of all parameters.

Gradients are put together by hand from the active entries, without autograd: no [N, F] tensor is made. The meaning of
every loss in plain dense PyTorch is in qscope/reference/train_losses.py.

`scale` is 1 / total variance of the targets, so that the loss is the fraction of variance unexplained. It is handed in
because many processes share one variance; with it, gradients of parts of a batch add up to those of the batch.
`across` is what processes that share the batch or the features exchange (`qscope.training.parallel`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qscope.ops import sparse_grads, sparse_outer
from qscope.ops.sparse_grads import SparseGrads
from qscope.training.parallel import ALONE, Alone

MULTI_TOPK_FACTOR, MULTI_TOPK_WEIGHT = 4, 1 / 8

LIFT = 0.1
"""Times AuxK's weight: that of the pre-activation loss. Measured: planted dead features come back as fast as with ten
times as much, hardly with a tenth. The bias gradients of 10^5 such features have norm 1, the limit of clipping."""


class Weights(NamedTuple):
    """What a forward pass reads."""

    W_enc: Tensor
    """[F, D_in]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, D_out]"""
    b_dec: Tensor
    """[D_out]"""


class Codes(NamedTuple):
    """The active entries of a batch; what is not active has the value 0."""

    acts: Tensor
    """[N, K]"""
    ids: Tensor
    """[N, K] int32"""
    overflow: Tensor
    """[] int64: tokens that may have lost entries to the limit per token; 0 means that the selection is proven."""


@dataclass
class Loss:
    """Loss and gradients of a batch."""

    loss: Tensor
    """[] float32: the part that sums over the tokens of a batch"""
    fvu: Tensor
    """[] float32: squared error of the reconstruction times `scale`"""
    error: Tensor
    """[N, D_out] float32: reconstruction minus target"""
    codes: Codes
    grads: SparseGrads
    """Float32; rows of features without an active entry are zero."""
    touched: Tensor
    """[F] bool: features with a gradient"""
    penalty: Tensor | float = 0.0
    """The part that belongs to the batch as a whole; what is minimised is loss + penalty"""
    log_threshold: Tensor | None = None
    """[F] float32: gradient of jumprelu's log thresholds"""


def fired(acts: Tensor, ids: Tensor, d_sae: int) -> Tensor:
    """[F] bool: features with a value above 0 (NaN is not). Without boolean indexing, which waits for a GPU."""
    marks = torch.zeros(d_sae + 1, dtype=torch.bool, device=acts.device)
    return marks.index_fill_(0, ids.long().masked_fill(~(acts > 0), d_sae).flatten(), True)[:d_sae]


# --- selection -------------------------------------------------------------------------------------------


def select_topk(x: Tensor, w: Weights, k: int, precision: str, across: Alone = ALONE) -> Codes:
    acts, ids, _ = across.encode(x, w.W_enc, w.b_enc, k, precision)
    return Codes(acts, ids, torch.zeros((), dtype=torch.int64, device=x.device))


def select_batch_topk(
    x: Tensor, w: Weights, k: int, limit: int, precision: str, across: Alone = ALONE
) -> tuple[Codes, Tensor]:
    """The k N largest values of the batch, and the smallest of them that is above 0 (infinity if there is none).

    The `limit` largest of every token are merged. A value outside them cannot belong to the k N largest unless all
    `limit` of its token do: those tokens are counted as overflow, and if there are none the selection is that of the
    whole [N, F]. Equal values at the border: lowest token, then lowest id.
    """
    acts, ids, every = across.encode(x, w.W_enc, w.b_enc, limit, precision)
    every = every.masked_fill(every.isnan(), 0)  # a row of NaN must not decide for the others; its error stays NaN
    every, first = across.batch(every)
    flat, wanted = every.flatten(), k * len(every)
    border = flat.topk(wanted, sorted=False).values.amin()
    above, equal = flat > border, flat == border
    keep = (above | (equal & (equal.cumsum(0) <= wanted - above.sum()))) & (flat > 0)
    keep = keep.view_as(every)
    threshold = torch.where(keep, every.float(), torch.inf).amin()
    keep = keep[first : first + len(x)]
    cut = limit < across.features(w.W_enc.shape[0])
    full = keep[:, -1].sum() if cut else keep.new_zeros((), dtype=torch.int64)
    codes = Codes(acts.masked_fill(~keep, 0), ids, full)
    return _narrowed(codes, keep), threshold


def _narrowed(codes: Codes, used: Tensor) -> Codes:
    """Without the columns that no token uses, those at the end and, where other processes hold features, those in
    between; on a GPU finding them would wait for the device."""
    if used.is_cuda:
        return codes
    columns = used.any(0)
    columns[0] |= ~columns.any()  # one must remain
    return Codes(codes.acts[:, columns], codes.ids[:, columns], codes.overflow)


# --- reconstruction --------------------------------------------------------------------------------------


def _gradients(acts: Tensor, slopes: Tensor, ids: Tensor, g: Tensor, x: Tensor, d_sae: int) -> SparseGrads:
    """sparse_grads, also for a transcoder whose input and output differ in width, and for no features at all."""
    if d_sae == 0:
        none = g.new_zeros
        return SparseGrads(none(0, g.shape[1]), none(0, x.shape[1], dtype=g.dtype), none(0), g.sum(0))
    if g.shape[1] == x.shape[1]:
        return sparse_grads(acts, slopes, ids, g, x, d_sae)
    W_dec, _ = sparse_outer(acts, ids, g, d_sae)
    W_enc, b_enc = sparse_outer(slopes, ids, x, d_sae)
    return SparseGrads(W_dec, W_enc, b_enc, g.sum(0))


def reconstruction_loss(
    codes: Codes, w: Weights, x: Tensor, target: Tensor, scale: Tensor, across: Alone = ALONE
) -> Loss:
    """scale * ||decode(codes) - target||^2, summed over the batch."""
    acts, ids, _ = codes
    d_sae = w.W_enc.shape[0]
    out = across.decode(acts, ids, w.W_dec, w.b_dec, target)
    act_grads = (out.act_grads * scale).masked_fill(~(acts > 0), 0)  # not a product: 0 * NaN
    grads = _gradients(acts, act_grads, ids, out.error * (2 * scale), x, d_sae)
    fvu = out.sq_err.sum() * scale
    return Loss(fvu, fvu, out.error, codes, grads, fired(acts, ids, d_sae))


def multi_topk_loss(
    codes: Codes, w: Weights, x: Tensor, target: Tensor, scale: Tensor, k: int, across: Alone = ALONE
) -> Loss:
    """The loss with the k first of the entries plus 1/8 of that with all (Gao et al. 2024, section 4.3)."""
    first = Codes(codes.acts[:, :k].contiguous(), codes.ids[:, :k].contiguous(), codes.overflow)
    main = reconstruction_loss(first, w, x, target, scale, across)
    wide = reconstruction_loss(codes, w, x, target, scale * MULTI_TOPK_WEIGHT, across)
    for total, part in zip(main.grads, wide.grads, strict=True):
        total += part
    main.loss = main.loss + wide.loss
    main.touched |= wide.touched
    return main


def nested_loss(
    codes: Codes, w: Weights, x: Tensor, target: Tensor, scale: Tensor, sizes: tuple[int, ...], across: Alone = ALONE
) -> Loss:
    """Mean over the sizes m of the loss of the reconstruction from the features 0..m-1 (Bussmann et al. 2025).

    Sizes ascend to F. The gradient of an entry is the sum over the dictionaries that hold it, so what belongs to the
    features of one interval between sizes is one sum over that interval alone.
    """
    acts, ids, _ = codes
    d_sae = w.W_enc.shape[0]
    sizes = across.prefixes(sizes)
    outs = [across.decode(acts.masked_fill(ids >= size, 0), ids, w.W_dec, w.b_dec, target) for size in sizes]
    part = scale / len(sizes)
    g = torch.zeros_like(outs[0].error)
    act_grads = torch.zeros_like(outs[0].act_grads)
    pieces = []
    for out, first, last in reversed(list(zip(outs, (0, *sizes), sizes, strict=False))):
        g = g + out.error * (2 * part)
        act_grads = act_grads + out.act_grads * part
        inside = (ids >= first) & (ids < last) & (acts > 0)
        values, slopes = acts.masked_fill(~inside, 0), act_grads.masked_fill(~inside, 0)
        pieces.append(_gradients(values, slopes, (ids - first).masked_fill(~inside, 0), g, x, last - first))
    pieces.reverse()
    rows = [torch.cat([piece[i] for piece in pieces]) for i in range(3)]
    grads = SparseGrads(rows[0], rows[1], rows[2], pieces[0].b_dec)
    loss = torch.stack([out.sq_err.sum() for out in outs]).sum() * part
    fvu = outs[-1].sq_err.sum() * scale
    return Loss(loss, fvu, outs[-1].error, codes, grads, fired(acts, ids, d_sae))


# --- jumprelu --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Penalty:
    """weight (L0 / target - 1)^2, or weight L0 where target is None."""

    weight: float
    target: int | None

    def __call__(self, l0: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope."""
        if self.target is None:
            return self.weight * l0, torch.full_like(l0, self.weight)
        excess = l0 / self.target - 1
        return self.weight * excess.square(), 2 * self.weight / self.target * excess


def jumprelu_loss(
    x: Tensor,
    w: Weights,
    log_threshold: Tensor,
    target: Tensor,
    scale: Tensor,
    *,
    bandwidth: float,
    penalty: Penalty,
    limit: int,
    precision: str,
    across: Alone = ALONE,
) -> Loss:
    """scale * squared error + penalty(L0), with z H(z - t) for z = W_enc x + b_enc and t = exp(log_threshold).

    Straight-through estimators with the rectangle kernel of width e = bandwidth (Rajamanoharan et al. 2024, equations
    11 and 12): d/dt z H(z - t) = -t/e and d/dt H(z - t) = -1/e where |z - t| < e/2, else 0; d/dz z H(z - t) = H(z - t)
    and d/dz H = 0. The entries that count are those with z > t - e/2: ranked by z - t, the `limit` largest of each
    token are kept, tokens that have more are counted as overflow.
    """
    half = bandwidth / 2
    threshold = log_threshold.exp()
    offset = threshold - half
    lifted, ids, every = across.encode(x, w.W_enc, w.b_enc - offset, limit, precision)
    lifted = lifted.float()
    d_sae = w.W_enc.shape[0]
    cut = limit < across.features(d_sae)
    overflow = (every[:, -1] > 0).sum() if cut else lifted.new_zeros((), dtype=torch.int64)
    codes = _narrowed(Codes(lifted, ids, overflow), lifted > 0)
    lifted, ids, _ = codes
    active = lifted > half
    near = (lifted > 0) & (lifted < bandwidth)
    at = threshold[ids.long()]
    acts = torch.where(active, lifted + (at - half), torch.where(lifted.isnan(), lifted, 0))
    out = across.decode(acts, ids, w.W_dec, w.b_dec, target)
    slopes = out.act_grads * scale
    grads = _gradients(acts, slopes.masked_fill(~active, 0), ids, out.error * (2 * scale), x, d_sae)
    tokens = torch.full((), float(across.tokens(len(x))), device=x.device)
    value, steepness = penalty(across.over_all(active.sum().float()) / tokens)
    per_token = steepness / tokens
    pull = (-(slopes * at + per_token) * at / bandwidth).masked_fill(~near, 0)  # at: the log's chain rule
    one = torch.ones(len(x), 1, device=x.device)
    _, log_grad = sparse_outer(pull, ids, one, d_sae)
    touched = fired(lifted, ids, d_sae)
    fvu = out.sq_err.sum() * scale
    codes = Codes(acts, ids, overflow)
    return Loss(fvu, fvu, out.error, codes, grads, touched, value, log_grad)


# --- dead features ---------------------------------------------------------------------------------------


def aux_loss(
    x: Tensor,
    w: Weights,
    dead: Tensor,
    error: Tensor,
    k: int,
    weight: float,
    precision: str,
    across: Alone = ALONE,
    dead_in_all: int | None = None,
) -> tuple[Tensor, SparseGrads, Tensor]:
    """weight * ||W_dec^T a - missed||^2 / variance(missed), missed = -error: the k largest of the dead features predict
    what the SAE left (AuxK, Gao et al. 2024, section 4.2; normalised as dictionary_learning). The error is a constant
    here. Not a number counts as 0.

    A dead feature whose scores are negative on all tokens of the batch is cut off by ReLU and would never come back.
    It adds weight * LIFT * mean_n(-score[n]), which raises its bias until it can take part: the pre-activation loss of
    Conerly et al. 2025 (Anthropic), given to dead features alone as in SAELens. Only once every token selects all of
    its positive dead features: before, a feature that took no part may only have been outdone, and others come first.

    dead [M] int64, ascending, and dead_in_all, M on all processes, at least 1.

    Returns the loss, the gradients of the rows `dead` of W_dec, W_enc and b_enc (b_dec takes no part), and [M] bool,
    which of them have one.
    """
    W_dec, W_enc, b_enc = w.W_dec[dead], w.W_enc[dead], w.b_enc[dead]
    every_dead = len(dead) if dead_in_all is None else dead_in_all
    k = min(k, every_dead)
    acts, ids, every = across.encode(x, W_enc, b_enc, k, precision)
    missed = -error
    out = across.decode(acts, ids, W_dec, None, missed)
    scale = (weight / across.variance(missed).float()).nan_to_num(nan=0.0, posinf=0.0)
    slopes = (out.act_grads * scale).masked_fill(~(acts > 0), 0)
    grads = _gradients(acts, slopes, ids, out.error * (2 * scale), x, len(dead))
    loss = (out.sq_err.sum() * scale).nan_to_num(nan=0.0)
    reached = fired(acts, ids, len(dead))
    crowded = ~(every[:, -1:] <= 0).all(0) if k < every_dead else reached.new_zeros(1)
    flags = across.any_token(torch.cat([crowded, reached]))  # of all processes that share the batch
    buried = ~flags[1:] & ~flags[:1]
    lift, x_sum = weight * LIFT / across.tokens(len(x)), x.sum(0, dtype=torch.float32)
    scores = W_enc.float() @ x_sum + len(x) * b_enc.float()
    loss = loss - lift * across.over_features(torch.where(buried, scores, 0).sum().nan_to_num(nan=0.0))
    grads.W_enc.sub_(torch.where(buried[:, None], lift * x_sum, 0))  # not a product: 0 * NaN
    grads.b_enc.sub_(torch.where(buried, lift * len(x), 0.0))
    return loss, grads, reached | buried
