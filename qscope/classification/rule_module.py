"""A rule as a small torch module for serving: only the encoder rows that it needs.

The activation of a clause is ReLU(W_enc[f] x + b_enc[f]), summed in float64 and rounded to float32, as
`SAE.encode_topk` does it; whether f is among the K largest is not asked, so only rules with the membership "preact"
can be served.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qscope.classification.rule import FeatureRule, MulticlassRule, OrRule, Rule
from qscope.classification.rule_file import from_json, to_json
from qscope.errors import InputError
from qscope.files import tensor_parts, write_file
from qscope.sae import SAE

FORMAT = "qscope-rule-module"


class RuleOutput(NamedTuple):
    """What a rule says of B texts."""

    scores: Tensor
    """[B] float64, the largest activation / scale; with R classes [B, R]"""
    decisions: Tensor
    """[B] bool; with several classes int64, places in the rule's classes"""
    values: Tensor
    """[B, C] float64 pooled activations of all clauses, those of several rules one after the other"""


def preact_activations(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(x W^T + b) of some features, [.., C] float32: summed in float64, then rounded.

    x: [.., D], weight: [C, D], bias: [C], of any floating dtype each.
    """
    return (x.double() @ weight.double().T + bias.double()).float().relu()


class RuleModule(nn.Module):
    """Scores and decisions of a rule from residuals.

    weight: [C, D] float32, bias: [C] float32: the encoder rows of the clauses; threshold, scale: [C] float64. These
    four buffers are all its state. Moving it to a device moves them; a cast to another dtype leaves them as they are,
    because decisions would change.
    """

    weight: Tensor
    bias: Tensor
    threshold: Tensor
    scale: Tensor

    def __init__(self, rule: Rule, weight: Tensor, bias: Tensor) -> None:
        """`from_saes` and `load` are the usual ways. Raises InputError for a rule on TopK membership."""
        super().__init__()
        rule.check_membership("preact")
        parts: tuple[OrRule, ...] = rule.rules if isinstance(rule, MulticlassRule) else (rule,)
        clauses = [clause for part in parts for clause in part.clauses]
        if weight.dim() != 2 or len(weight) != len(clauses) or bias.shape != weight.shape[:1]:
            raise InputError(
                f"weight has the shape {list(weight.shape)} and bias {list(bias.shape)}; the rule has {len(clauses)} "
                f"features, so [{len(clauses)}, d_in] and [{len(clauses)}] are expected."
            )
        self.rule = rule
        self.layers = rule.layers
        self._places = {layer: [i for i, c in enumerate(clauses) if c.layer == layer] for layer in self.layers}
        self._pooling = [part.pooling for part in parts for _ in part.clauses]
        self._sizes = [len(part.clauses) for part in parts]
        self._majority = rule.majority if isinstance(rule, MulticlassRule) else None
        device = weight.device
        numbers = [[clause.threshold for clause in clauses], [clause.scale for clause in clauses]]
        self.register_buffer("weight", weight.detach().float().contiguous())
        self.register_buffer("bias", bias.detach().float().contiguous())
        for name, values in zip(("threshold", "scale"), numbers, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64, device=device))

    @classmethod
    def from_saes(cls, rule: Rule, saes: Mapping[int, SAE], check: bool = True) -> "RuleModule":
        """The module of a rule, on the device of the SAEs.

        Args:
            saes: layer -> SAE.
            check: compare the SAEs' hashes with the rule's, which reads all their weights.

        Raises:
            InputError: for a missing SAE or another one than the rule names, and for a rule on TopK membership.
        """
        missing = [layer for layer in rule.layers if layer not in saes]
        if missing:
            raise InputError(f"The rule needs the SAE of layer {missing[0]}; given: {sorted(saes) or 'none'}.")
        if check:
            for layer in rule.layers:
                rule.source.check_sae(layer, saes[layer].weight_hash())
        parts: tuple[FeatureRule, ...] = rule.rules if isinstance(rule, MulticlassRule) else (rule,)
        rows = [(saes[clause.layer], clause.feature) for part in parts for clause in part.clauses]
        weight, bias = (torch.stack([getattr(sae, name)[i] for sae, i in rows]) for name in ("W_enc", "b_enc"))
        return cls(rule, weight, bias)

    def activations(self, residual: Mapping[int, Tensor]) -> Tensor:
        """[B, S, C] float32, of every token. residual: layer -> [B, S, D], float32, bfloat16 or float16."""
        columns: list[Tensor] = [self.bias] * len(self.bias)
        for layer in self.layers:
            places = self._places[layer]
            found = preact_activations(residual[layer], self.weight[places], self.bias[places])
            for i, column in zip(places, found.unbind(-1), strict=True):
                columns[i] = column
        return torch.stack(columns, dim=-1)

    def forward(self, residual: Mapping[int, Tensor], mask: Tensor) -> RuleOutput:
        """Of B texts of S tokens.

        Args:
            residual: layer -> [B, S, D]; what stands where the mask is false does not matter.
            mask: [B, S] bool, the tokens that count. Of those, a token whose residual or activation at a layer is not
                finite is left out there. A text without tokens that count has the score 0.
        """
        found = self.activations(residual)
        finite = {layer: residual[layer].isfinite().all(dim=-1) for layer in self.layers}
        layer_of = sorted((place, layer) for layer, places in self._places.items() for place in places)
        keep = mask[..., None] & found.isfinite() & torch.stack([finite[layer] for _, layer in layer_of], dim=-1)
        acts = torch.where(keep, found, 0).double()
        pooled = torch.stack([self._pool(acts[..., i], keep[..., i], i) for i in range(len(self._pooling))], dim=-1)
        fires = (pooled > self.threshold).split(self._sizes, dim=-1)
        scaled = (pooled / self.scale).split(self._sizes, dim=-1)
        scores = torch.stack([part.amax(dim=-1) for part in scaled], dim=-1)
        fired = torch.stack([part.any(dim=-1) for part in fires], dim=-1)
        if self._majority is None:
            return RuleOutput(scores[:, 0], fired[:, 0], pooled)
        best = torch.where(fired, scores, -1.0)
        first = (best == best.amax(dim=-1, keepdim=True)).int().cumsum(-1).eq(0).sum(-1)  # the lowest class of equals
        return RuleOutput(scores, torch.where(fired.any(dim=-1), first, self._majority), pooled)

    def _pool(self, acts: Tensor, keep: Tensor, clause: int) -> Tensor:
        """[B] from [B, S]."""
        if acts.shape[1] == 0:
            return acts.new_zeros(acts.shape[0])
        if self._pooling[clause] == "any":
            return acts.amax(dim=1)
        if self._pooling[clause] == "mean":
            return acts.sum(dim=1) / keep.sum(dim=1).clamp(min=1)
        after = keep.flip(1).int().cumsum(1).flip(1)  # tokens that count from here on: 1 first at the last of them
        return torch.where(keep & (after == 1), acts, 0).sum(dim=1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RuleModule":
        """Moves, but does not cast."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, with the rule as JSON in its header. Raises StorageError."""
        metadata = {"format": FORMAT, "rule": to_json(self.rule)}
        parts, size = tensor_parts({"bias": self.bias, "weight": self.weight}, metadata)
        write_file(Path(path), parts, size)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "RuleModule":
        """Raises InputError for a file that `save` did not write."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
                tensors = {name: file.get_tensor(name) for name in ("weight", "bias") if name in names}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read as an exported rule: {error}.") from error
        if metadata.get("format") != FORMAT or names != {"weight", "bias"}:
            raise InputError(f"{path} is no exported rule (RuleModule.save).")
        return cls(from_json(metadata.get("rule", ""), str(path)), tensors["weight"], tensors["bias"])
