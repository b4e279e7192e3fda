"""How well reconstructions match: squared error, direction, size, sparsity, and how often each feature fires.

Tokens come in two groups. ORDINARY ones, and those SET_ASIDE: attention sinks (extreme norm) and the first token of
every context. Sums are kept per group, so that every figure can be had for the ordinary tokens and for all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qscope import ops, reference
from qscope.evaluation.moments import Basis

ORDINARY, SET_ASIDE, LEFT_OUT = 0, 1, -1
DENSE = 0.1
"""A feature is dense if it fires on more than this share of the tokens."""
LOG10_START, LOG10_STEP, BINS = -7.0, 0.25, 28
"""The density histogram: bin i counts features whose log10(density) is in START + STEP [i, i + 1); ends are open."""

_SUMS = (
    "tokens", "error", "deviation", "deviation_hat", "deviation_dot", "square", "square_hat", "dot", "cosine",
    "norm_ratio", "l0", "pca_ordinary", "pca_all",
)  # fmt: skip


@dataclass(frozen=True)
class Densities:
    """How often features fire. density_f = tokens on which feature f is above 0 / tokens."""

    alive: int
    """Features that fired at least once."""
    dead_share: float
    """Features that never fired / d_sae. On few tokens, rare features count as dead."""
    dense_share: float
    """Features with density > 0.1 / d_sae."""
    median: float | None
    """Median density of the features that fired."""
    histogram: list[int]
    """Alive features per bin of log10(density): 28 bins of width 0.25 from -7 to 0."""


@dataclass(frozen=True)
class Fit:
    """Reconstruction of one set of n tokens. e = x - x_hat; mean is that of the set. None: a denominator is 0."""

    tokens: int
    fvu: float | None
    """sum ||x - x_hat||^2 / sum ||x - mean||^2"""
    explained_variance: float | None
    """1 - fvu"""
    frac_variance_explained: float | None
    """1 - sum ||e - mean e||^2 / sum ||x - mean||^2: as dictionary_learning and SAEBench's first version have it; a
    constant error costs nothing."""
    mse: float | None
    """sum ||x - x_hat||^2 / (n D)"""
    cosine: float | None
    """mean of x . x_hat / (||x|| ||x_hat||); 0 where a vector is 0"""
    l0: float | None
    """mean number of features above 0"""
    norm_ratio: float | None
    """mean of ||x_hat|| / ||x|| (SAEBench's l2_ratio); below 1: shrinkage"""
    relative_reconstruction_bias: float | None
    """sum ||x_hat||^2 / sum x . x_hat (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 10); below 1: shrinkage"""
    scale: float | None
    """The s that minimises sum ||x - s x_hat||^2: sum x . x_hat / sum ||x_hat||^2; above 1: shrinkage"""
    scale_about_mean: float | None
    """The same for x - mean and x_hat - mean: the share of x that is the mean cannot hide shrinkage"""
    pca_fvu: float | None
    """FVU of the rank-K PCA, K = the SAE's k, fitted on other tokens of the same kind"""
    densities: Densities


class Fidelity:
    """Sums over tokens, float64, in the order in which batches come.

    d_sae: features; pca: the linear codes of the ordinary tokens and of all, fitted on other tokens.
    """

    def __init__(self, d_sae: int, pca: tuple[Basis, Basis]) -> None:
        self.pca = pca
        self.shift = shift = pca[0].mean  # near the mean: keeps digits
        device = shift.device
        self.left_out = 0
        self.sums = torch.zeros(2, len(_SUMS), dtype=torch.float64, device=device)
        self.total = torch.zeros(2, len(shift), dtype=torch.float64, device=device)
        self.total_hat = torch.zeros_like(self.total)
        self.count = torch.zeros(2, d_sae, dtype=torch.int64, device=device)
        self._unused = (
            torch.zeros(2, d_sae, dtype=torch.float64, device=device),
            torch.zeros(2, d_sae, dtype=torch.float64, device=device),
            torch.zeros(2, d_sae, dtype=torch.float32, device=device),
        )

    @torch.no_grad()
    def add(self, x: Tensor, x_hat: Tensor, acts: Tensor, indices: Tensor, group: Tensor) -> None:
        """One batch.

        x, x_hat: [n, D]; acts, indices: [n, K], the active features; group: [n] int32, ORDINARY, SET_ASIDE or
        LEFT_OUT, which rows that are not finite have to be.
        """
        self.left_out += int((group == LEFT_OUT).sum())
        ops.feature_stats_(acts, indices, self.count, *self._unused, group)
        step = reference.rows_per_block(x.shape[1], 64)  # eight float64 copies of a row
        for rows in torch.arange(len(x), device=x.device).split(step):
            wide, hat = x[rows].double(), x_hat[rows].double()
            one, other = (basis.reconstruct(wide) for basis in self.pca)
            values = _per_token(wide, hat, one, other, acts[rows], self.shift)
            for which in (ORDINARY, SET_ASIDE):
                mine = (group[rows] == which)[:, None]
                self.sums[which] += values.where(mine, 0.0).sum(0)
                self.total[which] += (wide - self.shift).where(mine, 0.0).sum(0)
                self.total_hat[which] += (hat - self.shift).where(mine, 0.0).sum(0)

    def fit(self, ordinary_only: bool) -> Fit:
        """The figures of the ordinary tokens, or of all that were not left out."""
        groups = [ORDINARY] if ordinary_only else [ORDINARY, SET_ASIDE]
        sums = dict(zip(_SUMS, self.sums[groups].sum(0).tolist(), strict=True))
        total, total_hat = self.total[groups].sum(0), self.total_hat[groups].sum(0)
        n, width = sums["tokens"], len(self.shift)
        over = 1.0 / max(n, 1.0)
        variance = sums["deviation"] - float(total @ total) * over
        if variance <= 1e-12 * sums["deviation"]:  # rounding only: one token, or all alike
            variance = 0.0
        variance_hat = sums["deviation_hat"] - float((2 * total_hat - total) @ total) * over
        covariance = sums["deviation_dot"] - float(total_hat @ total) * over
        bias = float((total - total_hat).square().sum()) * over
        fvu = ratio(sums["error"], variance)
        return Fit(
            tokens=int(n),
            fvu=fvu,
            explained_variance=None if fvu is None else 1 - fvu,
            frac_variance_explained=None if fvu is None else 1 - (sums["error"] - bias) / variance,
            mse=ratio(sums["error"], n * width),
            cosine=ratio(sums["cosine"], n),
            l0=ratio(sums["l0"], n),
            norm_ratio=ratio(sums["norm_ratio"], n),
            relative_reconstruction_bias=ratio(sums["square_hat"], sums["dot"]),
            scale=ratio(sums["dot"], sums["square_hat"]),
            scale_about_mean=ratio(covariance, variance_hat),
            pca_fvu=ratio(sums["pca_ordinary" if ordinary_only else "pca_all"], variance),
            densities=densities(self.count[groups].sum(0), int(n)),
        )

    def set_aside_variance(self) -> float:
        """1 - sum ||x - mean||^2 over the ordinary tokens / the same over all, each about its own mean; 0..1."""
        deviation, total, count = self.sums[:, _SUMS.index("deviation")], self.total, self.sums[:, 0].clamp_min(1)
        ordinary = float(deviation[ORDINARY] - total[ORDINARY].square().sum() / count[ORDINARY])
        every = float(deviation.sum() - total.sum(0).square().sum() / self.sums[:, 0].sum().clamp_min(1))
        return max(0.0, 1 - ordinary / every) if every > 0 else 0.0


def _per_token(x: Tensor, hat: Tensor, one: Tensor, other: Tensor, acts: Tensor, shift: Tensor) -> Tensor:
    """[n, len(_SUMS)] float64: what each token adds to the sums."""
    d, d_hat = x - shift, hat - shift
    square, square_hat, dot = _dot(x, x), _dot(hat, hat), _dot(x, hat)
    size = (square * square_hat).sqrt()
    columns = {
        "tokens": torch.ones_like(dot),
        "error": _dot(x - hat, x - hat),
        "deviation": _dot(d, d),
        "deviation_hat": _dot(d_hat, d_hat),
        "deviation_dot": _dot(d, d_hat),
        "square": square,
        "square_hat": square_hat,
        "dot": dot,
        "cosine": (dot / size).where(size > 0, 0.0),
        "norm_ratio": (square_hat / square).sqrt().where(square > 0, 0.0),
        "l0": (acts > 0).sum(1).double(),
        "pca_ordinary": _dot(x - one, x - one),
        "pca_all": _dot(x - other, x - other),
    }
    return torch.stack([columns[name] for name in _SUMS], 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def densities(count: Tensor, tokens: int) -> Densities:
    """From the number of tokens on which each feature fired, [F] int64, of `tokens`."""
    alive = count[count > 0].double() / max(tokens, 1)
    bins = ((alive.log10() - LOG10_START) / LOG10_STEP).floor().clamp(0, BINS - 1).long()
    return Densities(
        alive=len(alive),
        dead_share=1 - len(alive) / len(count),
        dense_share=int((alive > DENSE).sum()) / len(count),
        median=float(alive.median()) if len(alive) else None,
        histogram=torch.bincount(bins, minlength=BINS).tolist(),
    )


def ratio(over: float, under: float) -> float | None:
    """over / under, or None where that is no number."""
    return over / under if under else None
