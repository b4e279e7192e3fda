"""What says whether a text shows a behaviour: a score from 0 to 1 per text, whose mean is the target rate.

script:Han                share of the letters that are Han; several scripts: script:Hiragana+Katakana
script:Han>0.3            1 where that share is above 0.3, else 0
language:fr               1 where the language identifier (package py3langid) says that language
keywords:king,queen       1 where one of the words occurs as a whole word, in any case
keywords:@words.txt       the same, a word or phrase a line
regex:\\bthou\\b            1 where the pattern is found (package regex: \\p{Han} and the like work)
regex:@patterns.txt       1 where one of them is found, a pattern a line
python:package.module:function    function(text) -> number or bool, or function(text, prompt)
judge:Is the text rude?   yes or no of another model, asked through an OpenAI-compatible endpoint
"""

import importlib
import inspect
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope.endpoint import JUDGE_KEY, JUDGE_MODEL, JUDGE_URL, Endpoint, NonsenseError, ask
from qscope.errors import InputError

__all__ = ["JUDGE_KEY", "JUDGE_MODEL", "JUDGE_URL", "KINDS", "Detector", "parse", "script_share", "yes_or_no"]
KINDS = ("script", "language", "keywords", "regex", "python", "judge")
_ACCEPTED = (
    "script:Han, script:Han>0.3, language:fr, keywords:king,queen, keywords:@words.txt, regex:PATTERN, "
    "python:module:function and judge:QUESTION"
)


@dataclass(frozen=True)
class Detector:
    """A behaviour that can be told from a text."""

    name: str
    """What was asked for, as it was given."""
    score_one: Callable[[str, str], float]
    """(text, prompt that it answers) -> 0 to 1."""
    kept_as: str | None = None
    """Name under which scores may be kept for later, because they are dear; None: they are cheap, ask again."""

    def __call__(self, texts: Sequence[str], prompts: Sequence[str]) -> list[float]:
        """A score per text, from 0 to 1. InputError where the detector gives anything else."""
        scores = []
        for text, prompt in zip(texts, prompts, strict=True):
            score = float(self.score_one(text, prompt))
            if not 0 <= score <= 1:  # also NaN
                raise InputError(
                    f"The detector {self.name} gave {score} for the text {text[:60]!r}; a number from 0 to 1, or a "
                    "bool, is accepted. Mend the detector."
                )
            scores.append(score)
        return scores


def parse(text: str) -> Detector:
    """The detector that a text such as `script:Han` names. Raises InputError, with what is accepted."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS or not rest.strip():
        raise InputError(f"The detector {text!r} was given. Accepted: {_ACCEPTED}.")
    if kind == "judge":
        return Detector(text, _judge(rest.strip(), text), f"{text} {os.environ[JUDGE_MODEL]}")
    makers = {
        "script": _script,
        "language": _language,
        "keywords": _keywords,
        "regex": _regex,
        "python": _python,
    }
    return Detector(text, makers[kind](rest.strip(), text))


def _threshold(rest: str, name: str) -> tuple[str, float | None]:
    """`Han>0.3` -> ("Han", 0.3)."""
    what, sign, number = rest.partition(">")
    if not sign:
        return what.strip(), None
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise InputError(f"The detector {name!r} has the threshold {number!r}; a number from 0 to below 1 is accepted.")
    return what.strip(), value


def _above(score: Callable[[str, str], float], threshold: float | None) -> Callable[[str, str], float]:
    return score if threshold is None else lambda text, prompt: float(score(text, prompt) > threshold)


# --- script and language ---------------------------------------------------------------------------------


def script_share(text: str, scripts: Sequence[str]) -> float:
    """Share of the letters and marks of `text` that belong to the Unicode scripts; 0 for a text without any.

    Characters of no script of their own (Common, Inherited: digits, punctuation, combining accents) count neither
    way. Scripts by their Unicode names, such as Han, Latin, Cyrillic, Arabic, Devanagari.
    """
    import regex  # transformers needs it too

    own = "".join(rf"\p{{Script={script}}}" for script in scripts)
    lettered = r"[[\p{L}\p{M}]--[\p{Script=Common}\p{Script=Inherited}]]"
    letters = len(regex.findall(lettered, text, flags=regex.V1))
    hits = len(regex.findall(rf"[[\p{{L}}\p{{M}}]&&[{own}]]", text, flags=regex.V1))
    return hits / letters if letters else 0.0


def _script(rest: str, name: str) -> Callable[[str, str], float]:
    import regex

    what, threshold = _threshold(rest, name)
    scripts = [script.strip() for script in what.split("+")]
    for script in scripts:
        try:
            regex.compile(rf"\p{{Script={script}}}")
        except regex.error as error:
            raise InputError(
                f"The detector {name!r} names the script {script!r}, which Unicode does not have. Accepted: names such "
                "as Han, Latin, Cyrillic, Arabic, Hiragana, Devanagari, several joined by +."
            ) from error
    return _above(lambda text, _: script_share(text, scripts), threshold)


def _language(rest: str, name: str) -> Callable[[str, str], float]:
    try:
        import py3langid
    except ImportError as error:
        raise InputError(
            f"The detector {name!r} needs a language identifier: pip install py3langid. Or take the script of the "
            "language, for example script:Cyrillic."
        ) from error
    known = sorted(language for language, _ in py3langid.rank("text"))
    if rest not in known:
        raise InputError(f"The detector {name!r} names the language {rest!r}. Known: {', '.join(known)}.")
    return lambda text, _: float(bool(text.strip()) and py3langid.classify(text)[0] == rest)


# --- words and patterns ----------------------------------------------------------------------------------


def _entries(rest: str, name: str, otherwise: list[str]) -> list[str]:
    """The lines of the file behind an @, else `otherwise`, without empty ones."""
    if rest.startswith("@"):
        try:
            otherwise = Path(rest[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"The list of {name!r} cannot be read: {error}. Give a UTF-8 file, an entry a line."
            ) from error
    found = [entry.strip() for entry in otherwise if entry.strip()]
    if not found:
        raise InputError(f"The detector {name!r} holds nothing to look for. Give words or patterns.")
    return found


def _keywords(rest: str, name: str) -> Callable[[str, str], float]:
    words = _entries(rest, name, rest.split(","))
    # No \b: a word may begin or end with something that is not a word character.
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return lambda text, _: float(pattern.search(text) is not None)


def _regex(rest: str, name: str) -> Callable[[str, str], float]:
    import regex

    try:
        patterns = [regex.compile(entry) for entry in _entries(rest, name, [rest])]
    except regex.error as error:
        raise InputError(f"A pattern of {name!r} is not a regular expression: {error}. Mend it.") from error
    return lambda text, _: float(any(pattern.search(text) for pattern in patterns))


# --- a function ------------------------------------------------------------------------------------------


def _python(rest: str, name: str) -> Callable[[str, str], float]:
    module, _, attribute = rest.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
        takes_prompt = len(inspect.signature(function).parameters) > 1
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"The detector {name!r} cannot be used: {error}. Accepted: python:module:function, where the module can be "
            "imported and function(text) or function(text, prompt) gives a number from 0 to 1."
        ) from error
    return lambda text, prompt: float(function(text, prompt) if takes_prompt else function(text))


# --- another model ---------------------------------------------------------------------------------------

_ASK = "You judge a text. Question: {question}\n\nThe text, between the lines:\n-----\n{text}\n-----\n{form}"


_FORM = "Answer with one word, yes or no."


def _judge(rest: str, name: str) -> Callable[[str, str], float]:
    """One question per text, temperature 0. Nothing is sent unless the environment names an endpoint."""
    model = Endpoint.from_environment(f"The detector {name!r}", retries=2, wait=0.5)

    def judged(text: str, _: str) -> float:
        try:
            return ask(model, _ASK.format(question=rest, text=text, form=_FORM), yes_or_no, _FORM, max_tokens=8)
        except NonsenseError as error:
            raise InputError(f"The judge gave an answer that is not yes or no: {error}") from error

    return judged


def yes_or_no(answer: str) -> float | None:
    """1 for an answer whose first word is yes, 0 for no; None for any other."""
    word = re.search(r"[a-z]+", answer.lower())
    return {"yes": 1.0, "no": 0.0}.get(word.group()) if word else None
