"""What a reconstruction does to the model: next-token loss with the output of one block replaced."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope import reference
from qscope.errors import ModelError
from qscope.evaluation.fidelity import ratio

VARIANTS = ("sae", "zero", "mean", "pca")


@dataclass(frozen=True)
class SpliceLoss:
    """Next-token loss, in nats, mean over the predicted tokens, with residuals replaced at some tokens.

    ce_*: -log p(next token); kl_*: sum_v p_clean(v) log(p_clean(v) / p(v)). sae: by the reconstruction, zero: by 0,
    mean: by the mean of other tokens of the kind, pca: by the rank-K PCA. None: a denominator is 0, or no tokens.
    """

    tokens: int
    """Predictions that were scored."""
    replaced: int
    """Tokens whose residual was replaced."""
    left_out: int
    """Predictions left out because a loss was not finite."""
    ce_clean: float | None
    ce_sae: float | None
    ce_zero: float | None
    ce_mean: float | None
    ce_pca: float | None
    kl_sae: float | None
    kl_zero: float | None
    kl_mean: float | None
    kl_pca: float | None
    ce_increase: float | None
    """ce_sae - ce_clean"""
    ce_increase_error: float | None
    """Standard error of ce_increase: deviation of the paired differences / sqrt(tokens), tokens as if independent"""
    loss_recovered: float | None
    """(ce_zero - ce_sae) / (ce_zero - ce_clean)"""
    loss_recovered_mean: float | None
    """(ce_mean - ce_sae) / (ce_mean - ce_clean)"""
    loss_recovered_pca: float | None
    """(ce_zero - ce_pca) / (ce_zero - ce_clean): what the PCA recovers"""
    kl_recovered: float | None
    """1 - kl_sae / kl_zero (SAEBench's kl_div_score)"""


@contextlib.contextmanager
def spliced(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside the with-block, `block` puts out `hidden` [B, S, D] instead of what it computes.

    The rest of a tuple that it puts out stays. Raises ModelError where the block puts out another shape, and when the
    with-block is left although the block never ran (a compiled model may skip hooks silently).
    """
    runs = 0

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal runs
        runs += 1
        own = output[0] if isinstance(output, tuple) else output
        if not isinstance(own, Tensor) or own.shape != hidden.shape:
            found = list(own.shape) if isinstance(own, Tensor) else type(own).__name__
            raise ModelError(
                f"{type(block).__name__} puts out {found}, and a residual {list(hidden.shape)} was to take its place."
                " Give token ids of the shape that the residual was taken from."
            )
        new = hidden.to(own.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
    if not runs:
        raise ModelError(
            f"{type(block).__name__} never ran inside the with-block, or its hooks were skipped, as compiled models "
            "and inference engines do. Call the uncompiled model inside the with-block."
        )


@contextlib.contextmanager
def bypassed(blocks: list[nn.Module], as_tuple: list[bool]) -> Iterator[None]:
    """Inside the with-block, these blocks hand on their input: before a block whose output is replaced, they only cost.

    as_tuple: whether each of them puts out a tuple. Not right for a model whose later blocks read more of an early
    block than its output; compare the logits once.
    """
    own = [vars(block).get("forward") for block in blocks]  # another library may have put its own there
    for block, wrap in zip(blocks, as_tuple, strict=True):
        block.forward = _hand_on_tuple if wrap else _hand_on
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _hand_on(*inputs: Any, **options: Any) -> Any:
    return inputs[0] if inputs else next(iter(options.values()))


def _hand_on_tuple(*inputs: Any, **options: Any) -> tuple[Any]:
    return (_hand_on(*inputs, **options),)


@torch.no_grad()
def next_token_losses(logits: Tensor, targets: Tensor, clean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(cross-entropy, KL from the clean distribution), each [n] float64, in nats.

    logits: [n, V], of any float dtype; targets: [n] int64; clean: [n, V], or None: the KL is 0. Computed in float64,
    a few rows at a time.
    """
    entropy = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    divergence = torch.zeros_like(entropy)
    step = reference.rows_per_block(logits.shape[1], 32)  # four float64 rows
    for at in range(0, len(logits), step):
        part = slice(at, at + step)
        log_p = logits[part].double().log_softmax(1)
        entropy[part] = -log_p.gather(1, targets[part, None]).squeeze(1)
        if clean is not None:
            log_clean = clean[part].double().log_softmax(1)
            # A token that the clean model excludes (-inf) adds nothing, as the limit of p log p says.
            terms = log_clean.exp() * (log_clean - log_p)
            divergence[part] = terms.where(log_clean > -torch.inf, 0.0).sum(1)
    return entropy, divergence


class SpliceSums:
    """Sums of losses over predictions; one that is not finite in some variant is left out of all."""

    def __init__(self) -> None:
        self.tokens = self.left_out = self.replaced = 0
        self.ce = dict.fromkeys(("clean", *VARIANTS), 0.0)
        self.kl = dict.fromkeys(VARIANTS, 0.0)
        self.increase = self.increase_square = 0.0

    def add(self, clean: Tensor, losses: Mapping[str, tuple[Tensor, Tensor]], replaced: int) -> None:
        """clean: cross-entropies [n]; losses: per variant (cross-entropies, divergences), [n] each."""
        good = clean.isfinite()
        for ce, kl in losses.values():
            good = good & ce.isfinite() & kl.isfinite()
        self.tokens += int(good.sum())
        self.left_out += int((~good).sum())
        self.replaced += replaced
        self.ce["clean"] += float(clean[good].sum())
        for name, (ce, kl) in losses.items():
            self.ce[name] += float(ce[good].sum())
            self.kl[name] += float(kl[good].sum())
        increase = (losses["sae"][0] - clean)[good]
        self.increase += float(increase.sum())
        self.increase_square += float(increase.square().sum())

    def result(self) -> SpliceLoss:
        n = self.tokens
        ce = {name: ratio(total, n) for name, total in self.ce.items()}
        kl = {name: ratio(total, n) for name, total in self.kl.items()}
        variance = max(0.0, self.increase_square - self.increase**2 / max(n, 1))
        lost = ratio(kl["sae"], kl["zero"]) if kl["sae"] is not None and kl["zero"] is not None else None
        return SpliceLoss(
            tokens=n,
            replaced=self.replaced,
            left_out=self.left_out,
            **{f"ce_{name}": value for name, value in ce.items()},
            **{f"kl_{name}": value for name, value in kl.items()},
            ce_increase=ratio(self.increase, n),
            ce_increase_error=math.sqrt(variance / (n - 1) / n) if n > 1 else None,
            loss_recovered=_recovered(ce["zero"], ce["sae"], ce["clean"]),
            loss_recovered_mean=_recovered(ce["mean"], ce["sae"], ce["clean"]),
            loss_recovered_pca=_recovered(ce["zero"], ce["pca"], ce["clean"]),
            kl_recovered=None if lost is None else 1 - lost,
        )


def _recovered(ablated: float | None, spliced_in: float | None, clean: float | None) -> float | None:
    if ablated is None or spliced_in is None or clean is None:
        return None
    return ratio(ablated - spliced_in, ablated - clean)
