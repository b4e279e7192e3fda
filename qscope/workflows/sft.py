"""Supervised fine-tuning that holds down a language's SAE features, beside the controls that may do as well.

For every arm and seed: the model as it was is trained on the same conversations, then answers prompts of other
languages; counted is how often an answer holds the target's script. Formulas and sources: docs/sft.md.
"""

import math
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from qscope import embedded
from qscope._version import __version__
from qscope.errors import InputError
from qscope.files import file_sha256
from qscope.model import load_model, model_hash
from qscope.post_training.switching import identifier, scripts_of, wrong_groups
from qscope.workflows import sft_arms, sft_data
from qscope.workflows import sft_result as results
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import load_encoder
from qscope.workflows.sft_arms import ARMS, Arm
from qscope.workflows.sft_data import Encoded
from qscope.workflows.sft_evaluate import held_out_loss, pad_id, sample
from qscope.workflows.sft_train import RUNS, adapted, claimed, finished, keep, train, write_json

PACKAGES = ("trl", "accelerate", "datasets")


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune with a penalty on SAE features of one language, beside controls; count answers that switch into it.

    Example: qscope sft chats.jsonl zh --model MODEL --sae SAE --layers 26 27 --out sft
    """

    data: str
    """Conversations, a row each (.jsonl, .parquet): "messages" (role, content) and "group" or "lang"."""
    target_group: str
    """Group, a language code, that answers of the other groups should not switch into."""
    out: Path = Path("sft")
    """Folder for everything; the same command goes on where one was stopped."""
    scripts: tuple[str, ...] = ()
    """Unicode scripts that tell a switch, such as Han. Default: those of the target language."""
    group_field: str | None = None
    """Field of the group. Default: group, else lang."""
    held_out: str | None = None
    """Held-out conversations. Default: a share of the data, by a hash of the question."""
    held_out_share: float = 0.1
    """That share."""
    held_out_examples: int = 100
    """Held-out conversations of each group whose loss is measured, at most."""
    prompts: str | None = None
    """Prompts to answer, rows as those of the data. Default: the questions of the held-out conversations."""
    prompts_per_group: int = 20
    """Prompts of each group but the target, at most; those that hold its script are left out."""
    texts: str | None = None
    """Texts for features and thresholds: rows with "text" and "group" or "lang". Default: answers of the data."""
    texts_per_group: int = 100
    """At most; of other groups without the script."""
    model: str | None = None
    """Hugging Face causal LM with a chat template, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    chat_template: Path | None = None
    """Jinja file, for a tokenizer that has no chat template."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all --layers, or one per layer."""
    layers: tuple[int, ...] = ()
    """Layers with a penalty. Default: the layer that the SAE was made for. SASFT takes the last two."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    allow_mismatch: bool = False
    """Go on although the SAE was made for another model or layer."""
    features: tuple[str, ...] = ()
    """Features to hold down, LAYER:FEATURE each. Default: those with the largest nu for the target."""
    features_per_layer: int = 2
    """How many of those."""
    alpha: Literal["estimated", "zero"] = "estimated"
    """Thresholds: mean pre-activation of each feature on each group's texts, or 0."""
    arms: tuple[Arm, ...] = ARMS
    """none, penalty, random (features), difference (of means), kl, entropy, token (probability), filter (data)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds; every arm is run from each."""
    weight: tuple[float, ...] = (1e-3,)
    """Of the penalty, and of random features and the difference of means. Several: each is run."""
    kl_weight: tuple[float, ...] = (0.1,)
    """Of KL to the model before training."""
    entropy_weight: tuple[float, ...] = (0.01,)
    """Of the confidence penalty; negative: sharper predictions."""
    token_weight: tuple[float, ...] = (1.0,)
    """Of the probability of tokens in the script."""
    weight_warmup: int = 0
    """Steps in which the weights rise to their value."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Stop after so many optimiser steps instead."""
    batch: int = 8
    """Conversations in a micro-batch."""
    accumulate: int = 1
    """Micro-batches in a step."""
    learning_rate: float = 5e-5
    """Highest."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Of the learning rate."""
    warmup_steps: int = 10
    """In which it rises."""
    weight_decay: float = 0.1
    """Of AdamW."""
    max_length: int = 512
    """Tokens of a conversation; the rest is cut off."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank instead of all weights (package peft)."""
    lora_alpha: int = 16
    """Their scale."""
    lora_targets: tuple[str, ...] = ()
    """Modules that get them. Default: all linear ones."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    bf16: bool = False
    """Compute the training in bfloat16 (autocast); weights stay as --dtype says."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32"
    """Of the weights."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    log_steps: int = 10
    """A line of the training log each."""
    save_steps: int = 200
    """A checkpoint each, from which a killed run goes on."""
    save_models: bool = False
    """Keep every trained model in its folder."""
    samples: int = 4
    """Answers to each prompt."""
    temperature: float = 1.0
    """Of the answers."""
    top_p: float = 0.8
    """Of the answers."""
    max_new_tokens: int = 128
    """Length of the answers."""
    generate_batch: int = 32
    """Answers generated at once."""
    sampling_seed: int = 0
    """Of the answers; the same for every arm."""
    identify: bool = False
    """Also count answers in another language than the prompt's, by py3langid; groups are ISO 639-1 codes then."""
    draws: int = 2000
    """Bootstrap resamples behind every interval."""

    def __post_init__(self) -> None:
        least = {
            "held_out_examples": 1, "prompts_per_group": 1, "texts_per_group": 1, "features_per_layer": 1, "batch": 1,
            "accumulate": 1, "max_length": 8, "lora_rank": 0, "log_steps": 1, "save_steps": 1, "samples": 1,
            "max_new_tokens": 1, "generate_batch": 1, "draws": 1, "warmup_steps": 0, "weight_warmup": 0,
        }  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                given = getattr(self, name)
                raise InputError(f"--{name.replace('_', '-')} is {given}; it must be at least {low}.")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps is {self.steps}; it must be at least 1.")
        if not 0 < self.held_out_share < 1 or not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"--held-out-share {self.held_out_share}, --temperature {self.temperature} and --top-p {self.top_p} "
                "were given; accepted are between 0 and 1, above 0, and above 0 up to 1."
            )
        for name in ("weight", "kl_weight", "token_weight"):
            if not getattr(self, name) or any(not 0 <= value < float("inf") for value in getattr(self, name)):
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; numbers from 0 are accepted.")
        for name in ("arms", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise InputError(f"--{name} {' '.join(map(str, given))} was given; name at least one, and none twice.")

    @property
    def model_path(self) -> str:
        return self.model or str(embedded.default_model_path())


def run(config: SFTConfig) -> results.SFTResult:
    """Train and measure every arm and seed, write the folder. Raises QscopeError for what a user can mend."""
    _check_packages(config)
    scripts = scripts_of(config.target_group, config.scripts)
    data = sft_data.load(config, scripts)
    with claimed(config.out, _options(config)):
        job = _Job(config, scripts, data)
        found = job.run()
        write_json(config.out / "result.json", results.as_json(found))
    return found


def _check_packages(config: SFTConfig) -> None:
    for name in (*PACKAGES, *(("peft",) if config.lora_rank else ())):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise InputError(
                f"`qscope sft` trains with TRL, and the package {name} is missing: pip install 'qscope[post-training]'."
            ) from error
    if config.identify:
        identifier()


def _options(config: SFTConfig) -> dict[str, Any]:
    """What a resumed run must share: arms, weights and seeds may be added, reading is not training."""
    options = asdict(config)
    weights = ("weight", "kl_weight", "entropy_weight", "token_weight")
    for name in ("out", "arms", "seeds", "device", "draws", "save_steps", "save_models", *weights):
        options.pop(name)
    for name in ("data", "held_out", "prompts", "texts"):
        if options[name] is not None:
            options[name] = file_sha256(Path(options[name]))
    if config.chat_template is not None and config.chat_template.is_file():
        options["chat_template"] = file_sha256(config.chat_template)
    options["model"] = model_hash(config.model_path)
    return options | {
        "qscope": __version__,
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in ("transformers", "trl")},
    }


class _Job:
    """All points, one after the other."""

    def __init__(self, config: SFTConfig, scripts: tuple[str, ...], data: sft_data.Data) -> None:
        self.config, self.scripts, self.data = config, scripts, data
        self.identify = identifier() if config.identify else None
        encoder = load_encoder(
            EncodeConfig(
                text=(), model=config.model, sae=config.sae, layers=config.layers, k=config.k,
                context_size=config.max_length, dtype=config.dtype, device=config.device,
                allow_mismatch=config.allow_mismatch,
            )
        )  # fmt: skip
        self.model, self.tokenizer, self.device = encoder.model, encoder.tokenizer, encoder.device
        self.model_name = encoder.model_name
        self.sae_hashes = {layer: sae.weight_hash() for layer, sae in encoder.saes.items()}
        sft_data.check_template(self.tokenizer, encoder.model_name, config.chat_template)
        self.notes = _notes(config, scripts, data)
        self.notes += [f"layer {layer}: {text}" for layer, text in encoder.mismatches.items() if text]
        self.held_out = self._encoded(data.held_out)
        self.prepared = sft_arms.prepare(config, data, self.model, self.tokenizer, encoder.saes)
        self._keep_features()

    def _encoded(self, examples: Any) -> list[Encoded]:
        made = (sft_data.encode(self.tokenizer, e, self.scripts, self.config.max_length) for e in examples)
        return [one for one in made if one is not None]

    def _keep_features(self) -> None:
        folder = self.config.out / "features"
        folder.mkdir(exist_ok=True)
        rows, mined = self.prepared.rows, self.prepared.mined
        write_json(
            folder / "features.json",
            {
                str(layer): {"features": mined.features[layer], "nu": mined.nu[layer], "sae_hash": rows[layer].sae_hash}
                for layer in rows
            },
        )
        for name, alpha in self.prepared.alphas.items():
            alpha.save(folder / f"alpha-{name}.json")

    def run(self) -> results.SFTResult:
        from tqdm import tqdm

        found = [self._base()]
        del self.model  # every run loads it afresh
        points = sft_arms.points(self.config)
        steps = len(points) * self._steps(len(self.data.train))
        with tqdm(total=steps, unit="step", desc="sft", dynamic_ncols=True, mininterval=0.5) as bar:
            for point in points:
                found.append(self._point(point, bar))
        return self._result(found)

    def _steps(self, examples: int) -> int:
        """Of a run, for the progress bar."""
        config = self.config
        return config.steps or max(1, round(config.epochs * -(-examples // (config.batch * config.accumulate))))

    def _base(self) -> results.PointResult:
        folder = self.config.out / RUNS / results.BASE
        done = finished(folder)
        if done is not None:
            return done
        print("qscope: the model before training", file=sys.stderr)
        return self._measure(folder, results.Point(results.BASE, None, -1), self.model, 0, ([], 0, 0.0))

    def _point(self, point: results.Point, bar: Any) -> results.PointResult:
        config, folder = self.config, self.config.out / RUNS / point.folder
        done = finished(folder)
        if done is not None:
            bar.update(done.steps)
            return done
        bar.set_postfix_str(f"{point.name}, seed {point.seed}")
        examples = self._encoded(sft_arms.examples_of(config, point, self.data, self.scripts))
        if not examples:
            raise InputError(
                f"No example is left for the arm {point.arm}: conversations are cut to --max-length "
                f"{config.max_length} tokens, and nothing of an answer remains. Give a larger one, or other data."
            )
        model = adapted(config, load_model(config.model_path, device=config.device, dtype=config.dtype)[0], point.seed)
        terms = sft_arms.terms_of(config, point, self.prepared, self.data, self.tokenizer, self.scripts)
        folder.mkdir(parents=True, exist_ok=True)
        trained = train(config, folder, model, self.tokenizer, examples, terms, self.data.groups, point.seed, bar)
        model.eval()
        if config.save_models:
            model.save_pretrained(folder / "model")
            self.tokenizer.save_pretrained(folder / "model")
        return self._measure(folder, point, model, len(examples), trained)

    def _measure(
        self, folder: Path, point: results.Point, model: Any, examples: int, trained: tuple[Any, int, float]
    ) -> results.PointResult:
        config = self.config
        log, steps, seconds = trained
        loss = held_out_loss(model, pad_id(self.tokenizer), self.held_out, config.target_group, config.batch)
        if not all(math.isfinite(value) for value in loss.nats):
            raise InputError(
                f"The arm {point.name} of seed {point.seed} has diverged: its held-out loss is no finite number. Give "
                "a smaller weight of this arm, or a smaller --learning-rate and another --out."
            )
        drawn = sample(model, self.tokenizer, self.data.prompts, config, self.scripts, self.identify)
        result = results.PointResult(
            arm=point.arm, weight=point.weight, seed=point.seed, examples=examples, steps=steps,
            seconds=round(seconds, 2), terms=sft_arms.about(point, self.prepared, config.target_group), log=log,
            clean_loss=loss.clean, mixed_loss=loss.mixed, nats=loss.nats, nat_tokens=loss.nat_tokens,
            switching=drawn.switching.all, by_group=drawn.switching.groups, hits=drawn.hits, sizes=drawn.sizes,
            length=drawn.length, samples=drawn.samples,
        )  # fmt: skip
        return keep(folder, result, drawn.responses)

    def _result(self, points: list[results.PointResult]) -> results.SFTResult:
        config, rows = self.config, self.prepared.mined
        summary = results.summarise(points, config.draws)
        compared = results.compare(points, config.draws)
        about = {
            "device": self.device,
            "examples": f"{len(self.data.train):,} to train, {len(self.held_out):,} held out",
            "prompts": f"{len(self.data.prompts)}, {config.samples} answers each",
            "learning rate": f"{config.learning_rate:g}",
            "alpha": config.alpha,
            "layers": ", ".join(map(str, rows.features)),
            "SAEs": ", ".join(f"{layer}: {sha[:12]}" for layer, sha in self.sae_hashes.items()),
            "qscope": __version__,
        }
        return results.SFTResult(
            model=self.model_name,
            target_group=config.target_group,
            scripts=self.scripts,
            about=about,
            notes=tuple(self.notes),
            features={str(layer): ids for layer, ids in rows.features.items()},
            nu={str(layer): values for layer, values in rows.nu.items()},
            arms=tuple(summary),
            comparisons=tuple(compared),
            verdict=results.verdict(summary, compared),
            points=tuple(points),
            out=config.out,
        )


def _notes(config: SFTConfig, scripts: tuple[str, ...], data: sft_data.Data) -> list[str]:
    notes = []
    own = wrong_groups(data.groups, config.target_group, scripts)
    if own:
        notes.append(
            f"The groups {', '.join(own)} write with {'/'.join(scripts)} themselves: their answers count as switched "
            "although they may be right. Name other --scripts, or leave these groups out of the prompts."
        )
    if data.prompts_left_out:
        notes.append(f"{data.prompts_left_out} held-out prompts hold {'/'.join(scripts)} and were left out.")
    if len(data.prompts) < 20:
        notes.append(f"{len(data.prompts)} prompts are too few for intervals that can be trusted.")
    if len(config.seeds) < 3:
        notes.append(f"{len(config.seeds)} training seeds: fewer than 3 say nothing about the spread between them.")
    if data.broken:
        notes.append(f"{data.broken} rows of the data are no JSON and were left out.")
    return notes
