"""Text to pieces, shards, windows and batches: what is read, what is counted, what is refused."""

import gzip
import io
import itertools
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope import data
from qscope.data import (
    Piece,
    ReadCounts,
    TextOptions,
    batches,
    find_sources,
    read_pieces,
    text_shards,
    tokenize,
)
from qscope.errors import InputError


def read(*paths, **options):
    counts = ReadCounts()
    opts = TextOptions(**options)
    return list(read_pieces(find_sources(paths, opts), opts, counts)), counts


def jsonl(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_formats_give_the_same_documents(tmp_path):
    texts = ["first text", "zweiter Text: äöü", "third\nwith a line"]
    rows = [{"id": i, "text": t} for i, t in enumerate(texts)]
    plain = jsonl(tmp_path / "a.jsonl", *rows)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": texts, "id": [0, 1, 2]}), table)
    expected = [Piece(i, t) for i, t in enumerate(texts)]
    for path in (plain, packed, table):
        assert read(path)[0] == expected


def test_folder_is_read_in_sorted_order_and_other_files_are_left(tmp_path):
    (tmp_path / "b.txt").write_text("bb")
    (tmp_path / "a.md").write_text("aa")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "sub" / "c.jsonl", {"text": "cc"})
    assert read(tmp_path)[0] == [Piece(0, "aa"), Piece(1, "bb"), Piece(2, "cc")]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("S", (), {"buffer": io.BytesIO(b"piped text")})())
    assert read("-")[0] == [Piece(0, "piped text")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "missing.txt", "no file or folder"),
        (lambda d: d, "holds no text"),
        (lambda d: _write(d / "x.bin", b"abc"), "does not tell its format"),
        (lambda d: jsonl(d / "x.jsonl", {"body": "t", "id": 1}), "no field 'text'. Its fields: body, id"),
        (lambda d: jsonl(d / "x.jsonl", "[1, 2]"), "are lists, not objects"),
        (
            lambda d: _write(d / "x.jsonl.gz", gzip.compress(b'{"text": "abc"}' * 50)[:-12]),
            "cannot be read to its end",
        ),
        (lambda d: _write(d / "x.parquet", b"PAR1 nonsense"), "not a readable Parquet file"),
    ],
)
def test_bad_input_is_refused_in_one_paragraph(tmp_path, make, message):
    with pytest.raises(InputError) as error:
        read(make(tmp_path))
    assert message in str(error.value)
    assert "\n\n" not in str(error.value)


def _write(path, content):
    path.write_bytes(content)
    return path


def test_unusable_rows_are_counted_or_refused(tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        {"text": "good"},
        "{broken",
        {"text": None},
        {"text": 3},
        {"other": 1},
        {"text": ""},
        {"text": "last"},
    )
    pieces, counts = read(path)
    assert pieces == [Piece(0, "good"), Piece(6, "last")]  # a document's number is its row
    assert counts.as_dict() == {"documents": 7, "empty": 1, "skipped": 4, "replaced_bytes": 0}
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read(path, strict=True)


def test_invalid_utf8_is_replaced_and_counted_or_refused(tmp_path):
    path = _write(tmp_path / "x.txt", b"caf\xe9 and \xff\xfe but \xc3\xa9 stays")
    pieces, counts = read(path)
    assert pieces == [Piece(0, "caf\ufffd and \ufffd\ufffd but é stays")]
    assert counts.replaced_bytes == 3
    with pytest.raises(InputError, match="invalid UTF-8 near 'caf'"):
        read(path, strict=True)


def test_invalid_utf8_in_parquet_is_replaced_and_counted(tmp_path):
    """Arrow does not check that its strings are UTF-8."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = pa.array([b"caf\xe9", None, b"fine"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "x.parquet")
    pieces, counts = read(tmp_path / "x.parquet")
    assert pieces == [Piece(0, "caf\ufffd"), Piece(2, "fine")]
    assert (counts.replaced_bytes, counts.skipped) == (1, 1)
    with pytest.raises(InputError, match="row 1 holds invalid UTF-8"):
        read(tmp_path / "x.parquet", strict=True)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    """As root every folder can be listed, so the refusal of the system is played."""
    (tmp_path / "a.txt").write_text("aa")

    def walk(top, onerror):
        yield str(top), [], ["a.txt"]
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "locked")))

    monkeypatch.setattr(data.os, "walk", walk)
    with pytest.raises(InputError, match="locked cannot be read: Permission denied"):
        read(tmp_path)


def test_a_huge_row_is_cut_in_linear_time(tmp_path):
    """Each cut copied the whole rest once: 64 MB would have been 32 GB of copying."""
    text = "word " * (64 << 18)
    pieces, rest = data._cut(text, last=True)
    assert len(pieces) > 1000 and rest == "" and sum(map(len, pieces)) == len(text)


def test_lone_surrogates_bom_and_nul(tmp_path):
    path = _write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "a\\ud800b \\ud83d\\ude00 \\u0000"}')
    pieces, counts = read(path)
    assert pieces == [Piece(0, "a\ufffdb \U0001f600 \0")]
    assert counts.replaced_bytes == 1
    assert read(_write(tmp_path / "y.txt", b"\xef\xbb\xbfplain"))[0] == [Piece(0, "plain")]


def test_a_character_across_read_blocks_survives(tmp_path):
    """Plain text is read in blocks of 1 MiB: put a three-byte character across the border."""
    text = "x" * ((1 << 20) - 1) + "€" + "y"
    pieces, counts = read(_write(tmp_path / "x.txt", text.encode()))
    assert "".join(p.text for p in pieces) == text
    assert counts.replaced_bytes == 0


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \n", max_size=400), st.integers(8, 40))
def test_cut_loses_nothing_and_cuts_before_white_space(text, limit):
    old, data.PIECE_CHARS = data.PIECE_CHARS, limit
    try:
        pieces, rest = data._cut(text, last=True)
    finally:
        data.PIECE_CHARS = old
    assert "".join(pieces) == text and rest == ""
    assert all(len(p) <= limit for p in pieces)
    for before, after in itertools.pairwise(pieces):
        assert after[0] in " \n" or not any(c in " \n" for c in before[limit // 2 + 1 :])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 100))
def test_shards_partition_the_pieces_in_order(sizes, limit):
    pieces = [Piece(i, "x" * size) for i, size in enumerate(sizes)]
    shards = list(text_shards(iter(pieces), limit))
    assert [p for s in shards for p in s.pieces] == pieces
    assert [s.index for s in shards] == list(range(len(shards)))
    assert all(sum(len(p.text) for p in s.pieces) >= limit for s in shards[:-1])
    assert all(sum(len(p.text) for p in s.pieces[:-1]) < limit for s in shards)


def test_shard_key_tells_text_and_boundaries_apart():
    keys = {
        data.TextShard(0, pieces).key()
        for pieces in (
            [Piece(0, "ab"), Piece(1, "c")],
            [Piece(0, "a"), Piece(1, "bc")],
            [Piece(0, "ab"), Piece(2, "c")],
        )
    }
    assert len(keys) == 3


class Words:
    """A tokenizer of one token per character, with the interface of a fast tokenizer's backend."""

    def __init__(self):
        self.backend_tokenizer = self

    def no_truncation(self):
        pass

    no_padding = no_truncation

    def encode_batch_fast(self, texts, add_special_tokens):
        assert not add_special_tokens
        return [type("E", (), {"ids": [ord(c) for c in t]})() for t in texts]


def test_windows_positions_and_carry():
    pieces = [Piece(4, "abcde"), Piece(4, "fg"), Piece(5, ""), Piece(6, "xyz")]
    found = tokenize(Words(), pieces, context_size=4, carry=(4, 10))
    assert "".join(map(chr, found.token)) == "abcdefgxyz"
    assert found.document.tolist() == [4] * 7 + [6] * 3
    assert found.position.tolist() == [10, 11, 12, 13, 14, 15, 16, 0, 1, 2]
    assert found.starts.tolist() == [0, 4, 5, 7, 10]


def test_max_tokens_cuts_exactly():
    for limit in range(1, 9):
        found = tokenize(Words(), [Piece(0, "abcde"), Piece(1, "fgh")], 3, (0, 0), max_tokens=limit)
        assert "".join(map(chr, found.token)) == "abcdefgh"[:limit]
        assert found.starts[-1] == limit


def test_truncation_and_padding_of_the_tokenizer_are_switched_off():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_truncation(4)
    backend.enable_padding(length=8, pad_id=1)
    wrapped = type("T", (), {"backend_tokenizer": backend})()
    assert tokenize(wrapped, [Piece(0, "a " * 10), Piece(1, "a")], 64, (0, 0)).token.tolist() == [0] * 11


@pytest.mark.parametrize(
    "names",
    [
        ("manifest.json", "shards.jsonl", "tokenizer/merges.txt"),
        ("activations.json", "shards.jsonl"),
        ("train.json", "log.jsonl"),
    ],
)
def test_what_qscope_wrote_inside_the_folder_is_not_text(tmp_path, names):
    (tmp_path / "a.txt").write_text("aa")
    (tmp_path / "codes" / "tokenizer").mkdir(parents=True)
    for name in names:
        (tmp_path / "codes" / name).write_text("{}")
    assert read(tmp_path)[0] == [Piece(0, "aa")]


def test_special_token_strings_in_text_stay_text():
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|im_start|>"])
    wrapped = type("T", (), {"backend_tokenizer": backend})()
    assert len(backend.encode("<|im_start|>").ids) == 1
    assert len(tokenize(wrapped, [Piece(0, "<|im_start|>")], 64, (0, 0)).token) == len("<|im_start|>")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_cover_every_window_once_within_budget(lengths, budget):
    starts = np.cumsum([0, *lengths])
    found = list(batches(starts, budget))
    assert sorted(np.concatenate(found)) == list(range(len(lengths)))
    for rows in found:
        padded = len(rows) * max(lengths[r] for r in rows)
        assert padded <= budget or len(rows) == 1
