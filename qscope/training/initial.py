"""What training starts from: the origin and scale of the activations, and the first weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qscope.ops import sparse_decode, sparse_outer, topk_encode
from qscope.reference import rows_per_block

MEDIAN_ROWS = 32768
PROBES = 256
SCALE_ROWS = 4096
JUMPRELU_START_L0 = 2
"""Times k: how many features jumprelu's first threshold lets fire on the sample."""


def geometric_median(x: Tensor, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [D] float64 with the least sum of distances to the rows of x [N, D]: Weiszfeld's iteration from the
    mean, until the unit vectors towards the rows average to less than `tolerance`, at most `steps` times."""
    median = x.mean(0, dtype=torch.float64)
    blocks = x.split(rows_per_block(x.shape[1] * 2, torch.float64.itemsize))
    for _ in range(steps):
        pulled, weight = torch.zeros_like(median), median.new_zeros(())
        for block in blocks:
            apart = block.double() - median
            lengths = apart.norm(dim=1)
            pulls = lengths.clamp_min(torch.finfo(torch.float64).tiny).reciprocal()
            pulls = torch.where(lengths > 0, pulls, 0)  # a row at the iterate pulls nowhere
            pulled, weight = pulled + pulls @ apart, weight + pulls.sum()
        if float(pulled.norm()) <= tolerance * len(x):
            break
        median = median + pulled / weight
    return median


def mean_norm(x: Tensor, centre: Tensor) -> float:
    """Mean distance of the rows of x from the centre, in float64."""
    blocks = x.split(rows_per_block(x.shape[1] * 2, torch.float64.itemsize))
    return float(sum((block.double() - centre).norm(dim=1).sum() for block in blocks)) / len(x)


def unit_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Random directions [count, width], float32 on the CPU: the same on every device."""
    return F.normalize(torch.randn(count, width, generator=generator), dim=1)


def tied(sample: Tensor, d_sae: int, k: int, seed: int, scale: str) -> tuple[Tensor, Tensor]:
    """W_enc, W_dec [F, D] of an autoencoder for centred activations [M, D]: unit decoder rows, the encoder parallel to
    them. With scale "probes" the encoder is divided by the mean norm of the reconstructions of random unit vectors
    (Gao et al. 2024, reference implementation), with "sample" it gets the least squared error on the sample."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = unit_rows(d_sae, sample.shape[1], generator).to(sample.device)
    if scale == "sample":
        return W_dec * _least_squares(sample[:SCALE_ROWS], sample[:SCALE_ROWS], W_dec, W_dec, k), W_dec
    probes = unit_rows(PROBES, sample.shape[1], generator).to(sample.device)
    acts, ids = topk_encode(probes, W_dec, None, k)
    return W_dec / sparse_decode(acts, ids, W_dec, None).norm(dim=1).mean(), W_dec


def _least_squares(x: Tensor, target: Tensor, W_enc: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """The factor on W_enc with which the reconstruction of the target has the least squared error; 1 if there is no
    positive one."""
    acts, ids = topk_encode(x, W_enc, None, k)
    guess = sparse_decode(acts, ids, W_dec, None).double()
    ratio = (guess * target).sum() / guess.square().sum()
    return torch.where(ratio > 0, ratio, 1.0).float()


def transcoder(x: Tensor, target: Tensor, d_sae: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """W_enc [F, D_in], W_dec [F, D_out] from centred samples [M, D]: random unit encoder rows, each decoder row in the
    direction of the sum of the targets weighted by its feature's activations (random where it never fires), and
    the encoder scaled to the least squared error."""
    generator = torch.Generator().manual_seed(seed)
    W_enc = unit_rows(d_sae, x.shape[1], generator).to(x.device)
    W_dec = unit_rows(d_sae, target.shape[1], generator).to(x.device)
    acts, ids = topk_encode(x, W_enc, None, k)
    sums, _ = sparse_outer(acts, ids, target, d_sae)
    size = sums.norm(dim=1, keepdim=True)
    W_dec = torch.where(size > 0, sums / size, W_dec)
    return W_enc * _least_squares(x, target, W_enc, W_dec, k), W_dec


def jumprelu_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, limit: int) -> float:
    """One threshold above 0 for all features at which, on the sample [M, D], 2 k features of a token fire on average.

    Started near 0 as in the paper, half of F would fire, more than the selection holds; those near the
    threshold, the only ones that move it, would be cut off.
    """
    wanted = min(JUMPRELU_START_L0 * k, max(k, limit // 2))
    values, _ = topk_encode(x, W_enc, b_enc, limit)
    border = values.flatten().topk(wanted * len(x), sorted=False).values.amin()
    return float(border.clamp_min(1e-6 * float(values.max().clamp_min(1.0))))
