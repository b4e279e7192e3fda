"""One training run of `qscope sft`: an arm from a seed, in a folder of its own, that goes on where it was killed."""

import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope.errors import InputError, StoreError
from qscope.files import acquire_lock, claim_folder, differences, write_file
from qscope.post_training.controls import Term
from qscope.workflows.sft_data import Encoded
from qscope.workflows.sft_result import PointResult, as_json, point_from_json

if TYPE_CHECKING:
    from qscope.workflows.sft import SFTConfig

OPTIONS, RUNS, RESULT, CHECKPOINTS = "options.json", "runs", "result.json", "checkpoints"
_TEMPORARY = re.compile(r"\.tmp-.*|\..*\.part")


@contextlib.contextmanager
def claimed(folder: Path, options: dict[str, Any]) -> Iterator[None]:
    """The folder of all runs, locked; StoreError where it holds something else, or runs with other options."""
    claim_folder(folder, OPTIONS, _TEMPORARY, "folder of `qscope sft`")
    lock = acquire_lock(folder)
    try:
        options = json.loads(json.dumps(options, default=str))
        path = folder / OPTIONS
        begun = any((folder / RUNS).glob(f"*/{RESULT}")) or any((folder / RUNS).glob(f"*/{CHECKPOINTS}/*"))
        if begun and path.exists():  # options of a command that was refused bind nobody
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise StoreError(f"{path} is damaged: {error}. Remove the folder and start again.") from error
            changed = differences(before, options)
            if changed:
                raise StoreError(
                    f"{folder} holds runs with other options: {'; '.join(changed[:5])}. Give the same options to go on "
                    "(arms, weights and seeds may be added), or another --out."
                )
        else:
            write_json(path, options)
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    data = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    write_file(path, [data], len(data))


def finished(folder: Path) -> PointResult | None:
    """The result of a run that was completed, or None. StoreError for a damaged one."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return point_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged: {error}. Remove its folder, and the run is made again.") from error


def keep(folder: Path, result: PointResult, responses: Sequence[Any]) -> PointResult:
    """Writes the result, then lets go of the checkpoints; gives it back as it will be read again."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(json.dumps(as_json(r), ensure_ascii=False).encode() + b"\n" for r in responses)
    write_file(folder / "responses.jsonl", [lines], len(lines))
    write_json(folder / RESULT, as_json(result))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    again = finished(folder)
    assert again is not None
    return again


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: the trainer writes trainer_state.json last. Others are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed while it was written
            shutil.rmtree(path, ignore_errors=True)
            continue
        found.append(path)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def adapted(config: "SFTConfig", model: Any, seed: int) -> Any:
    """With LoRA adapters where the config asks for them."""
    if config.lora_rank == 0:
        return model
    import peft
    import transformers

    transformers.set_seed(seed)
    targets: Any = list(config.lora_targets) or "all-linear"
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(f"LoRA cannot be put on this model: {error}. Name modules with --lora-targets.") from error


def train(
    config: "SFTConfig",
    folder: Path,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    terms: Sequence[Term],
    groups: Sequence[str],
    seed: int,
    bar: Any,
) -> tuple[list[dict[str, float]], int, float]:
    """Trains `model` in place. (log, steps, seconds); goes on from the newest checkpoint in `folder`."""
    import transformers
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_config import SFTConfig as TRLConfig

    from qscope.post_training.trl_sft import FeatureSFTTrainer

    transformers.set_seed(seed)
    arguments = TRLConfig(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulate,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_length=None,  # cut already
        bf16=config.bf16,
        use_cpu=model.device.type == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=1,
        seed=seed,
        data_seed=seed,
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
    )
    trainer = FeatureSFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list([example.row() for example in examples]),
        processing_class=tokenizer,
        callbacks=[_bar(bar)],
        terms=terms,
        groups=groups,
    )
    trainer.remove_callback(PrinterCallback)  # standard output is the result's
    began = time.perf_counter()
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - began
    rows = [row for row in trainer.state.log_history if "loss" in row]
    log = [{k: float(v) for k, v in row.items() if math.isfinite(v)} for row in rows]
    return log, trainer.state.global_step, seconds


def _bar(bar: Any) -> Any:
    import transformers

    class Progress(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.update(1)

    return Progress()
