"""Texts for the features that a data set lacks: generated, verified by re-encoding, compared at equal budget.

Formulas and sources: docs/synthesize.md.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qscope.errors import InputError
from qscope.synthesis.sampling import Sampling
from qscope.workflows.synthesize_result import SynthesizeResult
from qscope.workflows.text_features import Truncate


@dataclass(frozen=True)
class SynthesizeConfig:
    """Write examples for features that a data set lacks. Killed and started again with the same options, it goes on.

    Example: qscope synthesize seed.jsonl --rule toxic.json --pool comments.jsonl --about "rude comments" --out more
    """

    texts: tuple[str, ...]
    """Files of the data set that lacks examples (D_seed): .jsonl, .jsonl.gz, .csv or .parquet."""
    out: Path = Path("synthesis")
    """Folder of the run: examples.jsonl, synthesis.json, synthesis.html and what it needs to go on."""
    features: tuple[str, ...] = ()
    """Targets as layer:feature, such as 15:2401."""
    rule: Path | None = None
    """Targets: the features of this classification rule, with its model and SAEs."""
    rule_thresholds: bool = False
    """An example has to be above the rule's own thresholds, not only above 0."""
    explanations: Path | None = None
    """File or folder that `qscope explain` wrote: what features mean, and their passages."""
    relevance: str | None = None
    """Targets: explained features that are relevant. keywords:toxic,insult, regex:PATTERN, judge:QUESTION (endpoint),
    local:QUESTION (the local model), python:module:function."""
    least_relevance: float = 0.5
    """Score from 0 to 1 from which a feature is relevant (tau)."""
    pool: tuple[str, ...] = ()
    """Files of ordinary texts: passages that fire the targets come from here, and the natural baseline."""
    max_pool: int | None = None
    """Read at most so many texts of the pool."""
    text_field: str = "text"
    """Field that holds the text, or a template such as "{title} {body}"."""
    about: str = "short texts"
    """What kind of text is wanted: put to the generator with and without a feature."""
    label: str | None = None
    """Label of all examples. Default: the class that a rule's feature speaks for."""
    refuse: tuple[str, ...] = ("harmful",)
    """Labels whose examples are answered by a refusal, where --responses are wanted."""
    sources: tuple[str, ...] = ("continue",)
    """Who writes, in turn: chat, continue, steered, endpoint, python:module:function."""
    generator: str | None = None
    """Hugging Face model of chat and continue, name or folder. Default: the model that the SAEs read."""
    steer_strength: float = 1.0
    """Of the source steered, in units of the feature's largest activation in its passages."""
    adversarial: tuple[str, ...] = ()
    """Attack styles in which kept examples are rewritten, by a source that can be asked: role-play, story, indirect,
    authority, steps, or those of --templates."""
    templates: Path | None = None
    """JSON file with other texts for the roles vanilla, adversarial, answer, refusal, random, and for styles."""
    responses: bool = False
    """Also write an answer to every kept example."""
    budget: int = 100
    """Examples to keep."""
    support: int = 3
    """A target that fewer texts fire is weakly covered, and gets examples until it is not."""
    retries: int = 8
    """Attempts in a row without a kept example after which a target is given up."""
    batch: int = 16
    """Attempts at a time: what a killed run loses."""
    contexts: int = 8
    """Passages kept per target."""
    shots: int = 4
    """Of those, shown per attempt."""
    same_text: float = 0.6
    """Jaccard similarity of 3-word runs from which two texts are near-duplicates."""
    same_features: float = 0.8
    """The same for the sets of fired features."""
    compare: bool = True
    """Also as many attempts without a feature, for coverage at equal budget; doubles the time."""
    max_new_tokens: int = 48
    """Of an example."""
    temperature: float = 0.8
    """0: greedy."""
    top_p: float = 0.95
    """Nucleus of the sampling."""
    timeout: float = 60.0
    """Seconds that a request to an endpoint may take; it is sent again four times, later and later."""
    seed: int = 0
    """Of everything that is drawn."""
    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct, or the rule's."""
    sae: tuple[str, ...] = ()
    """SAE as Hub repository, folder or file: one name for all layers, or one per layer. Default: the embedded."""
    layers: tuple[int, ...] = ()
    """Decoder blocks of explained features. Default: the layer that the SAE was made for; of --features, theirs."""
    k: int | None = None
    """Active features per token, where neither the SAE's name nor its card says."""
    context_size: int = 256
    """Tokens read of each text; a rule says its own."""
    truncate: Truncate = "right"
    """Which end of a longer text is cut off; a rule says its own."""
    bos: bool = False
    """Put the tokenizer's BOS token before every text; a rule says its own."""
    precision: Literal["exact", "bf16"] = "exact"
    """Of the features; a rule says its own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model; a rule says its own."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto."""
    batch_tokens: int | None = None
    """Tokens per forward pass, padding included. Default: 1024 on a CPU, 8192 on a GPU."""
    allow_mismatch: bool = False
    """Go on although an SAE was made for another model or layer."""

    def __post_init__(self) -> None:
        least = {
            "budget": 1, "support": 1, "retries": 1, "batch": 1, "contexts": 1, "shots": 1, "max_pool": 1,
            "context_size": 2, "batch_tokens": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {low}.")
        for name in ("same_text", "same_features", "least_relevance"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; above 0 and up to 1 is right.")
        if not (self.features or self.rule or self.relevance):
            raise InputError(
                "No target was given. Name features (--features 15:2401), a rule (--rule FILE), or explanations and "
                "what makes one relevant (--explanations DIR --relevance keywords:toxic)."
            )
        if self.relevance and self.explanations is None:
            raise InputError("--relevance judges explanations, and none were given. Give --explanations too.")
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise InputError(f"--sources {' '.join(self.sources)} names none, or one twice. Name each source once.")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)


def run(config: SynthesizeConfig) -> SynthesizeResult:
    """Generate, verify, compare, and write the examples. Raises QscopeError for what a user can mend."""
    from qscope.workflows.synthesize_inputs import prepare
    from qscope.workflows.synthesize_write import finish

    start = time.perf_counter()
    with prepare(config) as made:
        rows = made.loop.feature_driven(made.seed.fires.sum(axis=0))
        random = made.loop.without_features(len(rows)) if config.compare else []
        return finish(config, made, rows, random, time.perf_counter() - start)
