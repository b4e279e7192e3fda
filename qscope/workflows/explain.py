"""Features of a store explained in words, with scores that say how far each explanation holds.

Formulas, sources and what the scores mean: docs/explain.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from qscope.classification import load_rule, save_rule
from qscope.classification.rule import FeatureRule, Rule
from qscope.endpoint import Chat, Endpoint
from qscope.errors import InputError
from qscope.explaining.contexts import Evidence, Sampling, gather
from qscope.explaining.journal import Explanation, Journal, Made, explanation, made_of
from qscope.explaining.judges import KeywordJudge, ModelJudge
from qscope.explaining.local_model import LocalModel
from qscope.explaining.prompts import Decode
from qscope.explaining.scores import KINDS, Score, score
from qscope.explaining.sentences import model_sentence, plain_sentence
from qscope.explaining.sources import StoreCodes
from qscope.store import FeatureStore
from qscope.workflows.explain_read import decoder, named_rule, raised_tokens
from qscope.workflows.explain_result import ExplainResult, MeanScore

Asked = Literal["endpoint", "local"]
_SAMPLED = 20  # features, where none are named


@dataclass(frozen=True)
class ExplainConfig:
    """Explain what features of a store fire on, and score each explanation on passages set aside.

    Example: qscope explain codes --features 15:120 15:7 --out explained --html explained.html

    Nothing is sent anywhere unless --explainer or --judge endpoint is given; QSCOPE_JUDGE_URL, QSCOPE_JUDGE_MODEL and
    QSCOPE_JUDGE_KEY name the endpoint (OpenAI-compatible).
    """

    store: Path
    """Folder written by `qscope encode`."""
    features: tuple[str, ...] = ()
    """Features as LAYER:ID, or ID in the store's first layer."""
    rule: Path | None = None
    """Explain the features of this rule of `qscope classify fit` as well."""
    sample: int | None = None
    """Explain so many features drawn at random among those that fire. Default: 20, where nothing else is named."""
    layer: int | None = None
    """Layer that --sample draws from. Default: the first of the store."""
    explainer: Literal["plain", "endpoint", "local"] = "plain"
    """Who writes the sentence: a rule that names tokens and a passage (plain), an endpoint, or a local model."""
    judge: Literal["keywords", "endpoint", "local", "none"] = "keywords"
    """Who is asked whether a feature fires in a passage: its own leading tokens (keywords), a model, or nobody."""
    local_model: str | None = None
    """Hugging Face model with a chat template, for `local`. Default: the embedded SmolLM2-135M-Instruct."""
    timeout: float = 60.0
    """Seconds of one request to the endpoint."""
    retries: int = 4
    """Of a request that fails or times out, after 1, 2, 4 .. seconds."""
    contexts: int = 10
    """Strongest passages that the sentence is made of."""
    window: int = 12
    """Tokens on either side of a passage's centre."""
    positives: int = 20
    """Passages in which the feature fires, to score with."""
    negatives: int = 20
    """Random passages in which it is silent, to score with."""
    near: int = 10
    """Silent passages that hold one of its leading tokens, to score with."""
    seed: int = 0
    """Of the halves, of the passages and of --sample."""
    lens: bool = True
    """Also the next tokens that each feature raises, where the model is at hand: that of --model, or the embedded."""
    model: str | None = None
    """Model of the store, for the raised tokens: name or folder."""
    sae: tuple[str, ...] = ()
    """SAEs of the store, for the raised tokens: one name for all layers, or one per layer."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    out: Path = Path("explanations")
    """Folder of the explanations; a run that was stopped goes on there, and one with other options explains again."""
    rule_out: Path | None = None
    """Write --rule to this file with the explanations as meanings of its features."""
    html: Path | None = None
    """Write a page to look at in a browser: one file, no network."""

    def __post_init__(self) -> None:
        for name, low in (("sample", 1), ("retries", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name} is {value}; it must be at least {low}.")
        if not 0 < self.timeout < math.inf:
            raise InputError(f"--timeout is {self.timeout}; a number of seconds above 0 is accepted.")
        if self.rule_out is not None and self.rule is None:
            raise InputError("--rule-out was given without --rule. Give the rule whose features are to be named.")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(
            contexts=self.contexts, positives=self.positives, negatives=self.negatives, near=self.near,
            window=self.window, seed=self.seed,
        )  # fmt: skip


def run(config: ExplainConfig) -> ExplainResult:
    """Explain, score and keep. Raises QscopeError for what a user can mend; what was finished is kept."""
    store = FeatureStore(config.store)
    rule = None if config.rule is None else load_rule(config.rule)
    wanted = _features(config, store, rule)
    models = _Models(config)
    models.check()
    saes = {layer: store.settings.sae(layer).sha256 for layer in wanted}
    with Journal(config.out, saes) as journal:
        raised, notes = raised_tokens(store, wanted, config.lens, config.model, config.sae, config.device)
        work = _Work(config, journal, models, decoder(store))
        for layer, features in wanted.items():
            work.add(gather(StoreCodes(store), layer, features, config.sampling()), raised)
        found = work.finish()
    ordered = tuple(found[layer, feature] for layer, features in wanted.items() for feature in features)
    rule_path = None
    if rule is not None and config.rule_out is not None:
        rule_path = str(save_rule(named_rule(rule, found), config.rule_out))
    return ExplainResult(
        about={
            "model": store.settings.model.name,
            "SAE": ", ".join(f"layer {layer} {saes[layer][:12]}" for layer in wanted),
            "explainer": models.explainer_name,
            "judge": models.judge_name,
        },
        explanations=ordered,
        made=work.made,
        scores=_means(ordered),
        requests=models.requests(),
        notes=(*notes, *_problems(ordered)),
        path=str(journal.path),
        rule_path=rule_path,
        html=config.html,
    )


# --- which features --------------------------------------------------------------------------------------


def _features(config: ExplainConfig, store: FeatureStore, rule: Rule | None) -> dict[int, list[int]]:
    """layer -> features, each once, in the order asked for."""
    first = store.layers[0] if config.layer is None else config.layer
    pairs = [_named(text, first) for text in config.features]
    for part in () if rule is None else (rule,) if isinstance(rule, FeatureRule) else rule.rules:
        for clause in part.clauses:
            part.source.check_sae(clause.layer, store.settings.sae(clause.layer).sha256)
            pairs.append((clause.layer, clause.feature))
    if config.sample is not None or not pairs:
        counts = store.feature_counts(first)
        alive = np.flatnonzero(counts)
        drawn = np.random.default_rng(config.seed).permutation(alive)[: config.sample or _SAMPLED]
        pairs += [(first, feature) for feature in sorted(drawn.tolist())]
    found: dict[int, list[int]] = {}
    for layer, feature in dict.fromkeys(pairs):
        d_sae = store.d_sae(layer)  # StoreError names the layers that there are
        if not 0 <= feature < d_sae:
            raise InputError(f"Feature {feature} of layer {layer} was asked for; its SAE has 0 to {d_sae - 1}.")
        found.setdefault(layer, []).append(feature)
    if not found:
        raise InputError(f"No feature of layer {first} fires in {config.store}. Name another --layer or store.")
    return found


def _named(text: str, first: int) -> tuple[int, int]:
    layer, colon, feature = text.rpartition(":")
    if not feature.isdecimal() or (colon and not layer.isdecimal()):
        raise InputError(f"--features {text!r} was given. Accepted: LAYER:ID such as 15:120, or ID.")
    return (int(layer) if colon else first), int(feature)


# --- who is asked ----------------------------------------------------------------------------------------


class _Models:
    """The explainer and the judge; one and the same object where both are the same model."""

    def __init__(self, config: ExplainConfig) -> None:
        self._config = config
        self._used: dict[str, Chat] = {}

    def check(self) -> None:
        """Before any work: an endpoint that is not configured."""
        if "endpoint" in (self._config.explainer, self._config.judge):
            _ = self._endpoint

    @cached_property
    def _endpoint(self) -> Chat:
        option = "--explainer" if self._config.explainer == "endpoint" else "--judge"
        return Endpoint.from_environment(
            f"{option} endpoint", timeout=self._config.timeout, retries=self._config.retries
        )

    @cached_property
    def _local(self) -> Chat:
        from qscope import embedded
        from qscope.model import load_model

        name = self._config.local_model
        model, tokenizer = load_model(name or embedded.default_model_path(), device=self._config.device)
        return LocalModel(model, tokenizer, self._local_name)

    @property
    def _local_name(self) -> str:
        from qscope import embedded

        name = self._config.local_model
        return embedded.DEFAULT_MODEL_NAME if name is None else Path(name).name if Path(name).exists() else name

    def _of(self, kind: Asked) -> Chat:
        model = self._endpoint if kind == "endpoint" else self._local
        self._used[f"{kind} {model.name}"] = model
        return model

    def _name(self, kind: str) -> str:
        return {"endpoint": lambda: self._endpoint.name, "local": lambda: self._local_name}.get(kind, lambda: kind)()

    @property
    def explainer_name(self) -> str:
        return self._name(self._config.explainer)

    @property
    def judge_name(self) -> str:
        return self._name(self._config.judge)

    def sentence(self, evidence: Evidence, raised: Sequence[str], plain: str, decode: Decode) -> tuple[str, str | None]:
        """(the explanation, why it is not the model's)."""
        kind = self._config.explainer
        if kind == "plain" or not evidence.strongest:
            return plain, None
        model = self._of(kind)
        text = model_sentence(model, evidence, raised, decode)
        if text is None:
            return plain, f"{model.name} never answered as it was asked to; the sentence is the plain one"
        return text, None

    def scores(self, evidence: Evidence, text: str, decode: Decode) -> dict[str, Score]:
        kind = self._config.judge
        if kind == "none":
            return {}
        if kind == "keywords":
            return score(evidence, KeywordJudge(evidence, decode))
        return score(evidence, ModelJudge(self._of(kind), text, decode))

    def requests(self) -> dict[str, dict[str, int]]:
        return {name: model.counts.as_dict() for name, model in self._used.items()}


# --- the work --------------------------------------------------------------------------------------------


class _Work:
    """Features in turn; those that the journal has are not made again."""

    def __init__(self, config: ExplainConfig, journal: Journal, models: _Models, decode: Decode) -> None:
        self._journal, self._models, self._decode = journal, models, decode
        self._todo: list[tuple[Evidence, Sequence[str], Made]] = []
        self._found: dict[tuple[int, int], Explanation] = {}
        self.made = 0

    def add(self, evidence: Sequence[Evidence], raised: Mapping[tuple[int, int], Sequence[str]]) -> None:
        for one in evidence:
            key = (one.layer, one.feature)
            made = made_of(one, raised.get(key, ()), self._models.explainer_name, self._models.judge_name)
            kept = self._journal.get(*key, made)
            if kept is None:
                self._todo.append((one, raised.get(key, ()), made))
            else:
                self._found[key] = kept

    def finish(self) -> dict[tuple[int, int], Explanation]:
        from tqdm import tqdm

        for one, raised, made in tqdm(self._todo, desc="explain", unit="feature", dynamic_ncols=True):
            plain = plain_sentence(one, raised, self._decode)
            text, problem = self._models.sentence(one, raised, plain, self._decode)
            scores = self._models.scores(one, text, self._decode)
            made_now = explanation(one, made, text, plain, raised, scores, problem, self._decode)
            self._journal.put(made_now)
            self._found[made_now.key] = made_now
            self.made += 1
        return self._found


def _means(explanations: Sequence[Explanation]) -> dict[str, MeanScore]:
    found = {}
    for kind in KINDS:
        scores = [one.scores[kind] for one in explanations if kind in one.scores]
        accuracy = [s.balanced_accuracy for s in scores if s.balanced_accuracy is not None]
        area = [s.auroc for s in scores if s.auroc is not None]
        if not accuracy:
            continue
        found[kind] = MeanScore(
            features=len(accuracy),
            balanced_accuracy=float(np.mean(accuracy)),
            balanced_accuracy_interval=_interval(accuracy),
            auroc=float(np.mean(area)),
            auroc_interval=_interval(area),
            unanswered=sum(s.unanswered for s in scores),
        )
    return found


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean, by Student's t, within 0 to 1."""
    if len(values) < 2:
        return None
    import scipy.stats

    half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    mean = float(np.mean(values))
    return max(0.0, mean - half), min(1.0, mean + half)


def _problems(explanations: Sequence[Explanation]) -> list[str]:
    found = [f"{one.layer}:{one.feature}: {one.problem}." for one in explanations if one.problem]
    missing = sum(bool(one.scores) and one.scores["detection"].balanced_accuracy is None for one in explanations)
    if missing:
        found.append(
            f"{missing} of {len(explanations)} features have no detection score: they fire, or are silent, in too few "
            "passages of the half of the texts that is set aside."
        )
    return found
