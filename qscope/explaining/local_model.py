"""A Hugging Face model in this process, asked as an endpoint is."""

from collections.abc import Sequence
from typing import Any

import torch

from qscope.endpoint import Counts, Message
from qscope.errors import InputError


class LocalModel:
    """Greedy generation through the tokenizer's chat template. Raises InputError for a tokenizer without one."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"The tokenizer of {name} has no chat template, so the model cannot be asked. Give a model that was "
                "tuned for conversation, or an endpoint."
            )
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._counts = Counts()

    @property
    def name(self) -> str:
        return self._name

    @property
    def counts(self) -> Counts:
        return self._counts

    @torch.no_grad()
    def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
        """The next message. Raises InputError for a conversation longer than the model's context."""
        self._counts.requests += 1
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        found = self._tokenizer(str(text), add_special_tokens=False, return_tensors="pt")
        ids = found["input_ids"].to(self._model.device)
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and ids.shape[1] + max_tokens > longest:
            raise InputError(
                f"A question of {ids.shape[1]} tokens with {max_tokens} for the answer was put to {self.name}, which "
                f"was made for {longest}. Ask with fewer or shorter passages (--contexts, --window), or another model."
            )
        made = self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, num_beams=1,
            use_cache=True, pad_token_id=self._tokenizer.eos_token_id, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        self._counts.answers += 1
        return str(self._tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
