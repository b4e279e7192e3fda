"""Another model, asked through an OpenAI-compatible endpoint: retried with back-off, and all that failed counted.

QSCOPE_JUDGE_URL    base URL, such as http://localhost:8000/v1; without it nothing is ever sent
QSCOPE_JUDGE_MODEL  name of the model there
QSCOPE_JUDGE_KEY    sent as a bearer token, where the endpoint wants one
"""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

from qscope.errors import InputError

JUDGE_URL, JUDGE_MODEL, JUDGE_KEY = "QSCOPE_JUDGE_URL", "QSCOPE_JUDGE_MODEL", "QSCOPE_JUDGE_KEY"
LONGEST_WAIT = 60.0  # seconds, also for what an endpoint asks for with Retry-After
_MOST_BYTES = 1 << 24  # of one answer
_LATER = {408, 409, 425, 429}  # of the 4xx: may go well when asked again; so may every 5xx
_AGAIN = "That is not the form that was asked for. {form}"

Message = dict[str, str]
"""{"role": "user", "content": ...}"""
T = TypeVar("T")


class EndpointError(InputError):
    """The endpoint gave no answer, after all retries."""


class NonsenseError(InputError):
    """The model answered, and never in the form that was asked for."""


@dataclass
class Counts:
    """What became of the requests to a model."""

    requests: int = 0
    answers: int = 0
    """Requests that came back with a text"""
    failures: int = 0
    """Requests without one: refused connections, HTTP errors, answers that are no chat completion"""
    timeouts: int = 0
    """Requests that took too long"""
    nonsense: int = 0
    """Texts that were not in the form that was asked for"""
    given_up: int = 0
    """Questions without a usable answer after all attempts"""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Chat(Protocol):
    """A model that continues a conversation: `Endpoint`, or a local one."""

    @property
    def name(self) -> str:
        """Of the model, as it is written into results."""
        ...

    @property
    def counts(self) -> Counts: ...

    def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
        """The model's next message; as likely as it can make it, not sampled."""
        ...


def ask(
    model: Chat, question: str, read: Callable[[str], T | None], form: str, max_tokens: int = 64, attempts: int = 3
) -> T:
    """What `read` makes of the model's answer.

    An answer of which it makes None is nonsense: it is counted, put back to the model with a reminder of `form` (a
    sentence such as "Answer with one word, yes or no."), and asked again.

    Raises NonsenseError after `attempts` of them, and EndpointError as the model does.
    """
    messages: list[Message] = [{"role": "user", "content": question}]
    answer = ""
    for _ in range(attempts):
        answer = model.chat(messages, max_tokens)
        found = read(answer)
        if found is not None:
            return found
        model.counts.nonsense += 1
        messages = [
            messages[0],
            {"role": "assistant", "content": answer},
            {"role": "user", "content": _AGAIN.format(form=form)},
        ]
    model.counts.given_up += 1
    raise NonsenseError(
        f"{model.name} answered {answer[:80]!r}, {attempts} times not as it was asked to ({form}). Take another model."
    )


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible endpoint (POST {base}/chat/completions), asked with temperature 0.

    A request that times out, is refused, or gets 408, 409, 425, 429, a 5xx or no chat completion is sent again, after
    `wait` seconds, then twice that, and so on (up to 60 s, shortened by up to half at random so that clients do not
    return together), or after what the endpoint's Retry-After says. Other 4xx are final.
    """

    base: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    """Seconds of one request without a byte received"""
    retries: int = 4
    wait: float = 1.0
    """Seconds before the first retry"""
    temperature: float = 0.0
    counts: Counts = field(default_factory=Counts)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        self.base = self.base.rstrip("/")
        if urllib.parse.urlsplit(self.base).scheme not in ("http", "https") or not self.model:
            raise InputError(
                f"The endpoint {self.base!r} with the model {self.model!r} was given. Accepted: the base URL of an "
                "OpenAI-compatible endpoint, such as http://localhost:8000/v1, and a model's name."
            )

    @property
    def name(self) -> str:
        return self.model

    @classmethod
    def from_environment(cls, wanted_by: str, **options: Any) -> "Endpoint":
        """The endpoint that the environment names. Raises InputError, beginning with `wanted_by`, where it does not."""
        base, model = os.environ.get(JUDGE_URL, ""), os.environ.get(JUDGE_MODEL, "")
        if urllib.parse.urlsplit(base).scheme not in ("http", "https") or not model:
            raise InputError(
                f"{wanted_by} asks another model, and none is configured. Set {JUDGE_URL} to the base URL of an "
                f"OpenAI-compatible endpoint (such as http://localhost:8000/v1), {JUDGE_MODEL} to the model's name, "
                f"and {JUDGE_KEY} where it wants a key."
            )
        return cls(base, model, os.environ.get(JUDGE_KEY) or None, **options)

    def chat(self, messages: Sequence[Message], max_tokens: int) -> str:
        """The next message. Raises EndpointError when no attempt brought one."""
        for attempt in range(self.retries + 1):
            self.counts.requests += 1
            try:
                text = self._post(messages, max_tokens)
            except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException) as error:
                asked = self._count(error)
                if attempt == self.retries or not _transient(error):
                    self.counts.given_up += 1
                    raise self._failed(error, attempt + 1) from error
                backoff = min(self.wait * 2**attempt, LONGEST_WAIT)
                self.sleep(asked if asked is not None else backoff * random.uniform(0.5, 1.0))
            else:
                self.counts.answers += 1
                return text
        raise AssertionError("the loop ends by return or raise")

    def _post(self, messages: Sequence[Message], max_tokens: int) -> str:
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.base}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            content = json.loads(response.read(_MOST_BYTES))["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError(f"the message's content is {type(content).__name__}, not text")
        return content

    def _count(self, error: Exception) -> float | None:
        """Counts it; seconds that the endpoint asked to wait."""
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(error, TimeoutError) or isinstance(reason, TimeoutError):
            self.counts.timeouts += 1
        else:
            self.counts.failures += 1
        if not isinstance(error, urllib.error.HTTPError):
            return None
        after = error.headers.get("Retry-After", "")
        error.close()
        return min(float(after), LONGEST_WAIT) if after.isdecimal() else None

    def _failed(self, error: Exception, attempts: int) -> EndpointError:
        times = f" in {attempts} attempts" if attempts > 1 else ""
        return EndpointError(
            f"The model at {self.base} gave no usable answer{times} ({type(error).__name__}: {error}). Check "
            f"{JUDGE_URL}, {JUDGE_MODEL} and {JUDGE_KEY}; the same command goes on from there."
        )


def _transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _LATER or error.code >= 500
    return True
