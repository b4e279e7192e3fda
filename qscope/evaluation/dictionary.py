"""Cosines between decoder rows: within one SAE, and between two whose features are matched one to one.

Cosines are computed a block at a time: [F, F] is never held for a large F.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qscope import reference
from qscope.errors import InputError

HELD = 1 << 24
"""Cosines that the greedy matching keeps at once: a smaller problem is held, a larger one swept through in blocks."""
MOST_HUNGARIAN = 8192
SAME = 0.7
"""Two features whose cosine reaches this are called the same (Paulo and Belrose 2025, arXiv 2501.16615)."""
BINS = 20


@dataclass(frozen=True)
class DecoderCosines:
    """c_f = max over g != f of cos(W_dec[f], W_dec[g])."""

    mean: float
    median: float
    largest: float
    above_09: float
    """Share of features with c_f > 0.9: near-duplicates."""
    histogram: list[int]
    """Features per bin of c_f: 20 bins of width 0.05 from 0 to 1; below 0 counts in the first."""
    norm_smallest: float
    norm_largest: float
    """Norms of decoder rows."""
    encoder_cosine: float
    """mean of cos(W_enc[f], W_dec[f])"""


@dataclass(frozen=True)
class Stability:
    """How much of an SAE's dictionary another SAE has found as well, by decoder rows."""

    against: str
    matching: str
    features: int
    other_features: int
    matched: int
    """Pairs, each feature in one: the smaller of the two sizes."""
    matched_cosine: float
    """mean cos(W_dec[f], W_dec'[m(f)]) over the pairs"""
    matched_share: float
    """Pairs with cos >= 0.7 / the SAE's features"""
    matched_encoder_cosine: float
    """mean cos(W_enc[f], W_enc'[m(f)]) over the same pairs"""
    mean_max_cosine: float
    """mean over f of max over g of cos(W_dec[f], W_dec'[g]) (MMCS); a feature of the other SAE may serve many times"""
    mean_max_cosine_reverse: float
    """The same from the other SAE to this one."""
    histogram: list[int]
    """Pairs per bin of the cosine: 20 bins of width 0.05 from 0 to 1; below 0 counts in the first."""


@torch.no_grad()
def decoder_cosines(W_enc: Tensor, W_dec: Tensor) -> DecoderCosines:
    """Of one SAE's weights, [F, D] each."""
    unit = unit_rows(W_dec)
    best = nearest(unit)[0].double()
    norms = torch.linalg.vector_norm(W_dec.double(), dim=1)
    return DecoderCosines(
        mean=float(best.mean()),
        median=float(best.median()),
        largest=float(best.max()),
        above_09=float((best > 0.9).double().mean()),
        histogram=cosine_histogram(best),
        norm_smallest=float(norms.min()),
        norm_largest=float(norms.max()),
        encoder_cosine=float((unit_rows(W_enc) * unit).sum(1).double().mean()),
    )


@torch.no_grad()
def stability(
    encoder: Tensor,
    decoder: Tensor,
    other_encoder: Tensor,
    other_decoder: Tensor,
    against: str,
    matching: Literal["greedy", "hungarian"] = "greedy",
) -> Stability:
    """Match the features of two SAEs on the same residuals by decoder cosine. All are [F, D], F may differ."""
    one, other = unit_rows(decoder), unit_rows(other_decoder)
    if not bool(one.isfinite().all() and other.isfinite().all()):
        raise InputError(f"The decoder of one of the two SAEs ({against} is the other) holds NaN or infinite weights.")
    mine, theirs = (greedy_match if matching == "greedy" else hungarian_match)(one, other)
    cosine = (one[mine] * other[theirs]).sum(1).double()
    encoders = (unit_rows(encoder[mine]) * unit_rows(other_encoder[theirs])).sum(1).double()
    return Stability(
        against=against,
        matching=matching,
        features=len(one),
        other_features=len(other),
        matched=len(mine),
        matched_cosine=float(cosine.mean()),
        matched_share=int((cosine >= SAME).sum()) / len(one),
        matched_encoder_cosine=float(encoders.mean()),
        mean_max_cosine=float(nearest(one, other)[0].double().mean()),
        mean_max_cosine_reverse=float(nearest(other, one)[0].double().mean()),
        histogram=cosine_histogram(cosine),
    )


def unit_rows(W: Tensor) -> Tensor:
    """W with rows of length 1, float32; a row of zeros stays."""
    wide = W.float()
    return wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def cosine_histogram(cosine: Tensor) -> list[int]:
    return torch.bincount((cosine.clamp(0, 1) * BINS).long().clamp_max(BINS - 1), minlength=BINS).tolist()


def nearest(one: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(largest cosine, lowest row of `other` that has it) for each row of `one`; unit rows [F, D], [G, D].

    Without `other`: to the other rows of `one`; a single row has cosine 0 to row 0.
    """
    target = one if other is None else other
    values, indices = [], []
    for rows in torch.arange(len(one), device=one.device).split(reference.rows_per_block(len(target), 16)):
        cosines = one[rows] @ target.T
        if other is None:
            cosines[torch.arange(len(rows), device=one.device), rows] = -torch.inf
        value, index = _best(cosines)
        values.append(value)
        indices.append(index)
    found = torch.cat(values)
    return found.where(found > -torch.inf, 0.0), torch.cat(indices)


def _best(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each row and the lowest column that has it: the same on every device, ties included."""
    value = cosines.amax(1)
    columns = torch.arange(cosines.shape[1], device=cosines.device)
    return value, columns.where(cosines == value[:, None], cosines.shape[1]).amin(1)


def greedy_match(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (row of one, row of other) that taking the largest cosine between free rows, again and again, gives.

    Unit rows [F, D], [G, D] -> two [min(F, G)] int64. A pair that is the best for both of its rows is one that this
    would take, so all such pairs are taken at once, and the rest is looked at again.
    """
    left = torch.arange(len(one), device=one.device)
    right = torch.arange(len(other), device=one.device)
    pairs: list[tuple[Tensor, Tensor]] = []
    held: Tensor | None = None
    while len(left) and len(right):
        if held is None and len(left) * len(right) <= HELD:
            held = one[left] @ other[right].T
        column, row = _mutual(one[left], other[right]) if held is None else (_best(held)[1], _best(held.T)[1])
        mutual = row[column] == torch.arange(len(left), device=one.device)
        pairs.append((left[mutual], right[column[mutual]]))
        stay = torch.ones(len(right), dtype=torch.bool, device=one.device)
        stay[column[mutual]] = False
        held = None if held is None else held[~mutual][:, stay]
        left, right = left[~mutual], right[stay]
    mine, theirs = (torch.cat(part) for part in zip(*pairs, strict=True))
    order = mine.argsort()
    return mine[order], theirs[order]


def _mutual(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(best column of each row, best row of each column) of one @ other.T, in one sweep over blocks of rows."""
    columns = []
    value = torch.full((len(other),), -torch.inf, device=one.device)
    row = torch.zeros(len(other), dtype=torch.int64, device=one.device)
    for rows in torch.arange(len(one), device=one.device).split(reference.rows_per_block(len(other), 16)):
        cosines = one[rows] @ other.T
        columns.append(_best(cosines)[1])
        block, place = _best(cosines.T)
        better = block > value  # an equal one further on loses to the earlier row
        row = torch.where(better, rows[place], row)
        value = torch.where(better, block, value)
    return torch.cat(columns), row


def hungarian_match(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs with the largest sum of cosines. Holds all F x G of them in float64: at most 8192 features a side."""
    if max(len(one), len(other)) > MOST_HUNGARIAN:
        raise InputError(
            f"Hungarian matching of {len(one)} with {len(other)} features was asked for; it holds all pairs, and at "
            f"most {MOST_HUNGARIAN} features a side are accepted. Use --matching greedy."
        )
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise InputError(
            "Hungarian matching needs scipy: pip install 'qscope[report]', or use --matching greedy."
        ) from error
    rows, columns = linear_sum_assignment((one @ other.T).double().cpu().numpy(), maximize=True)
    return torch.from_numpy(rows).to(one.device), torch.from_numpy(columns).to(one.device)
