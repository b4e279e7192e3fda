"""Loss terms inside the trainers of Hugging Face: a mixin for any of them, and the plain one.

A callback cannot do this: no trainer shows it the loss. What is added is scaled as the trainer's own loss is, so that
gradient accumulation (num_items_in_batch) and several processes give what one large batch gives.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from qscope.errors import InputError
from qscope.post_training.controls import Batch, Term

GROUP = "group"
"""Column of the dataset, and of the batch"""


class GroupCollator:
    """Makes batches with `inner`, and puts the groups of the examples beside them as numbers [B]."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Any], groups: Sequence[str] | None) -> None:
        self.inner, self.groups = inner, None if groups is None else list(groups)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [self._number(example.get(GROUP)) for example in examples]
        batch: dict[str, Any] = dict(self.inner([{k: v for k, v in e.items() if k != GROUP} for e in examples]))
        if len(batch["input_ids"]) != len(numbers):
            raise InputError(
                f"{len(numbers)} examples were packed into {len(batch['input_ids'])} sequences, and their groups can "
                "no longer be told. Train without packing and padding_free."
            )
        batch[GROUP] = torch.tensor(numbers, dtype=torch.int64)
        return batch

    def _number(self, group: Any) -> int:
        if isinstance(group, str) and self.groups is not None and group in self.groups:
            return self.groups.index(group)
        if isinstance(group, int) and not isinstance(group, bool) and group >= -1:
            return group
        known = "whole numbers from 0" if self.groups is None else f"{', '.join(self.groups)}, or their numbers"
        raise InputError(
            f"An example has the {GROUP} {group!r}; accepted are {known}, and -1 for one that no term reads. Give "
            f"every example of the training data a column {GROUP!r}, and name all of them in groups=."
        )


if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class FeatureTrainerMixin(_Base):
    """Put before a trainer class: `class Mine(FeatureTrainerMixin, SomeTrainer)`.

    The loss of training steps is the trainer's own plus every term; that of an evaluation is its own alone. The dataset
    has a column "group" (name or number), which reaches the terms although the model does not take it. Logged beside
    the loss: every term as term/NAME, its weight included.

    Args of the constructor, beside those of the trainer:
        terms: `qscope.post_training.controls.Term` objects.
        groups: names of the groups 0, 1, ...; needed where the column holds names.
    """

    data_collator: Any
    _signature_columns: Any

    def __init__(self, *args: Any, terms: Sequence[Term] = (), groups: Sequence[str] | None = None, **kw: Any) -> None:
        names = [term.name for term in terms]
        if len(set(names)) < len(names):
            raise InputError(f"Terms named {names} were given. Give every term a name of its own.")
        self.terms = tuple(terms)
        self._parts: dict[str, Tensor] = {}
        self._parts_step = 0
        super().__init__(*args, **kw)
        if getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False):
            raise InputError(
                "packing or padding_free was asked for: they put several examples into one sequence, and the groups of "
                "its tokens could no longer be told. Train without them."
            )
        if self.args.n_gpu > 1:
            raise InputError(
                "Several GPUs are visible to one process, which the Trainer would use through DataParallel; the terms "
                "do not work in its replicas. Launch with torchrun, or show one GPU (CUDA_VISIBLE_DEVICES)."
            )
        self.data_collator = GroupCollator(self.data_collator, groups)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if GROUP not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, GROUP]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for term in self.terms:
                stack.enter_context(term.attach(self.model))
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        groups = inputs.pop(GROUP, None)
        if not self.terms or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if groups is None or "labels" not in inputs:
            raise InputError(
                f"The batch has no {'labels' if groups is not None else 'groups'}: the terms need both. Keep the "
                "trainer's data_collator, or wrap your own in GroupCollator, and give labels."
            )
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        logits = None
        if any(term.needs_logits for term in self.terms):
            found, outputs = self._loss_with_logits(model, inputs, num_items_in_batch)
            logits = outputs.logits
        else:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            found, outputs = found if return_outputs else (found, None)
        inner = self.accelerator.unwrap_model(model)
        batch = Batch(inner, given, labels, groups, logits, num_items_in_batch, self.state.global_step)
        scale = self._scale(num_items_in_batch)
        # Those that read logits may run the model again, and hooks keep the latest pass: they come last.
        for term in sorted(self.terms, key=lambda term: term.needs_logits):
            part = scale * term.loss(batch)
            found = found + part
            self._note(term.name, part.detach(), num_items_in_batch)
        return (found, outputs) if return_outputs else found

    def _loss_with_logits(self, model: Any, inputs: dict[str, Any], items: Any) -> Any:
        """The loss from a pass that gives logits, by the plain Trainer: TRL's own computes none."""
        if getattr(self.args, "loss_type", "nll") != "nll" or getattr(self, "aux_loss_enabled", False):
            raise InputError(
                "A term that reads logits goes with loss_type='nll' and models without a router loss only. Leave the "
                "term out, or set loss_type='nll' and router_aux_loss_coef=0."
            )
        inputs["use_cache"] = False
        return transformers.Trainer.compute_loss(self, model, inputs, return_outputs=True, num_items_in_batch=items)

    def _scale(self, items: Any) -> int:
        """As in Trainer.compute_loss: items are of all processes, over whose gradients DDP takes the mean."""
        if items is None or not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes)

    # --- the log ---------------------------------------------------------------------------------------------

    def _note(self, name: str, part: Tensor, items: Any) -> None:
        if items is None:
            part = part / self.current_gradient_accumulation_steps
        self._parts[name] = self._parts[name] + part if name in self._parts else part

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._parts_step)
            for term in self.terms:
                if term.name in self._parts:
                    mean = self.accelerator.gather(self._parts[term.name].reshape(1)).mean()
                    logs[f"term/{term.name}"] = float(mean) / steps
            self._parts, self._parts_step = {}, self.state.global_step
        super().log(logs, *args, **kwargs)


class FeatureTrainer(FeatureTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` with loss terms."""
