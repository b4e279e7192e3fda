"""Rows with fields from the four kinds of files, and the texts that templates make of them."""

import gzip
import json

import pytest

from qscope.errors import InputError
from qscope.records import Record, RecordCounts, TextMaker, check_fields, read_records, require

ROWS = [{"text": "one\nline", "label": 1}, {"text": 'zwei, "drei"', "label": 0}, {"text": "", "label": 1}]


def write(path, rows):
    if path.suffix == ".csv":
        path.write_text('text,label\n"one\nline",1\n"zwei, ""drei""",0\n"",1\n')
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, which is an extra")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_all_kinds_of_files_give_the_same_rows(tmp_path, name):
    counts = RecordCounts()
    found = read_records(write(tmp_path / name, ROWS), counts)
    assert [record.number for record in found] == [0, 1, 2]
    assert [record.fields["text"] for record in found] == [row["text"] for row in ROWS]
    assert [str(record.fields["label"]) for record in found] == ["1", "0", "1"]
    assert counts.as_dict() == {"rows": 3, "broken": 0, "replaced": 0}


def test_broken_rows_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\nnonsense\n[1]\n{"a": "\xff"}\n' + b"[" * 5000 + b"\n")
    counts = RecordCounts()
    assert read_records(path, counts) == [Record(0, {"a": 1}), Record(3, {"a": "\ufffd"})]
    assert counts.as_dict() == {"rows": 5, "broken": 3, "replaced": 1}
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n1\n1,2,3\n3,4\n")
    counts = RecordCounts()
    assert read_records(path, counts) == [Record(0, {"a": "1", "b": "2"}), Record(3, {"a": "3", "b": "4"})]
    assert counts.broken == 2


def test_a_long_csv_field_is_read_and_the_limit_put_back(tmp_path):
    import csv

    before = csv.field_size_limit()
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(read_records(path)[0].fields["text"]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"x", "does not tell its format"),
        ("b.jsonl", None, "There is no file"),
        ("c.jsonl", b"", "holds no usable row"),
        ("d.jsonl", b"nonsense\n", "1 broken ones were left out"),
        ("e.jsonl.gz", b"\x1f\x8bnot", "cannot be read to its end"),
        ("e2.jsonl.gz", gzip.compress(b"{}" * 100, mtime=0)[:10] + b"\xff" * 40, "cannot be read to its end"),
        ("f.parquet", b"PAR1", "not a readable Parquet file"),
        ("g.csv", b"a,a\n1,2\n", "names a column twice"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / name)


def test_templates():
    record = Record(4, {"q": "Why?", "choices": ["yes", 2, None], "n": 3, "d": {"b": "é"}, "a.b": "dot", "s": "\ud800"})
    assert TextMaker(template="Q: {q}\\n{choices}\\t{n} {{x}}")(record) == "Q: Why?\nyes\n2\n\t3 {x}"
    assert TextMaker("a.b")(record) == "dot"
    assert TextMaker("d")(record) == '{"b": "é"}'
    assert TextMaker("s")(record) == "\ufffd"
    assert TextMaker(template="{n}|{m}")(Record(0, {"n": float("nan"), "m": 0.5})) == "|0.5"
    assert TextMaker(template="{q}{n}{q}").fields == ("q", "n")


@pytest.mark.parametrize("template", ["{q", "plain", "{}", "{q!r}", "{q:>10}", "q}"])
def test_templates_that_cannot_be_used_are_refused(template):
    with pytest.raises(InputError, match=r"[Tt]emplate"):
        TextMaker(template=template)


def test_a_missing_field_is_named_with_those_there_are(tmp_path):
    records = [Record(0, {"a": 1, "b": 2}), Record(1, {"a": 1})]
    with pytest.raises(InputError, match=r"has no field 'c'. Its fields: a, b. Name the right one with --field"):
        check_fields(tmp_path / "x.jsonl", records, ["a", "c"], "--field")
    with pytest.raises(InputError, match=r"Row 2 of .* has no field 'b'"):
        require(tmp_path / "x.jsonl", records[1], TextMaker("b"))
