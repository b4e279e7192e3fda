"""Manual pages (troff, the `man` macros) as plain paragraphs of prose.

Only running text is kept: headings, the tags of lists, tables, listings and synopses go. A page written with
the `mdoc` macros gives nothing. Meant for text corpora, not for reading a manual.
Source of the requests and escapes: groff(7), groff_man(7), groff_char(7).
"""

import re

_BREAKS = {"PP", "LP", "P", "TP", "TQ", "IP", "HP", "SH", "SS", "RS", "RE", "sp", "Sp", "br", "TH", "SY", "YS"}
_FONTS = {"B": " ", "I": " ", "SM": " ", "SB": " ", "R": " ", **dict.fromkeys(["BR", "IR", "RB", "RI", "BI", "IB"], "")}
_BLOCKS = {"TS": "TE", "nf": "fi", "EX": "EE", "Vb": "Ve", "EQ": "EN", "SY": "YS"}
_CHARACTERS = {
    "aq": "'", "dq": "\"", "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–", "hy": "-", "ti": "~",
    "ha": "^", "rs": "\\", "ga": "`", "Fo": "«", "Fc": "»", "fo": "‹", "fc": "›", "bu": "•", "co": "©", "rg": "®",
    "tm": "™", "<=": "≤", ">=": "≥", "!=": "≠", "->": "→", "<-": "←", "mu": "×", "pl": "+", "mi": "−", "ss": "ß",
    "OE": "Œ", "oe": "œ", "ae": "æ", "AE": "Æ", "/o": "ø", "/O": "Ø", "/l": "ł", "/L": "Ł", "bs": "\\", "at": "@",
    "sh": "#", "Do": "$", "ba": "|", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "de": "°", "+-": "±", "12": "½",
    "bq": "‚", "Bq": "„", "eu": "€", "Eu": "€",
}  # fmt: skip
_ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327", "o": "\u030a"}
_STRINGS = {"lq": "“", "rq": "”", "R": "®", "Tm": "™"}
_ESCAPE = re.compile(
    r"""\\(?:
      (?P<comment>["\#]) .*
    | (?: \( (?P<two>..) | \[ (?P<long>[^]]*) \] | C'(?P<named>[^']*)' )
    | \* (?: \( (?P<string2>..) | \[ (?P<string>[^]]*) \] | (?P<string1>.) )
    | [fFmMnkgY] (?: \( .. | \[ [^]]* \] | [+-]?. )
    | s (?: \( .. | \[ [^]]* \] | '[^']*' | [+-]? \d{1,2} )
    | [hvwlLDNboxXZRHSAB] ' [^']* '
    | (?P<one>.)
    )""",
    re.VERBOSE,
)
_ONE = {"-": "-", " ": " ", "~": " ", "0": " ", "e": "\\", "\\": "\\", "'": "'", "`": "`", ".": ".", "t": " "}
_WIDE = r"[\u1100-\u11ff\u2e80-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef]"


def paragraphs(source: str) -> list[str]:
    """The paragraphs of one page, each on one line."""
    if re.search(r"^\.Dd\b", source, re.MULTILINE):  # mdoc
        return []
    reader = _Reader()
    for line in source.splitlines():
        reader.take(line.rstrip())
    reader.end_paragraph()
    return reader.found


class _Reader:
    def __init__(self) -> None:
        self.found: list[str] = []
        self._lines: list[str] = []
        self._until: str | None = None  # the request that ends what is being left out
        self._depth = 0  # of \{ \} of a condition
        self._tag_follows = False

    def take(self, line: str) -> None:
        if self._depth:
            self._depth += line.count(r"\{") - line.count(r"\}")
            return
        request = re.match(r"[.'][ \t]*([^\s\\]+)?[ \t]*(.*)", line)
        name, rest = (request.group(1) or "", request.group(2)) if request else ("", "")
        if self._until is not None:
            if request and (name == self._until or line.strip() == self._until):
                self._until = None
        elif request is None:
            self._text(line)
        elif name in ("if", "ie", "el", "while"):
            self._depth = max(0, rest.count(r"\{") - rest.count(r"\}"))
        elif name in ("de", "de1", "am", "ig"):
            words = rest.split()
            ender = words[0 if name == "ig" else 1 :][:1]
            self._until = ender[0] if ender else "."
        elif name in _FONTS:
            words = [a or b for a, b in re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', re.sub(r'\\".*', "", rest))]
            if words:
                self._text(_FONTS[name].join(words))
        elif name in _BREAKS or name in _BLOCKS:
            self.end_paragraph()
            self._until = _BLOCKS.get(name)
            self._tag_follows = name in ("TP", "TQ")
            if name in ("SH", "SS") and not rest:
                self._tag_follows = True  # the heading is the next line
        elif name in ("UE", "ME") and self._lines:
            self._lines[-1] += rest  # the mark that follows a link

    def _text(self, line: str) -> None:
        if not line:
            self.end_paragraph()
        elif self._tag_follows:
            self._tag_follows = False
        elif line[0] in " \t":  # an indented line is a listing
            self.end_paragraph()
        else:
            self._lines.append(_ESCAPE.sub(_escape, line))

    def end_paragraph(self) -> None:
        text = join_lines(self._lines)
        self._lines = []
        if text:
            self.found.append(text)


def _escape(match: re.Match[str]) -> str:
    name = match.group("two") or match.group("long") or match.group("named")
    if name:
        if name in _CHARACTERS:
            return _CHARACTERS[name]
        if re.fullmatch(r"u[0-9A-F]{4,5}", name):
            return chr(int(name[1:], 16))
        if len(name) == 2 and name[0] in _ACCENTS and name[1].isalpha():
            import unicodedata

            return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
        return ""
    string = match.group("string2") or match.group("string") or match.group("string1")
    if string:
        return _STRINGS.get(string, "")
    return _ONE.get(match.group("one") or "", "")


def join_lines(lines: list[str]) -> str:
    """Lines of one paragraph as one line; no space goes between two wide characters (Chinese, Japanese)."""
    text = re.sub(r"\s+", " ", "\n".join(line.strip() for line in lines).replace("\n", "\ue000"))
    text = re.sub(rf"(?<={_WIDE})\ue000(?={_WIDE})", "", text)
    return re.sub(r"\s+", " ", text.replace("\ue000", " ")).strip()
