"""The arms of `qscope sft`: what each adds to plain SFT, and the features that this needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qscope.errors import InputError
from qscope.model import load_model
from qscope.post_training.alpha import Alpha, Mined, estimate, mine
from qscope.post_training.controls import (
    EntropyTerm,
    FeatureTerm,
    KLTerm,
    Term,
    TokenTerm,
    difference_of_means,
    drop_switched,
    random_features,
    schedule,
    tokens_of_script,
)
from qscope.post_training.penalty import FeaturePenalty
from qscope.post_training.rows import Rows, sae_rows
from qscope.sae import SAE
from qscope.workflows.sft_data import Data, Example
from qscope.workflows.sft_result import Point

if TYPE_CHECKING:
    from qscope.workflows.sft import SFTConfig

Arm = Literal["none", "penalty", "random", "difference", "kl", "entropy", "token", "filter"]
ARMS: tuple[Arm, ...] = ("none", "penalty", "random", "difference", "kl", "entropy", "token", "filter")
MEANING = {
    "base": "the model before training",
    "none": "plain SFT",
    "penalty": "SFT and the penalty on the SAE features of the target",
    "random": "the same penalty on random features of the same layers, another draw for each seed",
    "difference": "the same penalty on the difference of means between the target's residuals and the others'",
    "kl": "SFT and KL to the model before training, on answers of other groups",
    "entropy": "SFT and a confidence penalty, on answers of other groups",
    "token": "SFT and a penalty on the probability of tokens in the target's scripts, on answers of other groups",
    "filter": "plain SFT without the examples of other groups whose answer holds the target's scripts",
}
_BY_WEIGHT: dict[str, str] = {
    "penalty": "weight", "random": "weight", "difference": "weight", "kl": "kl_weight", "entropy": "entropy_weight",
    "token": "token_weight",
}  # fmt: skip


def points(config: "SFTConfig") -> list[Point]:
    """Every run, seed by seed, so that a run that is stopped has whole seeds."""
    found = []
    for seed in config.seeds:
        for arm in config.arms:
            weights = getattr(config, _BY_WEIGHT[arm]) if arm in _BY_WEIGHT else (None,)
            found += [Point(arm, weight, seed) for weight in weights]
    return found


@dataclass
class Prepared:
    """What the arms are made of, found with the model before training."""

    rows: dict[int, Rows]
    mined: Mined
    random: dict[int, dict[int, Rows]] = field(default_factory=dict)
    """seed -> rows"""
    difference: dict[int, Rows] = field(default_factory=dict)
    alphas: dict[str, Alpha] = field(default_factory=dict)
    """penalty, difference, random-SEED; none where --alpha zero"""
    tokens: tuple[int, ...] = ()


def prepare(config: "SFTConfig", data: Data, model: Any, tokenizer: Any, saes: Mapping[int, SAE]) -> Prepared:
    """Features, directions, thresholds. Raises InputError for groups without text and features that do not exist."""
    texts, target = data.texts, config.target_group
    size = {"context_size": config.max_length}
    if config.features:
        chosen = parse_features(config.features, saes)
        mined = Mined(chosen, {layer: () for layer in chosen})
    else:
        mined = mine(model, tokenizer, saes, texts, target, config.features_per_layer, **size)
    found = Prepared(sae_rows(saes, mined.features), mined)
    if "random" in config.arms:
        for seed in config.seeds:
            drawn = random_features(model, tokenizer, saes, texts, mined.features, seed, **size)
            found.random[seed] = sae_rows(saes, drawn)
    if "difference" in config.arms:
        found.difference = difference_of_means(model, tokenizer, found.rows, texts, target, **size)
    if config.alpha == "estimated":
        wanted = {"penalty": found.rows} if "penalty" in config.arms else {}
        wanted |= {"difference": found.difference} if found.difference else {}
        wanted |= {f"random-{seed}": rows for seed, rows in found.random.items()}
        found.alphas = {name: estimate(model, tokenizer, rows, texts, **size) for name, rows in wanted.items()}
    return found


def parse_features(given: Sequence[str], saes: Mapping[int, SAE]) -> dict[int, tuple[int, ...]]:
    """("15:12", "15:99") -> {15: (12, 99)}. InputError."""
    found: dict[int, list[int]] = {}
    for text in given:
        layer, colon, feature = text.partition(":")
        if not (colon and layer.isdigit() and feature.isdigit()) or int(layer) not in saes:
            raise InputError(
                f"--features {text} was given; accepted is LAYER:FEATURE, such as 15:12, with a layer that has an SAE "
                f"({', '.join(map(str, sorted(saes)))})."
            )
        found.setdefault(int(layer), []).append(int(feature))
    return {layer: tuple(ids) for layer, ids in found.items()}


def terms_of(
    config: "SFTConfig", point: Point, found: Prepared, data: Data, tokenizer: Any, scripts: Sequence[str]
) -> list[Term]:
    """What the arm adds to the loss of SFT."""
    if point.weight is None:
        return []
    weight, target = schedule(point.weight, config.weight_warmup), data.groups.index(config.target_group)
    if point.arm in ("penalty", "random", "difference"):
        rows = {"penalty": found.rows, "difference": found.difference}.get(point.arm) or found.random[point.seed]
        name = f"random-{point.seed}" if point.arm == "random" else point.arm
        penalty = FeaturePenalty(
            rows,
            alpha=found.alphas.get(name, "zero"),
            groups=data.groups,
            target_groups=(config.target_group,),
            weight=weight,
        )
        return [FeatureTerm(penalty, point.arm)]
    if point.arm == "kl":
        reference = None
        if config.lora_rank == 0:
            reference = load_model(config.model_path, device=config.device, dtype=config.dtype)[0].requires_grad_(False)
        return [KLTerm(weight, target, reference)]
    if point.arm == "entropy":
        return [EntropyTerm(weight, target)]
    found.tokens = found.tokens or tokens_of_script(tokenizer, scripts)
    return [TokenTerm(weight, target, found.tokens)]


def examples_of(config: "SFTConfig", point: Point, data: Data, scripts: Sequence[str]) -> list[Example]:
    """What the arm is trained on."""
    if point.arm != "filter":
        return list(data.train)
    return drop_switched(data.train, lambda e: e.answer, lambda e: e.group, config.target_group, scripts)


def about(point: Point, found: Prepared, target: str) -> dict[str, Any]:
    """What the arm was made of, for its result."""
    facts: dict[str, Any] = {"target_group": target, "meaning": MEANING[point.arm]}
    rows = {"penalty": found.rows, "difference": found.difference}.get(point.arm)
    rows = found.random.get(point.seed) if point.arm == "random" else rows
    for layer, one in (rows or {}).items():
        facts[f"layer {layer}"] = list(one.features) if one.features else "a direction"
    if point.arm == "token":
        facts["tokens"] = len(found.tokens)
    return facts
