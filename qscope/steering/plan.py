"""What the edits of one layer come to: rows for `qscope.ops.steer_add_`, and where each applies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qscope import ops, reference
from qscope.errors import InputError
from qscope.ops.steer_add_ import MAX_DIRECTIONS
from qscope.sae import SAE
from qscope.steering.spec import Edit, Gate
from qscope.steering.vectors import load_vector


@dataclass
class Column:
    """One direction of the operator."""

    edit: int
    """Index in the list of all edits"""
    layer: int
    setting: ops.SteerSetting
    direction: Tensor
    """[D] float32"""
    reader: Tensor | None = None
    gate: Tensor | None = None
    """[D]: a condition read from the same residual"""
    needs: Gate | None = None
    """A condition that is worked out beforehand"""
    member: tuple[int, bool] | None = None
    """(feature, whether it has to be among the k of the full encode)"""


@dataclass
class Columns:
    """Columns of one layer that are applied together, as the operator takes them.

    What is known before a forward pass, `live` and `mask`, is set by `choose`; `apply` runs inside it, where a compiled
    model must find the same code at every generated token.
    """

    columns: list[Column]
    device: torch.device
    live: bool = False
    """Whether any token of this pass is chosen"""
    applied: bool = False
    """Whether the pass has come to this layer"""
    mask: Tensor | None = None
    """bool [B, S, columns] the chosen tokens; None: all of them"""
    fired: Tensor | None = None
    """uint8 [B, S, columns], from the operator; where it is not needed to know them, None"""
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = field(init=False)
    conditional: bool = field(init=False)
    always: Tensor | None = field(init=False)
    """bool [columns]: whether a chosen token is changed; None where that depends on the residual"""
    total: Tensor | None = field(init=False, default=None)
    """[D] float32: what a token gets that all columns change, to the bit; None where that depends on the residual"""

    def __post_init__(self) -> None:
        directions = torch.stack([c.direction for c in self.columns]).to(self.device)
        self.tensors = (
            directions,
            ops.settings_tensor([c.setting for c in self.columns], self.device),
            _stacked([c.reader for c in self.columns], directions),
            _stacked([c.gate for c in self.columns], directions),
        )
        self.conditional = any(c.needs is not None or c.member is not None for c in self.columns)
        plain = all(c.setting.slope == 0 and not c.setting.gate_on for c in self.columns)
        always = torch.tensor([c.setting.constant != 0 for c in self.columns])
        self.always = always if plain and not self.conditional else None
        if self.always is not None:
            self.total = torch.zeros(1, directions.shape[1], device=self.device)
            for part in range(0, len(self.columns), MAX_DIRECTIONS):
                rows = slice(part, part + MAX_DIRECTIONS)
                ops.steer_add_(self.total, directions[rows], self.tensors[1][rows])
            self.total = self.total[0]

    def choose(self, each: Sequence[bool | Tensor], rows: int, tokens: int) -> None:
        """each: of every column, True, False or bool [B or 1, S or 1]: the tokens chosen for the pass to come."""
        self.fired, self.applied = None, False
        self.live = any(chosen is not False for chosen in each) and (self.always is None or bool(self.always.any()))
        self.mask = None
        if self.live and not all(chosen is True for chosen in each):
            full = (torch.tensor(c, device=self.device) if isinstance(c, bool) else c.to(self.device) for c in each)
            self.mask = torch.stack([chosen.expand(rows, tokens) for chosen in full], dim=-1)

    def apply(self, h: Tensor, readings: "Mapping[int, Reading]", record: bool) -> None:
        """Steers h [B, S, D] in place."""
        if self.total is not None and self.mask is None:
            h.add_(self.total)  # the same bits, in half the time of the operator's call at one token
            self.applied = True
            return
        directions, settings, readers, gates = self.tensors
        mask = self._conditions(h, readings) if self.conditional else self.mask
        fired = None
        if record and self.always is None:
            fired = torch.empty(*h.shape[:2], len(self.columns), dtype=torch.uint8, device=h.device)
        if len(self.columns) <= MAX_DIRECTIONS and not (h.requires_grad and torch.is_grad_enabled()):
            ops.steer_add_(h, directions, settings, readers=readers, gates=gates, mask=mask, fired=fired)
        else:  # the operator takes 32 directions and records no gradients; its plain PyTorch meaning does
            rows = h.view(-1, h.shape[-1])
            mask = None if mask is None else mask.reshape(len(rows), -1)
            flat = None if fired is None else fired.view(len(rows), -1)
            reference.steer_add_(rows, directions, settings, readers, gates, mask, flat)
        self.fired, self.applied = fired, True

    def _conditions(self, h: Tensor, readings: "Mapping[int, Reading]") -> Tensor:
        """The mask, narrowed by what was read from the residual: bool [B, S, columns]."""
        each = []
        for i, column in enumerate(self.columns):
            mask = (
                torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if self.mask is None else self.mask[..., i]
            )
            if column.needs is not None and column.needs.layer is not None:
                mask = mask & readings[column.needs.layer].opened[column.needs].to(h.device)
            if column.member is not None:
                feature, inside = column.member
                member = readings[column.layer].members_now[feature]
                mask = mask & (member if inside else ~member)
            each.append(mask)
        return torch.stack(each, dim=-1)

    def harvest(self, rows: int, tokens: int) -> Tensor | None:
        """bool or uint8 [B, S, columns]: where the pass behind changed the residual; None: nowhere."""
        if not self.live or not self.applied:
            return None
        if self.always is None:
            # A CUDA graph writes the next pass to the same place.
            return self.fired.clone() if self.fired is not None and self.fired.is_cuda else self.fired
        chosen = torch.ones(rows, tokens, 1, dtype=torch.bool) if self.mask is None else self.mask.cpu()
        return chosen & self.always


def _stacked(rows: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    if all(row is None for row in rows):
        return None
    zero = torch.zeros(like.shape[1])
    return torch.stack([zero if row is None else row.cpu() for row in rows]).to(like)


def columns_of(index: int, edit: Edit, sae: SAE | None, width: int) -> list[Column]:
    """The columns of one edit: one, or two where what is done depends on membership among the k largest."""
    if edit.vector is not None:
        direction, reader, bias = load_vector(edit.vector, edit.layer, width), None, 0.0
    else:
        sae, f = _needed(sae, edit.layer), _checked_feature(edit.feature, sae, edit.layer)
        direction, reader, bias = _row(sae.W_dec, f), _row(sae.W_enc, f), float(sae.b_enc[f])
    if abs(edit.amount) > torch.finfo(torch.float32).max:
        raise InputError(
            f"The strength of edit {index} (layer {edit.layer}) is {edit.amount:g}, too large for a float32."
        )
    square = direction.double().square().sum()
    if (edit.unit == "residual" or edit.mode == "orthogonalise") and not square > 0:
        raise InputError(f"The direction of edit {index} (layer {edit.layer}) is all 0 and cannot be normalised.")
    if edit.unit == "residual":
        direction = (direction.double() / square.sqrt()).float()
    if edit.mode == "orthogonalise":
        reader = (direction.double() / square).float()
    setting = {
        "add": lambda: ops.SteerSetting.add(edit.amount),
        "clamp": lambda: ops.SteerSetting.clamp(edit.amount, bias),
        "scale": lambda: ops.SteerSetting.scale(edit.strength, bias),
        "ablate": lambda: ops.SteerSetting.ablate(bias),
        "orthogonalise": ops.SteerSetting.orthogonalise,
    }[edit.mode]()
    column = Column(index, edit.layer, setting, direction, reader if edit.mode != "add" else None)
    _add_gate(column, edit, sae)
    if edit.activation == "preact" or edit.mode in ("add", "orthogonalise"):
        return [column]
    assert edit.feature is not None
    column.member = (edit.feature, True)
    if edit.mode != "clamp" or edit.amount == 0:
        return [column]
    setting = ops.SteerSetting.add(edit.amount)
    silent = Column(index, edit.layer, setting, direction, needs=column.needs, member=(edit.feature, False))
    _add_gate(silent, edit, sae)
    return [column, silent]


def _add_gate(column: Column, edit: Edit, sae: SAE | None) -> None:
    gate = edit.when
    if gate is None:
        return
    if gate.mode == "preact" and gate.layer in (None, edit.layer):
        sae, f = _needed(sae, edit.layer), _checked_feature(gate.feature, sae, edit.layer)
        column.gate = _row(sae.W_enc, f)
        column.setting = column.setting.gated(float(sae.b_enc[f]), gate.threshold)
    else:
        column.needs = at_layer(gate, edit.layer)


def at_layer(gate: Gate, layer: int) -> Gate:
    """The gate with its layer written out."""
    return Gate(gate.feature, layer if gate.layer is None else gate.layer, gate.threshold, gate.mode)


@dataclass
class Reading:
    """What has to be known of the residual of one layer before it, or a later one, is steered."""

    gates: list[Gate]
    members: list[int]
    """Features whose activation after TopK is asked for"""
    sae: SAE
    """On the device of the layer"""
    opened: dict[Gate, Tensor] = field(default_factory=dict)
    """Of the pass: gate -> bool [B, S]"""
    members_now: dict[int, Tensor] = field(default_factory=dict)
    """Of the pass: feature -> bool [B, S], whether it is among the k with a value above 0"""

    def read(self, h: Tensor) -> None:
        """h: [B, S, D] before this layer is steered."""
        acts: dict[int, Tensor] = {}
        wanted = {*self.members, *(g.feature for g in self.gates if g.mode == "exact")}
        if wanted:
            top_acts, top_indices = self.sae.encode_topk(h.detach())
            acts = {f: torch.where(top_indices == f, top_acts, 0).sum(-1) for f in sorted(wanted)}
        opened = {}
        for gate in self.gates:
            if gate.mode == "exact":
                opened[gate] = acts[gate.feature] > gate.threshold
            else:
                row, bias = self.sae.W_enc[gate.feature].float(), self.sae.b_enc[gate.feature].float()
                opened[gate] = h.detach().float() @ row + bias > gate.threshold
        self.opened = opened
        self.members_now = {f: acts[f] > 0 for f in self.members}


def check_gate(gate: Gate, sae: SAE | None, layer: int) -> None:
    _checked_feature(gate.feature, _needed(sae, layer), layer)


def _row(W: Tensor, f: int) -> Tensor:
    return W[f].detach().float().cpu()


def _needed(sae: SAE | None, layer: int) -> SAE:
    if sae is None:
        raise InputError(
            f"An edit names a feature of layer {layer}, for which there is no SAE. Name one in the spec's `saes`, or "
            f"give it: qscope.steer(model, spec, saes={{{layer}: sae}})."
        )
    return sae


def _checked_feature(feature: int | None, sae: SAE | None, layer: int) -> int:
    features = _needed(sae, layer).d_sae
    if feature is None or isinstance(feature, bool) or not 0 <= feature < features:
        raise InputError(f"Feature {feature} of layer {layer} was given; its SAE has features 0 to {features - 1}.")
    return feature
