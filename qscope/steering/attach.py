"""The hooks that steer a Hugging Face causal language model."""

import copy
import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope.errors import InputError, ModelError, SteeringNotApplied
from qscope.model import decoder_layers, residual_width
from qscope.ops.steer_add_ import MAX_DIRECTIONS
from qscope.sae import SAE
from qscope.steering import generation, history, plan, positions
from qscope.steering.generation import Generation
from qscope.steering.history import Record
from qscope.steering.spec import Edit, Gate, SAEReference, SteeringSpec
from qscope.steering.tokens import Choice, Pass, from_call


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
        model: a Hugging Face causal language model; what torch.compile made of it before is compiled again.
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
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.model, self.record = model, record
        self.prompt_length: int | None = None
        """Columns of direct calls that count as prompt; None: those before a cache is filled"""
        self.attached = False
        self._blocks, self._trunk = _blocks_and_trunk(model)
        self._generator = generation.generator_of(model, self._trunk)
        self._names = _names(self._trunk)
        self._specs, self._of_sequence = _distinct(spec)
        self.edits: tuple[Edit, ...] = tuple(edit for s in self._specs for edit in s.edits)
        """All edits, in the order of `fired`'s last dimension: those of a list of specs one spec after the other,
        equal specs once"""
        self._spec_of_edit = [i for i, s in enumerate(self._specs) for _ in s.edits]
        for edit in self.edits:
            _check_layer(edit.layer, len(self._blocks))
            _check_layer(edit.layer if edit.when is None else (edit.when.layer or 0), len(self._blocks))
        self._saes = _load_saes(self._specs, saes or {}, residual_width(model), allow_mismatch)
        self._choices = [_choice(edit, tokenizer, _vocabulary(model)) for edit in self.edits]
        self._columns, self._readings = self._planned(residual_width(model))
        self._handles: list[Any] = []
        self._passes: list[Record] = []
        self._now: tuple[int, int, int] | None = None
        """(first column, rows, tokens) of the pass that was begun and whose `fired` is not yet kept"""
        self._generation: Generation | None = None
        self._told = False
        """generate has said what the next pass is"""
        self._outside: dict[str, Any] = {}
        """What a multimodal model was called with, whose text trunk is given embeddings and a mask of its own kind"""
        self._called = False

    # --- what to do at which layer -----------------------------------------------------------------------

    def _planned(self, width: int) -> tuple[dict[int, list[plan.Columns]], dict[int, plan.Reading]]:
        """(layer -> columns of each spec, layer -> what to read there)."""
        columns: dict[int, list[plan.Columns]] = {}
        gates: dict[int, list[Gate]] = {}
        members: dict[int, list[int]] = {}
        for layer in sorted({edit.layer for edit in self.edits}):
            device = _device(self._blocks[layer])
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
            device = _device(self._blocks[layer])
            distinct = list(dict.fromkeys(gates.get(layer, [])))
            sae = self._saes[layer]
            sae = sae if sae.device == device else copy.deepcopy(sae).to(device)  # .to moves the caller's own
            readings[layer] = plan.Reading(distinct, sorted(set(members.get(layer, []))), sae)
        return columns, readings

    # --- hooks -------------------------------------------------------------------------------------------

    def attach(self) -> "Steering":
        """Steers from now on; returns itself. Several steerings of one model act in the order of attaching."""
        if self.attached:
            raise InputError("This steering is attached already; detach() it first, or make another one.")
        _forget_compiled(self._generator)
        self.attached = True
        self._handles = [self._trunk.register_forward_pre_hook(self._before, with_kwargs=True)]
        for layer in sorted({*self._columns, *self._readings}):
            hook = functools.partial(self._after, layer)
            self._handles.append(self._blocks[layer].register_forward_hook(hook))
        for module in _ancestors(self.model, self._trunk):
            note = functools.partial(self._note, _names(module))
            self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        generation.join(self._generator, self)
        return self

    def detach(self) -> None:
        """Removes every hook; what `fired` holds stays. Detaching twice does nothing."""
        if not self.attached:
            return
        self.attached = False
        for handle in self._handles:
            handle.remove()
        generation.leave(self._generator, self)
        _forget_compiled(self._generator)

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

    def _note(self, names: list[str], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a module around a text trunk."""
        self._outside = dict(zip(names, args, strict=False)) | kwargs

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the trunk: where the tokens of this pass stand, unless generate's wrapper has said it."""
        outside, self._outside = self._outside, {}
        if self._told:
            self._told = False
            return
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        now = self._generation
        known = now is not None and now.told  # then this pass is none of generate's own
        try:
            where = from_call(arguments, outside, self.prompt_length if now is None else None if known else now.prompt)
            self._begin_pass(where, keep=not known)
        except InputError:
            self._called = True  # said already
            raise

    def _begin_pass(self, where: Pass, keep: bool = True) -> None:
        """Which tokens of the pass to come each edit changes, as far as that does not depend on residuals."""
        if torch.compiler.is_compiling():  # the history would grow in compiled code: only the last pass is kept
            self._passes = []
        else:
            self._harvest()
            if keep:
                self._passes = history.continued(self._passes, where.start, where.rows)
        self._now = (where.start, where.rows, where.length) if keep else None
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
        if torch.is_autocast_enabled(h.device.type):  # it would take the products of the steering in half precision
            with torch.autocast(h.device.type, enabled=False):
                return self._steered(layer, h, output)
        return self._steered(layer, h, output)

    def _steered(self, layer: int, h: Tensor, output: Any) -> Any:
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

    def _begin_generation(self, now: Generation) -> tuple[Generation | None, list[Record], bool]:
        """Gives what `_end_generation` needs: a model may generate inside generate, as its own assistant does."""
        self._harvest()
        outer = (self._generation, self._passes, self._called)
        self._generation, self._passes, self._told, self._called = now, [], False, False
        return outer

    def _tell(self, where: Pass) -> None:
        self._begin_pass(where)
        self._told = True

    def _end_generation(self, outer: tuple[Generation | None, list[Record], bool], made: int | None) -> None:
        """made: columns of the result; None where generate has failed."""
        now, inner = self._generation, self._called
        self._harvest()
        self._generation, self._told, self._called = outer[0], False, True
        if outer[0] is not None:
            self._passes = outer[1]
            return
        if made is None or now is None:
            return  # an error has been raised, and one is enough
        # The last token is not fed in; what is behind it are candidates of an assistant.
        self._passes = history.before(self._passes, now.unnamed + made - 1)
        self._called = inner
        self._check_applied("by generate")

    # --- what happened -----------------------------------------------------------------------------------

    def _harvest(self) -> None:
        """Keeps where the pass behind has changed the residual."""
        if self._now is None or not self.record:
            return
        start, rows, tokens = self._now
        found = [
            ([column.edit for column in columns.columns], fired)
            for group in self._columns.values()
            for columns in group
            if (fired := columns.harvest(rows, tokens)) is not None
        ]
        self._passes.append(Record(start, rows, tokens, found))
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
        self._passes = history.joined(self._passes, len(self.edits))
        found = [each.dense(len(self.edits)) for each in self._passes]
        return found[0] if found else torch.zeros(0, 0, len(self.edits), dtype=torch.bool)


# --- preparing -----------------------------------------------------------------------------------------------


def _blocks_and_trunk(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder blocks and the module that holds their list, whose forward gets the token ids."""
    blocks = decoder_layers(model)
    return blocks, next(m for m in model.modules() if any(child is blocks for child in m.children()))


def _names(module: nn.Module) -> list[str]:
    """Of the arguments of its forward."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _ancestors(model: nn.Module, trunk: nn.Module) -> list[nn.Module]:
    """The modules around the text trunk of a multimodal model, from outside; none for a plain language model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return []
    return [module for module in model.modules() if module is not trunk and any(m is trunk for m in module.modules())]


def _device(block: nn.Module) -> torch.device:
    """Where a block computes: accelerate keeps the weights of offloaded ones elsewhere."""
    for module in block.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return next(block.parameters()).device


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    size = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _distinct(
    spec: SteeringSpec | str | Path | Sequence[SteeringSpec | None],
) -> tuple[list[SteeringSpec], list[int] | None]:
    """(different specs, for a list: the index of each sequence's, -1 for none)."""
    if isinstance(spec, str | Path):
        spec = SteeringSpec.load(spec)
    if isinstance(spec, SteeringSpec):
        return [spec], None
    if not isinstance(spec, list | tuple):
        raise InputError(
            f"{type(spec).__name__} was given as spec; a SteeringSpec, a file of one, or a list of SteeringSpec and "
            "None, one for each sequence, is accepted."
        )
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
    if not isinstance(given, Mapping) or not all(isinstance(sae, SAE) for sae in given.values()):
        raise InputError("`saes` has to map layers to SAEs: qscope.steer(model, spec, saes={15: sae}).")
    saes = {}
    for layer in sorted(layers):
        references = [spec.saes[layer] for spec in specs if layer in spec.saes]
        sae = given.get(layer)
        if sae is None and references:
            _check_one_sae(layer, references)
            sae = SAE.from_pretrained(references[0].source, layer=layer)
        if sae is None:
            continue  # said where the feature is looked up
        if sae.d_in != width:
            raise InputError(f"The SAE of layer {layer} reads width {sae.d_in}, and the model's residual has {width}.")
        wanted = {reference.hash for reference in references} - {None}
        if wanted and not allow_mismatch and wanted != {sae.weight_hash()}:
            other = min(map(str, wanted - {sae.weight_hash()}))
            raise InputError(
                f"The spec was made for an SAE of layer {layer} with the hash {other[:16]}..., "
                f"and this one, in {sae.dtype}, has {sae.weight_hash()[:16]}...: its feature ids may mean other "
                "things. Give the SAE that the spec was made for, in float32, or allow_mismatch=True."
            )
        saes[layer] = sae
    return saes


def _check_one_sae(layer: int, references: Sequence[SAEReference]) -> None:
    """InputError where the specs of a batch may mean different SAEs: hashes would say, else their names."""
    sources = sorted({reference.source for reference in references})
    if len(sources) > 1 and any(reference.hash is None for reference in references):
        raise InputError(
            f"The specs name different SAEs of layer {layer}, {' and '.join(sources)}; a batch is steered with one "
            "SAE per layer. Give specs of one SAE, or the one that is meant: qscope.steer(model, specs, saes={...})."
        )


def _choice(edit: Edit, tokenizer: Any, vocabulary: int | None) -> Choice:
    special = None
    if "special" in edit.skip:
        special = torch.tensor(sorted(_needed(tokenizer, "skip special").all_special_ids))
    after = edit.after
    if isinstance(after, str):
        ids = _needed(tokenizer, f"after {after!r}").encode(after, add_special_tokens=False)
        if len(ids) != 1:
            raise InputError(f"after {after!r} was given, which is {len(ids)} tokens here; give one token.")
        after = ids[0]
    if after is not None and not 0 <= after < (vocabulary or 2**63):
        raise InputError(f"after {after} was given; this model has the token ids 0 to {(vocabulary or 2**63) - 1}.")
    return Choice(positions.parse(edit.tokens), after, "first" in edit.skip, special)


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise InputError(f"{what} was given, which needs the tokenizer: qscope.steer(model, spec, tokenizer=...).")
    return tokenizer


def _forget_compiled(model: nn.Module) -> None:
    """Code compiled before hooks were added or removed would go on without, or with, them."""
    model.__dict__.pop("_compiled_call", None)  # where transformers' generate keeps its own
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
