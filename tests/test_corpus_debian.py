"""Debian texts: hand-made packages through the whole reader, and the real ones where they are to be had."""

import gzip
import hashlib
import io
import lzma
import tarfile
import time

import pytest

from qscope import corpus_debian, packages
from qscope.corpus import Document
from qscope.errors import InputError

PROSE = {
    "en": "The files of the folder are listed one after the other, and the hidden ones are left out of it.",
    "de": "Die Dateien des Ordners werden der Reihe nach aufgelistet, versteckte Dateien jedoch nicht.",
    "ru": "Файлы каталога выводятся один за другим, скрытые файлы при этом пропускаются полностью.",
    "ja": "フォルダの中のファイルを順番に表示する。ただし隠しファイルは表示しないものとする。",
}


def make_deb(path, files: dict[str, bytes], pack=lzma.compress, member="data.tar.xz", links=()):
    """A package as dpkg-deb writes it: debian-binary, control.tar, data.tar in an `ar` archive."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name in links:
            info = tarfile.TarInfo(f"./{name}")
            info.type, info.linkname = tarfile.SYMTYPE, "nowhere"
            archive.addfile(info)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", member: pack(data.getvalue())}
    raw = b"!<arch>\n"
    for name, content in members.items():
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        raw += b"\n" * (len(content) % 2)
    path.write_bytes(raw)
    return path


def page(*texts: str) -> bytes:
    return gzip.compress(b".TH X 1\n" + b"".join(b".PP\n" + text.encode() + b"\n" for text in texts))


def test_manual_pages(tmp_path):
    files = {
        "usr/share/man/de/man8/b.8.gz": page(PROSE["de"], "zu kurz", PROSE["en"]),
        "usr/share/man/de/man1/a.1.gz": page(PROSE["de"].replace("Ordners ", "Ordners\n"), "Noch ein Satz. " * 8),
        "usr/share/man/man1/c.1.gz": page(PROSE["de"] + "x"),  # of another language
        "usr/share/doc/x/copyright": b"GPL",
    }
    deb = make_deb(tmp_path / "m.deb", files, links=["usr/share/man/de/man1/link.1.gz"])
    first = f"{PROSE['de']}\n\n{('Noch ein Satz. ' * 8).strip()}"
    # The page of section 8 holds only a paragraph met before, a short one and one that was not translated.
    assert list(corpus_debian.read_package(deb, "de", "manpages")) == [Document("manpages", "manpages a.1", first)]
    assert [d.key for d in corpus_debian.read_package(deb, "en", "manpages")] == ["manpages c.1"]


def test_reference_is_cut_into_sections(tmp_path):
    text = f"""
1.1. Contents

1.1. Erste\u00e4 Schritte

    {PROSE["de"][:40]}
    {PROSE["de"][40:].strip()}

    $ ls -a | {"wort " * 30}

     * {PROSE["de"].replace("Dateien", "Akten")}

    +-----+
    |{"a " * 60}|

1.2.\u00a0Zweites

    nichts
"""
    name = "usr/share/debian-reference/debian-reference.de.txt.gz"
    deb = make_deb(tmp_path / "r.deb", {name: gzip.compress(text.encode())}, gzip.compress, "data.tar.gz")
    joined = PROSE["de"][:40].strip() + " " + PROSE["de"][40:].strip()
    expected = f"{joined}\n\n{PROSE['de'].replace('Dateien', 'Akten')}"
    assert list(corpus_debian.read_package(deb, "de", "reference")) == [
        Document("reference", "reference 1.1", expected)
    ]


def test_fortunes(tmp_path):
    second = "Zweiter Spruch, der ebenfalls lang genug ist und hier in zwei Zeilen steht"
    text = f"\x1b[33m{PROSE['de']}\x1b[m\n\t-- Wer\n%\n{second}\n  mit Ende\n%\nkurz\n%\n{second}\nmit Ende\n"
    base = "usr/share/games/fortunes/"
    files = {
        f"{base}de/x": text.encode(),
        f"{base}de/x.dat": text.encode() * 2,
        f"{base}off/y": (PROSE["de"] + "!").encode(),
        f"{base}ascii-art": (PROSE["de"] + "?").encode(),
    }
    deb = make_deb(tmp_path / "f.deb", files, bytes, "data.tar", links=[f"{base}x.u8"])
    found = list(corpus_debian.read_package(deb, "de", "fortunes"))
    assert [d.text for d in found] == [f"{PROSE['de']}\n-- Wer", f"{second}\nmit Ende"]
    assert found[0].key == found[0].text[:200]


@pytest.mark.parametrize("language", PROSE)
def test_prose_is_told_from_the_rest(language):
    assert corpus_debian.is_prose(PROSE[language], language)
    assert not corpus_debian.is_prose(PROSE[language][:25], language)
    assert not corpus_debian.is_prose("0x00 == 17; $$ ## 12345 " * 9, language)
    for other in {"de", "ru", "ja"} - {language}:
        assert not corpus_debian.is_prose(PROSE["en"], other)
    if language in ("ru", "ja"):
        assert not corpus_debian.is_prose(PROSE["de"], language)


def test_polish_to_is_not_taken_for_english():
    text = "To jest to, co to wszystko znaczy, a to znaczy bardzo wiele dla to czytających ludzi."
    assert corpus_debian.is_prose(text, "pl") and not corpus_debian.is_prose(text, "de")


@pytest.mark.parametrize("content", [b"", b"!<arch>\n", b"PK\x03\x04" * 40])
def test_no_package(tmp_path, content):
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(InputError, match=r"no readable Debian package: it has no data\.tar"):
        corpus_debian.archive_files(tmp_path / "x.deb")


def test_damaged_and_other_compression(tmp_path):
    whole = make_deb(tmp_path / "x.deb", {"a": b"a" * 5000}).read_bytes()
    assert corpus_debian.archive_files(tmp_path / "x.deb") == {"a": b"a" * 5000}
    for cut in range(8, len(whole), 7):
        (tmp_path / "x.deb").write_bytes(whole[:cut])
        with pytest.raises(InputError, match="no readable Debian package"):
            corpus_debian.archive_files(tmp_path / "x.deb")
    deb = make_deb(tmp_path / "y.deb", {"a": b"a"}, member="data.tar.zst")
    with pytest.raises(InputError, match=r"data\.tar\.zst is compressed in another way"):
        corpus_debian.archive_files(deb)


def test_unknown_language_or_kind():
    with pytest.raises(InputError, match=r"'xx'.*there are the languages en, de, fr"):
        list(corpus_debian.documents("xx"))
    with pytest.raises(InputError, match="fortunes, manpages, reference"):
        list(corpus_debian.documents("de", ("songs",)))


def test_the_table_names_real_files():
    assert len(corpus_debian.LANGUAGES) >= 10 and {"en", "ja", "zh", "ru"} <= set(corpus_debian.LANGUAGES)
    for language, kind, package in corpus_debian.PACKAGES:
        assert kind in ("reference", "manpages", "fortunes") and len(language) == 2
        assert package.registry == "debian" and len(package.sha256) == 64 and package.bytes < 5e6
        assert package.file.startswith(f"{package.name}_") and ":" not in package.file
    assert len({package.sha256 for _, _, package in corpus_debian.PACKAGES}) == len(corpus_debian.PACKAGES)


def test_documents_come_from_the_packages_of_the_language(tmp_path, monkeypatch):
    asked = []

    def fetch(package):
        asked.append(package.name)
        name = "usr/share/man/ja/man1/a.1.gz"
        return make_deb(tmp_path / package.file, {name: page(PROSE["ja"])} if "man" in package.name else {})

    monkeypatch.setattr(corpus_debian, "fetch", fetch)
    assert [d.text for d in corpus_debian.documents("ja")] == [PROSE["ja"]]
    assert asked == ["debian-reference-ja", "manpages-ja"]
    assert list(corpus_debian.documents("ja", ("reference",))) == []


@pytest.mark.network
def test_real_package():
    """The Portuguese reference: the same documents every time, and the language that they say."""
    try:
        first = list(corpus_debian.documents("pt"))
    except InputError as error:
        if "could not be fetched" not in str(error) and "not on the PATH" not in str(error):
            raise
        pytest.skip(f"no Debian archive answers: {error}")
    assert (
        hashlib.sha256(repr(first).encode()).digest()
        == hashlib.sha256(repr(list(corpus_debian.documents("pt"))).encode()).digest()
    )
    texts = [text for document in first for text in document.text.split("\n\n")]
    assert len(first) > 80 and len(texts) > 1500
    assert sum(" de " in text or "ção" in text or " o " in text for text in texts) > 0.8 * len(texts)
    assert 0 < sum(document.held_out for document in first) < 0.2 * len(first)
    began = time.process_time()
    list(corpus_debian.documents("pt"))
    assert time.process_time() - began < 20
    assert packages.fetch(corpus_debian.PACKAGES[14][2]).name.endswith("debian-reference-pt_2.100_all.deb")
