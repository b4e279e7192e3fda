"""The SASFT penalty as a loss term for any trainer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qscope.errors import InputError
from qscope.ops.feature_penalty import feature_penalty
from qscope.post_training.alpha import Alpha
from qscope.post_training.attach import Residuals
from qscope.post_training.rows import Rows, check_rows, direction_rows, names, sae_rows
from qscope.sae import SAE


@dataclass(frozen=True)
class PenaltyFigures:
    """What the last loss was made of. Tensors stay on their device, so that nothing waits for it."""

    loss: Tensor
    """[] float32, weight included"""
    unweighted: Tensor
    """[]"""
    weight: float
    response_tokens: Tensor
    """[] tokens that the labels and the mask let count"""
    penalised_tokens: Tensor
    """[] those of them that are of other groups than the features' own"""
    excess: dict[int, Tensor]
    """layer -> [S] mean of ReLU(pre - alpha) over the penalised tokens"""
    active: dict[int, Tensor]
    """layer -> [S] share of the penalised tokens above alpha"""

    def as_dict(self) -> dict[str, float]:
        """Numbers for a log; means over features. Waits for the device."""
        found = {
            "penalty": float(self.loss),
            "penalty_unweighted": float(self.unweighted),
            "penalty_weight": self.weight,
            "penalty_response_tokens": float(self.response_tokens),
            "penalty_penalised_tokens": float(self.penalised_tokens),
        }
        for layer in self.excess:
            found[f"penalty_excess_{layer}"] = float(self.excess[layer].mean())
            found[f"penalty_active_{layer}"] = float(self.active[layer].mean())
        return found


class FeaturePenalty(nn.Module):
    """Loss that pushes a few features below a threshold on tokens of groups to which they do not belong (SASFT).

        penalty = qscope.FeaturePenalty({15: sae}, {15: (12, 99)}, alpha=alpha, target_groups=("ja",), weight=1e-3)
        with penalty.attach(model):
            out = model(**batch)
            loss = out.loss + penalty.loss(groups, labels=batch["labels"])

    Per layer, in float32, summed over the layers and times `weight` (Deng et al. 2025, arXiv 2507.14894, as in their
    code; Qwen-Scope 7.3):

        sum over response tokens t and features s of 1[group of t is not the target]
            ReLU(<x[t], W_enc[s]> + b_enc[s] - alpha[group of t, s]) / (S x number of response tokens)

    x[t] is the residual at the place of label t, as in the authors' code. The denominator counts the response tokens
    of all groups. Only the chosen encoder rows are held, frozen, in float32, as buffers that no state_dict contains;
    the gradient goes to the model alone, and the model computes the same bits as without the penalty.
    """

    last: PenaltyFigures | None
    """Figures of the last loss, detached; None before the first"""

    def __init__(
        self,
        saes: Mapping[int, SAE] | Mapping[int, Rows],
        features: Mapping[int, Sequence[int]] | None = None,
        *,
        alpha: Alpha | Mapping[int, Tensor] | Literal["zero"] = "zero",
        groups: Sequence[str] | None = None,
        target_groups: Sequence[str | int] = (),
        weight: float | Callable[[int], float] = 1.0,
        plus_one: bool = False,
    ) -> None:
        """
        Args:
            saes: layer -> SAE; or layer -> Rows, without `features`.
            features: layer -> ids of the features to push down, at most 32 a layer.
            alpha: thresholds [G, S] for each layer, an `Alpha` that was estimated for these rows, or "zero".
            groups: names of the groups 0..G-1, so that `loss` takes names as well; of an `Alpha`, its own.
            target_groups: groups whose tokens are not penalised, by name or number.
            weight: of the term in the loss, or a function of the step that `loss` is given.
            plus_one: add 1 to the denominator S x response tokens, as the authors' code does.

        Raises InputError for anything that does not fit, and for an alpha of another SAE or of other features.
        """
        super().__init__()
        rows = _as_rows(saes, features)
        if isinstance(alpha, str) and alpha != "zero":
            raise InputError(f"alpha {alpha!r} was given; 'zero', an Alpha or layer -> numbers [G, S] is accepted.")
        if isinstance(alpha, Alpha):
            alpha.check(rows)
            if groups is not None and tuple(groups) != alpha.groups:
                raise InputError(
                    f"Groups {list(groups)} were given, and alpha has {list(alpha.groups)}: leave one out."
                )
            groups = alpha.groups
        self.groups = None if groups is None else tuple(groups)
        if self.groups is not None and len(set(self.groups)) < len(self.groups):
            raise InputError(f"Groups {list(self.groups)} were given. Name every group once.")
        self.rows = rows
        self.features = {layer: one.features for layer, one in rows.items()}
        self.weight, self.plus_one, self.last = weight, plus_one, None
        self._attached: Residuals | None = None
        thresholds = None if alpha == "zero" else alpha.values if isinstance(alpha, Alpha) else alpha
        self._one_alpha = thresholds is None
        for layer, one in rows.items():
            self._hold(layer, one, None if thresholds is None else thresholds.get(layer))
        counts = {getattr(self, f"alpha_{layer}").shape[0] for layer in rows}
        known = None if self._one_alpha else counts
        if known is not None and (len(known) > 1 or (self.groups and known != {len(self.groups)})):
            raise InputError(
                f"alpha has rows for {sorted(known)} groups, and the groups are {self.groups}. Give one row a group."
            )
        self._count = len(self.groups) if self.groups else None if known is None else known.pop()
        self._targets = tuple(self._number(group) for group in target_groups)

    @classmethod
    def from_directions(
        cls, rows: Mapping[int, Tensor], bias: Mapping[int, Tensor] | None = None, **options: Any
    ) -> "FeaturePenalty":
        """The same loss for any directions: `rows` layer -> [S, D], `bias` layer -> [S] (0 where not given).

        `options` are those of the constructor: alpha, groups, target_groups, weight, plus_one.
        """
        return cls(direction_rows(rows, bias), **options)

    def _hold(self, layer: int, one: Rows, alpha: Any) -> None:
        S = len(one.b)
        if alpha is None and not self._one_alpha:
            raise InputError(f"alpha has no entry for layer {layer}. Give [G, {S}] for each layer, or 'zero'.")
        values = torch.zeros(1, S) if alpha is None else torch.as_tensor(alpha).detach().float()
        if values.ndim != 2 or values.shape[1] != S or not len(values) or bool(values.isnan().any()):
            raise InputError(
                f"alpha of layer {layer} has the shape {list(values.shape)}; numbers [G, {S}] are accepted, a row for "
                "each group and a column for each feature, none of them NaN."
            )
        for name, tensor in (("W", one.W), ("b", one.b), ("alpha", values)):
            self.register_buffer(f"{name}_{layer}", tensor.to(one.W.device), persistent=False)

    def _number(self, group: str | int) -> int:
        if isinstance(group, str):
            if self.groups is None or group not in self.groups:
                known = "no names of groups were given" if self.groups is None else f"there are {names(self.groups)}"
                raise InputError(f"Group {group!r} was given, and {known}. Name one of them, or give numbers.")
            return self.groups.index(group)
        if isinstance(group, bool) or group < 0 or (self._count is not None and group >= self._count):
            upper = "" if self._count is None else f" to {self._count - 1}"
            raise InputError(f"Group {group} was given; groups are the numbers from 0{upper}.")
        return int(group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeaturePenalty":
        """Moved, never cast: rows rounded to bfloat16 would be other rows."""
        for name, tensor in self._buffers.items():
            assert tensor is not None
            self._buffers[name] = tensor.to(fn(tensor[:0]).device)
        return self

    # --- hooks -------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> "Attachment":
        """Hooks on the blocks of `model`, until detach() or the end of a with-block.

        The model may be wrapped: DistributedDataParallel, FSDP2, PEFT, torch.compile. Attach before the first call
        of a compiled model.

        Raises InputError for layers or widths that do not fit and if it is attached already, ModelError for a model
        whose blocks cannot be told.
        """
        if self._attached is not None:
            raise InputError("This penalty is attached already. Detach it first, or make a second one.")
        residuals = Residuals(model, self.rows)
        try:
            check_rows(self.rows, residuals.width, len(residuals.blocks))
        except InputError:
            residuals.detach()
            raise
        self._attached = residuals
        return Attachment(self)

    def detach(self) -> None:
        """Removes the hooks. The model is as it was."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None

    # --- the loss ----------------------------------------------------------------------------------------

    def loss(
        self,
        groups: Tensor | Sequence[str | int],
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        step: int = 0,
    ) -> Tensor:
        """The term for the forward pass just made: a float32 scalar with a gradient to the model. Once for each pass.

        Args:
            groups: of each sequence [B], or of each token [B, S], as numbers, or names for each sequence. -1: the
                tokens are not penalised, but count as response tokens.
            labels: [B, S], -100 where a token is no response token.
            attention_mask: [B, S], 0 where there is padding. Without labels and mask every token counts.
            num_items_in_batch: response tokens of the whole batch, where this is one of several micro-batches (or one
                of several processes): their losses then add up to that of the batch.
            step: for a weight that is a function.

        Without response tokens it is 0. Raises InputError for shapes or groups that do not fit, ModelError where no
        forward pass with a gradient was made.
        """
        if self._attached is None:
            raise InputError("The penalty is not attached: call the model inside `with penalty.attach(model):`.")
        residual = self._attached.take()
        weight = float(self.weight(step) if callable(self.weight) else self.weight)
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"The penalty's weight is {weight} at step {step}; a finite number from 0 is accepted.")
        first = next(iter(residual.values()))
        of = self._of_tokens(groups, first)
        response = _response(labels, attention_mask, first)
        counted = response & (of >= 0)
        for target in self._targets:
            counted &= of != target
        group = torch.where(counted, torch.zeros_like(of) if self._one_alpha else of, -1).reshape(-1)
        tokens = response.sum()
        items: Any = tokens if num_items_in_batch is None else num_items_in_batch
        items = torch.as_tensor(items, device=first.device).float().clamp(min=1)
        total, penalised = first.new_zeros((), dtype=torch.float32), counted.sum()
        excess, active = {}, {}
        for layer, hidden in residual.items():
            place = hidden.device
            W, b, alpha = (getattr(self, f"{name}_{layer}").to(place) for name in ("W", "b", "alpha"))
            found = feature_penalty(hidden.reshape(-1, hidden.shape[-1]), W, b, alpha, group.to(place))
            total = total + (found.sums.sum().to(total.device) / (len(b) * items + float(self.plus_one)))
            share = penalised.to(place).clamp(min=1)
            excess[layer], active[layer] = found.sums.detach() / share, found.active.sum(0) / share
        loss = weight * total
        self.last = PenaltyFigures(loss.detach(), total.detach(), weight, tokens, penalised, excess, active)
        return loss

    def _of_tokens(self, groups: Tensor | Sequence[str | int], residual: Tensor) -> Tensor:
        """[B, S] int64 on the residual's device."""
        if not isinstance(groups, Tensor):
            groups = torch.tensor([g if g == -1 else self._number(g) for g in groups], dtype=torch.int64)
        if groups.is_floating_point() or groups.dtype == torch.bool or groups.shape not in (
            residual.shape[:1],
            residual.shape[:2],
        ):  # fmt: skip
            raise InputError(
                f"Groups are {groups.dtype} {list(groups.shape)}; whole numbers [{residual.shape[0]}], one for each "
                f"sequence, or {list(residual.shape[:2])}, one for each token, are accepted."
            )
        # On a GPU this would wait for the device; there a token of a group without thresholds is left out.
        if groups.device.type == "cpu" and groups.numel() and not torch.compiler.is_compiling():
            low, high = int(groups.min()), int(groups.max())
            if low < -1 or (self._count is not None and high >= self._count):
                upper = "" if self._count is None else f" to {self._count - 1}"
                raise InputError(
                    f"Groups from {low} to {high} were given; -1 and the numbers from 0{upper} are accepted."
                )
        groups = groups.to(residual.device, torch.int64)
        return groups if groups.ndim == 2 else groups[:, None].expand(residual.shape[:2])


class Attachment:
    """A penalty on a model: a with-block, or until `detach()`."""

    def __init__(self, penalty: FeaturePenalty) -> None:
        self.penalty = penalty

    def __enter__(self) -> FeaturePenalty:
        return self.penalty

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        self.penalty.detach()


def _as_rows(
    saes: Mapping[int, SAE] | Mapping[int, Rows], features: Mapping[int, Sequence[int]] | None
) -> dict[int, Rows]:
    rows = {layer: one for layer, one in saes.items() if isinstance(one, Rows)}
    if features is None:
        if len(rows) < len(saes) or not rows:
            raise InputError("SAEs were given without features. Say which: features={15: (12, 99)}.")
        return dict(sorted(rows.items()))
    whole = {layer: one for layer, one in saes.items() if isinstance(one, SAE)}
    if len(whole) < len(saes):
        raise InputError("Rows were given together with features. Rows stand for themselves: leave features out.")
    return sae_rows(whole, features)


def _response(labels: Tensor | None, attention_mask: Tensor | None, residual: Tensor) -> Tensor:
    """[B, S] bool: the tokens that count."""
    shape, device = residual.shape[:2], residual.device
    response = torch.ones(shape, dtype=torch.bool, device=device)
    for name, given in (("labels", labels), ("attention_mask", attention_mask)):
        if given is None:
            continue
        if given.shape != shape:
            raise InputError(
                f"{name} are {list(given.shape)}, and the model's residual is {list(shape)}; they must be equal. A "
                "mask for a cache or virtual tokens (prompt tuning) does not fit: give the part for these tokens."
            )
        response &= (given.to(device) != -100) if name == "labels" else (given.to(device) != 0)
    return response
