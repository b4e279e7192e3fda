"""How often a model answers in the wrong script or language: the code-switching ratio, with intervals.

A response has switched when it holds any letter of the script that it should not hold: CSW of SASFT (Deng et al. 2025,
arXiv 2507.14894; Qwen-Scope equation 24), whose ratio is over all responses of all prompt languages together. Prompt
languages are to be chosen so that the script cannot be right: not Japanese where Han is looked for.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qscope.detectors import script_share
from qscope.errors import InputError

LEVEL = 0.95
_Z = 1.959963984540054  # 0.975 quantile of the normal distribution

SCRIPTS: dict[str, tuple[str, ...]] = {
    "zh": ("Han",),
    "ja": ("Hiragana", "Katakana", "Han"),
    "ko": ("Hangul",),
    "ru": ("Cyrillic",),
    "uk": ("Cyrillic",),
    "bg": ("Cyrillic",),
    "ar": ("Arabic",),
    "fa": ("Arabic",),
    "he": ("Hebrew",),
    "el": ("Greek",),
    "hi": ("Devanagari",),
    "th": ("Thai",),
}
"""Scripts of languages that do not write with Latin letters"""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Response:
    """One sampled answer."""

    text: str
    group: str
    """Language of the prompt"""
    prompt: int
    """Which prompt: samples of one prompt are not independent"""


@dataclass(frozen=True)
class GroupSwitching:
    """The responses of one prompt language, or of all together. Means are over responses, 0 where there is none."""

    responses: int
    empty: int
    """Without a visible character: they count as responses, and cannot have switched"""
    switched: int
    ratio: Interval
    """switched / responses, Wilson"""
    share: float
    """Mean share of the letters that belong to the script"""
    other_language: Interval | None = None
    """Share of the responses that the language identifier takes for another language than the prompt's; None: not
    asked. Empty responses are left out here."""


@dataclass(frozen=True)
class Switching:
    """What `measure` returns."""

    all: GroupSwitching
    groups: dict[str, GroupSwitching]
    by_prompt: Interval
    """The ratio of all, bootstrapped over prompts"""


def scripts_of(group: str, given: Sequence[str] = ()) -> tuple[str, ...]:
    """The Unicode scripts to look for: those given, checked, or those of the language `group`. InputError."""
    scripts = tuple(given) or SCRIPTS.get(group.lower().replace("_", "-").partition("-")[0], ())
    if not scripts:
        raise InputError(
            f"The scripts of {group!r} are not known here ({', '.join(SCRIPTS)} are), and a language with Latin "
            "letters cannot be told by its script. Name Unicode scripts, such as Han, Cyrillic, Hiragana."
        )
    for script in scripts:
        _pattern((script,))
    return scripts


def contains(text: str, scripts: Sequence[str]) -> bool:
    """Whether any character of `text` belongs to the Unicode scripts (CSW of Qwen-Scope equation 24).

    By the Script property: marks that several scripts share (U+3002, a fullwidth comma, the long vowel mark of kana)
    are Common and do not count.
    """
    return _pattern(tuple(scripts)).search(text) is not None


_patterns: dict[tuple[str, ...], "re.Pattern[str]"] = {}


def _pattern(scripts: tuple[str, ...]) -> "re.Pattern[str]":
    import regex  # transformers needs it too

    if scripts not in _patterns:
        try:
            _patterns[scripts] = regex.compile("[" + "".join(rf"\p{{Script={script}}}" for script in scripts) + "]")
        except regex.error as error:
            raise InputError(
                f"The script {' or '.join(map(repr, scripts))} was given, which Unicode does not have. Accepted: names "
                "such as Han, Latin, Cyrillic, Hangul, Hiragana, Arabic."
            ) from error
    return _patterns[scripts]


def identifier() -> Callable[[str], str]:
    """text -> language code of the package py3langid. Raises InputError where it is not installed."""
    try:
        import py3langid
    except ImportError as error:
        raise InputError(
            "A language identifier was asked for: pip install py3langid. Or leave it out; the script alone is enough "
            "where prompt and target language do not share one."
        ) from error
    return lambda text: str(py3langid.classify(text)[0])


def measure(
    responses: Sequence[Response],
    scripts: Sequence[str],
    identify: Callable[[str], str] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Switching:
    """The code-switching ratio, per prompt language and over all responses. Raises InputError for no response."""
    if not responses:
        raise InputError("There is no response to measure switching on. Give prompts.")
    names = sorted({response.group for response in responses})
    groups = {name: _group([r for r in responses if r.group == name], scripts, identify) for name in names}
    hits, sizes = by_prompt(responses, scripts)
    return Switching(_group(responses, scripts, identify), groups, bootstrap(hits, sizes, draws, seed))


def _group(
    responses: Sequence[Response], scripts: Sequence[str], identify: Callable[[str], str] | None
) -> GroupSwitching:
    texts = [response.text for response in responses]
    switched = sum(contains(text, scripts) for text in texts)
    other = None
    if identify is not None:
        spoken = [r for r in responses if r.text.strip()]
        other = wilson(sum(identify(r.text) != r.group for r in spoken), len(spoken))
    return GroupSwitching(
        responses=len(texts),
        empty=sum(not text.strip() for text in texts),
        switched=switched,
        ratio=wilson(switched, len(texts)),
        share=sum(script_share(text, scripts) for text in texts) / max(1, len(texts)),
        other_language=other,
    )


def wilson(hits: int, size: int) -> Interval:
    """Share with its Wilson score interval (Wilson 1927); 0 to 1 where nothing was counted."""
    if size == 0:
        return Interval(0.0, 0.0, 1.0)
    p, z2 = hits / size, _Z * _Z
    middle = (p + z2 / (2 * size)) / (1 + z2 / size)
    half = _Z / (1 + z2 / size) * math.sqrt(p * (1 - p) / size + z2 / (4 * size * size))
    # At 0 and 1 the two terms are equal but for rounding.
    return Interval(p, 0.0 if hits == 0 else max(0.0, middle - half), 1.0 if hits == size else min(1.0, middle + half))


def by_prompt(
    responses: Sequence[Response], scripts: Sequence[str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(switched, responses) of each prompt, [P] each, by ascending prompt."""
    found: dict[int, list[bool]] = {}
    for response in responses:
        found.setdefault(response.prompt, []).append(contains(response.text, scripts))
    ordered = [found[prompt] for prompt in sorted(found)]
    return np.array([float(sum(one)) for one in ordered]), np.array([float(len(one)) for one in ordered])


def bootstrap(
    hits: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], draws: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of sum(hits) / sum(sizes) over the prompts [P]."""
    return two_way({0: hits}, sizes, draws, seed)


def two_way(
    hits: Mapping[int, npt.NDArray[np.float64]],
    sizes: npt.NDArray[np.float64],
    draws: int = 2000,
    seed: int = 0,
    minus: Mapping[int, npt.NDArray[np.float64]] | None = None,
) -> Interval:
    """The ratio, mean over training seeds, with a percentile bootstrap over seeds and prompts, drawn both.

    `hits` seed -> [P], `sizes` [P] of every seed. With `minus`, the ratio of `hits` less that of `minus` at the same
    seeds and prompts, which are drawn together. With few seeds the interval is too narrow: 3 seeds have 10 draws.
    """
    seeds = sorted(hits if minus is None else set(hits) & set(minus))
    values = np.stack([hits[s] - (minus[s] if minus is not None else 0.0) for s in seeds])  # [seeds, P]
    random = np.random.default_rng(seed)
    rows = random.integers(len(seeds), size=(draws, len(seeds)))
    columns = random.integers(len(sizes), size=(draws, len(sizes)))
    found = np.array([values[r][:, c].mean(0).sum() / sizes[c].sum() for r, c in zip(rows, columns, strict=True)])
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean(0).sum() / sizes.sum()), float(low), float(high))


def wrong_groups(groups: Sequence[str], target: str, scripts: Sequence[str]) -> list[str]:
    """Groups other than `target` whose own writing holds one of the scripts (Japanese, where Han is looked for)."""
    return [g for g in groups if g != target and set(SCRIPTS.get(g.lower().partition("-")[0], ())) & set(scripts)]
