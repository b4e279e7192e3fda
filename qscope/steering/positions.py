"""Which tokens, as text: `all`, `prompt`, `generated`, `5`, `3-7`, `0,2,5-8`, `generated,0-3`."""

import re
from dataclasses import dataclass

from qscope.errors import InputError

_WORDS = ("all", "prompt", "generated")
_DIGITS = 15


@dataclass(frozen=True)
class Positions:
    """A token is chosen if any part says so."""

    prompt: bool = False
    """All tokens of the prompt"""
    generated: bool = False
    """All tokens that the model generated"""
    spans: tuple[tuple[int, int], ...] = ()
    """First and last position, both included, counted over real tokens from 0"""

    @property
    def everything(self) -> bool:
        return self.prompt and self.generated


def parse(text: str) -> Positions:
    """Reads the grammar above; raises InputError with a mark under the first fault."""
    prompt = generated = False
    spans = []
    start = 0
    for item in text.split(","):
        word = item.strip()
        begin = start + len(item) - len(item.lstrip())
        if word in _WORDS:
            prompt, generated = prompt or word != "generated", generated or word != "prompt"
        else:
            spans.append(_span(text, word, begin))
        start += len(item) + 1
    return Positions(prompt, generated, tuple(spans))


def _span(text: str, word: str, begin: int) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", word, re.ASCII)
    if found is None:
        good = re.match(r"\d+(\s*-\s*\d*)?", word, re.ASCII)
        raise _fault(text, begin + (good.end() if good else 0), "a position such as 5 or 3-7 was expected here")
    for group in (1, 2):
        if len(found[group] or "") > _DIGITS:
            raise _fault(text, begin + found.start(group), f"a position has at most {_DIGITS} digits")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise _fault(text, begin + found.start(2), f"the end of a span, {last}, is before its start, {first}")
    return first, last


def _fault(text: str, column: int, what: str) -> InputError:
    return InputError(
        f"The tokens to steer were given as\n  {text}\n  {' ' * column}^\nand {what}. Accepted are all, prompt, "
        "generated, positions counted from 0, and several of these with commas: 0,2,5-8 or generated,0-3."
    )
