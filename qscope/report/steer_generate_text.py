"""Unsteered and steered text side by side, in the terminal as the tokens come, or at the end where there is none."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from qscope.report.inspect_page import visible
from qscope.report.inspect_text import cells
from qscope.workflows.steer_generate import Continuation, SteerGenerateConfig, SteerGenerateResult, Token, run

SIDE_BY_SIDE = 76
"""Columns of a terminal from which on the two texts stand beside each other."""
_GAP = "  "
_LABELS = ("unsteered", "steered")
# Backgrounds of the 256-colour palette, dark to bright; one row for each feature shown, in turn.
_HUES = ((22, 28, 34, 40), (17, 19, 21, 27), (52, 88, 124, 160), (53, 90, 127, 164), (58, 100, 142, 178))
_RESET, _UNDERLINE = "\x1b[0m", "\x1b[4m"


def show(config: SteerGenerateConfig) -> SteerGenerateResult:
    """Run, and print to standard output: live on a terminal that can be written to again, else at the end."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR"):
        result = run(config)
        print(render(result))
        return result
    size = shutil.get_terminal_size((100, 24))
    view = Live(sys.stdout, max(1, size.columns - 1), size.lines)  # a full last column makes some terminals wrap
    result = run(config, view)
    view.finish(result)
    return result


def render(result: SteerGenerateResult, width: int = 100) -> str:
    """The result as plain text: one text after the other, activations as numbers behind the tokens."""
    lines = [*_head(result, width), "", "prompt", *_wrapped(_pieces(result.unsteered.tokens, False), width), ""]
    for label, text in zip(_LABELS, (result.unsteered, result.steered), strict=True):
        lines += [label, *_wrapped(_pieces(text.tokens, True), width), ""]
    return "\n".join([*lines, *_foot(result, width, ansi=False)])


def _head(result: SteerGenerateResult, width: int) -> list[str]:
    about = ", ".join(f"{name} {visible(value)}" for name, value in result.about.items())
    edits = [f"edit {i}: {visible(edit)}" for i, edit in enumerate(result.edits)]
    return [row for line in (about, *edits) for row in textwrap.wrap(line, width)]


def _foot(result: SteerGenerateResult, width: int, ansi: bool) -> list[str]:
    lines = [line for at, name in enumerate(result.shown) for line in _summary(result, at, name, width, ansi)]
    fired = [token for token in result.steered.tokens if token.fired]
    made = sum(token.generated for token in fired)
    lines.append(
        f"steering fired at {len(fired)} of {len(result.steered.tokens)} tokens ({made} of them generated)"
        + (": underlined" if ansi and fired else f": at {_spans(result.steered)}" if fired else "")
    )
    ended = [label for label, text in zip(_LABELS, (result.unsteered, result.steered), strict=True) if text.ended]
    lines += [f"ended by the model: {', '.join(ended)}"] if ended else []
    broken = [label for label, text in zip(_LABELS, (result.unsteered, result.steered), strict=True) if text.broken]
    if broken:
        lines.append(f"{' and '.join(broken)}: the model stopped telling tokens apart; the strengths are too large")
    how = f"{'shade' if ansi else f'[{chr(32).join(result.shown)}] behind a token'}: {result.activations}"
    lines += [how] if result.shown else []
    lines += [f"spec: {result.saved}"] if result.saved is not None else []
    return [row for line in lines for row in (textwrap.wrap(line, width) if "\x1b" not in line else [line])]


def _summary(result: SteerGenerateResult, at: int, name: str, width: int, ansi: bool) -> list[str]:
    """Where one feature was active in each text, and how strongly."""
    parts = []
    for label, text in zip(_LABELS, (result.unsteered, result.steered), strict=True):
        made = [token for token in text.tokens if token.generated]
        active = [(token.activations[at] or 0.0, token) for token in made if token.activations[at]]
        best = max(active, key=lambda pair: pair[0], default=None)
        peak = f", highest {best[0]:.3g} at {visible(best[1].text)!r}" if best else ""
        parts.append(f"{label} {len(active)} of {len(made)} generated tokens{peak}")
    mark = f"{_background(at, 2)} {name} {_RESET}" if ansi else name
    return [f"{mark} active: {'; '.join(parts)}"]


def _spans(text: Continuation) -> str:
    """Positions at which steering fired, as ranges."""
    found: list[list[int]] = []
    for position, token in enumerate(text.tokens):
        if token.fired and found and found[-1][1] == position - 1:
            found[-1][1] = position
        elif token.fired:
            found.append([position, position])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in found]
    return ",".join(shown[:20]) + (f" and {len(shown) - 20} more spans" if len(shown) > 20 else "")


# --- pieces of text ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A token's text with how it is shown."""

    text: str
    style: str = ""


def _pieces(tokens: Iterable[Token], generated: bool) -> list[Piece]:
    """Plain: activations in brackets behind the text of a token at which a shown feature is active."""
    found = []
    for token in tokens:
        if token.generated == generated:
            numbers = " ".join(
                "?" if value is None else f"{value:.3g}" if value else "-" for value in token.activations
            )
            found.append(Piece(token.text + (f"[{numbers}]" if any(token.activations) else "")))
    return found


def _shaded(tokens: Iterable[Token], generated: bool, tops: Sequence[float]) -> list[Piece]:
    """With styles: the background says which feature is most active beside its `tops`, and how much."""
    found = []
    for token in tokens:
        if token.generated == generated:
            shares = [(value or 0.0) / top if top else 0.0 for value, top in zip(token.activations, tops, strict=True)]
            style = _UNDERLINE if token.fired else ""
            if any(share > 0 for share in shares):
                at = max(range(len(shares)), key=shares.__getitem__)
                style += _background(at, min(3, int(4 * shares[at])))
            found.append(Piece(token.text, style))
    return found


def _background(feature: int, strength: int) -> str:
    return f"\x1b[97;48;5;{_HUES[feature % len(_HUES)][strength]}m"


def _wrapped(pieces: Iterable[Piece], width: int, pad: bool = False) -> list[str]:
    """Rows of at most `width` cells, cut at spaces where there is one in the row; padded to `width` on request."""
    rows: list[list[tuple[str, str]]] = [[]]
    used = 0
    for piece in pieces:
        for char in piece.text:
            if char == "\n":
                rows.append([])
                used = 0
                continue
            char = visible(char)
            if used + cells(char) > width:
                rows.append(_carried(rows[-1]))
                used = sum(cells(c) for c, _ in rows[-1])
            rows[-1].append((char, piece.style))
            used += cells(char)
    return [_row(row, width if pad else 0) for row in rows]


def _carried(row: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Takes the unfinished word off a full row, for the next one; nothing where the row is one word."""
    at = next((i for i in reversed(range(len(row))) if row[i][0] == " "), len(row))
    word = row[at + 1 :]
    del row[at + 1 :]
    return word


def _row(row: Sequence[tuple[str, str]], width: int) -> str:
    parts, last = [], ""
    for char, style in row:
        if style != last:
            parts.append((_RESET if last else "") + style)
            last = style
        parts.append(char)
    return "".join(parts) + (_RESET if last else "") + " " * max(0, width - sum(cells(char) for char, _ in row))


# --- live ----------------------------------------------------------------------------------------------------


@dataclass
class Live:
    """Shows a growing result: two columns whose unfinished rows are written again, or one text and then the other.

    A row is finished when no later token can change it; finished rows are never touched again.
    """

    out: TextIO
    width: int
    height: int
    started: bool = False
    rows_done: int = 0
    """Finished rows that stand on the terminal"""
    rows_open: int = 0
    """Rows below them that will be written again"""
    tops: list[float] = field(default_factory=list)
    """Highest activation of each feature so far: the full shade. Finished rows keep the shade they were given."""
    final: int = 0
    """Rows that no later token can change"""

    def __call__(self, result: SteerGenerateResult) -> None:
        texts = (result.unsteered, result.steered)
        for text in texts:
            for token in text.tokens[-1:] if self.started else text.tokens:  # a step adds one token to each text
                self.tops = self.tops or [0.0] * len(token.activations)
                self.tops = [max(a, b or 0.0) for a, b in zip(self.tops, token.activations, strict=True)]
        if not self.started:
            self._start(result)
        self._write(self._rows(texts), last=False)

    def finish(self, result: SteerGenerateResult) -> None:
        """Writes the rest: open rows, the second text where there is one column, the summary."""
        self._write(self._rows((result.unsteered, result.steered)), last=True)
        if not self.columns:
            self.rows_done = self.rows_open = 0
            self.out.write("\nsteered\n")
            self._write(self._column(result.steered, self.width), last=True)
        self.out.write("\n" + "\n".join(_foot(result, self.width, ansi=True)) + "\n")
        self.out.flush()

    @property
    def columns(self) -> bool:
        return self.width >= SIDE_BY_SIDE

    def _start(self, result: SteerGenerateResult) -> None:
        self.started = True
        prompt = _wrapped(_shaded(result.unsteered.tokens, False, self.tops), self.width)
        head = [*_head(result, self.width), "", "prompt", *prompt, ""]
        half = (self.width - len(_GAP)) // 2
        head.append(f"{_LABELS[0]:{half}}{_GAP}{_LABELS[1]}" if self.columns else _LABELS[0])
        self.out.write("\n".join(head) + "\n")

    def _column(self, text: Continuation, width: int) -> list[str]:
        return _wrapped(_shaded(text.tokens, True, self.tops), width, pad=self.columns)

    def _rows(self, texts: tuple[Continuation, Continuation]) -> list[str]:
        if not self.columns:
            rows = self._column(texts[0], self.width)
            self.final = len(rows) - 1
            return rows
        half = (self.width - len(_GAP)) // 2
        left, right = (self._column(text, half) for text in texts)
        count = max(len(left), len(right))
        # Of a text that goes on, the last row may change and rows below it may come.
        going = [len(rows) - 1 for rows, text in ((left, texts[0]), (right, texts[1])) if not text.ended]
        self.final = min(going, default=count)
        left, right = ([*rows, *[" " * half] * (count - len(rows))] for rows in (left, right))
        return [f"{a}{_GAP}{b}" for a, b in zip(left, right, strict=True)]

    def _write(self, rows: list[str], last: bool) -> None:
        """Writes all rows but the finished ones again; before the end no more than fit on the terminal."""
        fresh = rows[self.rows_done :]
        if not last:
            fresh = fresh[: max(1, self.height - 2)]
        back = f"\x1b[{self.rows_open}A" if self.rows_open else ""
        self.out.write(f"{back}\r\x1b[J" + "".join(f"{row}\n" for row in fresh))
        self.out.flush()
        finished = max(0, min(self.final - self.rows_done, len(fresh)))
        self.rows_done += finished
        self.rows_open = len(fresh) - finished
