"""What a feature does to the next token: its decoder row through the unembedding, and the model run with it added."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qscope.errors import ModelError
from qscope.finding.pooled import Floats, Ints
from qscope.model import capture, decoder_layers
from qscope.sae import SAE

LENS_TOKENS = 20  # of each feature, as in Arad et al.
VOCABULARY_ROWS = 16384  # of the unembedding that are widened to float32 at once
NEUTRAL_PROMPTS = (
    "From my experience,",  # Arad et al.'s
    "I would like to say that",
    "The next thing is",
    "It is well known that",
)
PRIOR = 1000.0  # tokens that the prior of `typical_tokens` weighs as much as


class Lens(NamedTuple):
    """Logit lens of n features."""

    tokens: Ints
    """[n, 20] ids of the tokens with the highest logits, highest first"""
    target: Floats
    """[n] mean logit of the target tokens - mean of all logits, over their standard deviation; 0 without targets"""


class Effect(NamedTuple):
    """Means over the prompts, of n features."""

    output_score: Floats
    """[n] (1 - lowest rank / V) x highest probability after the intervention, each over the feature's 20 lens tokens"""
    target_change: Floats
    """[n] log P(some target token) with the feature added - without, nats; 0 without targets"""


def typical_tokens(positive: Ints, negative: Ints, count: int) -> Ints:
    """Ids of the tokens most typical of the positive texts, most typical first.

    positive, negative: token ids of the texts. By the z-score of the log-odds ratio with an informative Dirichlet prior
    (Monroe, Colaresi and Quinn 2008, equations 16 and 22); only tokens with a z above 1.96.
    """
    both = np.concatenate([positive, negative])
    if not len(positive) or not len(negative):
        return both[:0]
    size = int(both.max()) + 1
    prior = PRIOR * np.bincount(both, minlength=size) / len(both)
    logits, variance = [], np.zeros(size)
    used = prior > 0
    for ids in (positive, negative):
        seen = np.where(used, np.bincount(ids, minlength=size) + prior, 1.0)
        logits.append(np.log(seen / (len(ids) + PRIOR - np.where(used, seen, 0.0))))
        variance += 1 / seen
    z = np.where(used, (logits[0] - logits[1]) / np.sqrt(variance), -np.inf)
    order = np.lexsort((np.arange(size), -z))[:count]
    return order[z[order] > 1.96]


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the unembedding. Raises ModelError unless there is one beside the blocks."""
    blocks = decoder_layers(model)
    holder = next(module for module in model.modules() if any(child is blocks for child in module.children()))
    named = dict(holder.named_children())
    found = [name for name in named if name in ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")]
    if len(found) != 1:
        raise ModelError(
            f"The final norm of {type(model).__name__} could not be told among {', '.join(named)}. Leave the output "
            "scores out with --prompts ''."
        )
    return named[found[0]]


@torch.no_grad()
def logit_lens(model: Any, directions: Tensor, targets: Sequence[int]) -> Lens:
    """Decoder rows [n, D] through the final norm and the unembedding (nostalgebraist 2020), in float32.

    An RMS norm makes the row's length irrelevant.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no unembedding. Give a causal language model.")
    weight: Tensor = head.weight
    norm = final_norm(model)
    rows = norm(directions.to(weight.device, next(norm.parameters(), weight).dtype))
    logits = torch.cat([rows.float() @ part.float().T for part in weight.split(VOCABULARY_ROWS)], dim=1)
    top = logits.topk(LENS_TOKENS, dim=1).indices
    target = torch.zeros(len(logits))
    if targets:
        chosen = logits[:, torch.tensor(list(targets), device=logits.device)].mean(1)
        target = (chosen - logits.mean(1)) / logits.std(1)
    return Lens(top.cpu().numpy(), target.double().cpu().numpy())


@torch.no_grad()
def one_token_effect(
    model: Any,
    sae: SAE,
    layer: int,
    features: Sequence[int],
    amounts: Sequence[float],
    prompts: Sequence[Sequence[int]],
    lens: Ints,
    targets: Sequence[int],
    factor: float,
) -> Effect:
    """Add each feature at the last token of each prompt and read the next token's probabilities.

    For the output score the residual h of the last token becomes h + factor x a x d, where a is the largest activation
    of any feature there and d the decoder row: Arad, Mueller and Belinkov (EMNLP 2025, "SAEs Are Good for Steering - If
    You Select the Right Features"), who take factor 10 and one prompt. That is far outside what the model is used to,
    so target_change is read with h + amount x d instead; amounts that move the residual equally far compare features.

    prompts: token ids. lens: [n, 20] of `logit_lens`.
    """
    device = next(model.parameters()).device
    directions = sae.W_dec.detach()[torch.as_tensor(list(features), device=sae.device)].float()
    usual = torch.tensor(list(amounts), device=sae.device)[:, None] * directions
    tokens = torch.from_numpy(np.ascontiguousarray(lens)).to(device)
    wanted = torch.tensor(list(targets), device=device, dtype=torch.int64)
    score, change = np.zeros(len(features)), np.zeros(len(features))
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=device)
        with capture(model, [layer]) as residual:
            before = model(input_ids=ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
        largest = float(sae.encode_topk(residual[layer][0, -1:].to(sae.device)).top_acts.max())
        for start in range(0, len(features), ROWS):
            rows = slice(start, start + ROWS)
            after = _steered(model, layer, ids, factor * largest * directions[rows]).log_softmax(-1)
            inside = after.gather(1, tokens[rows]).max(1, keepdim=True).values
            found = (1 - (after > inside).sum(1) / after.shape[1]) * inside[:, 0].exp()
            score[rows] += found.double().cpu().numpy() / len(prompts)
            if len(wanted):
                after = _steered(model, layer, ids, usual[rows]).log_softmax(-1)
                moved = after[:, wanted].logsumexp(1) - before[:, wanted].logsumexp(1)
                change[rows] += moved.double().cpu().numpy() / len(prompts)
    return Effect(score, change)


ROWS = 16  # of one forward pass


def _steered(model: Any, layer: int, ids: Tensor, added: Tensor) -> Tensor:
    """Logits [n, V] float32 of the last token with row i of `added` [n, D] added to its residual."""
    runs = 0

    def add(_module: nn.Module, _inputs: Any, output: Any, added: Tensor) -> Any:
        nonlocal runs
        runs += 1
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, -1] = (hidden[:, -1].float() + added.to(hidden.device)).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = decoder_layers(model)[layer].register_forward_hook(functools.partial(add, added=added))
    try:
        logits: Tensor = model(input_ids=ids.expand(len(added), -1), use_cache=False).logits
    finally:
        handle.remove()
    if not runs:
        raise ModelError(f"The hook on block {layer} was skipped, as compiled models do. Give the uncompiled model.")
    return logits[:, -1].float()
