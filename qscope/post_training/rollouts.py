"""Responses of a model to prompts, steered or not: what repetition is mined from and measured on."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from qscope.errors import InputError
from qscope.sae import SAE
from qscope.steering import SteeringSpec, steer


class Rollout(NamedTuple):
    prompt: list[int]
    """Token ids."""
    response: list[int]
    """Token ids, without the end token; may be empty."""
    ended: bool
    """The model put out an end token; else the response was cut at the largest length."""


def rollouts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = 32,
    spec: SteeringSpec | None = None,
    saes: Mapping[int, SAE] | None = None,
) -> list[Rollout]:
    """One response to each prompt, in their order; the random numbers of the caller are left as they were.

    temperature: 0 takes the most probable token. batch: prompts at once; another number gives other samples.
    Raises InputError for no prompts and for an empty one.
    """
    if not prompts or not all(prompts):
        raise InputError("No prompts were given, or an empty one; at least one token each is expected.")
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    found: list[Rollout] = []
    training = model.training
    model.eval()
    steered = steer(model, spec, saes=saes, tokenizer=tokenizer, record=False) if spec is not None else nullcontext()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), steered:
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch):
                rows = [list(prompt) for prompt in prompts[start : start + batch]]
                width = max(map(len, rows))
                ids = torch.tensor([[ends[0]] * (width - len(row)) + row for row in rows], device=device)
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
                made = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=ends,
                    pad_token_id=ends[0], use_cache=True, **(sampling if temperature > 0 else {"do_sample": False}),
                )  # fmt: skip
                found += [_cut(row, out, set(ends)) for row, out in zip(rows, made[:, width:].tolist(), strict=True)]
    finally:
        model.train(training)
    return found


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a response: the tokenizer's, and those of the model's generation config."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    ends = list(dict.fromkeys(token for token in given if token is not None))
    if not ends:
        raise InputError(
            f"{type(tokenizer).__name__} has no end token, and the model names none, so a response that ends cannot "
            "be told from one that goes on. Set eos_token of the tokenizer."
        )
    return ends


def _cut(prompt: list[int], out: list[int], ends: set[int]) -> Rollout:
    for place, token in enumerate(out):
        if token in ends:
            return Rollout(prompt, out[:place], True)
    return Rollout(prompt, out, False)
