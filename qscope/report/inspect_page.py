"""One page to look at features in a browser: data, style and script in a single file, no network.

Corpus text is hostile input. It travels as JSON in which `<`, `>` and `&` are escaped, the script puts it on
the page through `textContent` only, and a Content-Security-Policy with the hashes of the one style and the
one script keeps anything else from running.
"""

import base64
import hashlib
import json
import re
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Any

from qscope._version import __version__
from qscope.report.page_file import write_whole
from qscope.workflows.inspect_result import ORDERS, Context, Feature, InspectResult, Meaning, Text

MOST_FEATURES = 400
MOST_CONTEXTS = 12
MOST_TEXTS = 12
_PER_TOKEN = 6

# Characters that turn the direction of what follows: one of them in a text would garble the whole line.
_DIRECTION = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}


def visible(text: str) -> str:
    """`text` with line ends, tabs, control and direction characters replaced by marks; spaces stay."""
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\u2028\u2029\x85":
        return "\u21b5"
    if char in "\t\r\x7f":
        return {"\t": "\u21e5", "\r": "\u240d", "\x7f": "\u2421"}[char]
    if code < 32:
        return chr(0x2400 + code)
    if code in _DIRECTION or unicodedata.category(char) in ("Cc", "Cs"):
        return f"\u27e8U+{code:04X}\u27e9"
    return char


def page(result: InspectResult) -> str:
    """The page as HTML. It holds at most 400 features, 12 passages of each and 12 texts; its foot says so."""
    template = resources.files("qscope.report").joinpath("inspect_page.html").read_text(encoding="utf-8")
    for name in ("style", "script"):
        (body,) = re.findall(rf"<{name}>(.*?)</{name}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        template = template.replace(f"@@{name.upper()}_HASH@@", f"sha256-{digest}")
    return template.replace("@@DATA@@", embed(_data(result)))


def write_page(result: InspectResult, path: Path) -> Path:
    """Write `page(result)` to `path`, whole or not at all. Raises `StorageError`."""
    return write_whole(path, page(result), "Choose another --html path.")


def finish(result: InspectResult) -> Path | None:
    """Write the page where the config asked for it, if it did, and return its path."""
    return None if result.html is None else write_page(result, result.html)


def embed(data: Any) -> str:
    """JSON that is safe inside a script element: ASCII only, without `<`, `>` and `&`."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _short(value: float) -> float:
    """Four significant digits: what the eye can use, at half the bytes."""
    return float(f"{value:.4g}")


def _data(result: InspectResult) -> dict[str, Any]:
    features, texts = [*result.features, *result.text_features][:MOST_FEATURES], result.texts[:MOST_TEXTS]
    return {
        "about": [[visible(key), visible(value)] for key, value in result.about.items()],
        "facts": {
            "layer": result.layer,
            "tokens": result.num_tokens,
            "documents": result.num_documents,
            "alive": result.alive,
            "d_sae": result.d_sae,
            "k": result.k,
            "l0": _short(result.l0),
            "sinks": result.sink_tokens,
            "nan": result.nan_tokens,
            "sinks_counted": result.sinks_counted,
        },
        "density": result.density_histogram,
        "order": {"frequent": "Most frequent", "strongest": "Strongest", "specific": "Most specific"}[result.order],
        "features": [_feature(f) for f in features],
        "texts": [_text(t) for t in texts],
        "per_token": _PER_TOKEN,
        "foot": _foot(result, features, texts),
    }


def _feature(feature: Feature) -> dict[str, Any]:
    return {
        "id": feature.id,
        "count": feature.count,
        "density": _short(feature.density),
        "mean": _short(feature.mean),
        "max": _short(feature.max),
        "histogram": feature.histogram,
        "top": [[visible(t.text), t.count, _short(t.share)] for t in feature.top_tokens],
        "contexts": [_context(c) for c in feature.contexts[:MOST_CONTEXTS]],
        "meaning": None if feature.meaning is None else said(feature.meaning),
    }


def said(meaning: Meaning) -> str:
    """An explanation with its scores, on one line."""
    scores = {"detection": meaning.detection, "fuzzing": meaning.fuzzing}
    known = [f"{name} {value:.2f}" for name, value in scores.items() if value is not None]
    by = [] if meaning.by == "plain" else [meaning.by]
    return visible(meaning.text) + (f" ({', '.join(by + known)})" if by or known else "")


def _context(context: Context) -> dict[str, Any]:
    return {
        "document": context.document,
        "position": context.position,
        "peak": context.peak,
        "tokens": [visible(t) for t in context.tokens],
        "activations": [_short(a) for a in context.activations],
    }


def _text(text: Text) -> dict[str, Any]:
    return {
        "document": text.document,
        "length": text.num_tokens,
        "starts": visible("".join(t.text for t in text.tokens[:12]).strip())[:36],
        "tokens": [[visible(t.text), int(t.left_out), _flat(t.features[:_PER_TOKEN])] for t in text.tokens],
        "features": [
            [f.id, f.tokens, _short(f.total), _short(f.max), f.peak, _short(f.density), _flat(f.activations)]
            for f in text.features[:14]
        ],
    }


def _flat(pairs: list[tuple[int, float]]) -> list[float]:
    return [x for number, value in pairs for x in (number, _short(value))]


def _foot(result: InspectResult, features: list[Feature], texts: list[Text]) -> str:
    contexts = max((min(len(f.contexts), MOST_CONTEXTS) for f in features), default=0)
    linked = len(features) - min(len(result.features), MOST_FEATURES)
    return (
        f"This page holds {len(features):,} of {result.alive:,} alive features with up to {contexts} passages"
        f" each ({linked:,} of them because they lead in one of its texts), and {len(texts):,} of"
        f" {result.num_documents:,} texts; at most {MOST_FEATURES} features, {MOST_CONTEXTS} passages and"
        f" {MOST_TEXTS} texts fit on a page. Statistics are over all {result.counted_tokens:,} counted tokens"
        f" of the store. Order: {result.order} = {ORDERS[result.order]}. Density: share of counted tokens on"
        f" which a feature is active. Made by qscope {__version__}."
    )
