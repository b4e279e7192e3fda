"""Sampled continuations of a local model, the same for the same seed and batch on the same machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qscope.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn. Raises InputError for numbers that cannot be."""

    max_new_tokens: int = 48
    temperature: float = 0.8
    """0: greedy"""
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"{self.max_new_tokens} new tokens, temperature {self.temperature} and top-p {self.top_p} were given; "
                "they must be at least 1, at least 0, and above 0 up to 1."
            )


class LocalText:
    """A causal language model that continues texts."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found = tokenizer.eos_token_id if found is None else found
        self.ends: tuple[int, ...] = (
            () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)
        )
        self._breaks: tuple[int, ...] | None = None

    @property
    def breaks(self) -> tuple[int, ...]:
        """Tokens with a line break in them: with these as ends a text is one line."""
        if self._breaks is None:
            size = len(self.tokenizer)
            texts = self.tokenizer.batch_decode([[i] for i in range(size)])
            self._breaks = tuple(i for i, text in enumerate(texts) if "\n" in text)
        return self._breaks

    def continued(
        self, prompts: Sequence[str], sampling: Sampling, seed: int, special: bool = True, one_line: bool = False
    ) -> list[str]:
        """What the model adds to each prompt, in one batch padded on the left.

        Args:
            seed: of the batch; the global random state is left as it was.
            special: let the tokenizer add its special tokens (a chat template has put them there itself).
            one_line: end at a line break.

        Raises InputError for a prompt that does not fit the model's context.
        """
        rows = [self.tokenizer(prompt, add_special_tokens=special)["input_ids"] for prompt in prompts]
        longest = max(map(len, rows))
        self._check(longest + sampling.max_new_tokens)
        device = next(self.model.parameters()).device
        pad = self.ends[0] if self.ends else 0
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        ends = [*self.ends, *(self.breaks if one_line else ())]
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            found = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens, num_beams=1,
                use_cache=True, pad_token_id=pad, eos_token_id=ends or None, **drawn,
            )  # fmt: skip
        texts: list[str] = self.tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
        return texts

    def asked(self, question: str) -> str:
        """The question as a user's turn. InputError for a tokenizer without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"The tokenizer of {self.name} has no chat template, so it cannot be asked for an example. Take the "
                "source `continue`, which needs none, or a --generator that was tuned for conversation."
            )
        turn = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _check(self, tokens: int) -> None:
        config = getattr(self.model, "config", None)
        most = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
        if most is not None and tokens > most:
            raise InputError(
                f"A prompt with its continuation is {tokens} tokens, and {self.name} was made for {most}. Give fewer "
                "--contexts, or fewer --max-new-tokens."
            )
