"""A language model and text, or stored activations, to trained SAEs: any layers and sweeps at once, resumable."""

import os
import re
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qscope.errors import InputError
from qscope.files import claim_folder
from qscope.training.filters import NORM_MULTIPLE
from qscope.training.recipe import Recipe

if TYPE_CHECKING:
    from qscope.distributed import Group

MANIFEST = "train.json"
DEAD_AFTER = 10_000_000
BATCHES_IN_BUFFER = 64
WIDTHS = 16
"""d_sae over the width of the residual in all SAEs that Qwen-Scope released."""

PRESETS: dict[str, dict[str, Any]] = {
    "qwen-scope": {"objective": "topk", "multi_topk": False, "aux_weight": 1 / 32, "norm_multiple": NORM_MULTIPLE},
}
PRESET_K = {None: (32,), "qwen-scope": (50,)}


@dataclass(frozen=True)
class TrainConfig:
    """Train SAEs. Killed and started again with the same options, it goes on where it was, to the same weights.

    Example: qscope train --text corpus.jsonl --out saes --layers 5 15 25 --tokens 20000000
    """

    text: tuple[str, ...] = ()
    """Files (.txt, .md, .jsonl, .jsonl.gz, .parquet) or folders of them. One of --text, --dataset, --activations."""
    dataset: str | None = None
    """Dataset of the Hugging Face Hub, streamed (needs the package datasets)."""
    dataset_config: str | None = None
    """Its configuration, where it has several."""
    dataset_split: str = "train"
    """Its split."""
    activations: Path | None = None
    """Folder that qscope encode --activations wrote; no model is loaded then."""
    out: Path = Path("saes")
    """Folder of the run: SAEs, log, checkpoints, report; made, or continued if begun with the same options."""
    preset: Literal["qwen-scope"] | None = None
    """qwen-scope: what its paper discloses (TopK, k 50, AuxK 1/32, norm filter); options that contradict it fail."""
    finish: bool = False
    """Do not train on: write the SAEs of the newest checkpoint of an interrupted run, and the report."""

    model: str | None = None
    """Hugging Face causal LM, name or folder. Default: the embedded SmolLM2-135M-Instruct."""
    layers: tuple[int, ...] = ()
    """Decoder blocks whose output is learnt, from 0. Default: 15 of the embedded model, all that are stored."""
    transcoder_in: tuple[str, ...] = ()
    """Instead of --layers, transcoders: where each reads. A block's number or mlp_in.N, mlp_out.N of block N."""
    transcoder_out: tuple[str, ...] = ()
    """What each of them predicts from that: as many points, in the same order."""
    k: tuple[int, ...] = ()
    """Active features per token. Several values of k, d_sae, seed: every combination is trained. Default: 32."""
    d_sae: tuple[int, ...] = ()
    """Features. Default: 16 times the width of the activations, as Qwen-Scope."""
    seed: tuple[int, ...] = (0,)
    """Of the decoder's random directions at the start."""

    tokens: int = 2_000_000
    """How many tokens to train on: whole batches of them."""
    batch_tokens: int = 4096
    """Tokens per step."""
    buffer_tokens: int | None = None
    """Tokens in the shuffle buffer, each with all its activations. Default: 64 batches, but no more than --tokens."""
    data_seed: int = 0
    """Of the shuffling."""
    cycle: bool = False
    """Read the text again when it ends. Otherwise text that is shorter than --tokens is refused."""
    context_size: int = 512
    """Tokens that the model sees at once; documents are packed into windows of this size."""
    model_tokens: int | None = None
    """Tokens per forward pass of the model, all processes together. Default: 1024 per process on a CPU, 8192 on a
    GPU; of a run that goes on, as it began."""
    bos: bool = False
    """Put the tokenizer's BOS token before every window; it counts as the window's first token."""
    separator: bool = True
    """--no-separator joins documents without the tokenizer's EOS token between them."""
    first_token: Literal["drop", "keep"] = "drop"
    """drop: not to learn from the first token of a window (an attention sink as a rule) nor from separators."""
    norm_multiple: float | None = NORM_MULTIPLE
    """Leave out activations whose norm is above this many times the running median; None: no filter."""
    chat: bool = False
    """Rows are conversations, lists of {role, content}; they go through the model's chat template."""
    field: str | None = None
    """Field of JSON Lines, Parquet or dataset rows. Default: text, with --chat messages."""
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    """Of input whose name does not tell."""
    strict: bool = False
    """Refuse invalid UTF-8 and unusable rows instead of counting them."""

    objective: Literal["topk", "batch_topk", "matryoshka", "jumprelu"] = "topk"
    """What is learnt; docs/train.md says how, and gives the source of every field down to --l0-weight."""
    multi_topk: bool = False
    """With topk: add 1/8 of the loss at 4 k."""
    prefixes: tuple[int, ...] | None = None
    """Sizes of nested dictionaries, for matryoshka and batch_topk. Default for matryoshka: 1/16, 1/8, 1/4, 1/2, 1."""
    row_limit: int | None = None
    """Most active features of one token, for batch_topk (default 4 k) and jumprelu (256)."""
    aux_weight: float = 1 / 32
    """Of the AuxK loss, by which dead features learn what is left of the error; 0: none."""
    k_aux: int | None = None
    """Dead features that do so for a token. Default: half the width, at most 256."""
    dead_after_tokens: int | None = None
    """Tokens without firing after which a feature is dead. Default: 10,000,000, at most a tenth of --tokens."""
    dead_every: int = 8
    """Steps between two looks at which features are dead."""
    lr: float | None = None
    """Peak learning rate. Default: 2e-4 / sqrt(d_sae / 2^14), for long runs; short ones (100s of steps) bear 8e-4."""
    warmup_steps: int | None = None
    """Steps of linear rise. Default: 1000, at most a twentieth of all."""
    decay: float = 0.2
    """Share of the steps, the last ones, in which the rate falls to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam."""
    momentum_steps: int = 5
    """Steps that a feature's rows go on moving by momentum after their last gradient; 0 is lazy Adam."""
    eps: float = 6.25e-10
    """Of Adam."""
    grad_clip: float | None = 1.0
    """Largest norm of all gradients together; None: any."""
    ema: float | None = None
    """Decay per step of a running mean of the weights, which is then what is saved, such as 0.999."""
    encoder_scale: Literal["sample", "probes"] = "sample"
    """Length of encoder rows at the start: least error on a sample, or unit norm on random probes."""
    normalize_activations: Literal["unit", "sqrt_d", "none"] = "unit"
    """Mean norm that activations are scaled to; folded into the weights at the end."""
    precision: Literal["exact", "bf16"] | None = None
    """Of the forward's encode. Default: bf16 on a GPU, exact on a CPU."""
    threshold_beta: float = 0.99
    """Decay of batch_topk's running threshold."""
    bandwidth: float = 1e-3
    """Of jumprelu's kernel, in mean norms of the activations."""
    l0_penalty: Literal["target", "linear"] = "target"
    """Of jumprelu: (L0 / k - 1)^2 or L0."""
    l0_weight: float = 1.0
    """Of that penalty."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on, or auto. Of many processes: cpu, or cuda, of which each takes its own."""
    spread: int = 1
    """Of many processes (torchrun --nproc-per-node N -m qscope train ...): parts that share the SAEs among them.
    N = spread x dp x tp; all three may change when a run goes on."""
    dp: int = 1
    """Processes that share every batch of an SAE."""
    tp: int = 1
    """Processes that share the features of an SAE."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer is given up; writing a checkpoint must take less."""
    checkpoint_seconds: float = 900.0
    """Seconds between two checkpoints: a killed run loses at most as much."""
    checkpoint_steps: int | None = None
    """Steps between two checkpoints, instead of seconds."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = False
    """Keep also the one with the lowest FVU, the mean over the SAEs."""
    divergence_factor: float = 10.0
    """A loss above this many times its running minimum, or not finite, counts as diverged ..."""
    divergence_steps: int = 100
    """... and this many such steps in a row stop the run, with the last checkpoint from before kept."""
    log_every: int | None = None
    """Steps per line of the log, each the mean over them. Default: 500 lines a run, at most 100 steps each."""
    tensorboard: bool = False
    """Write the log for TensorBoard as well, to OUT/tensorboard (needs the package tensorboard)."""
    wandb: str | None = None
    """Send the log to this project of Weights & Biases as well (needs the package wandb)."""

    def __post_init__(self) -> None:
        self._check_source()
        self._check_points()
        self._check_numbers()
        for name, wanted in PRESETS.get(self.preset or "", {}).items():
            if getattr(self, name) != wanted:
                raise InputError(
                    f"--preset {self.preset} means {_option(name)} {wanted}, and {getattr(self, name)} was given. "
                    "Leave one of the two out."
                )
        if self.d_sae:
            self.recipes(0)  # refuses what cannot be trained before a model is loaded

    def _check_source(self) -> None:
        given = [bool(self.text), self.dataset is not None, self.activations is not None]
        if sum(given) != 1:
            raise InputError(
                f"{sum(given) or 'none'} of --text, --dataset and --activations was given. Exactly one is needed: "
                "files of text, a dataset of the Hub, or a folder that qscope encode --activations wrote."
            )
        if self.activations is not None and (self.model or self.transcoder_in or self.chat or self.bos):
            raise InputError(
                "--activations was given, for which no model is run, together with --model, --transcoder-in, --chat or "
                "--bos. Leave these out; they were settled when the activations were stored."
            )

    def _check_points(self) -> None:
        if len(self.transcoder_in) != len(self.transcoder_out):
            raise InputError(
                f"--transcoder-in names {len(self.transcoder_in)} points and --transcoder-out "
                f"{len(self.transcoder_out)}. Every transcoder needs one of each."
            )
        if self.transcoder_in and self.layers:
            raise InputError("--layers and --transcoder-in were both given. Train SAEs and transcoders in two runs.")
        if self.model == "":
            raise InputError("--model is empty. Name a Hugging Face model, or leave --model out for the embedded one.")
        if self.model is not None and not (self.layers or self.transcoder_in):
            raise InputError(f"--model {self.model} was given without --layers. Name the blocks, such as --layers 12.")
        for name in ("layers", "k", "d_sae", "seed"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"{_option(name)} {' '.join(map(str, values))} names a value twice. Name each once.")
        if not self.seed:
            raise InputError("--seed names no value. Name one, or leave --seed out for 0.")

    def _check_numbers(self) -> None:
        least = {"tokens": 2, "batch_tokens": 2, "context_size": 2, "buffer_tokens": 4, "model_tokens": 1}
        least |= {"checkpoint_steps": 1, "keep_last": 1, "log_every": 1, "divergence_steps": 1, "data_seed": 0}
        least |= {"spread": 1, "dp": 1, "tp": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{_option(name)} is {value}; it must be at least {low}.")
        if self.tokens < self.batch_tokens:
            raise InputError(
                f"--tokens {self.tokens} is less than one batch of {self.batch_tokens}. Give more tokens, or a smaller "
                "--batch-tokens."
            )
        if self.batch_tokens % self.dp or self.batch_tokens < 2 * self.dp:
            raise InputError(
                f"--batch-tokens {self.batch_tokens} cannot be dealt to --dp {self.dp} processes. Give a multiple of "
                f"{self.dp}, at least {2 * self.dp}."
            )
        if not self.timeout > 0:
            raise InputError(f"--timeout is {self.timeout}; more than 0 seconds are accepted.")
        if not self.divergence_factor > 1 or not self.checkpoint_seconds > 0:
            raise InputError(
                f"--divergence-factor is {self.divergence_factor} and --checkpoint-seconds {self.checkpoint_seconds}; "
                "more than 1 and more than 0 are accepted."
            )

    @property
    def total_steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def processes(self) -> int:
        return self.spread * self.dp * self.tp

    @property
    def steps_per_line(self) -> int:
        return self.log_every or min(100, max(1, self.total_steps // 500))

    def buffer(self, at_once: int) -> int:
        """Rows of the shuffle buffer; at_once: rows that are made in one piece."""
        if self.buffer_tokens is not None:
            return self.buffer_tokens
        return max(min(BATCHES_IN_BUFFER * self.batch_tokens, self.tokens), 2 * self.batch_tokens, 2 * at_once)

    def recipes(self, width: int) -> list[Recipe]:
        """Every combination of d_sae, k and seed, for activations of some width."""
        names = {item.name for item in fields(self)} & {item.name for item in fields(Recipe)}
        shared = {name: getattr(self, name) for name in names - {"d_sae", "k", "seed", "dead_after_tokens"}}
        dead_after = self.dead_after_tokens
        if dead_after is None:
            dead_after = min(DEAD_AFTER, max(1, self.tokens // 10))
        sizes, ks = self.d_sae or (WIDTHS * width,), self.k or PRESET_K[self.preset]
        return [
            Recipe(d_sae=size, k=k, seed=seed, dead_after_tokens=dead_after, **shared)
            for size, k, seed in product(sizes, ks, self.seed)
        ]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE (or transcoder): where it is, and its figures in training, means over the last tenth of the steps."""

    path: str
    point: str
    """Layer, or the point that a transcoder reads"""
    target: str | None
    """What a transcoder predicts"""
    d_in: int
    d_sae: int
    k: int
    seed: int
    figures: dict[str, float]
    """loss, fvu, l0, aux, dead_share (at the end), grad_norm; overflow and skipped are sums over the run"""


@dataclass(frozen=True)
class TrainResult:
    """What a run did: `run_*`, `seconds` (per stage, host time) and `tokens_per_second` of this run."""

    out: str
    model: str
    complete: bool
    """Whether all tokens were trained on; not with --finish of an interrupted run."""
    steps: int
    tokens: int
    resumed_step: int
    """Step of the checkpoint that this run went on from, 0 for none."""
    saes: dict[str, TrainedSAE]
    counts: dict[str, Any]
    """Text read and activations left out, and why"""
    run_tokens: int
    run_seconds: float
    tokens_per_second: float
    seconds: dict[str, float]
    buffer_bytes: int
    about: dict[str, str]
    """What was trained on what: text, sizes, dtype, device, versions."""
    log: str
    report: str
    """Path of the page, which `qscope.report.train_page.write` makes."""


def run(config: TrainConfig) -> TrainResult:
    """Train as `config` says. Raises QscopeError for everything that a user can mend, KeyboardInterrupt after a
    checkpoint when SIGINT or SIGTERM asked to stop, GroupError when another process of this run is lost. Of many
    processes only the first one returns; the others exit with status 0 when everything is written."""
    from qscope.training import checkpoint
    from qscope.workflows.train_job import Job, read_manifest
    from qscope.workflows.train_supply import open_supply

    with ExitStack() as stack:
        group = stack.enter_context(_processes(config))
        first = group is None or group.first
        manifest: dict[str, Any] = {}
        if first:
            claim_folder(config.out, MANIFEST, re.compile(r"\.tmp-.*"), "training run")
            stack.enter_context(checkpoint.locked(config.out))
            manifest = read_manifest(config.out)
        if group is not None:
            config = replace(config, device=str(group.device))
            manifest = group.world.objects(manifest)[0]
        job = Job(config, open_supply(config, manifest, group), manifest, group)
        stack.enter_context(closing(job.log))
        job.resume()
        if not config.finish:
            job.train()
        result = job.finish()
    if not first:
        raise SystemExit(0)  # the first one prints and writes the page
    return result


def _processes(config: TrainConfig) -> "AbstractContextManager[Group | None]":
    """The processes that torchrun started, None for one alone."""
    if config.processes == 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        return nullcontext()
    from qscope import distributed
    from qscope.workflows.train_supply import chosen_device

    sizes = {"spread": config.spread, "dp": config.dp, "tp": config.tp}
    return distributed.init(chosen_device(config.device), **sizes, timeout=config.timeout)
