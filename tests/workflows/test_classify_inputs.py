"""Labelled texts out of files: classes, duplicates, conflicts, and what is refused with which words."""

import json

import numpy as np
import pytest

from qscope.errors import InputError
from qscope.workflows.classify_inputs import read_labelled


def rows(path, *found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_two_classes_in_order_negative_first_with_groups(tmp_path):
    file = rows(
        tmp_path / "a.jsonl",
        {"text": "x", "label": "1", "lang": "fr"},
        {"text": "y", "label": 0, "lang": "en"},
        {"text": "z", "label": 1.0, "lang": "en"},
    )
    found = read_labelled([file], group_field="lang")
    assert found.names == ("0", "1") and found.groups == ("en", "fr")
    assert found.label.tolist() == [1, 0, 1] and found.positive.tolist() == [True, False, True]
    assert found.group.tolist() == [1, 0, 0] and found.counts() == {"0": 1, "1": 2}
    assert found.notes() == []


@pytest.mark.parametrize("labels", [(False, True), ("No", "Yes"), ("neg", "pos"), ("negative", "positive"), (-1, 1)])
def test_plain_pairs_need_no_option(tmp_path, labels):
    file = rows(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": labels[i % 2]} for i in range(4)))
    assert read_labelled([file]).label.tolist() == [0, 1, 0, 1]


def test_other_pairs_must_say_which_is_positive(tmp_path):
    file = rows(tmp_path / "a.jsonl", {"text": "a", "label": "spam"}, {"text": "b", "label": "ham"})
    with pytest.raises(InputError, match=r"--positive spam, or --positive ham"):
        read_labelled([file])
    found = read_labelled([file], positive="ham")
    assert found.names == ("spam", "ham") and found.label.tolist() == [0, 1]


def test_several_labels_are_refused_unless_said_how(tmp_path):
    file = rows(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": "bca"[i % 3]} for i in range(6)))
    with pytest.raises(InputError, match=r"3 labels: a, b, c. Say --multiclass .* or --positive LABEL"):
        read_labelled([file])
    found = read_labelled([file], multiclass=True)
    assert found.names == ("a", "b", "c") and found.label.tolist() == [1, 2, 0, 1, 2, 0] and found.multiclass
    found = read_labelled([file], positive="c")
    assert found.names == ("not c", "c") and found.label.tolist() == [0, 1, 0, 0, 1, 0]
    with pytest.raises(InputError, match=r"Give one of them"):
        read_labelled([file], positive="c", multiclass=True)
    with pytest.raises(InputError, match=r"no text has that label.*a, b, c"):
        read_labelled([file], positive="d")


@pytest.mark.parametrize("multiclass", [False, True])
def test_one_class_only_is_refused(tmp_path, multiclass):
    file = rows(tmp_path / "a.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 1})
    with pytest.raises(InputError, match=r"All 2 texts have the label '1'"):
        read_labelled([file], multiclass=multiclass)


def test_duplicates_are_counted_and_dropped_and_conflicts_counted(tmp_path):
    file = rows(
        tmp_path / "a.jsonl",
        *({"text": t, "label": y} for t, y in [("a", 1), ("b", 0), ("a", 0), ("b", 0), ("b", 0), ("c", 1)]),
    )
    kept = read_labelled([file])
    assert len(kept) == 6 and (kept.facts.duplicates, kept.facts.dropped, kept.facts.conflicts) == (3, 0, 1)
    assert any("3 rows repeat" in note for note in kept.notes())
    dropped = read_labelled([file], drop_duplicates=True)
    assert dropped.texts == ("a", "b", "c") and dropped.label.tolist() == [1, 0, 1]
    assert (dropped.facts.duplicates, dropped.facts.dropped, dropped.facts.conflicts) == (3, 3, 1)


def test_rows_without_text_or_label_and_broken_ones_are_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = ['{"text": "a", "label": 1}', '{"text": " ", "label": 1}', "{broken", '{"text": "b", "label": null}']
    file.write_text("\n".join([*lines, '{"text": "c", "label": false}', '{"text": "d", "label": true}']))
    with pytest.raises(InputError, match=r"3 labels"):
        read_labelled([file])
    found = read_labelled([file], positive="1")
    facts = found.facts
    assert (facts.rows, facts.broken, facts.empty, facts.unlabelled) == (6, 1, 1, 1) and found.texts == ("a", "c", "d")
    assert found.names == ("not 1", "1")


def test_unknown_fields_are_listed(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("comment,toxic\nx,0\ny,1\n")
    with pytest.raises(InputError, match=r"no field 'text'. Its fields: comment, toxic.*--text-field"):
        read_labelled([file])
    with pytest.raises(InputError, match=r"no field 'label'.*--label-field"):
        read_labelled([file], text_field="comment")
    with pytest.raises(InputError, match=r"no field 'lang'.*--group-field"):
        read_labelled([file], text_field="comment", label_field="toxic", group_field="lang")
    found = read_labelled([file], text_field="{comment}!", label_field="toxic")
    assert found.texts == ("x!", "y!") and found.label.tolist() == [0, 1]


def test_a_larger_sample_holds_a_smaller_one(tmp_path):
    file = rows(tmp_path / "a.jsonl", *({"text": f"t{i}", "label": i % 2} for i in range(60)))
    large, small = (read_labelled([file], max_texts=n, seed=3) for n in (40, 20))
    assert len(large) == 40 and len(small) == 20 and set(small.texts) < set(large.texts)
    assert small.facts.sampled_from == 60
    places = [int(text[1:]) for text in large.texts]
    assert places == sorted(places) and np.array_equal(large.label, np.array(places) % 2)
    assert set(read_labelled([file], max_texts=20, seed=4).texts) != set(small.texts)


def test_two_labels_with_multiclass_are_refused(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{i}", "label": "ab"[i % 2]}) + "\n" for i in range(4)))
    with pytest.raises(InputError, match=r"holds two labels: a, b\. Leave --multiclass out; --positive b"):
        read_labelled([file], multiclass=True)


def test_a_label_that_no_file_can_hold_is_written_with_a_mark(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{i}", "label": ["a\ud800", "b"][i % 2]}) + "\n" for i in range(4)))
    assert read_labelled([file], positive="b").names == ("a?", "b")
