"""Labelled texts out of hand-made archives."""

import hashlib
import io
import json
import tarfile
from collections import Counter

import pytest

from qscope import corpus_labelled
from qscope.corpus_labelled import Labelled
from qscope.errors import InputError


def tarball(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def md5(text):
    return hashlib.md5(text.encode()).hexdigest()


def test_comments(tmp_path):
    rows = ["0,both", '1,"you\nfool"', '0,"Good, thanks"', "1,both", '0,"Good, thanks"', "0, ", "0, both ", "1,\u00e4"]
    table = "\n".join(["is_offensive,text", *rows])
    path = tarball(
        tmp_path / "sample.tar.gz", {"sample-1/pkg/data/model.joblib": "x", "sample-1/data/clean_data.csv": table}
    )
    found = corpus_labelled.comments(path)
    assert [(text.text, text.label) for text in found] == [
        ("you\nfool", "offensive"),
        ("Good, thanks", "clean"),
        ("\u00e4", "offensive"),
    ]
    assert found[1].key == hashlib.sha256(b"Good, thanks").hexdigest()[:16]
    other = tarball(tmp_path / "other.tar.gz", {"sample-1/data/clean_data.csv": "is_offensive,text\n2,a\n"})
    with pytest.raises(InputError, match="cannot be read: '2'"):
        corpus_labelled.comments(other)
    with pytest.raises(InputError, match=r"holds no data/clean_data\.csv"):
        corpus_labelled.comments(tarball(tmp_path / "none.tar.gz", {"a": "b"}))
    (tmp_path / "cut.tar.gz").write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read to its end"):
        corpus_labelled.comments(tmp_path / "cut.tar.gz")


def test_sentences_share_the_key_of_the_english_one(tmp_path):
    english = tarball(
        tmp_path / "en.tgz", {"package/builds/doc-0.json": '["A cat.", "A dog."]', "package/builds/index.json": "["}
    )
    german = tarball(
        tmp_path / "de.tgz", {"package/builds/doc-3.json": json.dumps([["Ein Hund.", md5("A dog.")], ["Eh", "0"]])}
    )
    en, de = corpus_labelled.sentences(english, True), corpus_labelled.sentences(german, False)
    assert en == {md5("A cat."): "A cat.", md5("A dog."): "A dog."}
    assert [(en[key], de[key]) for key in en if key in de] == [("A dog.", "Ein Hund.")]


def test_lexicon_judges_whole_words(tmp_path):
    path = tarball(tmp_path / "words.tgz", {"package/en.json": '["dick", "two words", "\U0001f595", "a+b"]'})
    words = corpus_labelled.lexicon(path)
    assert words == ["a+b", "dick", "two words"]
    judge = corpus_labelled.offensive_by_lexicon(words)
    assert [
        judge(text) for text in ("a dick!", "dickens", "Philip K. Dick", "Dick is a dick", "in two words", "aab")
    ] == [
        True,
        False,
        None,
        True,
        True,
        False,
    ]


def aligned(count=600):
    english = {md5(f"s{i}"): f"sentence {i}{' bad' if i % 3 == 0 else ''}" for i in range(count)}
    german = {key: text.replace("sentence", "Satz") for key, text in english.items()}
    french = {key: text.replace("sentence", "phrase") for key, text in english.items()}
    german.update({md5(f"s{i}"): english[md5(f"s{i}")] for i in range(60, 120)})  # left as they were
    del french[md5("s2")]
    return {"en": english, "de": german, "fr": french}


def test_labels_are_carried_and_no_sentence_is_used_twice():
    texts = aligned()
    found = corpus_labelled.projected(texts, lambda text: None if "59 bad" in text else "bad" in text)
    assert len({text.key for text in found}) == len(found)
    kept = {int(texts["en"][text.key].split()[1]) for text in found}
    missing = set(range(600)) - kept
    assert {2, 159, 459} <= missing <= {2, 159, 459, *range(60, 120)}  # no French; in doubt
    assert not [text for text in found if text.group == "de" and "sentence" in text.text]
    assert 8 <= len(missing & set(range(60, 120))) <= 33  # those dealt to German: 20 of 60 expected, sd 3.7
    for text in found:
        assert text.text == texts[text.group][text.key]
        assert text.label == ("offensive" if "bad" in texts["en"][text.key] else "clean")
    shares = Counter(text.group for text in found)
    assert min(shares.values()) > 160 and set(shares) == {"de", "en", "fr"}  # 200 expected, sd 11.5


def test_languages_as_labels():
    found = corpus_labelled.dealt(aligned(), "sentences")
    words = {"en": "sentence", "de": "Satz", "fr": "phrase"}
    assert all(text.text.startswith(words[text.label]) and text.group == "sentences" for text in found)
    assert len({text.key for text in found}) == len(found)


def test_passages():
    text = "One two.\n\nthree\n four\n\n\n" + "x" * 50 + "\n\nend"
    found = list(corpus_labelled.passages([("a", text), ("b", text)], "en", "docs", 19))
    assert [(piece.text, piece.key) for piece in found] == [("One two. three four", "a:1"), ("x" * 38, "a:2")]
    assert {(piece.label, piece.group) for piece in found} == {("en", "docs")}


def test_balanced_and_natural_samples():
    texts = [Labelled(f"t{i}", "ab"[i % 10 == 0], "gh"[i % 4 == 0], str(i)) for i in range(1000)]
    cells = Counter((text.group, text.label) for text in texts)
    assert cells == {("g", "a"): 700, ("g", "b"): 50, ("h", "a"): 200, ("h", "b"): 50}
    balanced = corpus_labelled.sample(texts, 240)
    assert Counter((t.group, t.label) for t in balanced) == {
        ("g", "a"): 60,
        ("g", "b"): 50,
        ("h", "a"): 60,
        ("h", "b"): 50,
    }
    natural = corpus_labelled.sample(texts, 400, balanced=False)
    assert abs(sum(text.label == "b" for text in natural) - 40) < 20  # sd 4.6
    assert corpus_labelled.sample(texts[::-1], 100) == corpus_labelled.sample(texts, 100)
    assert set(corpus_labelled.sample(texts, 100)) < set(corpus_labelled.sample(texts, 200))
    assert corpus_labelled.sample(texts, 100, seed=1) != corpus_labelled.sample(texts, 100)
    assert corpus_labelled.sample([], 5) == []


def test_write(tmp_path):
    path = tmp_path / "out.jsonl"
    assert corpus_labelled.write([Labelled("a\nb \u00e9", "en", "docs", "k")], path) == 1
    assert path.read_text(encoding="utf-8") == '{"text": "a\\nb \u00e9", "label": "en", "group": "docs", "key": "k"}\n'
