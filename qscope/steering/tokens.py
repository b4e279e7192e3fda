"""Which tokens of a forward pass an edit changes, from what the pass is given."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qscope.errors import InputError
from qscope.steering.positions import Positions


@dataclass(frozen=True)
class Pass:
    """Where the S tokens of one forward pass stand in their sequences, whose columns count padding too."""

    start: int
    """Column of the first one: the number of columns that the cache holds already"""
    length: int
    """S"""
    prompt: int
    """Columns that are prompt; those from there on were generated"""
    attention: Tensor | None = None
    """[B, start + S], 0 for padding; None: there is none"""
    ids: Tensor | None = None
    """[B, start + S] token ids, or [B, S] where the earlier ones are not at hand; None: given embeddings"""
    positions: Tensor | None = None
    """[B or 1, S] position ids, where the caller gave some and no attention mask"""
    device: torch.device | None = None
    rows: int = 1
    """B"""

    def real(self) -> Tensor:
        """[B or 1, S] positions counted over real tokens from 0; -1 at padding."""
        if self.attention is not None:
            mask = self.attention != 0
            return torch.where(mask, mask.long().cumsum(1) - 1, -1)[:, self.start :]
        if self.positions is not None:
            return self.positions.reshape(-1, self.positions.shape[-2], self.length)[0]
        return torch.arange(self.start, self.start + self.length, device=self.device)[None]

    def whole_ids(self, what: str) -> Tensor:
        """[B, start + S] token ids; InputError where they are not known."""
        if self.ids is None or self.ids.shape[1] != self.start + self.length:
            raise InputError(
                f"{what} needs the ids of all tokens, but this forward pass was given embeddings or only the tokens "
                "after a filled cache. Call model.generate(input_ids=...), or the model with input_ids and no cache."
            )
        return self.ids


@dataclass(frozen=True)
class Choice:
    """Of one edit."""

    positions: Positions
    after: int | None = None
    skip_first: bool = False
    special: Tensor | None = None
    """Ids that are never chosen"""

    @property
    def everything(self) -> bool:
        """Whether every token is chosen, wherever it stands."""
        return self.positions.everything and not self.skip_first and self.after is None and self.special is None

    def of(self, where: Pass) -> bool | Tensor:
        """True: every token of the pass; False: none; else bool [B or 1, S]."""
        chosen = self._by_position(where)
        if chosen is False:
            return False
        if where.attention is not None and where.start < where.prompt:
            chosen = _both(chosen, where.real() >= 0)
        if self.skip_first and where.start <= _first_column(where):
            chosen = _both(chosen, where.real() > 0)
        if self.after is not None:
            seen = (where.whole_ids("`after`") == self.after).long().cumsum(1)
            before = torch.nn.functional.pad(seen, (1, -1))  # what comes later must not count: a cache has passed it
            chosen = _both(chosen, before[:, where.start :] > 0)
        if self.special is not None:
            if where.ids is None:
                raise InputError("skip special needs token ids, but this forward pass was given embeddings.")
            here = where.ids[:, -where.length :]
            chosen = _both(chosen, ~torch.isin(here, self.special.to(here.device)))
        return chosen

    def _by_position(self, where: Pass) -> bool | Tensor:
        p, end = self.positions, where.start + where.length
        if p.everything or (p.prompt and end <= where.prompt) or (p.generated and where.start >= where.prompt):
            return True
        found: Tensor | None = None
        if (p.prompt or p.generated) and where.start < where.prompt < end:
            columns = torch.arange(where.start, end, device=where.device)[None]
            found = columns < where.prompt if p.prompt else columns >= where.prompt
        if p.spans:
            real = where.real()
            for first, last in p.spans:
                inside = (real >= first) & (real <= last)
                found = inside if found is None else found | inside
        return False if found is None else found


def _first_column(where: Pass) -> int:
    """The last column that can hold a first token."""
    return where.prompt if where.attention is not None else 0


def _both(chosen: bool | Tensor, condition: Tensor) -> Tensor:
    return condition if isinstance(chosen, bool) else chosen & condition


def from_call(arguments: dict[str, Any], outside: dict[str, Any], prompt: int | None) -> Pass:
    """The pass that a model's forward is called with; `prompt` as the caller said, else everything before a cache.

    outside: what the model around a text trunk was called with, for what the trunk itself is not told.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if ids is None and isinstance(embeds, Tensor):
        ids = outside.get("input_ids")
        ids = ids if isinstance(ids, Tensor) and ids.shape == embeds.shape[:2] else None
    given = ids if ids is not None else embeds
    if not isinstance(given, Tensor):
        raise InputError("The model was called without input_ids and inputs_embeds; steering needs one of them.")
    cache = arguments.get("past_key_values")
    start = 0 if cache is None else int(cache.get_seq_length())
    length = given.shape[1]
    attention = arguments.get("attention_mask")
    if not isinstance(attention, Tensor) or attention.dim() != 2:
        attention = outside.get("attention_mask")
    if not isinstance(attention, Tensor) or attention.dim() != 2 or attention.shape[1] < start + length:
        attention = None
    positions = arguments.get("position_ids")
    end = start + length
    return Pass(
        start,
        length,
        prompt if prompt is not None else (start or end),
        None if attention is None else attention[:, :end],
        ids,
        positions if isinstance(positions, Tensor) else None,
        given.device,
        len(given),
    )
