"""Side effects of steering: of generated texts, of the model's predictions on neutral text, on multiple choice.

Everything takes the model as it is at the moment, steered or not; who calls decides what is attached.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# --- generated texts -------------------------------------------------------------------------------------


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(tokens: Sequence[int], n: int) -> float:
    """Different n-grams over n-grams (Li et al. 2016), of one text; 1 for a text shorter than n."""
    grams = ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """seq-rep-n (Welleck et al. 2020): 1 - distinct-n, the share of n-grams that the text has said already."""
    return 1.0 - distinct(tokens, n)


# --- neutral text ----------------------------------------------------------------------------------------


class Divergence(NamedTuple):
    """Sums over the predicted tokens of each text [B] of a batch, in nats."""

    cross_entropy: list[float]
    kl: list[float]


def halfway(tokens: int) -> int:
    """Tokens of a neutral text of that length that stand as the prompt; the predictions of the others count."""
    return tokens // 2


def log_probs(model: Any, ids: Tensor, prefix: Sequence[int] = (), begin: int | None = None) -> Tensor:
    """Log-probabilities [B, P, V] float32 with which the model predicts the second half of ids [B, S], teacher forced.

    P = S - halfway(S). prefix: tokens put in front of every text, but behind `begin` (BOS) where all begin with it.
    """
    front = torch.tensor(list(prefix), dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    first = int(bool((ids[:, 0] == begin).all())) if begin is not None else 0
    whole = torch.cat([ids[:, :first], front, ids[:, first:]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
    return logits[:, len(prefix) + halfway(ids.shape[1]) - 1 : -1].float().log_softmax(-1)


def divergence(base: Tensor, changed: Tensor, ids: Tensor) -> Divergence:
    """What `changed` costs on the same tokens: -sum log q(token), and sum KL(p || q), p = base, q = changed.

    base, changed: of `log_probs` [B, P, V]; ids [B, S]. Summed in float64 over tokens, in float32 over V.
    """
    loss = -changed.gather(-1, ids[:, halfway(ids.shape[1]) :, None].long()).squeeze(-1)
    kl = (base.exp() * (base - changed)).sum(-1)
    return Divergence(loss.double().sum(-1).tolist(), kl.double().sum(-1).clamp_min(0).tolist())


# --- multiple choice -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    query: str
    choices: tuple[str, ...]
    answer: int


def choose(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    rows: int,
    prefix: str = "",
    mark: Callable[[int], None] = lambda columns: None,
) -> list[bool]:
    """Whether the model prefers the right choice of each question: arguments of `choice_scores`."""
    scores = choice_scores(model, tokenizer, questions, rows, prefix, mark)
    best = [max(range(len(mine)), key=lambda j: mine[j]) for mine in scores]
    return [j == question.answer for j, question in zip(best, questions, strict=True)]


def choice_scores(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    rows: int,
    prefix: str = "",
    mark: Callable[[int], None] = lambda columns: None,
) -> list[list[float]]:
    """A score per choice of each question: log p(" choice" | query) over the number of characters of the choice, as
    `acc_norm` of the LM evaluation harness does.

    Args:
        rows: sequences per forward pass.
        prefix: text put in front of every query.
        mark: told before each pass how many of its columns are the query; steering counts the rest as generated.
    """
    sequences = [
        _Sequence(tokenizer(prefix + q.query)["input_ids"], tokenizer(f" {c}", add_special_tokens=False)["input_ids"])
        for q in questions
        for c in q.choices
    ]
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].query), i))
    sums = [0.0] * len(sequences)
    for begin in range(0, len(order), rows):
        taken = order[begin : begin + rows]
        for i, score in zip(taken, _score(model, [sequences[i] for i in taken], mark), strict=True):
            sums[i] = score
    each = iter(sums)
    return [[next(each) / max(1, len(choice)) for choice in question.choices] for question in questions]


class _Sequence(NamedTuple):
    query: list[int]
    choice: list[int]


def _score(model: Any, sequences: Sequence[_Sequence], mark: Callable[[int], None]) -> Iterator[float]:
    """Sum of the log-probabilities of each choice. Queries end, and choices begin, in one column."""
    left, right = max(len(s.query) for s in sequences), max(len(s.choice) for s in sequences)
    device = next(model.parameters()).device
    pad = [([0] * (left - len(s.query)), [0] * (right - len(s.choice))) for s in sequences]
    ids = torch.tensor([a + s.query + s.choice + b for s, (a, b) in zip(sequences, pad, strict=True)], device=device)
    mask = torch.ones_like(ids)
    for row, (a, b) in enumerate(pad):
        mask[row, : len(a)] = 0
        mask[row, left + right - len(b) :] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    mark(left)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    for row, sequence in enumerate(sequences):
        count = len(sequence.choice)
        found = logits[row, left - 1 : left - 1 + count].float().log_softmax(-1)
        yield float(found.gather(-1, ids[row, left : left + count, None]).double().sum())


# --- generating ------------------------------------------------------------------------------------------


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, special: bool = True
) -> list[list[int]]:
    """Greedy continuations of prompts in one batch padded on the left: token ids up to the end token, left out.

    special: let the tokenizer add its special tokens (a chat template has put them there itself).
    """
    rows = [tokenizer(prompt, add_special_tokens=special)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            use_cache=True, pad_token_id=pad, eos_token_id=ends or None, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
    return [list(itertools.takewhile(lambda t: t not in ends, row)) for row in found[:, longest:].tolist()]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: those of the model's generation config, else the tokenizer's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [int(found)]
