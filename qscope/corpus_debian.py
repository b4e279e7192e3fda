"""Text of Debian documentation packages in twelve languages, read out of the .deb files.

Three kinds: the Debian reference (the same book in every language), manual pages (mostly translations of the
same pages) and fortunes (quotes, verses, jokes). The packages are fetched by name and sha256 and never
installed; the text keeps its free licence (GPL, GFDL, BSD-like; `usr/share/doc/*/copyright` in each package)
and is never redistributed. Pieces that are not prose of the language are left out: listings, tables, markup,
and paragraphs that were not translated, as far as `is_prose` can tell.
"""

import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from qscope.corpus import Document
from qscope.corpus_troff import join_lines, paragraphs
from qscope.errors import InputError
from qscope.packages import Package, fetch

_TABLE = """\
en debian-reference-en 2.100 1704872 9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f
en manpages 6.03-2 1331652 efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91
en fortunes 1:1.99.1-7.3 848988 41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5
de debian-reference-de 2.100 1883880 3b0ce65fd63e75ddf8eb07ca36293425135080e690a07e06a6ac8bc8040ef0aa
de manpages-de 4.18.1-1 3615560 37d2e7ee51f22952aecec3af93647ff59194a3c74bb7a694560f49c7f7ab3978
de fortunes-de 0.35-1 904952 03fe7a7912935bd3d4e02e38d79ef32a289097f8718d4488c409595abce067a0
fr debian-reference-fr 2.100 1859084 01424cba9bfa2e13166da22d3d692d33a22ec7d8ef935ec81fd8802746087f65
fr manpages-fr 4.18.1-1 1899104 ec29759cc0e4a44dc7719c1e32869d0060667049e584f09556f0d982b969ea33
es debian-reference-es 2.100 1844336 a59b68c96f83d3cf29a476c847aee38364764603ea62eee592791e0a843a269e
es manpages-es 4.18.1-1 1018264 d21e9f85e487f149ae45b5c525b2b1a70ae7fd38d4b05b47c8753042c66f4c2b
es fortunes-es 1.36 317920 54636edc1a4384093b68d1666c7e702ce42d1fcc8b5ab402d9646c328dcca899
it debian-reference-it 2.100 1817192 7894062a5e9203a57ec6cb8d6a47d5ffb58c41dc004766522f1b4d78b2a8e0c6
it manpages-it 4.18.1-1 436864 4b18e87cc1b6a930d40949ddc86fb8e84b50da1a862cd17e2a504eeb8e3b4e48
it fortunes-it 1.99-4.1 522292 675df6ecb00c3b67d06b39ab223ff17f1ef1d0ec82a7e40f989356a2eb61a97e
pt debian-reference-pt 2.100 1799076 c9c5d30a8608485bad60f7bd7ce6c755af4a129c2b30511ee733b90ac17e7dfa
pl manpages-pl 1:4.18.1-1 1581200 31e518ea8331b5204d4fd0032037f96af1ba94a5afa4f0585dca1996b270cdf9
pl fortunes-pl 0.0.20130525-3 760160 39602aece2081a67c9e95ff7f6e8b0b8fc2cce971e920a31d04133d4ac007ad0
ru manpages-ru 4.18.1-1 1154124 5d5821dad5840652ba9c1c6b85bdc785c1fc52148a71c18fab6658c9659244c0
ru fortunes-ru 1.52-3.1 729496 2dc76af9c0e02e2926d36f88dcb685bb171fab8677e553a6def41efe8a551cc6
uk manpages-uk 4.18.1-1 1120972 7ad64b12010584a6cc10a341ba561a6774e8493166524f386bcd9fd7cbebdd5b
tr manpages-tr 2.0.6-2 848352 babf3ded00dd7c30db8fb333c1ff482fd5a52483d2bffec7557e3f78ed77eef1
ja debian-reference-ja 2.100 2022400 f67140e0b994409413bd5fcc8dfcce832445c99d724401f0275fa238daf30325
ja manpages-ja 0.5.0.0.20221215+dfsg-1 3826632 4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743
zh debian-reference-zh-cn 2.100 1885052 6d2d8d9a646397e28b04cdff23d2e4374101ebf9be348e35961af62c8a2d0977
zh manpages-zh 1.6.4.0-1 4937812 81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1
zh fortunes-zh 2.98 546072 211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105
"""  # language, package, version, bytes, sha256


def _package(row: str) -> tuple[str, str, Package]:
    language, name, version, size, sha256 = row.split()
    kind = name.removeprefix("debian-").split("-")[0]
    file = f"{name}_{version.rpartition(':')[2]}_all.deb"
    licence = "free, file by file: see its copyright file"
    what = f"{kind} in the language {language!r}"
    return language, kind, Package("debian", name, version, file, int(size), sha256, licence, what)


PACKAGES = tuple(_package(row) for row in _TABLE.splitlines())
"""(language, kind, package), the kind being reference, manpages or fortunes"""
LANGUAGES = tuple(dict.fromkeys(language for language, _, _ in PACKAGES))

# Letters of a script of its own: a paragraph with fewer of them was not translated.
_SCRIPTS = {
    "ru": r"[\u0400-\u04ff]",
    "uk": r"[\u0400-\u04ff]",
    "ja": r"[\u3040-\u30ff\u4e00-\u9fff]",
    "zh": r"[\u4e00-\u9fff]",
}
_ENGLISH = re.compile(
    r"\b(?:the|of|and|with|that|this|which|are|is|for|to|not|you|your|be|it|from|when|have)\b", re.IGNORECASE
)
_NOT_ENGLISH = {"pl": re.compile(r"\bto\b", re.IGNORECASE)}
"""little words that look like English ones"""
_MAN_FOLDERS = {"en": "", "zh": "zh_CN/"}
MIN_CHARS = 60
"""of a paragraph; half as many in Chinese and Japanese"""


def documents(language: str, kinds: tuple[str, ...] = ("reference", "manpages", "fortunes")) -> Iterator[Document]:
    """Documents of one language, in a fixed order: sections of the reference, manual pages, single fortunes.

    The paragraphs of a document are separated by blank lines; a paragraph of the first two kinds is one line, and
    stands only where it is met first. `source` is the kind. The key of a section or page is the same in every
    language, so that translations of one text fall on the same side of a split; that of a fortune is its text.
    The packages (1 to 10 MB a language) are fetched when they are not in the cache. Raises InputError for an
    unknown language or kind.
    """
    known = {kind for _, kind, _ in PACKAGES}
    if language not in LANGUAGES or not kinds or not known.issuperset(kinds):
        raise InputError(
            f"Debian texts in {language!r}, kinds {', '.join(kinds) or 'none'}, were asked for; there are the "
            f"languages {', '.join(LANGUAGES)} and the kinds {', '.join(sorted(known))}."
        )
    for code, kind, package in PACKAGES:
        if code == language and kind in kinds:
            yield from read_package(fetch(package), language, kind)


def read_package(deb: Path, language: str, kind: str) -> Iterator[Document]:
    """Documents of one .deb file, in a fixed order."""
    read = {"reference": _reference, "manpages": _manpages, "fortunes": _fortunes}[kind]
    return read(archive_files(deb), language)


def archive_files(deb: Path) -> dict[str, bytes]:
    """The regular files of a .deb (an `ar` archive with a compressed tar inside), by path, sorted.

    Raises InputError for a file that is not one, or is compressed with neither xz nor gzip.
    """
    raw = deb.read_bytes()
    place, member = 8, None
    while raw[:8] == b"!<arch>\n" and place + 60 <= len(raw):
        name = raw[place : place + 16].decode("ascii", "replace").strip().rstrip("/")
        size = raw[place + 48 : place + 58].strip()
        if not size.isdigit():
            break
        if name.startswith("data.tar"):
            member = name, raw[place + 60 : place + 60 + int(size)]
        place += 60 + int(size) + int(size) % 2
    try:
        if member is None:
            raise ValueError("it has no data.tar")
        name, content = member
        if name == "data.tar.xz":
            content = lzma.decompress(content)
        elif name == "data.tar.gz":
            content = gzip.decompress(content)
        elif name != "data.tar":
            raise ValueError(f"{name} is compressed in another way than xz or gzip")
        found = {}
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for info in archive:
                file = archive.extractfile(info) if info.isreg() else None
                if file is not None:
                    found[info.name.removeprefix("./")] = file.read()
    except (ValueError, EOFError, OSError, lzma.LZMAError, tarfile.TarError) as error:
        raise InputError(f"{deb} is no readable Debian package: {error}. Give a .deb file.") from error
    return dict(sorted(found.items()))


def is_prose(text: str, language: str) -> bool:
    """Whether a paragraph is running text of the language: long enough, mostly letters, in the script of the
    language, and, in a language with Latin script, without the little words of English (12 % and up)."""
    wide = language in ("ja", "zh")
    letters = sum(character.isalpha() for character in text)
    visible = sum(not character.isspace() for character in text)
    if len(text) < (MIN_CHARS // 2 if wide else MIN_CHARS) or letters < 0.7 * visible:
        return False
    if language in _SCRIPTS:
        return len(re.findall(_SCRIPTS[language], text)) >= 0.5 * letters
    words = len(text.split())
    if words < 6 or language == "en":
        return words >= 6
    own = _NOT_ENGLISH.get(language)
    return len(_ENGLISH.findall(own.sub("", text) if own else text)) < 0.12 * words


def _prose(texts: list[str], language: str, seen: set[str]) -> str:
    """The paragraphs that are prose and were not met before (`seen` grows), without credits and addresses."""
    kept = []
    for text in texts:
        if text not in seen and not re.search(r"<[^>]*[@:/][^>]*>", text) and is_prose(text, language):
            seen.add(text)
            kept.append(text)
    return "\n\n".join(kept)


def _manpages(files: dict[str, bytes], language: str) -> Iterator[Document]:
    folder = f"usr/share/man/{_MAN_FOLDERS.get(language, f'{language}/')}man"
    seen: set[str] = set()
    for name, raw in files.items():
        page = re.fullmatch(r"\d[^/]*/([^/]+)\.gz", name.removeprefix(folder)) if name.startswith(folder) else None
        if page is None:
            continue
        source = gzip.decompress(raw).decode("utf-8", errors="replace")
        prose = _prose(paragraphs(source), language, seen)
        if prose:
            yield Document("manpages", f"manpages {page.group(1)}", prose)


def _reference(files: dict[str, bytes], language: str) -> Iterator[Document]:
    seen: set[str] = set()
    for name, raw in files.items():
        if not name.endswith(".txt.gz"):
            continue
        text = gzip.decompress(raw).decode("utf-8", errors="replace")
        parts = re.split(r"^(\d+\.\d+)\.\s.*$", text, flags=re.MULTILINE)  # flush left: a heading
        for number, body in zip(parts[1::2], parts[2::2], strict=True):
            blocks = [block for block in re.split(r"\n\s*\n", body) if not _is_listing(block)]
            texts = [join_lines(block.splitlines()).removeprefix("* ") for block in blocks]
            prose = _prose(texts, language, seen)
            if prose:
                yield Document("reference", f"reference {number}", prose)


def _is_listing(block: str) -> bool:
    """A table, or something to type."""
    return "|" in block or re.search(r"^\s*[$#] |^\s*\+-", block, re.MULTILINE) is not None


def _fortunes(files: dict[str, bytes], language: str) -> Iterator[Document]:
    seen: set[str] = set()
    for name, raw in files.items():
        if not re.fullmatch(r"usr/share/games/fortunes/(?!off/|ascii-art).*(?<!\.dat)(?<!\.u8)", name):
            continue
        text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", raw.decode("utf-8", errors="replace"))
        for piece in re.split(r"^%.*$", text, flags=re.MULTILINE):
            lines = [re.sub(r"\s+", " ", line).strip() for line in piece.strip().splitlines()]
            fortune = "\n".join(lines)
            if fortune not in seen and is_prose(fortune, language):
                seen.add(fortune)
                yield Document("fortunes", fortune[:200], fortune)
