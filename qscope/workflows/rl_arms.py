"""The arms of `qscope rl`: what each is trained with. One model, one set of prompts, one reward unless it says so."""

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qscope.errors import InputError
from qscope.post_training.mining import LayerRises, steering_spec
from qscope.post_training.negatives import LoopNegative, SteeredNegative
from qscope.post_training.rewards import Reward, feature_reward, parse
from qscope.post_training.rollouts import end_tokens
from qscope.sae import SAE
from qscope.steering import SteeringSpec
from qscope.workflows.rl_result import Mined

Arm = Literal["vanilla", "sae", "behaviour", "random", "any", "loop", "overlong", "kl", "shaping"]
WORDS: dict[str, str] = {
    "before": "the model as it was given",
    "vanilla": "DAPO, all rollouts normal",
    "sae": "one rollout of each group steered with the repetition features",
    "behaviour": "the same, importance ratio against the steered model",
    "random": "one rollout steered with random features of the same layer and strength",
    "any": "one rollout steered with other random features in every group",
    "loop": "one rollout replaced by a loop of its own tokens",
    "overlong": "no steering, DAPO's soft penalty on length",
    "kl": "no steering, KL to the model as it was given",
    "shaping": "no steering, the repetition features' activation in the reward",
}
LOGGED = (
    "loss", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy", "kl", "grad_norm",
    "steered/reward", "steered/length", "steered/weight", "clip_ratio/region_mean",
)  # fmt: skip
POOL = 64
"""Specs that the arm `any` draws from."""


@dataclass(frozen=True)
class Settings:
    """What all arms share."""

    rewards: tuple[str, ...]
    group: int
    prompts_per_step: int
    steps: int
    max_new_tokens: int
    learning_rate: float
    epsilon: float
    epsilon_high: float
    inner: int
    temperature: float
    top_p: float
    length_cap: float | None
    kl: float
    shaping: float
    rows: int | None
    chat: bool


@dataclass(frozen=True)
class Material:
    """What the arms are made of."""

    model: Any
    tokenizer: Any
    saes: Mapping[int, SAE]
    mined: Mined
    active: Sequence[int]
    """Features of the layer that fire in responses, without the mined ones."""
    prompts: Sequence[str]


def active_features(rises: LayerRises, without: Sequence[int]) -> list[int]:
    """Those whose activation changed in any sample."""
    changed = ((rises.looping != 0) | (rises.control != 0)).nonzero()[0].tolist()
    return [f for f in changed if f not in without]


def spec_of(mined: Mined, features: Sequence[int]) -> SteeringSpec:
    return steering_spec({mined.layer: features}, mined.strength, {mined.layer: mined.norm})


def negative_of(arm: str, seed: int, material: Material) -> SteeredNegative | LoopNegative | None:
    """What makes the rare negative of an arm, or None."""
    mined, saes = material.mined, material.saes
    if arm in ("sae", "behaviour"):
        return SteeredNegative([spec_of(mined, mined.features)], saes, seed)
    if arm in ("random", "any"):
        if len(material.active) < len(mined.features):
            raise InputError(
                f"Arm {arm} needs {len(mined.features)} features that fire in the responses and are not the "
                f"repetition features, and layer {mined.layer} has {len(material.active)}. Leave the arm out."
            )
        chance = random.Random(f"{arm} {seed}")
        count = 1 if arm == "random" else POOL
        specs = [spec_of(mined, chance.sample(list(material.active), len(mined.features))) for _ in range(count)]
        return SteeredNegative(specs, saes, seed)
    return LoopNegative(seed=seed) if arm == "loop" else None


def rewards_of(arm: str, settings: Settings, material: Material, model: Any) -> list[Reward]:
    ends = end_tokens(model, material.tokenizer)
    names = list(settings.rewards)
    if arm == "overlong":
        names.append(f"overlong:{settings.max_new_tokens}:{max(1, settings.max_new_tokens // 4)}")
    found = [parse(name, ends) for name in names]
    if arm == "shaping":
        features = {material.mined.layer: material.mined.features}
        weight = -settings.shaping / material.mined.norm  # in units of the residual, as steering strengths are
        found.append(feature_reward(material.model, material.tokenizer, material.saes, features, weight))
    return found


def train(
    arm: str, seed: int, settings: Settings, material: Material, folder: Path
) -> tuple[Any, list[dict[str, float]]]:
    """(a trained copy of the model, the logged figures of each step). Leaves `material.model` as it is."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.grpo_config import GRPOConfig

    from qscope.post_training.trl_grpo import SteeredGRPOTrainer

    model = copy.deepcopy(material.model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    rewards = rewards_of(arm, settings, material, model)
    rollouts = settings.group * settings.prompts_per_step
    rows = settings.rows or rollouts
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=rollouts // rows,
        num_generations=settings.group,
        num_iterations=settings.inner,
        max_completion_length=settings.max_new_tokens,
        max_steps=settings.steps * settings.inner,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        loss_type="dapo",
        epsilon=settings.epsilon,
        epsilon_high=settings.epsilon_high,
        beta=settings.kl if arm == "kl" else 0.0,
        temperature=settings.temperature,
        top_p=settings.top_p,
        reward_weights=[reward.weight for reward in rewards],
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=seed,
        use_cpu=next(model.parameters()).device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
    )
    asked: list[Any] = [[{"role": "user", "content": p}] if settings.chat else p for p in material.prompts]
    trainer = SteeredGRPOTrainer(
        model=model,
        reward_funcs=list(rewards),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in asked]),
        processing_class=material.tokenizer,
        negative=negative_of(arm, seed, material),
        old_logps="behaviour" if arm == "behaviour" else "unsteered",
        length_cap=settings.length_cap,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, where --json puts the result
    trainer.train()
    return model, [_figures(row) for row in trainer.state.log_history if "loss" in row]


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Those of one step that are numbers."""
    given = {name: row.get(name) for name in LOGGED}
    return {n: float(v) for n, v in given.items() if isinstance(v, int | float) and math.isfinite(v)}
