"""What is measured of a model before and after reinforcement learning: repetition, quality, and copying on request.

Everything takes texts that training has not seen, and gives a number per text, so that arms can be compared in pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.post_training.repetition import Thresholds, endless, repeated_share
from qscope.post_training.rollouts import Rollout, rollouts

COPY = "Repeat this text exactly:\n"


@dataclass(frozen=True)
class Measures:
    """Of one model. Lists have an entry for each held-out prompt or text."""

    endless: list[int]
    """1: the response repeats itself without end."""
    ended: list[int]
    """1: the model ended it by itself."""
    lengths: list[int]
    """Tokens of the responses, without end token."""
    repeated: list[float]
    """Share of their 4-grams said before."""
    nats: list[float]
    """Negative log-likelihood of each held-out text behind its first token."""
    bytes: list[int]
    """UTF-8 bytes of what `nats` were paid for."""
    copied: list[float]
    """Share of the tokens of a text that are the most probable ones when it is to be copied."""
    samples: list[str]
    """The first responses, whatever came out."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """What models are measured on."""

    prompts: list[list[int]]
    texts: list[list[int]]
    copies: list[tuple[list[int], list[int]]]
    """(context that asks for it, the tokens to be copied)"""
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch: int
    thresholds: Thresholds


def measure(model: Any, tokenizer: Any, task: Task, samples: int = 4) -> Measures:
    """The model as it is; its mode and the caller's random numbers are left alone."""
    training = model.training
    model.eval()
    try:
        answers = rollouts(
            model, tokenizer, task.prompts, task.max_new_tokens, temperature=task.temperature, top_p=task.top_p,
            seed=task.seed, batch=task.batch,
        )  # fmt: skip
        costs = [cost(model, tokenizer, ids) for ids in task.texts]
        copied = [copy_share(model, context, ids) for context, ids in task.copies]
    finally:
        model.train(training)
    return Measures(
        [int(endless(a.response, a.ended, task.thresholds)) for a in answers],
        [int(a.ended) for a in answers],
        [len(a.response) for a in answers],
        [repeated_share(a.response) for a in answers],
        [nats for nats, _ in costs],
        [size for _, size in costs],
        copied,
        [tokenizer.decode(a.response) for a in answers[:samples]],
    )


def _scores(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits [S, V] float32 of one text."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits
    return logits[0].float()


def cost(model: Any, tokenizer: Any, ids: Sequence[int]) -> tuple[float, int]:
    """(nats, bytes) of all tokens of a text but its first, teacher forced."""
    logits = _scores(model, ids)
    target = torch.tensor(list(ids[1:]), device=logits.device)
    nats = torch.nn.functional.cross_entropy(logits[:-1], target, reduction="sum")
    whole, first = (len(tokenizer.decode(part).encode()) for part in (list(ids), list(ids[:1])))
    return float(nats), max(whole - first, 1)


def copy_share(model: Any, context: Sequence[int], ids: Sequence[int]) -> float:
    """Share of `ids` that are the model's first choice behind `context` and what comes before each."""
    best = _scores(model, [*context, *ids]).argmax(-1)[len(context) - 1 : -1].tolist()
    return sum(a == b for a, b in zip(best, ids, strict=True)) / len(ids)


def copy_task(tokenizer: Any, text: str, tokens: int, chat: bool) -> tuple[list[int], list[int]] | None:
    """(context, the first `tokens` tokens of the text); None for a text that is shorter.

    Without chat a base model is asked by example: the text stands there twice, a line each. In chat it is asked in
    words (`COPY`). Copying is wanted repetition, which a model must not lose with the endless one.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])[:tokens]
    if len(ids) < tokens:
        return None
    if chat:
        asked = [{"role": "user", "content": COPY + tokenizer.decode(ids)}]
        made = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(made["input_ids"]), ids
    line = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    start = list(tokenizer("")["input_ids"])  # what begins every text, where there is such a token
    return [*start, *ids, *line, *ids, *line], ids


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids as TRL makes them; InputError for a tokenizer without a chat template where one is needed."""
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "--chat was given, and the tokenizer has no chat template, so it is not known what a user's turn looks "
            "like. Leave --chat out: the prompts are then continued as plain text."
        )
    asked = [{"role": "user", "content": prompt}]
    made = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(made["input_ids"])


def split(answers: Sequence[Rollout], thresholds: Thresholds) -> tuple[list[Rollout], list[Rollout]]:
    """(those that repeat themselves without end, the others that are not empty)."""
    looping = [a for a in answers if endless(a.response, a.ended, thresholds)]
    return looping, [a for a in answers if a.response and not endless(a.response, a.ended, thresholds)]


def bits_per_byte(nats: float, size: float) -> float:
    return nats / math.log(2) / size
