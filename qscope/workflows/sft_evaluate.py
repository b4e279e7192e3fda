"""What a trained model does on held-out examples and prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qscope.post_training.switching import Response, Switching, by_prompt, contains, measure
from qscope.workflows.sft_data import IGNORED, Encoded, Example, question_ids
from qscope.workflows.sft_result import Loss

if TYPE_CHECKING:
    from qscope.workflows.sft import SFTConfig

SHOWN = 6


@dataclass(frozen=True)
class HeldOutLoss:
    clean: dict[str, Loss]
    mixed: dict[str, Loss]
    nats: list[float]
    nat_tokens: list[int]


@dataclass(frozen=True)
class Sampled:
    switching: Switching
    hits: list[float]
    sizes: list[float]
    length: float
    samples: list[dict[str, str]]
    responses: list[Response]


def held_out_loss(model: Any, pad: int, examples: Sequence[Encoded], target: str, batch: int) -> HeldOutLoss:
    """Cross-entropy on the answers. Of the target group every answer counts as clean."""
    sums = [nats for rows in _batches(examples, batch) for nats in _nats(model, pad, rows)]
    counts = [sum(label != IGNORED for label in e.labels[1:]) for e in examples]
    parts: dict[tuple[bool, str], list[int]] = {}
    for place, example in enumerate(examples):
        parts.setdefault((example.clean or example.group == target, example.group), []).append(place)

    def loss(places: list[int]) -> Loss:
        tokens = sum(counts[i] for i in places)
        return Loss(sum(sums[i] for i in places) / tokens, tokens)

    others = [i for i, e in enumerate(examples) if e.clean and e.group != target]
    return HeldOutLoss(
        {group: loss(places) for (clean, group), places in sorted(parts.items()) if clean},
        {group: loss(places) for (clean, group), places in sorted(parts.items()) if not clean},
        [round(sums[i], 6) for i in others],
        [counts[i] for i in others],
    )


def _batches(examples: Sequence[Encoded], size: int) -> Iterator[Sequence[Encoded]]:
    for first in range(0, len(examples), size):
        yield examples[first : first + size]


@torch.no_grad()
def _nats(model: Any, pad: int, rows: Sequence[Encoded]) -> list[float]:
    """Loss of each row, summed over its answer's tokens."""
    device = next(model.parameters()).device
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    # Causal: what stands to the right of a token does not change it, so no mask is needed.
    logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].to(device).flatten(), ignore_index=IGNORED, reduction="none"
    )
    return [float(x) for x in loss.view(len(rows), -1).sum(1, dtype=torch.float64).tolist()]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Example],
    config: "SFTConfig",
    scripts: Sequence[str],
    identify: Callable[[str], str] | None,
) -> Sampled:
    """Answers to the prompts, `config.samples` each, drawn from a seed that is the same for every run."""
    asked = [(i, question_ids(tokenizer, e.question)) for i, e in enumerate(prompts) for _ in range(config.samples)]
    asked.sort(key=lambda one: len(one[1]))  # stable, so the samples of a prompt stay together
    torch.manual_seed(config.sampling_seed)
    texts: dict[int, list[str]] = {}
    for first in range(0, len(asked), config.generate_batch):
        rows = asked[first : first + config.generate_batch]
        for (prompt, _), text in zip(rows, _generate(model, tokenizer, [ids for _, ids in rows], config), strict=True):
            texts.setdefault(prompt, []).append(text)
    responses = [Response(text, e.group, i) for i, e in enumerate(prompts) for text in texts[i]]
    hits, sizes = by_prompt(responses, scripts)
    return Sampled(
        measure(responses, scripts, identify, config.draws),
        hits.tolist(),
        sizes.tolist(),
        sum(len(r.text) for r in responses) / len(responses),
        _shown(responses, prompts, scripts),
        responses,
    )


def _shown(responses: Sequence[Response], prompts: Sequence[Example], scripts: Sequence[str]) -> list[dict[str, str]]:
    """Half of those that switched, as far as there are so many, and the first ones that did not."""
    switched = [r for r in responses if contains(r.text, scripts)][: SHOWN // 2]
    chosen = switched + [r for r in responses if not contains(r.text, scripts)][: SHOWN - len(switched)]
    return [
        {
            "group": r.group,
            "prompt": prompts[r.prompt].question[-1]["content"],
            "response": r.text,
            "switched": "yes" if contains(r.text, scripts) else "no",
        }
        for r in chosen
    ]


def _generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], config: "SFTConfig") -> list[str]:
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = pad_id(tokenizer)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    made: Tensor = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=pad,
        use_cache=True,
    )
    return [str(t) for t in tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)]


def pad_id(tokenizer: Any) -> int:
    """Of the padding token, or of any token where there is none: padding is masked."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
