"""Train the small multilingual Qwen3 model: 6.8 M parameters, byte-level BPE of 8,192, on a CPU.

    python scripts/train_small_model.py --out run                 # until it is stopped; goes on where it was
    python scripts/train_small_model.py --out run --finish 1500   # lowers the learning rate to 0 and writes run/model

The learning rate rises, stays, and falls only in a `--finish` run (warm-up, stable, decay: Hu et al. 2024,
arXiv:2404.06395; the fall is 1 - sqrt, Hägele et al. 2024, arXiv:2405.18392), so the first command may be stopped
(Ctrl-C, kill) and finished at any time, and trained further afterwards. Both print the bits per byte on held-out
text of every stream, and both go on from their newest checkpoint after a kill, to the same bits.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import small_model_data
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # token ids 0, 1, 2
# Qwen's own: words with one mark before them, single digits, runs of marks, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML; `generation` marks the answers for trainers that learn from them only.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 8192
CONTEXT = 256
SHARES = {"chat": 0.35, "debian": 0.35, "sentences": 0.30}
"""of the training windows; within a kind the languages follow the square root of their size"""
SAMPLE_BYTES = 1_200_000
"""of each stream, at most, for the vocabulary"""

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Stream:
    """Tokens of one stream: documents one after the other, each closed by END."""

    train: Ids
    starts: npt.NDArray[np.int64]
    """where the training documents begin"""
    held_out: Ids


@dataclass(frozen=True)
class Settings:
    batch: int = 16
    peak: float = 3e-3
    warmup: int = 200
    seed: int = 0
    save_minutes: float = 4.0
    evaluate_steps: int = 1000
    bf16: bool = True


def make_tokenizer(sample: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with Qwen's split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, START, STOP], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def prepare(out: Path, texts: Iterable[small_model_data.Text]) -> None:
    """Write the tokenizer and the tokens of every stream below `out`/data, once."""
    folder = out / "data"
    if folder.is_dir():
        return
    scratch = out / "data.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    streams: dict[str, list[small_model_data.Text]] = defaultdict(list)
    for text in texts:
        streams[text.stream].append(text)
    sample: list[str] = []
    for name in sorted(streams):
        streams[name].sort(key=lambda text: small_model_data.digest(text.text))  # mixes the sources
        left = SAMPLE_BYTES
        for text in streams[name]:
            if not text.held_out and left > 0 and not name.startswith("chat:"):
                sample.append(text.text)
                left -= len(text.text.encode())
    tokenizer = make_tokenizer(sample)
    tokenizer.save(str(scratch / "tokenizer.json"))
    for name, members in streams.items():
        for part, held_out in (("train", False), ("held-out", True)):
            encoded = tokenizer.encode_batch_fast([text.text for text in members if text.held_out == held_out])
            lengths = [len(encoding.ids) + 1 for encoding in encoded]
            ids = [token for encoding in encoded for token in (*encoding.ids, 0)]
            np.save(scratch / f"{name}.{part}.npy", np.array(ids, dtype=np.uint16))
            if not held_out:
                np.save(scratch / f"{name}.starts.npy", np.cumsum([0, *lengths[:-1]]))
    scratch.rename(folder)


def load_streams(out: Path) -> dict[str, Stream]:
    found = {}
    for path in sorted((out / "data").glob("*.train.npy")):
        name = path.name.removesuffix(".train.npy")
        train, starts, held_out = (
            np.load(path.with_name(f"{name}.{part}.npy"), mmap_mode="r") for part in ("train", "starts", "held-out")
        )
        if len(train) > CONTEXT + 1:
            found[name] = Stream(train, starts, held_out)
    return found


def weights(streams: Mapping[str, Stream]) -> npt.NDArray[np.float64]:
    """Chance of each stream to give a training window, in the order of `streams`."""
    kinds = [name.split(":")[0] for name in streams]
    root = np.sqrt([float(len(stream.train)) for stream in streams.values()])
    total = {kind: sum(r for r, k in zip(root, kinds, strict=True) if k == kind) for kind in kinds}
    chance = np.array([SHARES[kind] * r / total[kind] for r, kind in zip(root, kinds, strict=True)])
    return chance / chance.sum()


def batch_of(streams: Mapping[str, Stream], step: int, settings: Settings) -> torch.Tensor:
    """Windows [batch, CONTEXT + 1] of one step; a function of seed and step alone.

    A window of conversations begins with one, as it will when the model is used; others begin anywhere.
    """
    dice = np.random.default_rng((settings.seed, step))
    rows = []
    members = list(streams.items())
    for choice in dice.choice(len(members), size=settings.batch, p=weights(streams)):
        name, stream = members[choice]
        last = len(stream.train) - CONTEXT - 1
        if name.startswith("chat:"):
            usable = int(np.searchsorted(stream.starts, last, side="right"))
            start = int(stream.starts[dice.integers(usable)])
        else:
            start = int(dice.integers(last + 1))
        rows.append(stream.train[start : start + CONTEXT + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def make_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def learning_rate(step: int, settings: Settings, finish: tuple[int, int] | None) -> float:
    """Of the step from `step` to `step` + 1; `finish` is (first step, steps) of the fall."""
    rate = settings.peak * min(1.0, (step + 1) / settings.warmup)
    if finish is None:
        return rate
    return rate * (1 - math.sqrt((step - finish[0] + 1) / (finish[1] + 1)))


class Training:
    """Model, optimiser and step; saved in one safetensors file and read back to the same bits."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = make_model(settings.seed)
        self.step = 0
        self.finish: tuple[int, int] | None = None
        named = dict(self.model.named_parameters())
        matrices = [p for p in named.values() if p.ndim > 1]
        others = [p for p in named.values() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=True,
        )

    def advance(self, streams: Mapping[str, Stream]) -> float:
        """One step; returns its loss in nats a token."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings, self.finish)
        batch = batch_of(streams, self.step, self.settings)
        self.model.train()
        precision = torch.autocast("cpu", torch.bfloat16) if self.settings.bf16 else contextlib.nullcontext()
        with precision:
            logits = self.model(batch[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.reshape(1) if key == "step" else value
        meta = {"step": self.step, "finish": self.finish}
        scratch = path.with_suffix(".part")
        save_file(tensors, scratch, metadata={"training": json.dumps(meta)})
        os.replace(scratch, path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file, torch.no_grad():
            meta = json.loads(file.metadata()["training"])
            self.step = meta["step"]
            self.finish = tuple(meta["finish"]) if meta["finish"] else None
            names = set(file.keys())
            for name, parameter in self.model.named_parameters():
                parameter.copy_(file.get_tensor(f"model.{name}"))
                if f"exp_avg.{name}" in names:
                    self.optimizer.state[parameter] = {
                        "step": file.get_tensor(f"step.{name}").squeeze(0),
                        "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
                    }


def bits_per_byte(model: nn.Module, tokens: Ids, byte_counts: torch.Tensor, windows: int) -> float | None:
    """Of held-out tokens in up to `windows` separate windows (None if there is no whole one).

    The loss of all predicted tokens over the bytes of their texts; END and the marks of a chat count no byte.
    """
    count = min(windows, (len(tokens) - 1) // CONTEXT)
    if count < 1:
        return None
    model.eval()
    nats, size = 0.0, 0
    with torch.no_grad():
        for first in range(0, count, 8):
            places = range(first, min(first + 8, count))
            rows = [tokens[place * CONTEXT : place * CONTEXT + CONTEXT + 1].astype(np.int64) for place in places]
            batch = torch.from_numpy(np.stack(rows))
            logits = model(batch[:, :-1], use_cache=False).logits.float()
            nats += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            size += int(byte_counts[batch[:, 1:]].sum())
    return nats / math.log(2) / size


def evaluate(model: nn.Module, streams: Mapping[str, Stream], tokenizer: Tokenizer, windows: int) -> dict[str, float]:
    tokens = (tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size()))
    counts = [0 if token in (END, START, STOP) else len(token) for token in tokens]  # a character stands for a byte
    byte_counts = torch.tensor(counts + [0] * (VOCABULARY - len(counts)))
    found = {name: bits_per_byte(model, s.held_out, byte_counts, windows) for name, s in streams.items()}
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def train(out: Path, steps: int | None, finish: int | None, settings: Settings) -> Training:
    """Train to `steps` (None: until a signal) or through a fall of `finish` steps; checkpoints lie in `out`."""
    streams = load_streams(out)
    tokenizer = Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    training = Training(settings)
    stable, path = out / "stable.safetensors", out / "stable.safetensors"
    if finish is not None:
        path = out / "finish.safetensors"
        training.load(path if path.is_file() else stable)
        training.finish = training.finish or (training.step, finish)
        steps = sum(training.finish)
    elif stable.is_file():
        training.load(stable)
    stopped: list[int] = []
    handlers = {number: signal.signal(number, lambda got, _: stopped.append(got)) for number in _SIGNALS}
    began, first, saved = time.monotonic(), training.step, time.monotonic()
    try:
        while not stopped and (steps is None or training.step < steps):
            loss = training.advance(streams)
            if training.step % 50 == 0:
                speed = (training.step - first) * settings.batch * CONTEXT / (time.monotonic() - began)
                _log(out, step=training.step, loss=round(loss, 4), tokens_per_second=round(speed))
            if time.monotonic() - saved > 60 * settings.save_minutes:
                training.save(path)
                saved = time.monotonic()
            if training.step % settings.evaluate_steps == 0:
                _log(out, step=training.step, bits_per_byte=evaluate(training.model, streams, tokenizer, 8))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    training.save(path)
    if stopped:
        sys.exit(f"stopped at step {training.step}; the same command goes on from there")
    return training


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _log(out: Path, **record: Any) -> None:
    print(json.dumps(record), flush=True)
    with open(out / "log.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def export(out: Path, training: Training, windows: int = 32) -> Path:
    """Write `out`/model for `AutoModelForCausalLM.from_pretrained`, in bfloat16, with a card and the figures."""
    streams = load_streams(out)
    core = Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    exact = evaluate(training.model, streams, core, windows)
    model = training.model.to(torch.bfloat16)
    figures = {
        "steps": training.step,
        "tokens": training.step * training.settings.batch * CONTEXT,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": evaluate(model, streams, core, windows),
        "bits_per_byte_float32": exact,
    }
    folder, scratch = out / "model", out / "model.part"
    shutil.rmtree(scratch, ignore_errors=True)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(scratch)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=STOP, pad_token=END, additional_special_tokens=[START]
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(scratch)
    (scratch / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    (scratch / "README.md").write_text(card(figures), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


def card(figures: dict[str, Any]) -> str:
    names = sorted(figures["bits_per_byte"])
    languages = sorted({name.split(":")[1] for name in names})
    kinds = sorted(SHARES)
    rows = [
        f"| {language} | " + " | ".join(f"{figures['bits_per_byte'].get(f'{k}:{language}', '')}" for k in kinds) + " |"
        for language in languages
    ]
    table = "\n".join([f"| language | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|", *rows])
    return f"""# A small multilingual language model

Qwen3 architecture, {figures["parameters"]:,} parameters in bfloat16, byte-level BPE of {VOCABULARY:,}, context
{CONTEXT}, ChatML template. Made by `scripts/train_small_model.py` of qscope from scratch on a CPU, on
{figures["tokens"]:,} tokens, for tests and experiments; it is too small to make sense.

Conversations are of three kinds only: continue a text, repeat it, translate it (en, de, fr, it, ja).

Held-out bits per byte:

{table}

Text it learned from: Debian documentation packages (free licences file by file: GPL, GFDL, BSD-like and others),
the npm packages nlp-corpus, de-corpus, fr-corpus, it-corpus, ja-corpus (MIT; machine translations of mixed web
text). None of it is redistributed here. The texts hold coarse language, and so may what the model writes.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, help="stop there (default: at a signal)")
    parser.add_argument("--finish", type=int, metavar="STEPS", help="let the rate fall over so many steps, then export")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--batch", type=int, default=Settings.batch, help="windows of 256 tokens a step")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(batch=args.batch, bf16=not args.float32)
    if not (args.out / "data").is_dir():
        prepare(args.out, small_model_data.texts())
    training = train(args.out, args.steps, args.finish, settings)
    if args.finish is not None:
        folder = export(args.out, training)
        (args.out / "finish.safetensors").unlink()
        print(f"{folder}: {sum(p.stat().st_size for p in folder.iterdir()) / 1e6:.1f} MB")
        print((folder / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
