"""Does a steering spec work on prompts it was not made from, what does it cost, and would something simpler do as well?

Every arm (the spec, its negative, plain directions, random ones, an instruction) runs at several strengths. The
strengths of the directions are found so that their side effects meet those of the spec; arms are compared by target
rate at equal side effect.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qscope import detectors, embedded
from qscope._version import __version__
from qscope.errors import InputError
from qscope.files import write_file
from qscope.journal import Journal
from qscope.model import load_model, model_hash, residual_width
from qscope.sae import SAE
from qscope.steering import SteeringSpec, steer
from qscope.workflows import steer_eval_arms as arms
from qscope.workflows import steer_eval_baselines as baselines
from qscope.workflows import steer_eval_inputs as inputs
from qscope.workflows import steer_eval_result as results
from qscope.workflows.steer_eval_matching import matched, resamples, strengths_for, verdict
from qscope.workflows.steer_eval_runner import NEUTRAL_ROWS, Runner, residual_sample

SIZES = tuple(0.02 * 2**i for i in range(9))
"""|change| / typical norm at which the side effect of a baseline is looked up, to find its strengths."""
HEADROOM = 1.5
"""Baselines go on to this multiple of the spec's largest side effect, so that their curves pass it."""

Arm = Literal["sign-flipped", "difference", "pca", "probe", "random-feature", "random-direction", "prompt"]


@dataclass(frozen=True)
class SteerEvalConfig:
    """Measure a steering spec on held-out prompts: target rate, side effects, and baselines at equal side effect.

    Example: qscope steer eval spec.json prompts.txt --detector script:Han --positive zh.txt --negative en.txt
    """

    spec: Path
    """Steering spec (.json, .yaml), as `qscope steer find` writes it."""
    prompts: str
    """Prompts, a line each of .txt or a row each of .jsonl or .parquet; none that was used to find the features."""
    detector: str | None = None
    """What tells the behaviour: script:Han, script:Han>0.3, language:fr, keywords:king,queen, keywords:@words.txt,
    regex:PATTERN, python:module:function, judge:QUESTION (another model, named by QSCOPE_JUDGE_URL, _MODEL, _KEY)."""
    out: Path = Path("steer-eval")
    """Folder for everything: journal, report.html, result.json. The same command goes on where one was stopped."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Factors of the strengths in the spec."""
    positive: str | None = None
    """Training texts with the behaviour, for difference of means, PCA and probe; without them these are left out."""
    negative: str | None = None
    """Training texts without it."""
    instruction: tuple[str, ...] = ()
    """For the prompt-only arm: each is put in front of the prompts, on a line of its own."""
    sizes: tuple[float, ...] = ()
    """Strengths of the plain and random directions, as |change| / typical norm of the residual. Default: found so that
    the side effects meet the spec's."""
    layer: int | None = None
    """Of the plain and random directions. Default: that of the first edit, whose tokens and condition they share."""
    random_features: int = 2
    """How many features of the SAE, drawn from those that fire on the neutral text."""
    random_directions: int = 2
    """How many."""
    skip: tuple[Arm, ...] = ()
    """Arms to leave out."""
    match: Literal["kl", "ce"] = "kl"
    """Side effect at which arms are compared: KL to the unsteered model, or increase of the cross-entropy."""
    max_new_tokens: int = 40
    """Length of the answers."""
    batch: int = 16
    """Prompts generated at once; kept together, so that a resumed run repeats the same numbers."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template, as a user's turn."""
    text: str | None = None
    """Neutral text for perplexity and KL. Default: the demo's held-out text."""
    field: str = "text"
    """Field of JSON Lines or Parquet that holds prompts and texts."""
    neutral_texts: int = 24
    """How many neutral texts."""
    neutral_tokens: int = 128
    """Tokens of each; the first half stands as a prompt, the predictions of the second half count."""
    choices: str | None = None
    """Multiple-choice questions (JSON Lines: query, choices, answer). Default: ARC-Easy."""
    questions: int = 64
    """How many of them; 0: none."""
    pool: Literal["mean", "last"] = "mean"
    """What the plain directions are fitted on: mean over the tokens of a training text, or its last token."""
    context_size: int = 256
    """Tokens of a training text that are read."""
    draws: int = 2000
    """Bootstrap resamples behind every interval."""
    seed: int = 0
    """Of random features, random directions and the bootstrap."""
    samples: int = 4
    """Prompts shown with both answers: the first ones, whatever came out."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    allow_mismatch: bool = False
    """Steer although the SAE is not the one that the spec was made for."""
    allow_overlap: bool = False
    """Go on although prompts occur in the training texts."""

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "batch": 1, "neutral_texts": 2, "neutral_tokens": 4, "context_size": 1}
        least |= {"draws": 1, "questions": 0, "samples": 0, "random_features": 0, "random_directions": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                given = getattr(self, name)
                raise InputError(f"--{name.replace('_', '-')} is {given}; it must be at least {low}.")
        if self.detector is None:
            raise InputError(
                "No --detector was given, so nothing would say whether steering works. Accepted: script:Han, "
                "language:fr, keywords:king,queen, regex:PATTERN, python:module:function, judge:QUESTION."
            )
        if (self.positive is None) != (self.negative is None):
            raise InputError("--positive and --negative go together: training texts with the behaviour and without.")
        if any(not 0 < size < float("inf") for size in self.sizes):
            raise InputError(f"--sizes {' '.join(map(str, self.sizes))} was given; numbers above 0 are accepted.")


@dataclass
class _Loaded:
    """What a run works with."""

    spec: SteeringSpec
    saes: dict[int, SAE]
    prompts: list[str]
    positive: list[str]
    negative: list[str]
    questions: list[Any]
    detector: detectors.Detector
    notes: list[str]


def run(config: SteerEvalConfig) -> results.SteerEvalResult:
    """Measure, compare, write the folder. Raises QscopeError for what a user can mend."""
    loaded = _load(config)
    model_path = config.model or str(embedded.default_model_path())
    model, tokenizer = load_model(model_path, device=config.device, dtype=config.dtype)
    spec = _checked_spec(config, loaded, model, tokenizer)
    neutral = inputs.neutral_windows(tokenizer, config.text, config.field, config.neutral_texts, config.neutral_tokens)
    options = _options(config, loaded, model_hash(model_path), neutral)
    options["computed"] = f"{model.device.type} {model.dtype}"
    from tqdm import tqdm

    with Journal(config.out, options, "steering evaluation") as journal:
        with tqdm(unit="tok", unit_scale=True, desc="steer eval", dynamic_ncols=True, mininterval=0.5) as bar:
            runner = Runner(
                model, tokenizer, loaded.saes, journal, loaded.prompts, neutral, loaded.questions, loaded.detector,
                config.batch, config.max_new_tokens, config.chat, bar,
            )  # fmt: skip
            plan = _Plan(config, replace(spec, saes={}), runner, loaded)
            cost = plan.cost()
            print(f"qscope: {cost}", file=sys.stderr)
            plan.find_directions()
            raws = [runner.run(point) for point in plan.points()]
        result = _result(config, loaded, plan, raws, cost, neutral)
        data = json.dumps(results.as_json(result), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        write_file(config.out / "result.json", [data], len(data))
    return result


def _load(config: SteerEvalConfig) -> _Loaded:
    """Everything that needs no model, so that a mistake is found before one is loaded."""
    spec = SteeringSpec.load(config.spec)
    if not spec.edits:
        raise InputError(f"{config.spec} holds no edit, so there is nothing to evaluate.")
    assert config.detector is not None
    detector = detectors.parse(config.detector)
    prompts = inputs.read_texts(config.prompts, config.field, "prompts")
    positive = inputs.read_texts(config.positive, config.field, "--positive") if config.positive else []
    negative = inputs.read_texts(config.negative, config.field, "--negative") if config.negative else []
    overlap = inputs.check_held_out(prompts, [*positive, *negative], config.allow_overlap)
    notes = []
    if overlap:
        notes.append(f"{len(overlap)} of {len(prompts)} prompts occur in the training texts of the baselines.")
    if len(prompts) < 10:
        notes.append(f"{len(prompts)} prompts are too few for intervals that can be trusted.")
    questions = inputs.read_questions(config.choices, config.questions)
    return _Loaded(spec, {}, prompts, positive, negative, questions, detector, notes)


def _checked_spec(config: SteerEvalConfig, loaded: _Loaded, model: Any, tokenizer: Any) -> SteeringSpec:
    """The spec, once tried on the model, with its SAEs loaded."""
    spec = loaded.spec
    for layer, reference in spec.saes.items():
        loaded.saes[layer] = SAE.from_pretrained(reference.source, layer=layer)
    steer(model, spec, saes=loaded.saes, tokenizer=tokenizer, allow_mismatch=config.allow_mismatch)
    device = next(model.parameters()).device
    loaded.saes = {layer: sae.to(device) for layer, sae in loaded.saes.items()}
    return spec


def _options(config: SteerEvalConfig, loaded: _Loaded, model: str, neutral: torch.Tensor) -> dict[str, Any]:
    """What a resumed run must share. Not: the detector, bootstrap, samples, which only read what was generated."""
    options = asdict(config)
    for name in ("spec", "out", "detector", "draws", "samples", "match", "device", "allow_overlap", "instruction"):
        options.pop(name)
    return options | {
        "spec": loaded.spec.to_json(),
        "model_sha256": model,
        "prompt_texts": loaded.prompts,
        "instructions": list(config.instruction),
        "training_sha256": inputs.digest([*loaded.positive, "", *loaded.negative]),
        "neutral_sha256": inputs.digest([str(neutral.tolist())]),
        "questions_sha256": inputs.digest([repr(question) for question in loaded.questions]),
        "qscope": __version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


class _Plan:
    """Which points are run: the spec's are given, those of the baselines follow from its side effects."""

    def __init__(self, config: SteerEvalConfig, spec: SteeringSpec, runner: Runner, loaded: _Loaded) -> None:
        self.config, self.spec, self.runner = config, spec, runner
        self.like = next((e for e in spec.edits if e.layer == config.layer), spec.edits[0])
        self.layer = config.layer if config.layer is not None else self.like.layer
        if self.layer != self.like.layer:  # a condition may be read at a later layer than this one
            self.like = replace(self.like, layer=self.layer, when=None)
        self.left_out: dict[str, str] = {}
        self.strengths = arms.check_strengths(spec, config.strengths)
        layers = sorted({edit.layer for edit in spec.edits} | {self.layer})
        hidden = residual_sample(runner.model, runner.neutral, layers)
        self.norms = {layer: baselines.typical_norm(hidden[layer]) for layer in layers}
        self.width = residual_width(runner.model)
        self.fits = self._wanted_fits(loaded)
        self.directions: list[arms.Direction] = []
        self._loaded, self._hidden = loaded, hidden[self.layer]
        self.instructions = [] if "prompt" in config.skip else list(config.instruction)
        if not self.instructions:
            self._leave("prompt only", "prompt", "no --instruction was given")

    def _leave(self, arm: str, name: str, why: str) -> None:
        self.left_out[arm] = "--skip" if name in self.config.skip else why

    def find_directions(self) -> None:
        """Fit, draw and look up the directions of the baselines."""
        config, hidden = self.config, self._hidden
        found = self._fitted(self._loaded) if self.fits else []
        sae = self._loaded.saes.get(self.layer)
        if "random-feature" in config.skip or sae is None:
            self._leave("random feature", "random-feature", f"the spec names no SAE of layer {self.layer}")
        else:
            ordinary = hidden[:, 1:].reshape(-1, self.width)
            acts, indices = sae.encode_topk(ordinary)
            fired = indices[acts > 0].unique().tolist()
            chosen = [edit.feature for edit in self.spec.edits if edit.feature is not None]
            for feature in baselines.random_features(fired, chosen, config.random_features, config.seed):
                row = tuple(sae.W_dec[feature].detach().float().cpu().tolist())
                found.append(arms.Direction(f"random feature {feature}", "fires on the neutral text", row))
        if "random-direction" in config.skip:
            self._leave("random direction", "random-direction", "")
        else:
            drawn = baselines.random_directions(self.width, config.random_directions, config.seed)
            found += [arms.Direction(f"random direction {i + 1}", "uniform", row) for i, row in enumerate(drawn)]
        self.directions = found

    def _wanted_fits(self, loaded: _Loaded) -> list[str]:
        short: dict[str, Arm] = {"difference of means": "difference", "PCA": "pca", "linear probe": "probe"}
        wanted = [name for name in baselines.NAMES if short[name] not in self.config.skip]
        for name in baselines.NAMES:
            if name not in wanted or not loaded.positive:
                self._leave(name, short[name], "no training texts (--positive, --negative) were given")
        return wanted if loaded.positive else []

    def _fitted(self, loaded: _Loaded) -> list[arms.Direction]:
        config, model, tokenizer = self.config, self.runner.model, self.runner.tokenizer
        positive, negative = (
            baselines.pooled(model, tokenizer, texts, self.layer, config.pool, config.context_size, config.batch)
            for texts in (loaded.positive, loaded.negative)
        )
        fits = baselines.fit(positive, negative, self.fits, config.seed)
        return [arms.Direction(fit.name, fit.note, fit.direction) for fit in fits]

    def cost(self) -> str:
        """What will be done at most, said before it is."""
        config, runner = self.config, self.runner
        sizes = len(config.sizes) or len(self.strengths) + 1
        flipped = 0 if "sign-flipped" in config.skip else len(self.strengths) + 1
        drawn = 0 if "random-feature" in config.skip else config.random_features
        drawn += 0 if "random-direction" in config.skip else config.random_directions
        directions = len(self.fits) + drawn
        count = 1 + len(self.strengths) + flipped + sizes * directions + len(self.instructions)
        answers = count * len(runner.prompts)
        search = 0 if config.sizes else directions * len(SIZES) * min(NEUTRAL_ROWS, len(runner.neutral))
        choices = sum(len(question.choices) for question in runner.questions)
        training = len(self._loaded.positive + self._loaded.negative) if self.fits else 0
        return (
            f"at most {count} settings: {answers:,} answers of up to "
            f"{config.max_new_tokens} tokens ({answers * config.max_new_tokens:,} tokens), "
            f"{(count * len(runner.neutral) + search) * runner.neutral.shape[1]:,} tokens of neutral text, "
            f"{count * choices:,} scored choices, {training} training texts; {len(runner.journal.pieces)} pieces are "
            "finished already"
        )

    def points(self) -> list[arms.Point]:
        """All of them, the unsteered one first."""
        spec = self._spec_points(self.strengths)
        points = [arms.Point(arms.UNSTEERED, 0.0, 0.0), *spec, *self._flipped()]
        sizes = self._sizes(spec)
        for direction in self.directions:
            points += [self._at(direction, size) for size in sizes[direction.name]]
        points += [arms.Point(arms.PROMPT, float(i), None, None, text) for i, text in enumerate(self.instructions, 1)]
        self.runner.divergences(points)
        return points

    def _spec_points(self, strengths: Sequence[float]) -> list[arms.Point]:
        return arms.spec_points(self.spec, strengths, self.norms, self.runner.saes, self.width)

    def _flipped(self) -> list[arms.Point]:
        if "sign-flipped" in self.config.skip or not any(edit.mode == "add" for edit in self.spec.edits):
            self._leave(arms.FLIPPED, "sign-flipped", "the spec has no edit of mode add")
            return []
        return self._spec_points([-s for s in [*self.strengths, HEADROOM * self.strengths[-1]]])

    def _at(self, direction: arms.Direction, size: float) -> arms.Point:
        return arms.direction_point(direction, size, self.like, self.norms[self.layer])

    def _sizes(self, spec: list[arms.Point]) -> dict[str, list[float]]:
        """Sizes of each direction: those given, or those whose side effect on the first neutral texts is the spec's."""
        if self.config.sizes:
            return {direction.name: sorted(set(self.config.sizes)) for direction in self.directions}
        base = arms.Point(arms.UNSTEERED, 0.0, 0.0)
        tried = {d.name: [self._at(d, size) for size in SIZES] for d in self.directions}
        points = [base, *spec, *(point for row in tried.values() for point in row)]
        found = self.runner.divergences(points, texts=NEUTRAL_ROWS)
        side = {key: self._side(value, found[base.key]) for key, value in found.items()}
        levels = [side[point.key] for point in spec]
        levels = sorted(level for level in [*levels, HEADROOM * max(levels)] if level > 0)
        return {
            name: strengths_for(SIZES, [side[point.key] for point in row], levels) or [SIZES[-1]]
            for name, row in tried.items()
        }

    def _side(self, found: tuple[list[float], list[float]], base: tuple[list[float], list[float]]) -> float:
        predicted = len(found[0]) * self.runner.predicted
        return sum(found[1]) / predicted if self.config.match == "kl" else (sum(found[0]) - sum(base[0])) / predicted


def _result(
    config: SteerEvalConfig, loaded: _Loaded, plan: _Plan, raws: list[results.Raw], cost: str, neutral: torch.Tensor
) -> results.SteerEvalResult:
    predicted = plan.runner.predicted
    points = [results.measured(raw, raws[0], predicted, config.draws, config.seed) for raw in raws]
    if not any(point.fired for point in points if point.arm == arms.SPEC):
        loaded.notes.append("The spec acted on no token of any prompt or answer: check its tokens and conditions.")
    curves = results.curves(points, raws, config.match, arms.PROMPT)
    drawn = resamples(len(loaded.prompts), config.draws, config.seed)
    mine = [(p, np.array(r.scores)) for p, r in zip(points, raws, strict=True) if p.arm == arms.SPEC]
    compared = [
        matched(arm, curve, point.strength, results.side_effect(point, config.match), scores, drawn)
        for point, scores in mine
        for arm, curve in curves.items()
        if arm != arms.SPEC
    ]
    total = arms.added(plan.spec, plan.layer, loaded.saes, plan.width)
    cosines = {}
    if total is not None:
        for direction in plan.directions:
            d = torch.tensor(direction.vector)
            cosines[direction.name] = float(total @ d / (total.norm() * d.norm()))
    return results.SteerEvalResult(
        spec=str(config.spec),
        detector=loaded.detector.name,
        match=config.match,
        prompts=len(loaded.prompts),
        about=_about(config, plan, neutral),
        cost=cost,
        points=points,
        matched=compared,
        verdict=verdict(compared),
        directions={direction.name: direction.note for direction in plan.directions},
        cosines=cosines,
        left_out=plan.left_out,
        notes=loaded.notes,
        samples=results.samples_of(
            loaded.prompts, raws[0], [r for r in raws if r.point.arm == arms.SPEC], config.samples
        ),
        out=config.out,
        page=config.out / "report.html",
    )


def _about(config: SteerEvalConfig, plan: _Plan, neutral: torch.Tensor) -> dict[str, str]:
    model = config.model or embedded.DEFAULT_MODEL_NAME
    norms = ", ".join(f"{norm:.4g} at layer {layer}" for layer, norm in plan.norms.items())
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "prompts": f"{len(plan.runner.prompts)}{' in the chat template' if config.chat else ''}",
        "answers": f"greedy, at most {config.max_new_tokens} tokens",
        "neutral text": f"{len(neutral)} texts of {neutral.shape[1]} tokens ({config.text or 'held-out demo text'})",
        "questions": f"{len(plan.runner.questions)} of {config.choices or 'ARC-Easy'}",
        "typical residual norm": norms,
        "dtype": str(next(plan.runner.model.parameters()).dtype).removeprefix("torch."),
        "seed": str(config.seed),
        "versions": f"qscope {__version__}, torch {torch.__version__}, transformers {metadata.version('transformers')}",
    }
