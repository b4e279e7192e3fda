"""The hooks that steer a Hugging Face causal language model."""

import functools
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope.errors import InputError, ModelError, SteeringNotApplied
from qscope.model import decoder_layers, residual_width
from qscope.ops.steer_add_ import MAX_DIRECTIONS
from qscope.sae import SAE
from qscope.steering import plan, positions
from qscope.steering.spec import Edit, Gate, SteeringSpec
from qscope.steering.tokens import Choice, Pass, from_call

_SESSIONS = "_qscope_steering"


def steer(
    model: nn.Module,
    spec: SteeringSpec | str | Path | Sequence[SteeringSpec | None],
    *,
    saes: Mapping[int, SAE] | None = None,
    tokenizer: Any = None,
    allow_mismatch: bool = False,
    record: bool = True,
) -> "Steering":
    """Changes the residuals of `model` as `spec` says, inside a with-block or between attach() and detach().

        with qscope.steer(model, spec) as steering:
            model.generate(...)
        steering.fired            # bool [rows, tokens, edits]

    Any forward pass is steered: generate (with and without cache, sampling, beam search, left padding), and direct
    calls. `prompt` and `generated` mean what generate was given and what it adds; in a direct call, what comes before
    a cache is filled and what comes after, unless `steering.prompt_length` says otherwise. Where gradients are
    recorded, the steering is differentiable. Steering with strength 0 changes no bit.

    Args:
        model: a Hugging Face causal language model; a compiled one must be compiled after the steering is attached.
        spec: a SteeringSpec, a file of one, or one SteeringSpec (or None) for each sequence of the batch; rows that
            generate makes of a sequence (beams, num_return_sequences) follow it.
        saes: layer -> SAE, for features; those of the spec's `saes` are loaded where they are not given.
        tokenizer: needed for `skip: special` and for an `after` that is text.
        allow_mismatch: use an SAE although its hash is not the one in the spec.
        record: keep what `fired` gives: one byte for each token and edit.

    Raises InputError for a spec that does not fit model or SAEs, ModelError for a model whose blocks are not found.
    """
    return Steering(model, spec, saes=saes, tokenizer=tokenizer, allow_mismatch=allow_mismatch, record=record)


class Steering:
    """Made by `steer`; see there."""

    def __init__(
        self,
        model: nn.Module,
        spec: SteeringSpec | str | Path | Sequence[SteeringSpec | None],
        *,
        saes: Mapping[int, SAE] | None = None,
        tokenizer: Any = None,
        allow_mismatch: bool = False,
        record: bool = True,
    ) -> None:
        self.model, self.record = model, record
        self.prompt_length: int | None = None
        """Columns of direct calls that count as prompt; None: those before a cache is filled"""
        self.attached = False
        self._blocks, self._trunk = _blocks_and_trunk(model)
        self._names = list(inspect.signature(type(self._trunk).forward).parameters)[1:]
        self._specs, self._of_sequence = _distinct(spec)
        self.edits: tuple[Edit, ...] = tuple(edit for s in self._specs for edit in s.edits)
        """All edits, in the order of `fired`'s last dimension: those of a list of specs one spec after the other,
        equal specs once"""
        self._spec_of_edit = [i for i, s in enumerate(self._specs) for _ in s.edits]
        for edit in self.edits:
            _check_layer(edit.layer, len(self._blocks))
            _check_layer(edit.layer if edit.when is None else (edit.when.layer or 0), len(self._blocks))
        self._saes = _load_saes(self._specs, saes or {}, residual_width(model), allow_mismatch)
        self._choices = [_choice(edit, tokenizer) for edit in self.edits]
        self._columns, self._readings = self._planned(residual_width(model))
        self._handles: list[Any] = []
        self._passes: list[_Record] = []
        self._now: tuple[int, int] | None = None
        """(rows, tokens) of the pass that was begun and whose `fired` is not yet kept"""
        self._generating, self._told, self._prompt, self._padded = False, False, 0, False
        self._called = False

    # --- what to do at which layer -----------------------------------------------------------------------

    def _planned(self, width: int) -> tuple[dict[int, list[plan.Columns]], dict[int, plan.Reading]]:
        """(layer -> columns of each spec, layer -> what to read there)."""
        columns: dict[int, list[plan.Columns]] = {}
        gates: dict[int, list[Gate]] = {}
        members: dict[int, list[int]] = {}
        for layer in sorted({edit.layer for edit in self.edits}):
            device = next(self._blocks[layer].parameters()).device
            grouped: list[list[plan.Column]] = [[] for _ in self._specs]
            for index, edit in enumerate(self.edits):
                if edit.layer == layer:
                    grouped[self._spec_of_edit[index]] += plan.columns_of(index, edit, self._saes.get(layer), width)
            for column in (c for group in grouped for c in group):
                if column.needs is not None and column.needs.layer is not None:
                    gates.setdefault(column.needs.layer, []).append(column.needs)
                if column.member is not None:
                    members.setdefault(layer, []).append(column.member[0])
            together = [c for group in grouped for c in group]
            if self._of_sequence is None or len(together) <= MAX_DIRECTIONS:
                columns[layer] = [plan.Columns(together, device)]
            else:
                columns[layer] = [plan.Columns(group, device) for group in grouped if group]
        readings = {}
        for layer in sorted({*gates, *members}):
            for gate in gates.get(layer, []):
                plan.check_gate(gate, self._saes.get(layer), layer)
            device = next(self._blocks[layer].parameters()).device
            distinct = list(dict.fromkeys(gates.get(layer, [])))
            readings[layer] = plan.Reading(distinct, sorted(set(members.get(layer, []))), self._saes[layer].to(device))
        return columns, readings

    # --- hooks -------------------------------------------------------------------------------------------

    def attach(self) -> "Steering":
        """Steers from now on; returns itself. Several steerings of one model act in the order of attaching."""
        if self.attached:
            raise InputError("This steering is attached already; detach() it first, or make another one.")
        _forget_compiled(self.model)
        self.attached = True
        self._handles = [self._trunk.register_forward_pre_hook(self._before, with_kwargs=True)]
        for layer in sorted({*self._columns, *self._readings}):
            hook = functools.partial(self._after, layer)
            self._handles.append(self._blocks[layer].register_forward_hook(hook))
        sessions = self.model.__dict__.setdefault(_SESSIONS, [])
        sessions.append(self)
        if len(sessions) == 1 and hasattr(self.model, "generate"):
            _wrap_generation(self.model)
        return self

    def detach(self) -> None:
        """Removes every hook; what `fired` holds stays. Detaching twice does nothing."""
        if not self.attached:
            return
        self.attached = False
        for handle in self._handles:
            handle.remove()
        sessions = self.model.__dict__[_SESSIONS]
        sessions.remove(self)
        if not sessions:
            for name in (_SESSIONS, "generate", "prepare_inputs_for_generation"):
                self.model.__dict__.pop(name, None)
        _forget_compiled(self.model)

    def __enter__(self) -> "Steering":
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.detach()
        if kind is None:
            self._check_applied("in the with-block")

    def _check_applied(self, when: str) -> None:
        if self.edits and not self._called:
            raise SteeringNotApplied(
                f"Nothing was steered {when}: no forward pass went through the hooks of {type(self.model).__name__}. "
                "The model was not called, or its forward was compiled before the steering was attached (compile it "
                "afterwards), or another engine runs it (docs/vllm.md)."
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the trunk: where the tokens of this pass stand, unless generate's wrapper has said it."""
        if self._generating and self._told:
            return
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        try:
            self._begin_pass(from_call(arguments, self._prompt if self._generating else self.prompt_length))
        except InputError:
            self._called = True  # said already
            raise

    def _begin_pass(self, where: Pass) -> None:
        """Which tokens of the pass to come each edit changes, as far as that does not depend on residuals."""
        if torch.compiler.is_compiling():  # the history would grow in compiled code: only the last pass is kept
            self._passes = []
        else:
            self._harvest()
            if where.start == 0:
                self._passes = []
        self._now = (where.rows, where.length)
        chosen = [choice.of(where) for choice in self._choices]
        for columns in (c for group in self._columns.values() for c in group):
            each = [chosen[column.edit] for column in columns.columns]
            if self._of_sequence is not None:
                each = [
                    self._of_rows(m, self._spec_of_edit[c.edit], where)
                    for m, c in zip(each, columns.columns, strict=True)
                ]
            columns.choose(each, where.rows, where.length)

    def _of_rows(self, chosen: bool | Tensor, spec: int, where: Pass) -> bool | Tensor:
        """`chosen`, for the rows of the batch that belong to sequences of this spec."""
        assert self._of_sequence is not None
        each, left = divmod(where.rows, len(self._of_sequence))
        if left or each == 0:
            raise InputError(
                f"{len(self._of_sequence)} specs were given, one for each sequence, and the model was called with "
                f"{where.rows} rows; a multiple of the number of specs is expected."
            )
        own = [s == spec for s in self._of_sequence for _ in range(each)]
        if chosen is False or all(own):
            return chosen
        rows = torch.tensor(own, device=where.device)[:, None]
        return rows if chosen is True else rows & chosen

    def _after(self, layer: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """After a block: the residual, steered. In a compiled model nothing here may differ from token to token."""
        if not self.attached:  # a compiled model may hold on to the hook
            return None
        h = output[0] if isinstance(output, tuple) else output
        if not isinstance(h, Tensor) or h.ndim != 3:
            raise ModelError(
                f"Block {layer} of {type(self.model).__name__} puts out {type(h).__name__}, not a residual stream "
                "[batch, sequence, width] alone or first in a tuple. It cannot be steered."
            )
        self._called = True
        if layer in self._readings:
            self._readings[layer].read(h)
        live = [columns for columns in self._columns.get(layer, ()) if columns.live]
        if not live:
            return None
        steered = h if h.is_contiguous() else h.contiguous()
        if h.requires_grad and torch.is_grad_enabled():
            steered = h.clone()
        for columns in live:
            columns.apply(steered, self._readings, self.record)
        if steered is h:
            return None
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    # --- generate ----------------------------------------------------------------------------------------

    def _begin_generation(self, prompt: int, padded: bool) -> None:
        self._generating, self._prompt, self._padded = True, prompt, padded
        self._told, self._now, self._passes, self._called = False, None, [], False

    def _tell(self, where: Pass) -> None:
        self._told = True
        self._begin_pass(where)

    def _end_generation(self, complete: bool) -> None:
        self._generating = self._told = False
        if complete:
            self._check_applied("by generate")
        self._called = True  # an error has been raised otherwise

    # --- what happened -----------------------------------------------------------------------------------

    def _harvest(self) -> None:
        """Keeps where the pass behind has changed the residual."""
        if self._now is None or not self.record:
            return
        found = [
            ([column.edit for column in columns.columns], fired)
            for group in self._columns.values()
            for columns in group
            if (fired := columns.harvest(*self._now)) is not None
        ]
        self._passes.append(_Record(*self._now, found))
        self._now = None

    @property
    def fired(self) -> Tensor:
        """bool [rows, tokens, edits], on the CPU: where each of `edits` changed the residual, in the last generate or
        the last direct calls. Tokens of all passes since an empty cache stand one after the other (of a model compiled
        by the caller, those of the last pass); the last generated token is not among them, for it is never fed in.
        Rows of a beam search are those of the moment."""
        if not self.record:
            raise InputError("record=False was given, so it was not kept where the steering fired.")
        self._harvest()
        found = [each.dense(len(self.edits)) for each in self._passes]
        return torch.cat(found, dim=1) if found else torch.zeros(0, 0, len(self.edits), dtype=torch.bool)


@dataclass
class _Record:
    """Of one forward pass."""

    rows: int
    tokens: int
    fired: list[tuple[list[int], Tensor]]
    """([edit of each column], bool or uint8 [rows, tokens, columns])"""

    def dense(self, edits: int) -> Tensor:
        found = torch.zeros(self.rows, self.tokens, edits, dtype=torch.bool)
        for each, where in self.fired:
            where = where.cpu().bool()
            for i, edit in enumerate(each):
                found[..., edit] |= where[..., i]
        return found


# --- preparing -----------------------------------------------------------------------------------------------


def _blocks_and_trunk(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder blocks and the module that holds their list, whose forward gets the token ids."""
    blocks = decoder_layers(model)
    return blocks, next(m for m in model.modules() if any(child is blocks for child in m.children()))


def _distinct(
    spec: SteeringSpec | str | Path | Sequence[SteeringSpec | None],
) -> tuple[list[SteeringSpec], list[int] | None]:
    """(different specs, for a list: the index of each sequence's, -1 for none)."""
    if isinstance(spec, str | Path):
        spec = SteeringSpec.load(spec)
    if isinstance(spec, SteeringSpec):
        return [spec], None
    found: list[SteeringSpec] = []
    of_sequence = []
    for one in spec:
        if one is not None and not isinstance(one, SteeringSpec):
            raise InputError(f"A list with {type(one).__name__} was given; SteeringSpec and None are accepted in it.")
        if one is not None and one not in found:
            found.append(one)
        of_sequence.append(-1 if one is None else found.index(one))
    if not of_sequence:
        raise InputError("An empty list of specs was given; one spec, or None, for each sequence is expected.")
    return found, of_sequence


def _check_layer(layer: int, count: int) -> None:
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise InputError(f"Layer {layer} was given; this model has layers 0 to {count - 1} (blocks counted from 0).")


def _load_saes(
    specs: Sequence[SteeringSpec], given: Mapping[int, SAE], width: int, allow_mismatch: bool
) -> dict[int, SAE]:
    """The SAE of each layer whose features are named, checked against the specs' hashes."""
    layers = set()
    for edit in (edit for spec in specs for edit in spec.edits):
        layers |= {edit.layer} if edit.feature is not None else set()
        layers |= {edit.when.layer if edit.when.layer is not None else edit.layer} if edit.when else set()
    saes = {}
    for layer in sorted(layers):
        references = [spec.saes[layer] for spec in specs if layer in spec.saes]
        sae = given.get(layer)
        if sae is None and references:
            sae = SAE.from_pretrained(references[0].source, layer=layer)
        if sae is None:
            continue  # said where the feature is looked up
        if sae.d_in != width:
            raise InputError(f"The SAE of layer {layer} reads width {sae.d_in}, and the model's residual has {width}.")
        wanted = {reference.hash for reference in references} - {None}
        if wanted and not allow_mismatch and wanted != {sae.weight_hash()}:
            raise InputError(
                f"The spec was made for an SAE of layer {layer} with the hash {sorted(map(str, wanted))[0][:16]}..., "
                f"and this one, in {sae.dtype}, has {sae.weight_hash()[:16]}...: its feature ids may mean other "
                "things. Give the SAE that the spec was made for, in float32, or allow_mismatch=True."
            )
        saes[layer] = sae
    return saes


def _choice(edit: Edit, tokenizer: Any) -> Choice:
    special = None
    if "special" in edit.skip:
        special = torch.tensor(sorted(_needed(tokenizer, "skip special").all_special_ids))
    after = edit.after
    if isinstance(after, str):
        ids = _needed(tokenizer, f"after {after!r}").encode(after, add_special_tokens=False)
        if len(ids) != 1:
            raise InputError(f"after {after!r} was given, which is {len(ids)} tokens here; give one token.")
        after = ids[0]
    return Choice(positions.parse(edit.tokens), after, "first" in edit.skip, special)


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise InputError(f"{what} was given, which needs the tokenizer: qscope.steer(model, spec, tokenizer=...).")
    return tokenizer


# --- generate ------------------------------------------------------------------------------------------------


def _wrap_generation(model: Any) -> None:
    """Lets the steerings of `model` know what generate was given, and what every pass of it is given."""
    generate, prepare = model.generate, model.prepare_inputs_for_generation
    sessions: list[Steering] = model.__dict__[_SESSIONS]

    @functools.wraps(generate)
    def generating(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = list(sessions)
        for steering in now:
            steering._begin_generation(*_prompt_of(args, kwargs))
        complete = False
        try:
            result = generate(*args, **kwargs)
            complete = True
            return result
        finally:
            for steering in now:
                steering._end_generation(complete)

    @functools.wraps(prepare)
    def preparing(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(input_ids, *args, **kwargs)
        for steering in sessions:
            if steering._generating:
                steering._tell(_pass_of(prepared, input_ids, kwargs.get("attention_mask"), steering))
        return prepared

    model.generate = types.MethodType(generating, model)
    model.prepare_inputs_for_generation = types.MethodType(preparing, model)


def _prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, bool]:
    """(columns before the first generated token, whether some of them are padding)."""
    ids, attention = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), kwargs.get("attention_mask")
    given = [x for x in (ids, kwargs.get("inputs_embeds"), attention) if isinstance(x, Tensor)]
    padded = isinstance(attention, Tensor) and not bool((attention != 0).all())
    return max((x.shape[1] for x in given), default=1), padded


def _pass_of(prepared: dict[str, Any], input_ids: Tensor, attention: Any, steering: Steering) -> Pass:
    fed = prepared.get("input_ids")
    fed = prepared["inputs_embeds"] if fed is None else fed
    attention = attention if isinstance(attention, Tensor) and attention.dim() == 2 else None
    end = input_ids.shape[1]
    if attention is not None:  # embeddings of the prompt, and what a cache holds already, are not in input_ids
        end = max(end, attention.shape[1])
    elif (cache := prepared.get("past_key_values")) is not None:
        end = max(end, int(cache.get_seq_length()) + fed.shape[1])
    mask = attention if steering._padded and attention is not None and attention.shape[1] == end else None
    return Pass(end - fed.shape[1], fed.shape[1], steering._prompt, mask, input_ids, None, fed.device, len(fed))


def _forget_compiled(model: nn.Module) -> None:
    """Code compiled before hooks were added or removed would go on without, or with, them."""
    model.__dict__.pop("_compiled_call", None)  # where transformers' generate keeps its own
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
