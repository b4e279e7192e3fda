"""Who says whether an explanation fits a passage: the keywords of the feature itself, for nothing, or a model."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from qscope.detectors import yes_or_no
from qscope.endpoint import Chat, NonsenseError, ask
from qscope.explaining import prompts
from qscope.explaining.contexts import Evidence, Passage
from qscope.explaining.prompts import Decode

KEYWORD_SHARE = 0.8  # of the activation: so many leading tokens are keywords


class Verdict(NamedTuple):
    """What a judge says of one passage."""

    yes: bool
    score: float
    """Larger for yes; orders passages"""


class Judge(Protocol):
    """Of one feature's explanation."""

    def detect(self, passage: Passage) -> Verdict | None:
        """Whether the feature fires in the passage; None for no usable answer."""
        ...

    def fuzz(self, passage: Passage, marks: Sequence[bool]) -> Verdict | None:
        """Whether the marked tokens are those on which it fires; None for no usable answer."""
        ...


class KeywordJudge:
    """The rule "fires on these words", the words being the feature's leading tokens of the first half.

    Words are compared without case and surrounding spaces (a token of nothing else, as it is). As many tokens are words
    as carry 0.8 of the activation.
    detect: yes if one of the words occurs; score: the largest share of a word's occurrences in the first half on which
    the feature fired. fuzz: score: the share of the marked tokens that are words; yes from one half on.
    """

    name = "keywords"

    def __init__(self, evidence: Evidence, decode: Decode) -> None:
        self._decode = decode
        fired: dict[str, float] = {}
        occurred: dict[str, float] = {}
        share = 0.0
        for token in evidence.top_tokens:
            if share >= KEYWORD_SHARE:
                break
            word = self._word(token.token)
            fired[word] = fired.get(word, 0.0) + token.count
            occurred[word] = occurred.get(word, 0.0) + token.count / token.precision
            share += token.share
        self.words = {word: fired[word] / occurred[word] for word in fired}
        """Word -> share of its occurrences on which the feature fired"""

    def _word(self, token: int) -> str:
        text = self._decode([token])
        return text.strip().casefold() or text

    def detect(self, passage: Passage) -> Verdict:
        score = max((self.words.get(self._word(token), 0.0) for token in passage.tokens), default=0.0)
        return Verdict(score > 0, score)

    def fuzz(self, passage: Passage, marks: Sequence[bool]) -> Verdict:
        named = [self._word(token) in self.words for token, mark in zip(passage.tokens, marks, strict=True) if mark]
        score = sum(named) / len(named)
        return Verdict(score >= 0.5, score)


class ModelJudge:
    """A model that reads the explanation and one passage at a time, and says yes or no."""

    def __init__(self, model: Chat, explanation: str, decode: Decode) -> None:
        self._model, self._explanation, self._decode = model, explanation, decode

    def detect(self, passage: Passage) -> Verdict | None:
        return self._ask(prompts.detect_question(self._explanation, passage, self._decode))

    def fuzz(self, passage: Passage, marks: Sequence[bool]) -> Verdict | None:
        return self._ask(prompts.fuzz_question(self._explanation, passage, marks, self._decode))

    def _ask(self, question: str) -> Verdict | None:
        try:
            answer = ask(self._model, question, yes_or_no, prompts.YES_NO_FORM, max_tokens=8)
        except NonsenseError:  # counted by `ask`; the passage is left out of the score, which says how many were
            return None
        return Verdict(answer > 0, answer)
