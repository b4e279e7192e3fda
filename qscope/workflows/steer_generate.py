"""Steering tried by hand: the same prompt continued without and with it, and what chosen features do at every token."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qscope import embedded
from qscope.errors import InputError, ModelError
from qscope.model import capture, load_model, model_hash, residuals
from qscope.sae import SAE
from qscope.steering import Edit, SAEReference, Steering, SteeringSpec, positions, steer
from qscope.steering.spec import Unit
from qscope.workflows.encoder import check_fit
from qscope.workflows.steer_eval_baselines import typical_norm
from qscope.workflows.steer_eval_inputs import neutral_windows
from qscope.workflows.steer_eval_measures import end_tokens
from qscope.workflows.steer_generate_items import Item, parse_item, read_prompt

SAMPLE = (24, 128)
"""Neutral texts, and tokens of each, on which the scale of the units quantile and residual is measured."""
_ROWS = 8
MEASURED = (
    "the feature's activation after TopK, read from the residual as it comes out of its block, before the steering of "
    "that block is added; blocks behind one that is steered see the change"
)


@dataclass(frozen=True)
class SteerGenerateConfig:
    """Try steering by hand: one prompt, continued without and with it, side by side.

    Example: qscope steer generate "The weather today" --features 15:6159=2.0 15:12=-1
    """

    prompt: str
    """Text to continue; - reads standard input, @FILE a file."""
    features: tuple[str, ...] = ()
    """What to add: LAYER:FEATURE=STRENGTH, several with spaces between them: 15:6159=2.0 15:12=-1."""
    spec: Path | None = None
    """Steering spec (.json, .yaml) whose edits are made as well."""
    show: tuple[str, ...] = ()
    """Features whose activation is shown at every token: 15:6159 15:12. Default: those that are steered."""
    layer: int | None = None
    """Layer of features given without one. Default: that of the SAE, where there is one SAE only."""
    strength_unit: Unit = "absolute"
    """Of the strengths in --features. quantile: times the 0.99 quantile of the feature's own activations on neutral
    text; residual: times the typical norm of the residual there, the direction made a unit vector."""
    tokens: str = "all"
    """Which tokens --features steers: all, prompt, generated, positions such as 0,2,5-8."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template, as a user's turn."""
    max_new_tokens: int = 60
    """Tokens to generate."""
    temperature: float = 0.0
    """0: always the most probable token. Above: drawn, both texts with the same random numbers."""
    seed: int = 0
    """Of the random numbers."""
    text: str | None = None
    """Neutral text for the units quantile and residual. Default: the demo's held-out text."""
    save: Path | None = None
    """Write the spec that was used to this file (.json, .yaml), for qscope steer eval."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one for all layers that are named, or several that say their own layer.
    Default: those of --spec, else the embedded."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    allow_mismatch: bool = False
    """Steer although an SAE was made for another model, or is not the one that the spec was made for."""

    def __post_init__(self) -> None:
        if not self.features and self.spec is None:
            raise InputError("Nothing to steer was given. Give --features 15:6159=2.0 or --spec FILE.")
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature is {self.temperature}; 0 (greedy) or a number above it is accepted.")
        positions.parse(self.tokens)


@dataclass(frozen=True)
class Token:
    """One token of a text, as it was fed to the model."""

    id: int
    text: str
    """"" where a character is not whole yet; it comes with the token that completes it."""
    generated: bool
    activations: tuple[float | None, ...]
    """Of the features shown, in their order; None: not a finite number"""
    fired: tuple[int, ...]
    """Indices of the edits that changed this token's residual"""


@dataclass
class Continuation:
    """One of the two texts; grows while it is made."""

    tokens: list[Token] = field(default_factory=list)
    """Of the prompt, then the generated ones up to the end token, which is left out"""
    text: str = ""
    """What was generated"""
    ended: bool = False
    """The model ended the text itself"""
    broken: bool = False
    """All tokens got the same score, or one that is no number: the text means nothing"""

    def generated(self) -> int:
        """Number of generated tokens."""
        return sum(token.generated for token in self.tokens)


@dataclass
class SteerGenerateResult:
    """What `qscope steer generate` shows."""

    about: dict[str, str]
    prompt: str
    """As the model reads it, with the chat template"""
    shown: list[str]
    """Features in the order of every token's activations, as LAYER:FEATURE"""
    edits: list[str]
    """In words, in the order of the spec and of `fired`"""
    spec: dict[str, Any]
    """The steering spec that was used"""
    activations: str = MEASURED
    """How the activations were measured"""
    saved: Path | None = None
    unsteered: Continuation = field(default_factory=Continuation)
    steered: Continuation = field(default_factory=Continuation)


Watch = Callable[[SteerGenerateResult], None]


class Feature(NamedTuple):
    layer: int
    id: int

    def __str__(self) -> str:
        return f"{self.layer}:{self.id}"


@dataclass(frozen=True)
class _Loaded:
    """Model and SAEs that belong together."""

    model: Any
    tokenizer: Any
    name: str
    saes: dict[int, SAE]
    sources: dict[int, str]


def run(config: SteerGenerateConfig, watch: Watch | None = None) -> SteerGenerateResult:
    """Generate both texts; `watch` sees the result grow, after the prompt and after every token.

    Raises QscopeError for what a user can mend.
    """
    items = [parse_item(text, strength=True) for text in config.features]
    show = [parse_item(text, strength=False) for text in config.show]
    given = SteeringSpec.load(config.spec) if config.spec is not None else SteeringSpec(())
    prompt = read_prompt(config.prompt)
    loaded = _load(config, *_sources(config, [*items, *show], given))
    spec = _spec(config, given, [(_placed(i, config.layer, loaded.saes), i.strength) for i in items], loaded)
    session = _Session(
        config, loaded, spec, _shown([_placed(i, config.layer, loaded.saes) for i in show], spec), prompt
    )
    if config.save is not None:
        session.result.saved = spec.save(config.save)
    with _progress(config.max_new_tokens, hidden=watch is not None) as bar:

        def tell(result: SteerGenerateResult) -> None:
            bar.update(max(text.generated() for text in (result.unsteered, result.steered)) - bar.n)
            if watch is not None:
                watch(result)

        session.generate(tell)
    return session.result


@contextmanager
def _progress(total: int, hidden: bool) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=total, unit="tok", desc="generate", dynamic_ncols=True, mininterval=0.5, disable=hidden) as bar:
        yield bar


# --- what to steer -------------------------------------------------------------------------------------------


def _sources(config: SteerGenerateConfig, items: Sequence[Item], spec: SteeringSpec) -> tuple[list[int], list[str]]:
    """(layers, names of their SAEs); no layers where the SAEs say their own."""
    named = {item.layer if item.layer is not None else config.layer for item in items} - {None}
    layers = sorted({*(layer for layer in named if layer is not None), *(f.layer for f in _features(spec))})
    if config.sae:
        return (layers, list(config.sae) * len(layers)) if layers and len(config.sae) == 1 else ([], list(config.sae))
    known = {layer: reference.source for layer, reference in spec.saes.items()}
    if config.model is None:
        known = dict.fromkeys(embedded.SAE_LAYERS, embedded.SAES) | known
    missing = [layer for layer in layers if layer not in known]
    if missing or (items and not known):
        raise InputError(
            f"{f'A feature of layer {missing[0]}' if missing else 'A feature'} was given, for which there is no SAE; "
            f"there are SAEs for {_listed(known)}. Take one of these, or name an SAE with --sae."
        )
    own = [embedded.DEFAULT_LAYER] if config.model is None and not spec.saes else sorted(known)
    layers = layers or own
    return layers, [known[layer] for layer in layers]


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(f"layer {layer}" for layer in sorted(layers)) or "no layer"


def _load(config: SteerGenerateConfig, layers: list[int], names: list[str]) -> _Loaded:
    path = config.model or str(embedded.default_model_path())
    model, tokenizer = load_model(path, device=config.device, dtype=config.dtype)
    name = config.model or embedded.DEFAULT_MODEL_NAME
    local = Path(name).exists()
    name = Path(name).resolve().name if local else name
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"The tokenizer of {name} has no fast version, which qscope needs; take a model that has one.")
    saes: dict[int, SAE] = {}
    wanteds: Sequence[int | None] = layers or [None] * len(names)
    for source, wanted in zip(names, wanteds, strict=True):
        sae = SAE.from_pretrained(source, layer=wanted, k=config.k, device=model.device)
        layer = wanted if wanted is not None else sae.card.layer
        if layer is None or layer in saes:
            raise InputError(
                f"The SAE {source} {'does not say its layer' if layer is None else f'is the second of layer {layer}'}. "
                "Give one SAE per layer; for one that does not say its layer, say it as LAYER:FEATURE or with --layer."
            )
        check_fit(model, name, model_hash(path), local, layer, sae, config.allow_mismatch)
        saes[layer] = sae
    return _Loaded(model, tokenizer, name, saes, dict(zip(saes, names, strict=True)))


def _placed(item: Item, layer: int | None, saes: dict[int, SAE]) -> Feature:
    """The feature with its layer, checked against the SAEs."""
    found = item.layer if item.layer is not None else layer
    if found is None and len(saes) == 1:
        (found,) = saes
    if found is None or found not in saes:
        given = f"{item.feature} was given without a layer" if found is None else f"{found}:{item.feature} was given"
        raise InputError(
            f"Feature {given}, and there are SAEs for {_listed(saes)}. Say it as LAYER:{item.feature} with one of "
            "these layers, or name another SAE with --sae."
        )
    if item.feature >= saes[found].d_sae:
        raise InputError(
            f"Feature {found}:{item.feature} was given; the SAE of layer {found} has the features 0 to "
            f"{saes[found].d_sae - 1}."
        )
    return Feature(found, item.feature)


def _spec(
    config: SteerGenerateConfig, given: SteeringSpec, items: Sequence[tuple[Feature, float]], loaded: _Loaded
) -> SteeringSpec:
    """The spec's edits and then those of --features, with the SAEs that they belong to."""
    features = [feature for feature, _ in items]
    scales = _scales(config, features, loaded) if config.strength_unit != "absolute" else {}
    made = tuple(
        Edit(
            layer=feature.layer, feature=feature.id, strength=strength, unit=config.strength_unit,
            scale=scales.get(feature), tokens=config.tokens,
        )
        for feature, strength in items
    )  # fmt: skip
    saes = dict(given.saes)
    for layer in sorted({feature.layer for feature in features} - set(saes)):
        saes[layer] = SAEReference(loaded.sources[layer], loaded.saes[layer].weight_hash())
    return SteeringSpec((*given.edits, *made), saes, given.model or loaded.name, given.note)


def _scales(config: SteerGenerateConfig, features: Sequence[Feature], loaded: _Loaded) -> dict[Feature, float]:
    """What one unit of strength is, on neutral text: of each feature, or of its layer."""
    layers = sorted({feature.layer for feature in features})
    ids = neutral_windows(loaded.tokenizer, config.text, "text", *SAMPLE)
    parts = [residuals(loaded.model, rows, layers) for rows in ids.split(_ROWS)]
    hidden = {layer: torch.cat([part[layer] for part in parts]) for layer in layers}
    if config.strength_unit == "residual":
        return {feature: typical_norm(hidden[feature.layer]) for feature in features}
    scales = {}
    for feature in features:
        acts, indices = loaded.saes[feature.layer].encode_topk(hidden[feature.layer][:, 1:])  # the first is a sink
        values = acts[(indices == feature.id) & (acts > 0)].float().cpu().numpy()
        if not len(values):
            raise InputError(
                f"Feature {feature} is active at none of {ids[:, 1:].numel():,} neutral tokens, so its activations "
                "have no quantile. Give an absolute strength, or other text with --text."
            )
        scales[feature] = float(np.quantile(values, 0.99))
    return scales


def _features(spec: SteeringSpec) -> list[Feature]:
    """Features that the edits change or depend on, each once."""
    found = [Feature(edit.layer, edit.feature) for edit in spec.edits if edit.feature is not None]
    for edit in spec.edits:
        if edit.when is not None:
            found.append(Feature(edit.layer if edit.when.layer is None else edit.when.layer, edit.when.feature))
    return list(dict.fromkeys(found))


def _shown(asked: Sequence[Feature], spec: SteeringSpec) -> list[Feature]:
    return list(dict.fromkeys(asked)) or _features(spec)


def _words(edit: Edit) -> str:
    """An edit as a person says it."""
    what = f"{edit.layer}:{edit.feature}" if edit.feature is not None else f"layer {edit.layer}, {_vector(edit)}"
    amount = f"{edit.strength:g}" if edit.mode in ("add", "clamp", "scale") else ""
    if edit.unit != "absolute" and edit.scale is not None:
        amount += f" x {edit.scale:.4g} ({edit.unit})"
    parts = [" ".join(filter(None, (what, edit.mode, amount)))]
    parts += [] if edit.tokens == "all" else [f"tokens {edit.tokens}"]
    parts += [] if edit.after is None else [f"after {edit.after!r}"]
    parts += [f"not {name}" for name in edit.skip]
    if edit.when is not None:
        layer = edit.layer if edit.when.layer is None else edit.when.layer
        parts.append(f"where {layer}:{edit.when.feature} > {edit.when.threshold:g} ({edit.when.mode})")
    return ", ".join(parts)


def _vector(edit: Edit) -> str:
    return edit.vector if isinstance(edit.vector, str) else "a vector"


# --- generating ----------------------------------------------------------------------------------------------


class _Session:
    """Both texts in one batch: row 0 unsteered, row 1 steered, so that they come at the same pace."""

    def __init__(
        self, config: SteerGenerateConfig, loaded: _Loaded, spec: SteeringSpec, shown: list[Feature], prompt: str
    ) -> None:
        self.config, self.loaded, self.spec, self.shown = config, loaded, spec, shown
        self.ends = end_tokens(loaded.model, loaded.tokenizer)
        text, ids = self._prompt(prompt)
        self.ids = torch.tensor([ids, ids], device=loaded.model.device)
        self.result = SteerGenerateResult(
            about={
                "model": loaded.name,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "device": str(loaded.model.device),
                "tokens": f"at most {config.max_new_tokens}",
                "sampling": f"temperature {config.temperature:g}, seed {config.seed}"
                if config.temperature
                else "greedy",
            },
            prompt=text,
            shown=[str(feature) for feature in shown],
            edits=[_words(edit) for edit in spec.edits],
            spec=spec.to_json(),
        )

    def _prompt(self, prompt: str) -> tuple[str, list[int]]:
        tokenizer = self.loaded.tokenizer
        if self.config.chat:
            if not tokenizer.chat_template:
                raise InputError("--chat was given, and this tokenizer has no chat template. Leave --chat out.")
            turn = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(prompt, add_special_tokens=not self.config.chat)["input_ids"]
        longest = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(ids) + self.config.max_new_tokens > longest:
            raise InputError(
                f"The prompt has {len(ids)} tokens; with --max-new-tokens {self.config.max_new_tokens} that is more "
                f"than the {longest} that the model was made for. Give a shorter prompt or fewer tokens."
            )
        return prompt, ids

    def generate(self, watch: Watch) -> None:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        layers = {feature.layer for feature in self.shown}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (self.ends[0] if self.ends else 0)
        steering = steer(
            model, [None, self.spec], saes=self.loaded.saes, tokenizer=tokenizer,
            allow_mismatch=self.config.allow_mismatch,
        )  # fmt: skip
        from transformers import GenerationConfig

        model.generation_config = (
            GenerationConfig()
        )  # what comes with a model, such as a repetition penalty, is not said
        # Captured before the steering is attached: hooks run in the order of coming. Vectors alone show no feature.
        with capture(model, layers or {0}) as residual, steering, torch.no_grad():
            reader = _Reader(self, steering, residual, watch)
            # A token's residual is computed when it is fed in, so one more is drawn than is shown.
            model.generate(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), num_beams=1, do_sample=False,
                max_new_tokens=self.config.max_new_tokens + 1, use_cache=True, pad_token_id=pad,
                eos_token_id=self.ends or None, temperature=None, top_p=None, top_k=None, logits_processor=[reader],
            )  # fmt: skip
        reader.finish()


class _Reader:
    """A logits processor: after every forward pass it notes the tokens that went in, and it draws with a temperature.

    Drawing is argmax(logits / temperature + Gumbel noise), which has the probabilities of softmax(logits /
    temperature). Both rows get the same noise, so that what differs between the texts is the steering's doing.
    """

    def __init__(self, session: _Session, steering: Steering, residual: dict[int, Tensor], watch: Watch) -> None:
        from tokenizers.decoders import DecodeStream

        self.session, self.steering, self.residual, self.watch = session, steering, residual, watch
        self.texts = (session.result.unsteered, session.result.steered)
        self.streams = [DecodeStream(skip_special_tokens=False) for _ in self.texts]
        self.noise = torch.Generator().manual_seed(session.config.seed)
        self.seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fed = input_ids[:, self.seen :].tolist()
        activations = self._activations()
        fired = self.steering.fired[:, -len(fed[0]) :].tolist()
        for row, text in enumerate(self.texts):
            for at, token in enumerate(fed[row]):
                generated = self.seen > 0
                if generated and token in self.session.ends:
                    text.ended = True
                if not text.ended:
                    self._add(row, token, generated, activations[row][at], fired[row][at])
        differ = (scores.amax(1) > scores.amin(1)).tolist()  # not where one is nan
        for text, sound in zip(self.texts, differ, strict=True):
            text.broken = text.broken or not sound
        self.seen = input_ids.shape[1]
        self.watch(self.session.result)
        return self._drawn(scores)

    def _add(self, row: int, token: int, generated: bool, activations: list[float], fired: list[bool]) -> None:
        piece = self.streams[row].step(self.session.loaded.tokenizer.backend_tokenizer, token) or ""
        values = tuple(value if math.isfinite(value) else None for value in activations)
        edits = tuple(edit for edit, yes in enumerate(fired) if yes)
        self.texts[row].tokens.append(Token(token, piece, generated, values, edits))
        self.texts[row].text += piece if generated else ""

    def _activations(self) -> list[list[list[float]]]:
        """[rows, tokens, features shown] of the last forward pass."""
        rows, tokens = next(iter(self.residual.values())).shape[:2]
        found = torch.zeros(rows, tokens, len(self.session.shown))
        for layer in {feature.layer for feature in self.session.shown}:
            acts, indices = self.session.loaded.saes[layer].encode_topk(self.residual[layer])
            for at, feature in enumerate(self.session.shown):
                if feature.layer == layer:
                    found[..., at] = torch.where(indices == feature.id, acts, 0).sum(-1).float().cpu()
        values: list[list[list[float]]] = found.tolist()
        return values

    def _drawn(self, scores: Tensor) -> Tensor:
        temperature = self.session.config.temperature
        if not temperature:
            return scores
        noise = -torch.empty(scores.shape[-1]).exponential_(generator=self.noise).log()
        return scores / temperature + noise.to(scores.device)

    def finish(self) -> None:
        """Texts whose first token is the end were never fed in; characters that never became whole are dropped."""
        for text in self.texts:
            text.ended = text.ended or text.generated() < self.session.config.max_new_tokens
