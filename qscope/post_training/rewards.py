"""Rewards of responses, by name, as TRL's GRPO trainer calls them: a list with a number, or None, per completion.

repetition                 -1 where the response repeats itself without end (qscope.post_training.repetition), else 0
ngrams:4                   - the share of its 4-grams that it has said before
overlong:256:64            DAPO's soft penalty: 0 up to 256 - 64 tokens, falling to -1 at 256 and -1 beyond
detector:script:Han        what qscope.detectors gives, from 0 to 1
python:module:function     function(text), function(text, prompt), or function(completions, ...) called as TRL does
2.5*repetition             any of them with a weight, which may be negative

None means that a reward has nothing to say about a completion, and counts as in TRL: the other rewards are summed; a
completion that gets None from all is left out of its group's mean and has the advantage 0. NaN and infinity are
faults of a reward, and refused by name: TRL would take NaN for None.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qscope import detectors
from qscope.errors import InputError
from qscope.model import residuals
from qscope.post_training.repetition import DEFAULT, Thresholds, endless, repeated_share
from qscope.post_training.rows import sae_rows
from qscope.sae import SAE

_ACCEPTED = (
    "repetition, ngrams:N, overlong:LARGEST:BUFFER, detector:DETECTOR and python:module:function, each with a weight "
    "in front where it is not 1, as in 0.5*overlong:256:64"
)
Scores = Sequence[float | None]


@dataclass(frozen=True)
class Completion:
    """What a reward looks at."""

    ids: list[int]
    """Of the response, without end token."""
    text: str
    prompt: str
    ended: bool
    """By itself, not cut at the largest length."""


@dataclass
class Reward:
    """A reward function for TRL (`reward_funcs`) that refuses NaN. Its weight is for `reward_weights`."""

    name: str
    call: Callable[..., Scores]
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.__name__ = self.name  # TRL logs rewards under it

    def __call__(self, **given: Any) -> list[float | None]:
        scores = [None if score is None else float(score) for score in self.call(**given)]
        wrong = [(i, score) for i, score in enumerate(scores) if score is not None and not math.isfinite(score)]
        if wrong:
            place, score = wrong[0]
            raise InputError(
                f"The reward {self.name} gave {score} for {len(wrong)} of {len(scores)} completions, first for "
                f"{plain_text(given['completions'][place])[:60]!r}. Finite numbers are accepted, and None where it has "
                "nothing to say. Mend the reward."
            )
        return scores


def checked(function: Any) -> Any:
    """A reward as TRL accepts it, made to refuse NaN; a model, a model's name and an async one stay as they are."""
    if isinstance(function, str | nn.Module | Reward) or inspect.iscoroutinefunction(function):
        return function
    return Reward(getattr(function, "__name__", type(function).__name__), function)


def parse(text: str, end_ids: Sequence[int], thresholds: Thresholds = DEFAULT) -> Reward:
    """The reward that a text names. Raises InputError with what is accepted.

    end_ids: the tokens that end a response (`qscope.post_training.rollouts.end_tokens`).
    """
    front, star, name = text.rpartition("*") if _is_number(text.partition("*")[0]) else ("", "", text)
    kind, _, rest = name.strip().partition(":")
    weight = float(front) if star else 1.0
    if kind == "python":
        return Reward(name, _python(rest, text), weight)
    makers = {"repetition": _repetition, "ngrams": _ngrams, "overlong": _overlong, "detector": _detector}
    if kind not in makers or not math.isfinite(weight):
        raise InputError(f"The reward {text!r} was given. Accepted: {_ACCEPTED}.")
    score = makers[kind](rest, text, thresholds)
    return Reward(name, _each(score, end_ids), weight)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- what TRL gives --------------------------------------------------------------------------------------


def plain_text(said: Any) -> str:
    """Of a prompt or completion: the text, or the contents of its messages."""
    return said if isinstance(said, str) else "\n".join(str(message.get("content") or "") for message in said)


def completions_of(given: Mapping[str, Any], end_ids: Sequence[int]) -> list[Completion]:
    """The completions of a call by TRL: prompts, completions (texts or messages) and completion_ids."""
    found = []
    for prompt, said, ids in zip(given["prompts"], given["completions"], given["completion_ids"], strict=True):
        ended = bool(ids) and ids[-1] in end_ids
        found.append(Completion(list(ids[:-1] if ended else ids), plain_text(said), plain_text(prompt), ended))
    return found


def _each(score: Callable[[Completion], float | None], end_ids: Sequence[int]) -> Callable[..., Scores]:
    def call(**given: Any) -> Scores:
        return [score(completion) for completion in completions_of(given, end_ids)]

    return call


# --- the kinds -------------------------------------------------------------------------------------------


def _repetition(rest: str, name: str, thresholds: Thresholds) -> Callable[[Completion], float]:
    if rest:
        raise InputError(f"The reward {name!r} was given; repetition takes nothing behind it. Accepted: {_ACCEPTED}.")
    return lambda c: -float(endless(c.ids, c.ended, thresholds))


def _ngrams(rest: str, name: str, _: Thresholds) -> Callable[[Completion], float]:
    (n,) = _whole(rest or "4", name, 1)
    return lambda c: -repeated_share(c.ids, n)


def _overlong(rest: str, name: str, _: Thresholds) -> Callable[[Completion], float]:
    largest, buffer = _whole(rest, name, 2)
    if buffer > largest:
        raise InputError(f"The reward {name!r} was given, whose buffer is longer than the largest length.")
    return lambda c: soft_overlong(len(c.ids) + c.ended, largest, buffer)


def soft_overlong(length: int, largest: int, buffer: int) -> float:
    """Length penalty of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13): 0, then linear over `buffer`, then -1."""
    return -min(1.0, max(0.0, (length - (largest - buffer)) / buffer))


def _detector(rest: str, name: str, _: Thresholds) -> Callable[[Completion], float]:
    detector = detectors.parse(rest)
    return lambda c: detector([c.text], [c.prompt])[0]


def _whole(rest: str, name: str, count: int) -> list[int]:
    parts = rest.split(":")
    if len(parts) != count or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"The reward {name!r} was given; {count} whole numbers above 0 are expected: {_ACCEPTED}.")
    return [int(part) for part in parts]


def _python(rest: str, name: str) -> Callable[..., Scores]:
    module, _, attribute = rest.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
        names = list(inspect.signature(function).parameters)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"The reward {name!r} cannot be used: {error}. Accepted: python:module:function, where the module can be "
            "imported and function(text), function(text, prompt) or function(completions, ...) gives numbers."
        ) from error
    if "completions" in names:
        return lambda **given: function(**given)
    pairs = len(names) > 1

    def call(**given: Any) -> Scores:
        both = zip(map(plain_text, given["completions"]), map(plain_text, given["prompts"]), strict=True)
        return [function(text, prompt) if pairs else function(text) for text, prompt in both]

    return call


# --- features --------------------------------------------------------------------------------------------


def feature_reward(
    model: Any, tokenizer: Any, saes: Mapping[int, SAE], features: Mapping[int, Sequence[int]], weight: float,
) -> Reward:  # fmt: skip
    """Shaping by features: mean over the response's tokens and the features of ReLU(<W_enc row, x> + b_enc).

    The response is read again by `model`: a frozen one, or the policy itself, which then can also learn to hide the
    feature instead of the behaviour. A negative `weight` holds the features down; note that features of endless
    repetition also fire on wanted copies (Qwen-Scope section 8, Fig. 21). An empty response gets None.
    The pre-activation of the few rows stands for the activation after TopK, so no dense SAE is run.
    """
    rows = sae_rows(saes, features)
    count = sum(len(ids) for ids in features.values())

    def score(prompt: Any, ids: Sequence[int]) -> float | None:
        if not ids:
            return None
        front = _prompt_ids(tokenizer, prompt)
        hidden = residuals(model, torch.tensor([[*front, *ids]]), rows)
        total = 0.0
        for layer, row in rows.items():
            x = hidden[layer][0, len(front) :].float()
            total += float((x @ row.W.T.to(x) + row.b.to(x)).relu().double().sum())
        return total / (len(ids) * count)

    def call(**given: Any) -> Scores:
        return [score(p, ids) for p, ids in zip(given["prompts"], given["completion_ids"], strict=True)]

    return Reward("features", call, weight)


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if not isinstance(prompt, str):
        made = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(made["input_ids"])
    return list(tokenizer(prompt)["input_ids"])
