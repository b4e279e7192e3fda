"""Tables of what features react to, for a terminal of any width."""

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable

from qscope.report.inspect_page import finish, said, visible
from qscope.workflows.inspect_result import (
    ORDERS,
    TEXT_ORDERS,
    Context,
    Feature,
    InspectResult,
    Text,
    TextFeature,
)

_SIDE_BY_SIDE = 76  # narrower terminals get numbers and text on lines of their own
_STEPS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


def render(result: InspectResult) -> str:
    """What `qscope inspect` prints; writes the page as well when one was asked for."""
    page = finish(result)
    tty = sys.stdout.isatty()
    text = tables(result, width=shutil.get_terminal_size((100, 24)).columns, ansi=tty)
    return text if page is None else f"{text}\n\npage: {page}"


def tables(result: InspectResult, width: int = 100, ansi: bool = False) -> str:
    """The tables as lines of at most `width` cells (40 or more). `ansi`: peaks in bold, else between \u27e6
    and \u27e7."""
    width = max(width, 40)
    if result.document is not None:
        body = _document(result.texts[0], result.order, width, ansi)
    elif len(result.features) == 1:
        body = _in_depth(result.features[0], width, ansi)
    else:
        body = _list(result, width, ansi)
    return "\n".join([*_head(result, width), "", *body])


def _head(result: InspectResult, width: int) -> list[str]:
    about = [f"{key} {visible(value)}" for key, value in result.about.items()]
    layers = f"layer {result.layer}" + (f" of {', '.join(map(str, result.layers))}" if len(result.layers) > 1 else "")
    held = [f"{result.num_tokens:,} tokens in {result.num_documents:,} documents"]
    held += [
        f"{result.alive:,} of {result.d_sae:,} features alive",
        f"L0 {_number(result.l0)} of k {result.k}",
    ]
    sinks = f"{result.sink_tokens:,} attention sinks (extreme norm)"
    nan = f"{result.nan_tokens:,} NaN row{'' if result.nan_tokens == 1 else 's'}"
    if result.sinks_counted:
        held += [f"{sinks} counted", f"left out {nan}"]
    else:
        held += [f"left out {sinks} and {nan}"]
    return [*_flow([layers, *about], width), *_flow(held, width)]


def _list(result: InspectResult, width: int, ansi: bool) -> list[str]:
    if not result.features:
        return ["No feature is active in this store."]
    lines = _flow([f"{len(result.features)} features, order {result.order}:", ORDERS[result.order]], width, "  ")
    lines += ["", clip(_ROW.format("feature", "tokens", "density", "mean", "max") + "  top tokens", width)]
    for feature in result.features:
        row = _ROW.format(
            feature.id,
            f"{feature.count:,}",
            _share(feature.density),
            _number(feature.mean),
            _number(feature.max),
        )
        lines.append(clip(f"{row}  {_top_tokens(feature)}", width))
        if feature.meaning is not None:
            lines.append(clip(f"{'':9}{said(feature.meaning)}", width))
        lines += [_passage(context, 9, width, ansi) for context in feature.contexts[:1]]
    return [
        *lines,
        "",
        *_flow(["--feature ID shows one in depth", "--document N one text", "--html FILE a page"], width),
    ]


_ROW = "{:>7} {:>9} {:>8} {:>7} {:>7}"


def _in_depth(feature: Feature, width: int, ansi: bool) -> list[str]:
    if feature.count == 0:
        return [f"Feature {feature.id} is never active in this store."]
    facts = [f"Feature {feature.id}", f"active on {feature.count:,} tokens ({_share(feature.density)})"]
    facts += [f"mean {_number(feature.mean)}", f"max {_number(feature.max)}"]
    highest = max(feature.histogram)
    steps = "".join(_STEPS[-(-8 * count // highest)] for count in feature.histogram)
    lines = [
        *_flow(facts, width),
        f"0 {steps} {_number(feature.max)}",
        *([] if feature.meaning is None else ["", *textwrap.wrap(said(feature.meaning), width)]),
        "",
        "tokens that carry its activation",
    ]
    for share in feature.top_tokens:
        bar = "\u2588" * max(1, round(20 * share.share))
        lines.append(clip(f"{_share(share.share):>7}  {bar:<20} {_spaced(share.text)}  ({share.count:,})", width))
    apart = len({c.document for c in feature.contexts}) == len(feature.contexts)
    lines += ["", "strongest passages" + (", one per text" if apart else "")]
    for context in feature.contexts:
        place = f"text {context.document}, token {context.position}"
        lines.append(clip(f"{_number(context.activations[context.peak]):>7}  {place}", width))
        lines.append(_passage(context, 9, width, ansi))
    return lines


def _document(text: Text, order: str, width: int, ansi: bool) -> list[str]:
    lines = _flow(
        [f"Text {text.document}", f"{text.num_tokens:,} tokens", f"strongest first: {TEXT_ORDERS[order]}"],
        width,
    )
    head = "{:>7} {:>7} {:>8} {:>7} {:>8}"
    lines += ["", clip(head.format("feature", "tokens", "sum", "max", "density") + "  where it peaks", width)]
    for feature in text.features:
        row = head.format(
            feature.id, feature.tokens, _number(feature.total), _number(feature.max), _share(feature.density)
        )
        if width < _SIDE_BY_SIDE:
            lines += [clip(row, width), " " * 9 + _around(text, feature, width - 9, ansi)]
        else:
            lines.append(f"{row}  {_around(text, feature, width - len(row) - 2, ansi)}")
    return lines


def _around(text: Text, feature: TextFeature, room: int, ansi: bool) -> str:
    if feature.peak >= len(text.tokens):
        return clip(f"at token {feature.peak}", room)
    before = "".join(visible(t.text) for t in text.tokens[max(0, feature.peak - 24) : feature.peak])
    after = "".join(visible(t.text) for t in text.tokens[feature.peak + 1 : feature.peak + 25])
    return _marked(before, visible(text.tokens[feature.peak].text), after, room, ansi)


def _passage(context: Context, indent: int, width: int, ansi: bool) -> str:
    words = [visible(t) for t in context.tokens]
    before, after = "".join(words[: context.peak]), "".join(words[context.peak + 1 :])
    return " " * indent + _marked(before, words[context.peak], after, width - indent, ansi)


def _marked(before: str, peak: str, after: str, room: int, ansi: bool) -> str:
    """One line of at most `room` cells; the marked peak starts at the same cell in every line of equal
    `room`."""
    word = peak.lstrip(" ") or peak
    before = before + peak[: len(peak) - len(word)]
    left = room * 2 // 5
    before = clip(before, left, from_left=True)
    before = " " * (left - cells(before)) + before
    word = clip(word, max(room - left - 3, 1))
    after = clip(after, room - left - cells(word) - (0 if ansi else 2))
    return f"{before}\x1b[1m{word}\x1b[22m{after}" if ansi else f"{before}\u27e6{word}\u27e7{after}"


def cells(text: str) -> int:
    """Terminal cells that `text` takes: two for wide East Asian characters and emoji, none for combining
    marks."""
    return sum(map(_cells, text))


def _cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def clip(text: str, room: int, from_left: bool = False) -> str:
    """`text` in at most `room` cells; cut at its end, or at its start with `from_left`, where an ellipsis
    says so."""
    if cells(text) <= room:
        return text
    if room < 1:
        return ""
    used, kept = 1, []
    for char in reversed(text) if from_left else text:
        used += _cells(char)
        if used > room:
            break
        kept.append(char)
    return "\u2026" + "".join(reversed(kept)) if from_left else "".join(kept) + "\u2026"


def _flow(parts: Iterable[str], width: int, gap: str = " \u00b7 ") -> list[str]:
    """The parts side by side, as many to a line as fit."""
    lines: list[str] = []
    for part in parts:
        if lines and cells(lines[-1]) + cells(gap) + cells(part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(clip(part, width))
    return lines


def _top_tokens(feature: Feature) -> str:
    return "  ".join(_spaced(t.text) for t in feature.top_tokens[:6])


def _spaced(token: str) -> str:
    """A token standing alone, its spaces made visible."""
    return visible(token).replace(" ", "\u00b7")


def _number(value: float) -> str:
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.1e}"


def _share(part: float) -> str:
    percent = 100 * part
    if percent == 0 or percent >= 0.001:
        return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"
    return f"{percent:.0e} %"
