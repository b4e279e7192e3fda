"""Loss terms for trainers: the SAE penalty, and what may do as well without an SAE.

    FeatureTerm   the SASFT penalty of `FeaturePenalty`: SAE features, random features, or a plain direction
    KLTerm        divergence from the model as it was
    EntropyTerm   confidence penalty (Pereyra et al. 2017, arXiv 1701.06548)
    TokenTerm     probability of the tokens that are written in a script

All are means over the response tokens, of which only those of other groups than the target count: the denominator is
the number of response tokens of all groups, as in SASFT. So one weight means the same share of the batch in each.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qscope.errors import InputError
from qscope.post_training.alpha import _residuals
from qscope.post_training.penalty import FeaturePenalty
from qscope.post_training.rows import Rows, sae_rows
from qscope.post_training.switching import contains
from qscope.sae import SAE

Weight = float | Callable[[int], float]
Example = TypeVar("Example")


@dataclass(frozen=True)
class Batch:
    """One forward pass in training, as the terms see it."""

    model: nn.Module
    """Without the wrapper of DistributedDataParallel"""
    inputs: Mapping[str, Any]
    """What the model was given: no labels, no groups"""
    labels: Tensor
    """[B, S], -100 where a token is no response token"""
    groups: Tensor
    """[B] int64; -1: counts as response, and no term reads it"""
    logits: Tensor | None
    """[B, S, V] where a term needs them"""
    items: Tensor | int | None
    """Response tokens of the whole batch, where this is one of several micro-batches or processes"""
    step: int


class Term:
    """A part of the loss. `loss` is called once after each forward pass of a training step."""

    name: str = ""
    needs_logits = False

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def attach(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Around the training of `model`."""
        return contextlib.nullcontext()

    def loss(self, batch: Batch) -> Tensor:
        """[] float32, weight included, with a gradient to the model."""
        raise NotImplementedError

    def weight_at(self, step: int) -> float:
        return float(self.weight(step) if callable(self.weight) else self.weight)


def schedule(weight: float, warmup: int = 0) -> Weight:
    """Constant, or rising linearly from weight / warmup at step 0 to `weight` at step warmup - 1 and after."""
    if warmup <= 0:
        return weight
    return lambda step: weight * min(1.0, (step + 1) / warmup)


class FeatureTerm(Term):
    """`FeaturePenalty` as a term; its weight is the penalty's own."""

    def __init__(self, penalty: FeaturePenalty, name: str = "penalty") -> None:
        super().__init__(penalty.weight)
        self.penalty, self.name = penalty, name

    def attach(self, model: nn.Module) -> AbstractContextManager[Any]:
        self.penalty.to(next(model.parameters()).device)
        return self.penalty.attach(model)

    def loss(self, batch: Batch) -> Tensor:
        return self.penalty.loss(batch.groups, batch.labels, num_items_in_batch=batch.items, step=batch.step)


class _LogitTerm(Term):
    """Mean over the predictions of response tokens of a value of the next-token distribution."""

    needs_logits = True

    def __init__(self, weight: Weight, target: int | None) -> None:
        """target: the group whose responses are left alone; None: all count."""
        super().__init__(weight)
        self.target = target

    def loss(self, batch: Batch) -> Tensor:
        assert batch.logits is not None, "the trainer gives logits where needs_logits says so"
        response = batch.labels[:, 1:] != -100
        items = response.sum() if batch.items is None else batch.items
        of = batch.groups[:, None].expand_as(response)
        counted = response & (of >= 0) & (of != (-1 if self.target is None else self.target))
        rows = batch.logits[:, :-1][counted]
        values = self.values(rows, batch, counted)
        denominator = torch.as_tensor(items, device=values.device).float().clamp(min=1)
        return self.weight_at(batch.step) * values.sum() / denominator

    def values(self, logits: Tensor, batch: Batch, counted: Tensor) -> Tensor:
        """[n] float32 of the rows [n, V]; `counted` [B, S - 1] is where they stand."""
        raise NotImplementedError


class KLTerm(_LogitTerm):
    """sum p ln(p / q) over the vocabulary: p of the model, q of the model as it was (the usual penalty of RLHF).

    `reference` is a frozen copy that was made before training; None: the same model without its PEFT adapters.
    """

    name = "kl"

    def __init__(self, weight: Weight, target: int | None, reference: nn.Module | None) -> None:
        super().__init__(weight, target)
        self.reference = reference

    def attach(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self.reference is None and not hasattr(model, "disable_adapter"):
            raise InputError(
                "The KL term was given no reference model, and the model that is trained has no adapters to switch "
                "off. Give a frozen copy that was made before training."
            )
        return contextlib.nullcontext()

    def values(self, logits: Tensor, batch: Batch, counted: Tensor) -> Tensor:
        with torch.no_grad(), self._frozen(batch.model) as model:
            found = model(**batch.inputs).logits[:, :-1][counted]
            q = found.float().log_softmax(-1)
        p = logits.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    @contextlib.contextmanager
    def _frozen(self, model: Any) -> Iterator[nn.Module]:
        if self.reference is not None:
            yield self.reference
            return
        training = [module for module in model.modules() if module.training]
        model.eval()  # no dropout: it is the model as it was
        try:
            with model.disable_adapter():
                yield model
        finally:
            for module in training:
                module.training = True


class EntropyTerm(_LogitTerm):
    """-H(p): a positive weight rewards spread-out predictions, a negative one sharp ones."""

    name = "entropy"

    def values(self, logits: Tensor, batch: Batch, counted: Tensor) -> Tensor:
        p = logits.float().log_softmax(-1)
        return (p.exp() * p).sum(-1)


class TokenTerm(_LogitTerm):
    """The probability that the next token is one of `tokens` (see `tokens_of_script`)."""

    name = "token"

    def __init__(self, weight: Weight, target: int | None, tokens: Sequence[int]) -> None:
        super().__init__(weight, target)
        if not tokens:
            raise InputError("The token penalty was given no token: no token of the vocabulary is in that script.")
        self.tokens = torch.tensor(sorted(tokens))

    def values(self, logits: Tensor, batch: Batch, counted: Tensor) -> Tensor:
        wide = logits.float()
        own = wide.index_select(1, self.tokens.to(wide.device))
        return (own.logsumexp(-1) - wide.logsumexp(-1)).exp()


# --- what the controls are made of ---------------------------------------------------------------------------


def tokens_of_script(tokenizer: Any, scripts: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens whose text holds a character of the scripts.

    Of byte-level tokens that end inside a character, those count whose bytes can only go on to become letters of the
    scripts, or to more than half (without them a byte-level vocabulary could write every rare character unseen). Bytes
    in the middle of a character are not told: the penalty has acted at its first.
    """
    starts: dict[bytes, bool] = {}
    found = []
    vocabulary = tokenizer.get_vocab()
    byte_level = all(character in vocabulary for character in _ALPHABET)
    for name, token in vocabulary.items():
        if token in tokenizer.all_special_ids:
            continue
        raw = _bytes(name, byte_level)
        text = tokenizer.decode([token]) if raw is None else raw.decode("utf-8", "ignore")
        if contains(text, scripts):
            found.append(token)
        elif raw is not None and (start := _unfinished(raw)):
            if start not in starts:
                starts[start] = _mostly(start, scripts)
            if starts[start]:
                found.append(token)
    return tuple(sorted(found))


def _byte_alphabet() -> dict[str, int]:
    """Character of the byte-level alphabet of GPT-2 -> byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _bytes(token: str, byte_level: bool) -> bytes | None:
    """The bytes of a token of a byte-level vocabulary, or of a byte of SentencePiece (<0xE3>); else None."""
    if byte_level:
        return bytes(_ALPHABET[c] for c in token) if token and all(c in _ALPHABET for c in token) else None
    fallback = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes([int(fallback.group(1), 16)]) if fallback else None


def _unfinished(raw: bytes) -> bytes:
    """The beginning of a character at the end of `raw`, or nothing."""
    for size in (1, 2, 3):
        lead = raw[-size] if len(raw) >= size else 0
        if lead >= 0xC2 and size < (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4):
            return raw[-size:]
        if not 0x80 <= lead < 0xC0:
            break
    return b""


def _mostly(start: bytes, scripts: Sequence[str]) -> bool:
    """Whether more than half of the letters that UTF-8 can write behind `start` are of the scripts."""
    lead = start[0]
    size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    code = lead & (0xFF >> (size + 1))
    for byte in start[1:]:
        code = code << 6 | byte & 0x3F
    shift = 6 * (size - len(start))
    places = range(code << shift, min((code + 1) << shift, 0x110000))
    letters = [c for c in map(chr, places) if c.isalpha() and not 0xD800 <= ord(c) < 0xE000]
    return 2 * sum(contains(c, scripts) for c in letters) > len(letters)


def random_features(
    model: Any,
    tokenizer: Any,
    saes: Mapping[int, SAE],
    texts: Mapping[str, Sequence[str]],
    chosen: Mapping[int, Sequence[int]],
    seed: int,
    *,
    context_size: int = 512,
) -> dict[int, tuple[int, ...]]:
    """As many features of each layer as were chosen, drawn from the others that fire somewhere in the texts.

    Raises InputError where too few fire.
    """
    fired = {layer: np.zeros(sae.d_sae, bool) for layer, sae in saes.items()}
    for own in texts.values():
        for found, _ in _residuals(model, tokenizer, own, tuple(saes), context_size, 1024):
            for layer, x in found.items():
                acts, ids = saes[layer].encode_topk(x.to(saes[layer].device))
                fired[layer][ids[acts > 0].cpu().numpy()] = True
    drawn = {}
    for layer in sorted(chosen):
        others = np.setdiff1d(np.flatnonzero(fired[layer]), np.asarray(chosen[layer]))
        if len(others) < len(chosen[layer]):
            raise InputError(
                f"{len(chosen[layer])} random features of layer {layer} were asked for, and {len(others)} others fire "
                "in the texts. Give more text."
            )
        picked = np.random.default_rng((seed, layer)).choice(others, len(chosen[layer]), replace=False)
        drawn[layer] = tuple(int(i) for i in picked)
    return drawn


def difference_of_means(
    model: Any,
    tokenizer: Any,
    rows: Mapping[int, Rows],
    texts: Mapping[str, Sequence[str]],
    target: str,
    *,
    context_size: int = 512,
) -> dict[int, Rows]:
    """One direction per layer of `rows`: mean residual of the target's tokens - mean over the other groups of theirs.

    Scaled to the mean norm of the layer's rows, so that one weight is one size of gradient. The bias puts 0 at the mean
    of the other groups; with an estimated alpha it cancels. Tokens count as for alpha. InputError for a group without
    tokens.
    """
    if target not in texts or len(texts) < 2:
        raise InputError(f"A direction for {target!r} needs its texts and those of another group; given: {[*texts]}.")
    means: dict[int, dict[str, Tensor]] = {layer: {} for layer in rows}
    for group, own in texts.items():
        sums, tokens = {layer: 0.0 for layer in rows}, 0
        totals: dict[int, Any] = dict(sums)
        for found, _ in _residuals(model, tokenizer, own, tuple(rows), context_size, 1024):
            tokens += len(next(iter(found.values())))
            for layer, x in found.items():
                totals[layer] = totals[layer] + x.double().sum(0).cpu()
        if not tokens:
            raise InputError(f"The texts of the group {group!r} hold no token that counts. Give longer texts.")
        for layer in rows:
            means[layer][group] = totals[layer] / tokens
    made = {}
    for layer, one in rows.items():
        others = torch.stack([mean for group, mean in means[layer].items() if group != target]).mean(0)
        direction = means[layer][target] - others
        norm = float(direction.norm())
        if not norm > 0:
            raise InputError(f"The mean residual of {target!r} at layer {layer} is that of the other groups.")
        W = direction / norm * one.W.double().norm(dim=1).mean().cpu()
        made[layer] = Rows(W[None].float(), -(W @ others)[None].float())
    return made


def drop_switched(
    examples: Sequence[Example],
    response: Callable[[Example], str],
    group: Callable[[Example], str],
    target: str,
    scripts: Sequence[str],
) -> list[Example]:
    """Data filtering: the examples of `target`, and those of other groups whose response is free of the scripts."""
    return [e for e in examples if group(e) == target or not contains(response(e), scripts)]


__all__ = [
    "Batch",
    "EntropyTerm",
    "FeatureTerm",
    "KLTerm",
    "Term",
    "TokenTerm",
    "difference_of_means",
    "drop_switched",
    "random_features",
    "sae_rows",
    "schedule",
    "tokens_of_script",
]
