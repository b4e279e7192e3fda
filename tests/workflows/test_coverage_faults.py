"""`qscope coverage` given what it cannot use: refused in one paragraph, and before the model runs where possible."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qscope.errors import InputError, StorageError, StoreError
from qscope.files import acquire_lock
from qscope.report import coverage_text
from qscope.workflows.coverage import CoverageConfig, run
from qscope.workflows.coverage_inputs import gather, read_item_scores, read_scores
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encode import run as encode

ITEMS = ("What is two and two?", "How many legs has a spider?", "Who wrote the play?", "Name a river.")


def write(path: Path, lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def config(tmp_path, tiny):
    files = [write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {text}"} for text in ITEMS]) for name in "ab"]
    return CoverageConfig(
        tuple(files), out=tmp_path / "out", model=tiny.model, sae=(tiny.saes[2],), layers=(2,), resamples=4,
        permutations=3, exclusive=1, device="cpu", dtype="float32",
    )  # fmt: skip


# --- benchmarks ------------------------------------------------------------------------------------------


def test_a_feature_store_has_no_other_sae_and_no_fields(config, tiny, tmp_path):
    """The codes of a store were counted as if the other SAE had made them."""
    text = write(tmp_path / "text.jsonl", [{"text": text} for text in ITEMS])
    common = {"model": tiny.model, "sae": (tiny.saes[2],), "layers": (2,), "device": "cpu", "dtype": "float32"}
    encode(EncodeConfig(text=(text,), out=tmp_path / "store", **common))
    both = replace(config, benchmarks=(config.benchmarks[0], str(tmp_path / "store")))
    with pytest.raises(InputError, match="--other-sae was given, and store is a feature store"):
        gather(replace(both, other_sae=(tiny.saes[0],)))
    for change in ({"field_of": ("store=text",)}, {"template_of": ("store={text}",)}):
        with pytest.raises(InputError, match="names store, a feature store"):
            gather(replace(both, **change))
    with pytest.raises(InputError, match="--match-items is 5, and a has 4 items"):
        gather(replace(both, match_items=5))
    assert [b.name for b in gather(replace(both, match_items=4))] == ["a", "store"]


def test_options_that_mean_nothing_are_refused(config):
    with pytest.raises(InputError, match="--seed is -1"):
        replace(config, seed=-1)
    with pytest.raises(InputError, match="name of the field is empty"):
        gather(replace(config, field=""))
    with pytest.raises(InputError, match="both name a"):
        gather(replace(config, field_of=("a=prompt",), template_of=("a={prompt}!",)))


def test_names_that_no_file_system_takes_are_refused(config):
    with pytest.raises(InputError, match=r"cannot be read to its end: .*File name too long"):
        gather(replace(config, benchmarks=("x" * 5000 + ".jsonl",)))


def test_names_that_are_not_utf8_or_grow_in_lower_case(config, tmp_path):
    odd = tmp_path / "\udcff\x1b\u0130.jsonl"  # no UTF-8; a control character; a letter that is two in lower case
    odd.write_text(Path(config.benchmarks[0]).read_text())
    config = replace(config, benchmarks=(config.benchmarks[1], str(odd)), null=False)
    result = run(config)
    assert [b.name for b in result.benchmarks] == ["b", "??\u0130"]
    assert "??\u0130: 4 items" in coverage_text.render(result)  # the page is written, too
    assert (config.out / "coverage.html").read_text(encoding="utf-8").count("??\u0130") > 1


def test_a_folder_in_use_is_left_alone(config):
    config.out.mkdir()
    lock = acquire_lock(config.out)
    try:
        with pytest.raises(StoreError, match="being written by another process"):
            run(config)
    finally:
        lock.release()
    assert sorted(path.name for path in config.out.iterdir()) == [".lock"]
    with pytest.raises(StorageError, match="could not be written"):
        run(replace(config, out=Path(config.benchmarks[0])))


def test_sensitivity_of_one_benchmark_is_said_to_be_none(config):
    result = run(replace(config, benchmarks=config.benchmarks[:1], sensitivity=True, null=False, html=False))
    assert result.sensitivity == () and "no sensitivity: rankings need two benchmarks" in result.notes


# --- scores ----------------------------------------------------------------------------------------------


def test_scores_may_lack_fields_row_by_row(tmp_path):
    rows = [{"model": "m0", "a": 1}, *({"model": f"m{i}", "a": i, "b": -i} for i in (1, 2, 3)), {"a": 4}]
    scores = read_scores(Path(write(tmp_path / "scores.jsonl", rows)), ("a", "b"))
    assert (scores.models, scores.values.tolist()) == (("m1", "m2", "m3"), [[1, -1], [2, -2], [3, -3]])
    assert "2 models lack a score in scores.jsonl and are left out: m0, row 5" in scores.notes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{}, {}], "has no columns"),
        ([{"model": "m", "a": 10**400, "b": 1}], "where a score is expected"),
    ],
)
def test_scores_that_are_none_are_refused(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_scores(Path(write(tmp_path / "scores.jsonl", rows)), ("a", "b"))


def test_item_scores_have_a_row_for_every_row(config, tmp_path):
    """A table without the broken row was read as if it had it: the scores of wrong items."""
    lines = [json.dumps({"prompt": text}) for text in ITEMS]
    path = write(tmp_path / "c.jsonl", [lines[0], "{broken", *lines[1:3], json.dumps({"prompt": ""})])
    (benchmark,) = gather(replace(config, benchmarks=(path,)))
    assert [item.row for item in benchmark.items] == [0, 2, 3]
    scores = [{"id": f"q{i}", "m1": i, "m2": 10 * i, "m3": -i} for i in range(5)]
    models, values, notes = read_item_scores(Path(write(tmp_path / "s.jsonl", scores)), benchmark)
    assert (models, values.tolist()) == (("m1", "m2", "m3"), [[0, 2, 3], [0, 20, 30], [0, -2, -3]])
    assert notes == ("item scores of c: 3 columns are taken for models: m1, m2, m3",)
    for rows, message in (([*scores[:1], *scores[2:]], "has 4 rows, and"), (["{", *scores[1:]], "1 of them broken")):
        with pytest.raises(InputError, match=message):
            read_item_scores(Path(write(tmp_path / "s.jsonl", rows)), benchmark)


def test_item_scores_without_an_order_name_their_table(config, tmp_path):
    path = write(tmp_path / "s.jsonl", [{"m1": 1, "m2": 1, "m3": 1}] * 4)
    with pytest.raises(InputError, match=r"--item-scores .*s\.jsonl, for a: All 3 models score the same"):
        run(replace(config, item_scores=(f"a={path}",)))
