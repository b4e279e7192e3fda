"""Reinforcement learning against endless repetition, with rare negatives steered by SAE features, and the controls.

First the features: responses that repeat themselves are sampled, features that rise between the first and the last
occurrence of a token are mined, and a strength is found at which they cause repetition. Then every arm is trained from
the same model with every seed, and measured on prompts and texts that no training has seen.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from qscope._version import __version__
from qscope.errors import InputError
from qscope.files import write_file
from qscope.journal import Journal
from qscope.model import tokenizer_hash
from qscope.post_training import rewards as reward_names
from qscope.post_training.mining import LayerRises, causal_check, rises, steering_spec
from qscope.post_training.repetition import Thresholds, endless
from qscope.post_training.rollouts import Rollout, end_tokens, rollouts
from qscope.steering import SteeringSpec
from qscope.workflows import rl_arms as arms
from qscope.workflows import rl_measure as measures
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import Encoder, load_encoder
from qscope.workflows.rl_arms import Arm, Material, Settings
from qscope.workflows.rl_result import BEFORE, Mined, RLResult, lines, plain, verdicts
from qscope.workflows.steer_eval_inputs import digest, read_texts


@dataclass(frozen=True)
class RLConfig:
    """Train a model not to repeat itself, with one steered rollout in every group, and compare with controls.

    Example: qscope rl train.txt held-out.txt --text text.jsonl --model Qwen/Qwen3-1.7B --sae SAE --layers 13 20
    """

    prompts: str
    """Training prompts, a line each of .txt or a row each of .jsonl or .parquet."""
    held_out: str
    """Prompts for measuring; none of them a training prompt."""
    text: str
    """Held-out texts: bits per byte and copying are measured on them."""
    out: Path = Path("rl")
    """Folder for everything: journal, report.html, result.json. The same command goes on where one was stopped; an arm
    with a seed that is done is not run again."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer."""
    layers: tuple[int, ...] = ()
    """Layers to mine; the one whose best feature has the largest t is steered."""
    features: tuple[int, ...] = ()
    """Repetition features, if they are known (of the one layer given); default: mined."""
    count: int = 4
    """How many features to mine."""
    strength: float | None = None
    """Of steering, times the typical norm of the residual. Default: the smallest of --strengths at which half of the
    responses repeat."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Tried in the causal check."""
    arms: tuple[Arm, ...] = ("vanilla", "sae", "random", "any", "loop", "overlong", "kl")
    """vanilla: plain DAPO. sae, behaviour: steered with the features (behaviour: ratio against the steered model).
    random, any: with other features. loop: a template. overlong, kl, shaping: no steering, another term."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rewards: tuple[str, ...] = ("repetition",)
    """repetition, ngrams:4, overlong:256:64, detector:script:Han, python:module:function; weighted as 0.5*ngrams:4."""
    steps: int = 40
    """Groups of rollouts are made this often."""
    inner: int = 1
    """Optimiser steps on each (the paper's mu)."""
    group: int = 8
    """Rollouts of a prompt, the steered one among them (G)."""
    prompts_per_step: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    learning_rate: float = 1e-5
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    """DAPO's, of the ratio's upper clip."""
    length_cap: float | None = 1.0
    """A negative counts at most this many times as many tokens as a normal response of its group has on average."""
    kl: float = 0.04
    """Weight of the arm kl."""
    shaping: float = 1.0
    """Weight of the arm shaping."""
    rows: int | None = None
    """Rollouts in one forward and backward pass. Default: all of a step."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template, as a user's turn."""
    prompt_tokens: int = 128
    """Longer prompts are left out."""
    mine_prompts: int = 128
    """Training prompts sampled from when features are mined, each at every temperature that is needed."""
    mine_temperatures: tuple[float, ...] = (1.0, 0.7, 0.4, 0.0)
    """Tried in turn until --mine-least responses repeat themselves."""
    mine_least: int = 16
    cause_prompts: int = 24
    """Of the causal check, on each side."""
    texts: int = 64
    """How many held-out texts."""
    text_tokens: int = 128
    """Tokens of each that are read."""
    copy_tokens: int = 24
    """Tokens to be copied."""
    batch: int = 32
    """Prompts generated at once when measuring."""
    repeats: float = 4.0
    """Copies from which a loop is endless."""
    loop_tokens: int = 32
    """Tokens from which it is."""
    draws: int = 2000
    """Bootstrap resamples behind every interval."""
    field: str = "text"
    """Field of JSON Lines or Parquet that holds prompts and texts."""
    save_models: bool = False
    """Keep the trained models, in OUT/models/ARM-SEED."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    """Of the model in training."""
    device: str = "auto"
    allow_mismatch: bool = False
    """Go on although an SAE was made for another model."""

    def __post_init__(self) -> None:
        least = {"count": 1, "steps": 1, "inner": 1, "group": 2, "prompts_per_step": 1, "max_new_tokens": 2}
        least |= {"mine_prompts": 2, "mine_least": 2, "cause_prompts": 1, "texts": 1, "text_tokens": 2}
        least |= {"copy_tokens": 1, "batch": 1, "draws": 1, "prompt_tokens": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {low}.")
        if any(not given or len(set(given)) < len(given) for given in (self.arms, self.seeds)):
            raise InputError("--arms and --seeds need at least one entry each, and none of them twice.")
        rollouts = self.group * self.prompts_per_step
        if self.rows is not None and (self.rows < 1 or rollouts % self.rows):
            raise InputError(
                f"--rows {self.rows} was given; a divisor of group x prompts per step, {rollouts}, is accepted."
            )
        if self.features and len(self.layers) != 1:
            raise InputError(f"--features was given with the layers {list(self.layers)}; name the one they belong to.")
        if not self.strengths or min(self.strengths) <= 0 or (self.strength is not None and self.strength <= 0):
            raise InputError("Steering strengths have to be above 0.")
        if not self.temperature > 0:
            raise InputError(f"--temperature {self.temperature} was given; rollouts are samples, so it is above 0.")
        _ = self.thresholds

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(repeats=self.repeats, tokens=self.loop_tokens)


def run(config: RLConfig) -> RLResult:
    """Mine, train, measure, write the folder. Raises QscopeError for what a user can mend."""
    _check_packages()
    texts = _read(config)
    encoder = load_encoder(
        EncodeConfig(
            text=(), model=config.model, sae=config.sae, layers=config.layers, dtype=config.dtype, context_size=1,
            device=config.device, allow_mismatch=config.allow_mismatch,
        )
    )  # fmt: skip
    _check_length(config, encoder)
    for name in config.rewards:  # refused before anything is sampled
        reward_names.parse(name, end_tokens(encoder.model, encoder.tokenizer), config.thresholds)
    job = _Job(config, encoder, *texts)
    with Journal(config.out, job.options(), "folder of `qscope rl`") as journal:
        return job.run(journal)


def _check_packages() -> None:
    try:
        import datasets  # noqa: F401  # only asked whether it is there, before an hour of sampling
        import trl  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"qscope rl trains with TRL, and {error.name} is not installed: pip install 'qscope[post-training]'."
        ) from error


def _check_length(config: RLConfig, encoder: Encoder) -> None:
    longest = getattr(encoder.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.prompt_tokens + config.max_new_tokens > longest:
        raise InputError(
            f"--prompt-tokens {config.prompt_tokens} and --max-new-tokens {config.max_new_tokens} were given, and "
            f"{encoder.model_name} was made for {longest} tokens together. Give smaller ones."
        )


def _read(config: RLConfig) -> tuple[list[str], list[str], list[str]]:
    """(training prompts, held-out prompts, texts)."""
    prompts = list(dict.fromkeys(read_texts(config.prompts, config.field, "prompts")))
    held_out = list(dict.fromkeys(read_texts(config.held_out, config.field, "held-out prompts")))
    both = {" ".join(p.casefold().split()) for p in prompts} & {" ".join(p.casefold().split()) for p in held_out}
    if both:
        raise InputError(
            f"{len(both)} held-out prompts are training prompts too, such as {min(both)[:60]!r}; what is measured on "
            "them would say nothing about new ones. Take them out of one of the files."
        )
    return prompts, held_out, read_texts(config.text, config.field, "--text")


class _Job:
    """One run: the model, what it is trained and measured on, and the pieces in their order."""

    def __init__(
        self, config: RLConfig, encoder: Encoder, prompts: list[str], held_out: list[str], texts: list[str]
    ) -> None:
        self.config, self.encoder = config, encoder
        self.model, self.tokenizer = encoder.model, encoder.tokenizer
        self.notes: list[str] = []
        self.prompts = self._short(prompts, "training prompts")
        self.held_out = self._short(held_out, "held-out prompts")
        ids = [list(self.tokenizer(t)["input_ids"])[: config.text_tokens] for t in texts]
        copies = [measures.copy_task(self.tokenizer, t, config.copy_tokens, config.chat) for t in texts]
        self.task = measures.Task(
            prompts=[measures.prompt_ids(self.tokenizer, p, config.chat) for p in self.held_out],
            texts=[i for i in ids if len(i) >= 2][: config.texts],
            copies=[c for c in copies if c is not None][: config.texts],
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, seed=0,
            batch=config.batch, thresholds=config.thresholds,
        )  # fmt: skip
        if not self.task.texts or not self.task.copies:
            raise InputError(
                f"{config.text} holds no text of {config.copy_tokens} tokens or more; give longer texts, or a smaller "
                "--copy-tokens."
            )

    def _short(self, prompts: Sequence[str], what: str) -> list[str]:
        limit = self.config.prompt_tokens
        fitting = [p for p in prompts if len(measures.prompt_ids(self.tokenizer, p, self.config.chat)) <= limit]
        if len(fitting) < 2:
            raise InputError(
                f"{len(fitting)} of {len(prompts)} {what} have at most {limit} tokens; at least 2 are needed. Give "
                "shorter ones or a larger --prompt-tokens."
            )
        if len(fitting) < len(prompts):
            self.notes.append(f"{len(prompts) - len(fitting)} {what} are longer than {limit} tokens and left out.")
        return fitting

    def options(self) -> dict[str, Any]:
        """What makes two runs the same. Arms and seeds may be added, and how often intervals are drawn."""
        free = ("out", "arms", "seeds", "draws", "save_models", "prompts", "held_out", "text", "model", "sae")
        given = {name: value for name, value in asdict(self.config).items() if name not in free}
        return given | {
            "texts_sha256": digest([*self.prompts, *self.held_out, *(str(t) for t in self.task.texts)]),
            "model_sha256": self.encoder.model_sha256,
            "tokenizer_sha256": tokenizer_hash(self.tokenizer),
            "saes": {str(layer): sae.weight_hash() for layer, sae in self.encoder.saes.items()},
            "trl": metadata.version("trl"),
        }

    def run(self, journal: Journal) -> RLResult:
        found = journal.get("mined") or journal.put("mined", value=self._mine())
        self.notes += found["notes"]
        kept = found["mined"]
        mined = Mined(**kept | {"features": tuple(kept["features"]), "rows": tuple(kept["rows"])})
        material = Material(self.model, self.tokenizer, self.encoder.saes, mined, found["active"], self.prompts)
        if journal.get(BEFORE) is None:
            _say("measuring the model as it is")
            journal.put(BEFORE, value=measures.measure(self.model, self.tokenizer, self.task).to_json())
        for seed in self.config.seeds:
            for arm in self.config.arms:
                if journal.get("arm", arm, seed) is None:
                    journal.put("arm", arm, seed, value=self._train(arm, seed, material))
        return self._result(journal, mined)

    # --- features ----------------------------------------------------------------------------------------

    def _mine(self) -> dict[str, Any]:
        config = self.config
        answers = self._answers()
        looping, control = measures.split(answers, config.thresholds)
        _say(f"{len(looping)} of {len(answers)} sampled responses repeat themselves without end")
        notes: list[str] = []
        seen = len(looping) >= 2 or not config.features
        if not seen:
            notes.append(
                f"{len(looping)} sampled responses repeat themselves without end, so it was not looked at how the "
                "named features rise in them."
            )
        pair = (looping, control) if seen else (control[::2], control[1::2])
        found = rises(self.model, self.encoder.saes, *pair)
        layer = max(
            found, key=lambda name: (max((found[name].t[f] for f in found[name].ranked(1)), default=0.0), -name)
        )
        chosen = list(config.features) or found[layer].ranked(config.count)
        if not chosen:
            raise InputError("No feature rises more in the responses that repeat than in the others. Try other layers.")
        norm = found[layer].residual_norm
        calm = [a.prompt for a in control]
        cause = causal_check(
            self._count, lambda s: steering_spec({layer: chosen}, s, {layer: norm}), calm[: config.cause_prompts],
            [a.prompt for a in looping][: config.cause_prompts], config.strengths,
        )  # fmt: skip
        strength = config.strength
        if strength is None:
            enough = [c for c in cause["amplify"][1:] if c.ratio >= 0.5]
            best = enough[0] if enough else max(cause["amplify"][1:], key=lambda c: c.ratio)
            strength = best.strength
            if not enough:
                notes.append(
                    f"At no strength do half of the steered responses repeat; {strength:g} is taken, where "
                    f"{best.ratio:.0%} do. The negatives are then no sure negatives."
                )
        mined = Mined(
            layer, tuple(chosen), not config.features, strength, norm,
            tuple(_row(found[layer], f) for f in chosen if seen),
            {side: [{"strength": c.strength, "hits": c.hits, "count": c.count} for c in levels]
             for side, levels in cause.items()},
            len(looping), len(control),
        )  # fmt: skip
        return {"mined": asdict(mined), "active": arms.active_features(found[layer], chosen), "notes": notes}

    def _answers(self) -> list[Rollout]:
        """Responses to training prompts, at lower and lower temperatures until enough of them repeat themselves."""
        asked = [
            measures.prompt_ids(self.tokenizer, p, self.config.chat) for p in self.prompts[: self.config.mine_prompts]
        ]
        answers: list[Rollout] = []
        for temperature in self.config.mine_temperatures:
            answers += self._sample(asked, temperature, None)
            if len(measures.split(answers, self.config.thresholds)[0]) >= self.config.mine_least:
                break
        return answers

    def _sample(self, asked: Sequence[Sequence[int]], temperature: float, spec: SteeringSpec | None) -> list[Rollout]:
        config = self.config
        return rollouts(
            self.model, self.tokenizer, asked, config.max_new_tokens, temperature=temperature, top_p=config.top_p,
            seed=1, batch=config.batch, spec=spec, saes=self.encoder.saes,
        )  # fmt: skip

    def _count(self, asked: Sequence[Sequence[int]], spec: SteeringSpec | None) -> int:
        answers = self._sample(asked, self.config.temperature, spec)
        return sum(endless(a.response, a.ended, self.config.thresholds) for a in answers)

    # --- training ----------------------------------------------------------------------------------------

    def _train(self, arm: str, seed: int, material: Material) -> dict[str, Any]:
        c = self.config
        _say(f"training {arm}, seed {seed}")
        settings = Settings(
            c.rewards, c.group, c.prompts_per_step, c.steps, c.max_new_tokens, c.learning_rate, c.epsilon,
            c.epsilon_high, c.inner, c.temperature, c.top_p, c.length_cap, c.kl, c.shaping, c.rows, c.chat,
        )  # fmt: skip
        model, curve = arms.train(arm, seed, settings, material, c.out / "trainer" / f"{arm}-{seed}")
        if c.save_models:
            model.save_pretrained(c.out / "models" / f"{arm}-{seed}")
            self.tokenizer.save_pretrained(c.out / "models" / f"{arm}-{seed}")
        return {"measures": measures.measure(model, self.tokenizer, self.task).to_json(), "curve": curve}

    # --- result ------------------------------------------------------------------------------------------

    def _result(self, journal: Journal, mined: Mined) -> RLResult:
        config = self.config
        runs = {arm: [journal.get("arm", arm, seed) for seed in config.seeds] for arm in config.arms}
        found = {BEFORE: [plain(journal.get(BEFORE))]}
        found |= {arm: [plain(run["measures"]) for run in each] for arm, each in runs.items()}
        table = lines(found, arms.WORDS, config.draws, seed=0)
        if len(config.seeds) < 3:
            self.notes.append(f"{len(config.seeds)} seeds: the intervals say little about other seeds.")
        result = RLResult(
            model=self.encoder.model_name,
            about={
                "steps": str(config.steps), "group": str(config.group),
                "prompts per step": str(config.prompts_per_step),
                "seeds": " ".join(map(str, config.seeds)), "held-out prompts": f"{len(self.held_out)}",
                "texts": f"{len(self.task.texts)}", "rewards": " + ".join(config.rewards), "qscope": __version__,
                "trl": metadata.version("trl"), "device": self.encoder.device,
            },
            mined=mined,
            arms=table,
            curves={arm: [run["curve"] for run in each] for arm, each in runs.items()},
            samples={arm: each[0].samples for arm, each in found.items()},
            prompts=self.held_out[: len(found[BEFORE][0].samples)],
            notes=tuple(self.notes),
            out=str(config.out),
        )  # fmt: skip
        result = replace(result, verdicts=verdicts(table))
        data = json.dumps(asdict(result), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        write_file(config.out / "result.json", [data], len(data))
        return result


def _row(rises: LayerRises, feature: int) -> dict[str, float]:
    figures = {"looping": rises.looping, "control": rises.control, "t": rises.t}
    return {"feature": float(feature)} | {name: float(values[feature]) for name, values in figures.items()}


def _say(words: str) -> None:
    print(f"qscope: {words}", file=sys.stderr)
