"""What a result must satisfy before it is timed; every tolerance follows from the precision that was used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Unit roundoff: half a unit in the last place of a result.
ROUNDING = {"float32": 2.0**-24, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_BLOCK = 1024


@contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    """float32 matrix products on the GPU in "ieee" or "tf32"; restored afterwards."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, value
    try:
        yield
    finally:
        matmul.fp32_precision = before


def float32_scores(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x W^T + b in float32 from the upcast inputs, never in TF32."""
    with matmul_precision("ieee"):
        return torch.nn.functional.linear(x.float(), W.float(), b.float())


def score_tolerance(scores: Tensor, D: int, precision: str) -> float:
    """How far a score may lie from its float32 value, for rows of unit variance, so that |x| |w| is sqrt(D).

    float32: two orders of summing D terms of magnitude 0.8 / sqrt(D), errors growing like sqrt(D) at each step.
    tf32: two roundings of 2^-11 a term with random signs, six standard deviations over 10^9 scores.
    bfloat16: one rounding of the largest score; twice that, since a product may be summed in bfloat16 parts.
    """
    if precision == "float32":
        return D * 2.0**-23
    if precision == "tf32":
        return 8 * ROUNDING["tf32"]
    return 2 * ROUNDING["bfloat16"] * float(scores.abs().max())


def check_topk(result: tuple[Tensor, Tensor], scores: Tensor, k: int, tolerance: float) -> None:
    """A threshold certificate, in any order: values are those scores, and nothing left out lies clearly above.

    No relu: at the shapes that are measured the k largest scores are positive.
    """
    values, indices = result[0].float(), result[1].long()
    assert values.shape == indices.shape == (scores.shape[0], k), f"shape {list(values.shape)} for k={k}"
    off = float((values - scores.gather(1, indices)).abs().max())
    assert off <= tolerance, f"a value is {off:.3g} off its score; {tolerance:.3g} is allowed"
    ordered = indices.sort(dim=1).values
    assert bool((ordered[:, 1:] != ordered[:, :-1]).all()), "an id was selected twice"
    blocks = zip(scores.split(_BLOCK), indices.split(_BLOCK), values.split(_BLOCK), strict=True)
    for block, ids, kept in blocks:
        missed = float((block.scatter(1, ids, -torch.inf).amax(1) - kept.amin(1)).max())
        assert missed <= 2 * tolerance, f"a score {missed:.3g} above the smallest selected one was left out"


def close(name: str, result: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """|result - want| <= bound, elementwise; infinities must be equal, NaN is never right."""
    assert result.shape == want.shape, f"{name} has shape {list(result.shape)}, not {list(want.shape)}"
    off = (result.to(want.dtype) - want).abs()
    right = (off <= bound) | (result == want)
    assert bool(right.all()), f"{name} is off at {int((~right).sum())} places, by up to {float(off[~right].max()):.3g}"


def decode_answer(acts: Tensor, indices: Tensor, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The float32 reconstruction, and the sum of the magnitudes of its terms, which its error scales with."""
    bias = None if b is None else b.float()
    want = torch.empty(acts.shape[0], W.shape[1], device=W.device)
    magnitude, sizes = torch.empty_like(want), W.abs()
    for begin in range(0, acts.shape[0], _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        v, i = acts[rows].float(), indices[rows]
        want[rows] = _decode(v, i, W, bias)
        magnitude[rows] = _decode(v.abs(), i, sizes, None if bias is None else bias.abs())
    return want, magnitude


def _decode(v: Tensor, i: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """reference.sparse_decode rounds to W's dtype; the answer keeps float32."""
    y = torch.zeros(v.shape[0], W.shape[1], device=W.device)
    for slot in range(v.shape[1]):
        y += v[:, slot, None] * W.index_select(0, i[:, slot].long()).float()
    return y if b is None else y + b


def check_decode(result: Tensor, answer: tuple[Tensor, Tensor], k: int, precision: str) -> None:
    """Two float32 sums of k terms in different orders, and one rounding to the dtype of the result.

    tf32 and bfloat16 products (the dense decoder) round each factor: half a unit of each term as well.
    """
    want, magnitude = answer
    bound = 2 * (k + 2) * ROUNDING["float32"] * magnitude
    if precision != "float32":
        bound = bound + ROUNDING[precision] * (magnitude + 2 * want.abs())
    close("the reconstruction", result.float(), want, bound)
