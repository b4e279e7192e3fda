"""A training run: one stream of activations, any number of trainers, a log, checkpoints, an orderly stop."""

import contextlib
import dataclasses
import functools
import json
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qscope.distributed import Group
from qscope.errors import CheckpointError, InputError, ModelError, StorageError
from qscope.files import differences, write_file
from qscope.training import Recipe, SAETrainer, checkpoint, parallel
from qscope.training.buffer import Point
from qscope.workflows.encode import Clock
from qscope.workflows.train import MANIFEST, TrainConfig, TrainResult
from qscope.workflows.train_log import SHORT, Log, Window, last_figures
from qscope.workflows.train_save import RESULT, save_trained
from qscope.workflows.train_supply import Supply

SAMPLE = 8192
"""Tokens from which the first weights are made: the first batches, which are then trained on."""

# Options that may change between two parts of a run. What text and model are is known from their content.
_CHANGEABLE = {
    "text", "dataset", "dataset_config", "activations", "out", "finish", "model", "layers", "transcoder_in",
    "transcoder_out", "device", "checkpoint_seconds", "checkpoint_steps", "keep_last", "keep_best", "log_every",
    "divergence_factor", "divergence_steps", "tensorboard", "wandb", "spread", "dp", "tp", "timeout",
}  # fmt: skip
# Options that the stream's settings hold.
_OF_STREAM = {
    "norm_multiple", "context_size", "model_tokens", "separator", "bos", "first_token", "cycle", "chat",
    "buffer_tokens", "data_seed", "dtype",
}  # fmt: skip


AGREE_EVERY = {"cpu": 1, "cuda": 8}
"""Steps between two questions of a group whether a signal came to one of them: the answer waits for the device."""

T = TypeVar("T")


@dataclasses.dataclass
class Plan:
    """One SAE or transcoder of a run."""

    name: str
    """Its folder below that of the run"""
    point: Point
    target: Point | None
    recipe: Recipe


@dataclasses.dataclass
class Unit(Plan):
    """One that this process trains, alone or with others."""

    trainer: SAETrainer
    window: Window


class Job:
    """One run over one folder, which must be locked (by the first process of a group).

    Of a group all processes do the same in the same order. The stream is the same on all of them. What others know of
    their SAEs goes round at a line of the log and at a checkpoint; the first one writes all files but the SAEs, which
    the leading process of each one does.
    """

    def __init__(
        self, config: TrainConfig, supply: Supply, manifest: dict[str, Any], group: Group | None = None
    ) -> None:
        self.config, self.supply, self.manifest, self.group = config, supply, manifest, group
        self.first = group is None or group.first
        self.plans = list(_plans(config, supply))
        if len(self.plans) < config.spread:
            raise InputError(
                f"--spread {config.spread} was given, and this run trains {len(self.plans)} SAEs. Give at most that "
                "many; --dp and --tp put several processes to work on one SAE."
            )
        self.units = [self._unit(plan) for i, plan in enumerate(self.plans) if group is None or group.owns(i)]
        self.log = Log(config.out, config.tensorboard and self.first, config.wandb if self.first else None)
        self.clock = Clock()
        self.step = self.resumed_step = self._saved_step = self._line_steps = 0
        self.elapsed = 0.0
        """Seconds of training, of all parts of the run, without loading"""
        self.metric: float | None = None
        """Mean FVU of the last line"""
        self._pending: list[dict[Point, Tensor]] = []
        self._counts: dict[str, Any] = {}

    def _unit(self, plan: Plan) -> Unit:
        config, supply = self.config, self.supply
        trainer = SAETrainer(
            plan.recipe, supply.width(plan.point), d_out=None if plan.target is None else supply.width(plan.target),
            device=supply.device, total_steps=config.total_steps, batch_tokens=config.batch_tokens, group=self.group,
        )  # fmt: skip
        return Unit(**vars(plan), trainer=trainer, window=Window(supply.device, config.divergence_factor))

    def _of_all(self, own: dict[str, T]) -> dict[str, T]:
        """What every process has for its SAEs, in the order of the plans."""
        parts = [own] if self.group is None else self.group.spread.objects(own)
        return {plan.name: next(part[plan.name] for part in parts if plan.name in part) for plan in self.plans}

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on, by the names of the options."""
        options = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _CHANGEABLE | _OF_STREAM}
        names = [plan.name for plan in self.plans]
        found = {**options, "d_sae": sorted({plan.recipe.d_sae for plan in self.plans}), "saes": names}
        plain: dict[str, Any] = json.loads(json.dumps({**found, "activations": self.supply.settings}))
        return plain

    # --- start and resume --------------------------------------------------------------------------------

    def resume(self) -> None:
        """Goes on from the newest checkpoint, or begins. Raises CheckpointError for a folder of another run."""
        out, position = self.config.out, 0
        found = checkpoint.resume(out, self.identity) if self.first else None
        if self.group is not None:
            path = self.group.world.objects(None if found is None else str(found.path))[0]
            if path is not None and found is None:
                found = checkpoint.load(path, self.identity)
        if found is not None:
            self._restore(found)
            position = found.log_position
            if self.first and not self.config.finish:
                print(f"qscope: going on from step {self.step:,} of {self.config.total_steps:,}", file=sys.stderr)
        elif self.config.finish:
            raise InputError(
                f"--finish was given, and {out} has no checkpoint. Train first: the same command without --finish."
            )
        elif self.first:
            self._refuse_other_result()
            self.manifest = {"format": "qscope-train", "version": 1, "run": uuid.uuid4().hex, "config": self.identity}
            text = json.dumps(self.manifest, indent=1).encode() + b"\n"
            write_file(out / MANIFEST, [text], len(text))
        if self.first:
            self.log.open(position, self.step, self.manifest["run"], self.manifest["config"])

    def _refuse_other_result(self) -> None:
        """A finished run whose checkpoints were deleted is not overwritten by another one."""
        changed = differences(self.manifest["config"], self.identity) if self.manifest else []
        if changed and (self.config.out / RESULT).exists():
            raise CheckpointError(
                f"{self.config.out} holds the SAEs of a run with other options: {'; '.join(changed[:12])}. Give "
                "another folder, or delete this one first."
            )

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        own = found.trainers.pop("run")
        for unit in self.units:
            unit.trainer.load_state_dict(found.trainers[unit.name])
            unit.window.restore(own["windows"][unit.name])
        self.step = self.resumed_step = self._saved_step = found.step
        self._line_steps, self.elapsed, self.metric = own["line_steps"], own["elapsed"], own["metric"]
        points, device = self.supply.points, self.supply.device
        self._pending = [{point: batch[str(point)].to(device) for point in points} for batch in own["pending"]]
        if self.step < self.config.total_steps and not self.config.finish:
            self.supply.stream.restore(found.stream)
        self._counts = own["counts"]
        found.restore_rng()

    # --- training ----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Every step that is left. KeyboardInterrupt, after a checkpoint, when a signal asked to stop."""
        total = self.config.total_steps
        if self.step == total:
            return
        self._begun = self._line_began = self._checkpoint_at = time.perf_counter()
        before = self.elapsed
        with self._bar() as bar, _StopRequest(self.first) as stop, _memory_advice():
            if self.step == 0:
                self._initialise()
            self._check_disk()
            bar.set_description("train")
            while self.step < total:
                self._one_step()
                bar.update(self.config.batch_tokens)
                self.elapsed = before + time.perf_counter() - self._begun
                if self._line_steps == self.config.steps_per_line or self.step == total:
                    self._line(bar)
                asked, due = self._wishes(stop.asked)
                if self.step == total or due or asked:
                    self._save()
                if asked and self.step < total:
                    raise KeyboardInterrupt

    def _initialise(self) -> None:
        batches = min(self.config.total_steps, -(-SAMPLE // self.config.batch_tokens))
        self._pending = [self._next() for _ in range(batches)]
        with self.clock("initialise"):
            for unit in self.units:
                sample = torch.cat([batch[unit.point] for batch in self._pending])
                aim = None if unit.target is None else torch.cat([batch[unit.target] for batch in self._pending])
                unit.trainer.initialise(sample, aim)

    def _one_step(self) -> None:
        batch = self._pending.pop(0) if self._pending else self._next()
        if self.group is not None:
            batch = parallel.slice_of(batch, self.group)
        with self.clock("step"):
            for unit in self.units:
                target = None if unit.target is None else batch[unit.target]
                unit.window.add(unit.trainer.step(batch[unit.point], target))
        self.step += 1
        self._line_steps += 1

    def _next(self) -> dict[Point, Tensor]:
        try:
            with self.clock("activations"):
                return self.supply.stream.next(self.config.batch_tokens)
        except InputError as error:
            # When the text ran dry, what was learnt until then is saved. Text that fails while the buffer is filled
            # leaves no stream to go on with.
            if self.supply.stream.producer.done and self.step > self._saved_step:
                self._save()
            if self._saved_step == 0:
                raise
            raise InputError(
                f"{error} The newest checkpoint is of step {self._saved_step:,} of {self.config.total_steps:,}; "
                "--finish writes the SAEs as they are there."
            ) from error

    def _line(self, bar: Any) -> None:
        """Writes the log, shows the figures, stops a run that has diverged."""
        now = time.perf_counter()
        speed = self._line_steps * self.config.batch_tokens / max(1e-9, now - self._line_began)
        common = {"step": self.step, "tokens": self.step * self.config.batch_tokens}
        timing = {"seconds": round(self.elapsed, 2), "tokens_per_second": round(speed, 1)}
        records: list[dict[str, Any]] = []
        lines = self._of_all({unit.name: (unit.window.line(), *unit.window.stands()) for unit in self.units})
        for plan in self.plans:
            lr = plan.recipe.lr_at(self.step, self.config.total_steps)
            records.append({**common, "sae": plan.name, **timing, "lr": lr, **lines[plan.name][0]})
        if self.first:
            self.log.write(self.step, records)
        self._line_began, self._line_steps = now, 0
        fvus = [record["fvu"] for record in records if record["fvu"] is not None]
        self.metric = sum(fvus) / len(fvus) if fvus else None
        bar.set_postfix_str(_summary(records), refresh=False)
        for plan, record in zip(self.plans, records, strict=True):
            self._check_divergence(plan, record, *lines[plan.name][1:])

    def _check_divergence(self, unit: Plan, record: dict[str, Any], streak: int, best: float) -> None:
        patience = min(self.config.divergence_steps, -(-self.config.total_steps // 4))
        if self.step == self.config.total_steps:  # it would be handed out as complete
            patience = min(patience, SHORT)
        if streak < patience:
            return
        loss = record["loss"]
        stands = "is not finite" if loss is None else f"stands at {loss:.3g}"
        kept = checkpoint.latest(self.config.out)
        raise InputError(
            f"The loss of {unit.name} {stands} after step {self.step:,}, and was not finite or above "
            f"{self.config.divergence_factor:g} times its lowest mean, {best:.3g}, for {streak:,} steps in a row: the "
            "run has diverged and was stopped. "
            + (f"{kept} is from before; --finish writes its SAEs. " if kept else "No checkpoint had been written yet. ")
            + f"Begin again in another folder with a smaller --lr (the peak was {unit.recipe.peak_lr:.2g}), or a "
            "longer --warmup-steps; where activations are extreme, with a smaller --norm-multiple."
        )

    # --- checkpoints -------------------------------------------------------------------------------------

    def _due(self) -> bool:
        if self.config.checkpoint_steps is not None:
            return self.step - self._saved_step >= self.config.checkpoint_steps
        return time.perf_counter() - self._checkpoint_at >= self.config.checkpoint_seconds

    def _wishes(self, asked: bool) -> tuple[bool, bool]:
        """Whether a signal asked for a stop, and whether a checkpoint is due: the same on every process."""
        due, by_steps = self._due(), self.config.checkpoint_steps is not None
        if self.group is None:
            return asked, due
        if self.step % AGREE_EVERY[self.group.device.type]:
            return False, due and by_steps
        wishes = torch.tensor([asked, due and (by_steps or self.first)], device=self.group.device)
        asked, due = self.group.world.any(wishes).tolist()
        return asked, due

    def _save(self) -> bool:
        """A checkpoint, unless the loss is not finite or far from where it was: the one before is better then."""
        if any(self._of_all({unit.name: int(unit.window.streak) for unit in self.units}).values()):
            return False
        done = self.step == self.config.total_steps
        with self.clock("checkpoint"):
            self._counts = self.supply.stream.counts()
            own = {
                "line_steps": self._line_steps,
                "elapsed": self.elapsed,
                "metric": self.metric,
                "counts": self._counts,
                "pending": [{str(point): rows for point, rows in batch.items()} for batch in self._pending],
                "windows": self._of_all({unit.name: unit.window.state() for unit in self.units}),
            }
            states = self._states()
            if self.first:
                checkpoint.save(
                    self.config.out, self.step, {**states, "run": own}, {} if done else self.supply.stream.state(),
                    self.log.sync(), self.identity, metric=self.metric, keep_last=self.config.keep_last,
                    keep_best=self.config.keep_best,
                )  # fmt: skip
            if self.group is not None:
                self.group.world.barrier()
        self._saved_step, self._checkpoint_at = self.step, time.perf_counter()
        return True

    def _states(self) -> dict[str, parallel.State]:
        """Of all trainers, on the first process."""
        trainers = {unit.name: unit.trainer for unit in self.units}
        if self.group is None:
            return {name: trainer.state_dict() for name, trainer in trainers.items()}
        return parallel.collect_states(self.group, [plan.name for plan in self.plans], trainers)

    def _check_disk(self) -> None:
        """Refuses a run whose first checkpoint would not fit, before hours are spent."""
        parameters = [p for unit in self.units for p in unit.trainer.parameters.values()]
        needed = sum(t.nbytes for p in parameters for t in p.tensors().values())
        if self.group is not None:  # processes along dp hold the same
            needed = sum(self.group.world.objects(needed if self.group.dp.rank == 0 else 0))
        if not self.first:
            return
        needed += self.supply.stream.memory() + sum(rows.nbytes for batch in self._pending for rows in batch.values())
        free = shutil.disk_usage(self.config.out).free
        if free < needed:
            raise StorageError(
                f"A checkpoint of this run takes up to {needed:,} bytes ({self.supply.stream.memory():,} of them the "
                f"shuffle buffer), and {free:,} are free where {self.config.out} lies. Make room, give another folder, "
                "or a smaller --buffer-tokens."
            )

    # --- the end -----------------------------------------------------------------------------------------

    def finish(self) -> TrainResult:
        """Writes the SAEs as they are, and what is known about the run."""
        config, began = self.config, self.step - self.step // 10
        if self.step > self._saved_step:
            self._counts = self.supply.stream.counts()
        figures = {plan.name: last_figures(config.out, plan.name, began - 1) for plan in self.plans if self.first}
        if self.group is not None:
            figures = self.group.world.objects(figures)[0]
        with self.clock("save"):
            write = self.group is None or self.group.leads
            saes = self._of_all(
                {
                    unit.name: save_trained(unit, config, self.supply, figures[unit.name], self._counts, write)
                    for unit in self.units
                }
            )
        ran = (self.step - self.resumed_step) * config.batch_tokens
        seconds = time.perf_counter() - self._begun if ran else 0.0
        result = TrainResult(
            out=str(config.out),
            model=self.supply.model_name,
            complete=self.step == config.total_steps,
            steps=self.step,
            tokens=self.step * config.batch_tokens,
            resumed_step=self.resumed_step,
            saes=saes,
            counts=self._counts,
            run_tokens=ran,
            run_seconds=round(seconds, 3),
            tokens_per_second=round(ran / seconds, 1) if ran else 0.0,
            seconds={stage: round(value, 3) for stage, value in self.clock.seconds.items()},
            buffer_bytes=self.supply.stream.memory(),
            about=self._about(),
            log=str(self.log.path),
            report=str(config.out / "report.html"),
        )
        if self.first:
            text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False).encode() + b"\n"
            write_file(config.out / RESULT, [text], len(text))
        return result

    def _about(self) -> dict[str, str]:
        config, about = self.config, self.supply.about()
        if self.group is not None:
            about["processes"] = f"{config.processes}: spread {config.spread}, dp {config.dp}, tp {config.tp}"
        return about

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Any]:
        from tqdm import tqdm

        batch = self.config.batch_tokens
        with tqdm(
            total=self.config.total_steps * batch,
            initial=self.step * batch,
            unit="tok",
            unit_scale=True,
            desc="train: filling the buffer",
            dynamic_ncols=True,
            mininterval=0.5,
            smoothing=0,  # steps come in bursts between two fillings of the buffer
            disable=not self.first,
        ) as bar:
            yield bar


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `train.json` says of the run in this folder, empty without one. Raises CheckpointError if it is damaged."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != "qscope-train" or not {"run", "config"} <= content.keys():
            raise ValueError("it is not the record of a training run")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it, or give another folder.") from error
    return dict(content)


def _plans(config: TrainConfig, supply: Supply) -> Iterator[Plan]:
    for point, target in zip(supply.inputs, supply.targets, strict=True):
        recipes = config.recipes(supply.width(point))
        for recipe in recipes:
            name = f"layer{point}" if target is None else f"transcoder-{point}-{target}"
            if len(recipes) > 1:
                name = f"f{recipe.d_sae}-k{recipe.k}-seed{recipe.seed}/{name}"
            yield Plan(name, point, target, recipe)


def _summary(records: list[dict[str, Any]]) -> str:
    """Means over the SAEs; of the FVU also from where to where."""
    parts = []
    for name, label, form in (
        ("loss", "loss", "{:.3f}"), ("fvu", "FVU", "{:.3f}"), ("l0", "L0", "{:.1f}"), ("dead_share", "dead", "{:.1%}"),
    ):  # fmt: skip
        values = [record[name] for record in records if record[name] is not None]
        text = form.format(sum(values) / len(values)) if values else "-"
        if name == "fvu" and len(values) > 1:
            text += f" ({min(values):.3f} to {max(values):.3f})"
        parts.append(f"{label} {text}")
    return ", ".join(parts)


@contextlib.contextmanager
def _memory_advice() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            "The device's memory does not hold the model, the shuffle buffer and all trainers. Finished checkpoints "
            "are kept. In a new folder, try a smaller --buffer-tokens or --batch-tokens, or fewer layers at once."
        ) from error


class _StopRequest:
    """SIGINT and SIGTERM ask for a stop after the step; a second one is KeyboardInterrupt at once."""

    def __init__(self, says_so: bool) -> None:
        self.asked, self.says_so = False, says_so
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.says_so:
            print("\nqscope: stopping with a checkpoint after this step; once more: at once, without", file=sys.stderr)
