"""The journal: batches come back in order, half a line is forgotten, two at once are refused."""

import json

import pytest

from qscope.errors import StoreError
from qscope.journal import JOURNAL
from qscope.synthesis.journal import BatchJournal

OPTIONS = {"budget": 3, "sources": ["chat"]}


def test_batches_are_found_again(tmp_path):
    with BatchJournal(tmp_path / "run", OPTIONS) as journal:
        assert journal.add("a", [{"text": "ü\n"}]) == [{"text": "ü\n"}]
        journal.add("b", [1])
        journal.add("a", [2])
    with BatchJournal(tmp_path / "run", OPTIONS) as journal:
        assert journal.batches("a") == [[{"text": "ü\n"}], [2]] and journal.batches("b") == [[1]]
        assert journal.batches("c") == []


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    with BatchJournal(tmp_path, OPTIONS) as journal:
        journal.add("a", [1])
        journal.add("a", [2])
    whole = (tmp_path / JOURNAL).read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):  # every byte of the second line
        (tmp_path / JOURNAL).write_bytes(whole[:cut])
        with BatchJournal(tmp_path, OPTIONS) as journal:
            assert journal.batches("a") == [[1]]
            journal.add("a", [2])
        assert (tmp_path / JOURNAL).read_bytes() == whole


def test_two_at_once_and_other_options_are_refused(tmp_path):
    with (
        BatchJournal(tmp_path, OPTIONS),
        pytest.raises(StoreError, match="another process"),
    ):
        BatchJournal(tmp_path, OPTIONS)
    with pytest.raises(StoreError, match="budget: 3 -> 4"):
        BatchJournal(tmp_path, {**OPTIONS, "budget": 4})
    BatchJournal(tmp_path, OPTIONS).close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "damaged in line 2"),
        ("no json", "damaged in line 2"),
        (json.dumps({"key": ["a", 5], "value": []}), "batch 5 of a stands where 1 belongs"),
        (json.dumps({"key": ["a"], "value": []}), "not the journal of a synthesis"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    with BatchJournal(tmp_path, OPTIONS) as journal:
        journal.add("a", [1])
    with open(tmp_path / JOURNAL, "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(StoreError, match=message):
        BatchJournal(tmp_path, OPTIONS)
    with pytest.raises(StoreError, match=message):  # and not: in use by another process
        BatchJournal(tmp_path, OPTIONS)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="not a synthesis run"):
        BatchJournal(tmp_path, OPTIONS)
