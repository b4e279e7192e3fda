"""What `qscope steer generate` is given as text: features with strengths, and the prompt."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from qscope.errors import InputError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DIGITS = re.compile(r"\d+", re.ASCII)


class Item(NamedTuple):
    """A feature, and how strongly to add it."""

    layer: int | None
    """None: the one that --layer or the SAE says"""
    feature: int
    strength: float = 0.0


def parse_item(text: str, strength: bool) -> Item:
    """Reads LAYER:FEATURE=STRENGTH or FEATURE=STRENGTH, without =STRENGTH where `strength` is false.

    Raises InputError with a mark under the first fault.
    """
    first = _DIGITS.match(text)
    if first is None:
        raise _fault(text, 0, "the number of a layer or feature was expected here", strength)
    layer, feature, at = None, int(first[0]), first.end()
    if text[at : at + 1] == ":":
        second = _DIGITS.match(text, at + 1)
        if second is None:
            raise _fault(text, at + 1, "the number of a feature was expected here", strength)
        layer, feature, at = feature, int(second[0]), second.end()
    if not strength:
        if at < len(text):
            raise _fault(text, at, "nothing more was expected here", strength)
        return Item(layer, feature)
    if text[at : at + 1] != "=":
        raise _fault(text, at, "= and a strength were expected here", strength)
    number = _NUMBER.match(text, at + 1)
    if number is None or number.end() < len(text):
        at = number.end() if number is not None else at + 1
        raise _fault(text, at, "the strength has to be a finite number such as 2, -0.5 or 1e3", strength)
    value = float(number[0])
    if abs(value) == float("inf"):
        raise _fault(text, at + 1, "this strength is too large for a float", strength)
    return Item(layer, feature, value)


def _fault(text: str, column: int, what: str, strength: bool) -> InputError:
    form, example = ("LAYER:FEATURE=STRENGTH", "15:6159=2.0 15:12=-1") if strength else ("LAYER:FEATURE", "15:6159")
    return InputError(
        f"A feature was given as\n  {text}\n  {' ' * column}^\nand {what}. Accepted is {form}, several with spaces "
        f"between them: {example}; LAYER: may be left out where --layer or the SAE says it."
    )


def read_prompt(given: str) -> str:
    """The prompt itself, what standard input holds (-), or a file (@FILE). InputError where there is no text."""
    if given == "-":
        if sys.stdin is None:
            raise InputError("The prompt was to come from standard input (-), which is closed. Pipe text into qscope.")
        text = sys.stdin.read()
    elif given.startswith("@"):
        try:
            text = Path(given[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"The prompt {given} cannot be read: {error}. @ names a UTF-8 file; give a prompt that begins with @ "
                "through standard input (-)."
            ) from error
    else:
        text = given
    text = text.removesuffix("\n") if given == "-" or given.startswith("@") else text
    if not text:
        raise InputError("The prompt is empty. Give text, - for standard input, or @FILE.")
    return text
