"""What a training run leaves: SAEs in qscope's format, and the weights of what that format cannot hold."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qscope.checkpoints import SAECard
from qscope.files import storage_error, tensor_parts, write_file
from qscope.workflows.train import TrainConfig, TrainedSAE
from qscope.workflows.train_supply import Supply, versions

if TYPE_CHECKING:
    from qscope.workflows.train_job import Unit

RESULT = "result.json"
WEIGHTS, CARD = "weights.safetensors", "card.json"


def save_trained(
    unit: "Unit", config: TrainConfig, supply: Supply, figures: dict[str, float], counts: dict[str, Any],
    write: bool = True,
) -> TrainedSAE:  # fmt: skip
    """Writes one SAE into its folder, so that `qscope.SAE.from_pretrained(OUT, layer=...)` finds it. Of the processes
    that train it, all call this and one writes.

    Transcoders and jumprelu, which are no qscope.SAE, become `weights.safetensors` (see SAETrainer.export) and
    `card.json`.
    """
    folder, trainer = config.out / unit.name, unit.trainer
    training = _training(unit, config, supply, figures, counts)
    if unit.target is None and unit.recipe.objective != "jumprelu":
        if unit.recipe.objective == "batch_topk":
            training["threshold"] = float(trainer.export()["threshold"])
        layer = unit.point if isinstance(unit.point, int) else None
        source = f"{config.out.resolve().name}/{unit.name}"
        card = SAECard(supply.model_name, layer=layer, source=source, context_size=supply.context_size)
        sae = trainer.to_sae(dataclasses.replace(card, training=training))
        if write:
            sae.save(folder)
    else:
        weights = trainer.export()
        if write:
            _save_weights(unit, folder, supply, training, weights)
    return TrainedSAE(
        path=str(folder),
        point=str(unit.point),
        target=None if unit.target is None else str(unit.target),
        d_in=trainer.d_in,
        d_sae=unit.recipe.d_sae,
        k=unit.recipe.k,
        seed=unit.recipe.seed,
        figures=figures,
    )


def _training(
    unit: "Unit", config: TrainConfig, supply: Supply, figures: dict[str, float], counts: dict[str, Any]
) -> dict[str, Any]:
    """For the card: everything that the weights depend on. No time, so that equal runs leave equal bytes."""
    settings = {k: v for k, v in supply.settings.items() if not isinstance(v, list | dict)}
    found = {
        "model_sha256": supply.model_sha256,
        "tokens": unit.trainer.tokens,
        "steps": unit.trainer.step_number,
        "complete": unit.trainer.step_number == config.total_steps,
        "batch_tokens": config.batch_tokens,
        "total_steps": config.total_steps,
        "preset": config.preset,
        "recipe": {**dataclasses.asdict(unit.recipe), "lr": unit.recipe.peak_lr},
        "precision": unit.trainer.precision,
        "activations": settings,
        "activations_sha256": supply.settings_sha256(),
        "text": supply.source,
        "counts": counts,
        "figures": figures,
        "device": supply.device_name,
        "versions": versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _save_weights(
    unit: "Unit", folder: Path, supply: Supply, training: dict[str, Any], weights: dict[str, Tensor]
) -> None:
    card = {
        "format": "qscope-weights",
        "format_version": 1,
        "model": supply.model_name,
        "reads": str(unit.point),
        "predicts": str(unit.point if unit.target is None else unit.target),
        "objective": unit.recipe.objective,
        "k": unit.recipe.k,
        "d_in": unit.trainer.d_in,
        "d_out": unit.trainer.d_out,
        "d_sae": unit.recipe.d_sae,
        "context_size": supply.context_size,
        "training": training,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    parts, size = tensor_parts(weights, {"format": "pt"})
    card["sha256"] = write_file(folder / WEIGHTS, parts, size)
    text = (json.dumps(card, indent=2, allow_nan=False) + "\n").encode()
    write_file(folder / CARD, [text], len(text))
