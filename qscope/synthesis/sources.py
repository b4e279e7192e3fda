"""Who writes examples. A source turns requests into texts, one each, empty where it has nothing to say.

chat      the local model, asked through its chat template
continue  the local model, continuing a list of passages that fire the feature
steered   the same list with passages that do not, the model steered with the feature itself
endpoint  another model, asked through an OpenAI-compatible endpoint
python:module:function    function(prompt, target or None) -> text; target: layer, feature, meaning, contexts, label
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qscope.endpoint import Endpoint, NonsenseError, ask
from qscope.errors import InputError
from qscope.sae import SAE
from qscope.steering import Edit, SteeringSpec, steer
from qscope.synthesis.sampling import LocalText, Sampling
from qscope.synthesis.targets import Target

NAMES = ("chat", "continue", "steered", "endpoint", "python:MODULE:FUNCTION")
_MARKER = re.compile(r"^\s*(?:[-*\u2022]|\d{1,2}[.)]|(?:text|example|comment|answer)\s*:)\s+", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u00ab": "\u00bb"}


@dataclass(frozen=True)
class Request:
    """One text that is wanted."""

    prompt: str
    """What a model is asked, from a template"""
    examples: tuple[str, ...] = ()
    """Passages that the text is to be like"""
    others: tuple[str, ...] = ()
    """Passages of the same kind that need not fire the feature"""
    target: Target | None = None
    """None: no feature is wanted"""


class Source(Protocol):
    """Who writes."""

    @property
    def name(self) -> str: ...

    @property
    def asks(self) -> bool:
        """Whether it does what a prompt says, so that it can rewrite and answer."""
        ...

    def write(self, requests: Sequence[Request], seed: int) -> list[str]:
        """A text per request; InputError (EndpointError) where the source fails."""
        ...


def cleaned(text: str, one_line: bool = True) -> str:
    """Without list markers, surrounding quotes and spaces; of several lines the first that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    found = lines[0] if one_line else "\n".join(lines)
    found = _MARKER.sub("", found, count=1).strip()
    if len(found) > 1 and _QUOTES.get(found[0]) == found[-1]:
        found = found[1:-1].strip()
    return found if any(c.isalnum() for c in found) else ""


@dataclass
class ChatSource:
    """A local model that is asked."""

    text: LocalText
    sampling: Sampling
    name: str = "chat"
    asks: bool = True
    one_line: bool = True

    def write(self, requests: Sequence[Request], seed: int) -> list[str]:
        asked = [self.text.asked(r.prompt) for r in requests]
        return [cleaned(t, self.one_line) for t in self.text.continued(asked, self.sampling, seed, special=False)]


def as_list(passages: Sequence[str]) -> str:
    """A list that a base model goes on with."""
    return "".join(f"- {passage}\n" for passage in passages) + "-"


@dataclass
class ContinueSource:
    """A local model that goes on with a list of passages."""

    text: LocalText
    sampling: Sampling
    name: str = "continue"
    asks: bool = False

    def write(self, requests: Sequence[Request], seed: int) -> list[str]:
        lists = [as_list(r.examples if r.target else r.others) for r in requests]
        empty = [i for i, r in enumerate(requests) if not (r.examples if r.target else r.others)]
        found = self.text.continued(lists, self.sampling, seed, one_line=True)
        return ["" if i in empty else cleaned(text) for i, text in enumerate(found)]


@dataclass
class SteeredSource:
    """A local model that goes on with a list of ordinary passages while each row is steered with its own feature.

    At every generated token strength * (largest activation of the feature in its passages) times the feature's decoder
    row is added to the residual of its layer.
    """

    text: LocalText
    sampling: Sampling
    saes: Mapping[int, SAE]
    strength: float = 1.0
    name: str = "steered"
    asks: bool = False

    def write(self, requests: Sequence[Request], seed: int) -> list[str]:
        specs = [self._spec(r.target) for r in requests]
        lists = [as_list(r.others) for r in requests]
        if all(spec is None for spec in specs):
            return [cleaned(text) for text in self.text.continued(lists, self.sampling, seed, one_line=True)]
        with steer(self.text.model, specs, saes=self.saes, tokenizer=self.text.tokenizer, record=False):
            found = self.text.continued(lists, self.sampling, seed, one_line=True)
        return [cleaned(text) for text in found]

    def _spec(self, target: Target | None) -> SteeringSpec | None:
        if target is None:
            return None
        edit = Edit(
            target.layer, target.feature, mode="add", strength=self.strength, unit="quantile",
            scale=target.scale or 1.0, tokens="generated",
        )  # fmt: skip
        return SteeringSpec((edit,))


@dataclass
class EndpointSource:
    """Another model. Answers without a text are nonsense: asked again, counted, and given up as an empty text."""

    endpoint: Endpoint
    sampling: Sampling
    name: str = "endpoint"
    asks: bool = True
    one_line: bool = True

    def write(self, requests: Sequence[Request], seed: int) -> list[str]:
        return [self._one(r.prompt) for r in requests]

    def _one(self, prompt: str) -> str:
        form = "Answer with the text only."
        try:
            return ask(
                self.endpoint, prompt, lambda t: cleaned(t, self.one_line) or None, form, self.sampling.max_new_tokens
            )
        except NonsenseError:  # counted by `ask`; the attempt counts as one without a text
            return ""


@dataclass
class FunctionSource:
    """A function of the user's."""

    function: Any
    name: str
    asks: bool = True

    @classmethod
    def load(cls, name: str) -> "FunctionSource":
        """Of `python:module:function`. InputError where there is none."""
        _, _, place = name.partition(":")
        module, _, attribute = place.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
            if not callable(function):
                raise TypeError(f"{attribute} is {type(function).__name__}")
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise InputError(
                f"The source {name!r} cannot be used: {error}. Accepted: python:module:function, where the module can "
                "be imported and function(prompt, target) gives a text."
            ) from error
        return cls(function, name)

    def write(self, requests: Sequence[Request], seed: int) -> list[str]:
        found = []
        for request in requests:
            text = self.function(request.prompt, request.target)
            if not isinstance(text, str):
                raise InputError(f"The source {self.name} gave {type(text).__name__}; it has to give a text.")
            found.append(" ".join(text.encode("utf-8", "replace").decode("utf-8").split()))
        return found
