"""Endless repetition: does a response end in a loop that it does not leave, and how much of it was said already?

Two signs, either is enough:

suffix loop   the response ends in at least `repeats` copies of one piece (a partial copy at either end counts its
              share), which together are at least `tokens` long
share         at least `share` of the n-grams of the last `window` tokens occurred before in that window, as in four
              copies of one piece; this finds loops whose copies differ now and then. A loop that counts ("Step 1:
              run it. Step 2: run it. ...") stays below it, for a table looks the same; a lower `share` finds it

and a response that ended by itself (with the end token) is not endless, whatever it repeats. Copies, lists and
refrains stay below the thresholds: a text given back once or three times, a list whose entries differ, "ha ha ha ha".
The paper (Qwen-Scope section 8) does not say what its detector was; these thresholds are ours. Welleck et al. 2020
(arXiv:1908.04319) define the share over a whole text (seq-rep-n).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qscope.errors import InputError


@dataclass(frozen=True)
class Thresholds:
    """When repetition counts as endless; see the module."""

    repeats: float = 4.0
    """Copies of the piece in the loop."""
    tokens: int = 32
    """Length of the loop. Of a text it is counted in characters, `characters`."""
    characters: int = 120
    n: int = 4
    share: float = 0.75
    window: int = 128
    """Tokens; a response that is shorter is judged by its suffix loop alone."""

    def __post_init__(self) -> None:
        if not (self.repeats >= 2 and min(self.tokens, self.characters, self.n) >= 1):
            raise InputError(f"{self} was given; repeats of at least 2, and lengths of at least 1, are accepted.")
        if not (0 < self.share <= 1 and self.window > self.n):
            raise InputError(f"{self} was given; a share above 0 and at most 1, and a window above n, are accepted.")


DEFAULT = Thresholds()


@dataclass(frozen=True)
class Loop:
    """The end of a response that repeats itself."""

    period: int
    """Length of the repeated piece."""
    length: int
    """Length of the whole loop, which is the end of the response."""

    @property
    def repeats(self) -> float:
        return self.length / self.period


def shared_prefixes(items: Sequence[Hashable]) -> list[int]:
    """z[i]: length of the longest common prefix of items and items[i:] (Gusfield 1997, section 1.4). O(n)."""
    n = len(items)
    z = [0] * n
    if n:
        z[0] = n
    left = right = 0
    for i in range(1, n):
        z[i] = min(right - i, z[i - left]) if i < right else 0
        while i + z[i] < n and items[z[i]] == items[i + z[i]]:
            z[i] += 1
        if i + z[i] > right:
            left, right = i, i + z[i]
    return z


def suffix_loop(items: Sequence[Hashable], repeats: float = 2.0, length: int = 1) -> Loop | None:
    """The loop with the shortest period in which `items` end, of at least `repeats` copies and `length` items. O(n).

    The end of `items` has the period p exactly as far back as the reversed items agree with themselves p places on.
    """
    z = shared_prefixes(items[::-1])
    for period in range(1, len(items)):
        whole = period + z[period]
        if z[period] and whole >= length and whole >= repeats * period:
            return Loop(period, whole)
    return None


def repeated_share(items: Sequence[Hashable], n: int = 4) -> float:
    """1 - different n-grams / n-grams (Welleck et al. 2020, seq-rep-n); 0 for fewer than n items."""
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def endless(ids: Sequence[int], ended: bool = False, thresholds: Thresholds = DEFAULT) -> bool:
    """Whether a response repeats itself without end.

    Args:
        ids: token ids of the response alone, without end token and padding; may be empty.
        ended: the model ended it by itself. Such a response is not endless.
    """
    if ended:
        return False
    t = thresholds
    if suffix_loop(ids, t.repeats, t.tokens) is not None:
        return True
    return len(ids) >= t.window and repeated_share(ids[-t.window :], t.n) >= t.share


def endless_text(text: str, ended: bool = False, thresholds: Thresholds = DEFAULT) -> bool:
    """`endless` for a response of which only the text is known: its suffix loop, in characters.

    Tokens may cut one text in several ways, characters do not; a character that was cut off at the end (U+FFFD) is
    not looked at.
    """
    if ended:
        return False
    return suffix_loop(text.rstrip("\ufffd"), thresholds.repeats, thresholds.characters) is not None


def occurrences(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(token id, first place, last place) of every id that occurs at least twice, in the order of the first places."""
    places: dict[int, tuple[int, int]] = {}
    for place, token in enumerate(ids):
        places[token] = (places.get(token, (place, place))[0], place)
    return [(token, first, last) for token, (first, last) in places.items() if last > first]
