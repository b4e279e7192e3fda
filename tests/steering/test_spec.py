"""Specs as data and files."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qscope.errors import InputError, StorageError
from qscope.steering import Edit, Gate, SAEReference, SteeringSpec
from qscope.steering.vectors import load_vector

FULL = SteeringSpec(
    (
        Edit(15, 6159, strength=2.0, unit="quantile", scale=7.25, tokens="generated,0-3", skip=("first", "special")),
        Edit(15, 12, mode="clamp", strength=0.0, activation="exact", after=7, when=Gate(3, 14, 0.5, "exact")),
        Edit(3, vector=(0.5, -1.0), mode="orthogonalise"),
        Edit(4, vector="dir.safetensors#a", strength=-0.1, unit="residual", scale=41.0, after="<x>"),
    ),
    {15: SAEReference("Qwen/SAE", "ab" * 32), 14: SAEReference("./x")},
    "Qwen/Qwen3",
    "a note",
)


@pytest.mark.parametrize("name", ["s.json", "s.yaml", "s.yml"])
def test_files_give_back_what_was_saved(tmp_path, name):
    assert SteeringSpec.load(FULL.save(tmp_path / "deep" / name)) == FULL


def test_the_json_is_plain_and_short():
    spec = SteeringSpec((Edit(15, 6159, strength=2.0),))
    expected = {
        "format": "qscope-steering",
        "format_version": 1,
        "saes": {},
        "edits": [{"layer": 15, "feature": 6159, "strength": 2.0}],
    }
    assert json.loads(json.dumps(spec.to_json())) == expected


@given(
    st.floats(-1e6, 1e6),
    st.sampled_from(["add", "clamp"]),
    st.integers(0, 10**6),
    st.sampled_from(["all", "prompt", "0,2,5-8"]),
)
def test_numbers_survive_to_the_bit(strength, mode, feature, tokens):
    spec = SteeringSpec((Edit(2, feature, mode=mode, strength=strength, tokens=tokens),))
    assert SteeringSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_scaled_changes_only_what_is_added():
    half = FULL.scaled(0.5)
    assert [e.strength for e in half.edits] == [1.0, 0.0, 0.0, -0.05]
    assert half.edits[1:3] == FULL.edits[1:3]
    assert FULL.edits[0].amount == 14.5 and half.edits[0].amount == 7.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(format="x"), "reads qscope-steering version 1"),
        (dict(format_version=2), "version 2"),
        (dict(edits={}), "no list `edits`"),
        (dict(colour=1), "unknown field 'colour'"),
        (dict(saes={"x": {}}), "layers from 0"),
        (dict(saes={"3": {}}), "lacks source in the SAE of layer 3"),
        (dict(edits=[{"feature": 1}]), "lacks layer in edit 0"),
        (dict(edits=[{"layer": 1, "feature": 1}, 3]), "edit 1 is int"),
        (dict(edits=[{"layer": 1, "feature": 1, "strenght": 2}]), "unknown field 'strenght'"),
        (dict(edits=[{"layer": 1, "feature": "1"}]), "`feature` of edit 0 is '1'"),
        (dict(edits=[{"layer": True, "feature": 1}]), "`layer` of edit 0 is True"),
        (dict(edits=[{"layer": 1, "feature": 1, "strength": "2"}]), "`strength` of edit 0 is '2'; a number"),
        (dict(edits=[{"layer": 1, "feature": 1, "strength": float("nan")}]), "strength is nan"),
        (dict(edits=[{"layer": 1, "feature": 1, "when": {"feature": 2, "mode": "topk"}}]), "mode of when 'topk'"),
        (dict(edits=[{"layer": 1, "feature": 1, "tokens": "0,2,5-"}]), r"0,2,5-\n {8}\^"),
        (dict(edits=[{"layer": 1, "feature": 1, "tokens": "0," + "9" * 30}]), r"\n {4}\^\nand a position has at most"),
        (dict(edits=[{"layer": 1, "vector": 5}]), "`vector` of edit 0 is 5"),
        (dict(saes={"03": {"source": "a"}, "3": {"source": "b"}}), "'3' is given twice"),
        (dict(model=5), "`model` of the steering spec is 5; text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"format": "qscope-steering", "format_version": 1, "edits": []} | change))
    with pytest.raises(InputError, match=words) as caught:
        SteeringSpec.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(), "or neither"),
        (dict(feature=1, vector=(1.0,)), "or neither"),
        (dict(feature=1, mode="multiply"), "accepted are add, clamp"),
        (dict(feature=1, strength=float("inf")), "finite"),
        (dict(vector=(1.0, float("nan"))), "vector is nan"),
        (dict(vector=(1.0,), mode="clamp"), "no activation"),
        (dict(feature=1, unit="quantile"), "scale None"),
        (dict(feature=1, unit="quantile", scale=-1.0), "scale -1.0"),
        (dict(feature=1, mode="clamp", unit="residual", scale=1.0), "residual with add"),
        (dict(vector=(1.0,), unit="quantile", scale=1.0), "quantile goes with"),
        (dict(feature=1, skip=("last",)), "first, special"),
        (dict(feature=1, when=Gate(2, layer=9)), "computes later"),
        (dict(feature=1.5), "feature is 1.5; a whole number"),
        (dict(feature="1"), "feature is '1'; a whole number"),
    ],
)
def test_edits_that_mean_nothing(fields, words):
    with pytest.raises(InputError, match=words):
        Edit(4, **fields)


def test_gates_that_mean_nothing():
    with pytest.raises(InputError, match="never below 0"):
        Gate(1, threshold=-0.5, mode="exact")
    with pytest.raises(InputError, match="whole number"):
        Gate(1.0)
    assert Gate(1, threshold=-0.5).threshold == -0.5


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StorageError, match="could not be read"):
        SteeringSpec.load(tmp_path / "none.json")
    for name, text, words in (("a.json", "{", "not JSON"), ("a.yaml", "a: [", "not YAML"), ("b.yaml", "3", "is int")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words):
            SteeringSpec.load(tmp_path / name)
    head, edit = "format: qscope-steering\nformat_version: 1\n", "edits:\n- {layer: 0, feature: 1, "
    for text, words in (
        (edit + "strength: 1e3}", "write 1.0e\\+3"),
        (edit + "strength: .inf}", "strength is inf"),
        (edit + "strength: 1, strength: 2}", "'strength' is given twice"),
        ("saes: {3: {source: a}, '3': {source: b}}\nedits: []", "'3' is given twice"),
        ("note: 2024-01-01\nedits: []", "`note` of the steering spec is datetime"),
    ):
        (tmp_path / "d.yaml").write_text(head + text)
        with pytest.raises(InputError, match=words):
            SteeringSpec.load(tmp_path / "d.yaml")
    (tmp_path / "d.yaml").write_text(head + "edits:\n- &a {layer: 0, feature: 1, skip: first}\n- {<<: *a, layer: 2}")
    assert [(e.layer, e.skip) for e in SteeringSpec.load(tmp_path / "d.yaml").edits] == [
        (0, ("first",)),
        (2, ("first",)),
    ]
    (tmp_path / "d.json").write_text('{"edits": [{"layer": 0, "feature": 1, "feature": 2}]}')
    with pytest.raises(InputError, match="'feature' is given twice"):
        SteeringSpec.load(tmp_path / "d.json")
    (tmp_path / "c.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="not YAML"):
        SteeringSpec.load(tmp_path / "c.yaml")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        FULL.save(tmp_path / "file" / "s.json")


# --- vectors -------------------------------------------------------------------------------------------------


def test_vectors_from_files(tmp_path):
    rows = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    save_file({"a": rows[3], "all": rows.bfloat16()}, tmp_path / "v.safetensors")
    save_file({"only": rows[3]}, tmp_path / "one.safetensors")
    assert torch.equal(load_vector(f"{tmp_path}/v.safetensors#a", 5, 8), rows[3])
    assert torch.equal(load_vector(f"{tmp_path}/v.safetensors#all", 5, 8), rows[5].bfloat16().float())
    assert torch.equal(load_vector(f"{tmp_path}/one.safetensors", 5, 8), rows[3])
    assert torch.equal(load_vector((1.0, 0.1), 0, 2), torch.tensor([1.0, 0.1]))


def test_control_vectors(tmp_path):
    gguf = pytest.importorskip("gguf", reason="reads GGUF files")
    path = tmp_path / "control.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    rows = np.arange(24, dtype=np.float32).reshape(3, 8)
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", rows[layer])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_vector(str(path), 2, 8).tolist() == rows[2].tolist()
    with pytest.raises(InputError, match=r"no direction\.0"):
        load_vector(str(path), 0, 8)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0garbage!", "not a safetensors file"),
        ("x.gguf", b"GGUF....", "not a GGUF file"),
        ("x.pt", b"", "no pickle"),
    ],
)
def test_vectors_that_cannot_be_read(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_vector(str(tmp_path / name), 0, 8)


def test_vectors_that_do_not_fit(tmp_path):
    save_file({"a": torch.zeros(8), "b": torch.full((8,), torch.nan)}, tmp_path / "v.safetensors")
    for source, words in (("", "name one of them"), ("#c", "holds a, b"), ("#b", "not finite")):
        with pytest.raises(InputError, match=words):
            load_vector(f"{tmp_path}/v.safetensors{source}", 0, 8)
    with pytest.raises(InputError, match=re.escape("[8] or not finite; 9 finite numbers")):
        load_vector(f"{tmp_path}/v.safetensors#a", 0, 9)


def test_replacing_a_field_checks_again():
    with pytest.raises(InputError):
        dataclasses.replace(FULL.edits[0], strength=float("nan"))
