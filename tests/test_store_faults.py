"""Feature stores under fire: killed writers, full disks, second writers, foreign and hostile folders."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qscope.errors import StorageError, StoreError
from qscope.store import FeatureStore, StoreWriter

_spec = importlib.util.spec_from_file_location("store_kill_harness", Path(__file__).with_name("store_kill_harness.py"))
writers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(writers)
settings_of, arrays_of, encode, contents = (
    writers.settings_of,
    writers.arrays_of,
    writers.encode,
    writers.contents,
)
SHARDS, Tokenizer = writers.SHARDS, writers.Tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "codes"
    encode(path)
    return contents(path)


@pytest.fixture
def store(tmp_path):
    encode(tmp_path / "codes")
    return tmp_path / "codes"


def message(caught):
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- killed writers --------------------------------------------------------------------------------------


def harness(name, folder):
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    done = subprocess.run(
        [sys.executable, writers.__file__, name, str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_death_at_every_system_call_leaves_the_same_store(tmp_path):
    for name, result in harness("exhaustive", tmp_path).items():
        assert len(result["stores"]) > 40
        for step, found in enumerate(result["stores"], 1):
            assert found == result["whole"], f"{name} run, killed at system call {step}"


def test_kill_at_random_times_leaves_the_same_store(whole, tmp_path):
    for found in harness("at_random", tmp_path):
        assert found == whole


def test_a_write_that_the_kernel_refuses_can_be_resumed(whole, tmp_path):
    result = harness("on_a_small_disk", tmp_path)
    assert result["status"] == 0
    assert "shard-00000.safetensors could not be written: the file size limit" in result["error"]
    assert "bytes were needed" in result["error"] and "goes on from there" in result["error"]
    assert result["left"] == [".lock", "manifest.json", "shards.jsonl", "tokenizer"]
    assert result["stores"] == [whole]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", range(4))
def test_a_full_disk_at_any_write_of_a_shard(whole, tmp_path, monkeypatch, number, call):
    """Header, a tensor, the last tensor, the journal line; the same writer goes on when there is room."""
    path = tmp_path / "codes"
    write, count = os.write, [0]

    def full(handle, data):
        count[0] += 1
        if count[0] == 1 + (0, 3, 7, 8)[call]:
            write(handle, bytes(data)[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        return write(handle, data)

    with StoreWriter.open(path, settings_of()) as writer:
        writer.save_tokenizer(Tokenizer())
        writer.add(0, "text-0", arrays_of(0), {"carry": [0, 0]})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(
            StorageError, match=r"bytes were needed, [\d,]+ bytes are free.*same command again"
        ) as caught:
            writer.add(1, "text-0", arrays_of(1), {"carry": [1, 0]})
        assert ("shards.jsonl" if call == 3 else "shard-00001.safetensors") in message(caught)
        assert count[0] == 1 + (0, 3, 7, 8)[call]
        monkeypatch.undo()
        assert len(writer.finished) == 1 and not list(path.glob(".tmp-*"))
        with pytest.warns(UserWarning, match="incomplete"):
            FeatureStore(path).verify()
        for index in (1, 2, 3):
            writer.add(index, "text-0", arrays_of(index), {"carry": [index, 0]})
        writer.complete({"documents": SHARDS})
    assert contents(path) == whole


# --- the journal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["cut 1", "cut 40", "cut line", "zeros", "zeros and newline", "half a line more"])
def test_a_torn_last_line_is_ignored_and_removed(whole, store, tail):
    journal = store / "shards.jsonl"
    data = journal.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    torn = {
        "cut 1": data[:-1],
        "cut 40": data[:-40],
        "cut line": data[: last + 1],
        "zeros": data[:last] + b"\0" * 200,
        "zeros and newline": data[:last] + b"\0" * 200 + b"\n",
        "half a line more": data + b'{"index":4,"fi',
    }[tail]
    journal.write_bytes(torn)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "totals": {}}))
    with pytest.warns(UserWarning, match="incomplete"):
        assert len(FeatureStore(store)) == (SHARDS if tail == "half a line more" else SHARDS - 1)
    assert journal.read_bytes() == torn
    encode(store)
    assert contents(store) == whole


def test_a_broken_line_in_the_middle_is_an_error(store):
    journal = store / "shards.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], lines[1][:-5], *lines[2:]]))
    for use in (FeatureStore, encode):
        with pytest.raises(StoreError, match=r"line 2, is damaged") as caught:
            use(store)
        message(caught)
    journal.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    with pytest.raises(StoreError, match="describes shard 2, expected 1"):
        FeatureStore(store)


def test_a_complete_store_that_lost_a_line_is_an_error(store):
    journal = store / "shards.jsonl"
    journal.write_bytes(journal.read_bytes()[:-3])
    with pytest.raises(StoreError, match=r"marked complete with 4 shards, but shards\.jsonl names 3"):
        FeatureStore(store)


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/passwd",
        "shard-00001.safetensors",
        "shard-0.safetensors",
        "tokenizer/../shard-00000.safetensors",
    ],
)
def test_a_shard_cannot_have_another_name(store, name):
    journal = store / "shards.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"shard-00000.safetensors"', json.dumps(name).encode(), 1))
    for use in (FeatureStore, encode):
        with pytest.raises(StoreError, match=r"only 'shard-00000\.safetensors' is allowed"):
            use(store)


# --- resuming --------------------------------------------------------------------------------------------


def test_a_second_run_writes_nothing(store):
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.name != ".lock"}
    encode(store)
    assert before == {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.name != ".lock"}


def test_a_changed_source_is_encoded_again_with_all_after_it(store, tmp_path):
    before = {file.name: file.stat().st_mtime_ns for file in store.glob("shard-*")}
    encode(store, seeds=(0, 9, 0))
    encode(tmp_path / "fresh", seeds=(0, 9, 0))
    assert contents(store) == contents(tmp_path / "fresh")
    after = {file.name: file.stat().st_mtime_ns for file in store.glob("shard-*")}
    assert [name for name in sorted(after) if after[name] == before[name]] == ["shard-00000.safetensors"]


def test_other_settings_are_refused_and_named(store):
    before = contents(store)
    changed = settings_of(precision="bf16", context_size=32, max_tokens=10, sources=["a"])
    with pytest.raises(StoreError) as caught:
        StoreWriter.open(store, changed)
    text = message(caught)
    for part in (
        'precision: "exact" -> "bf16"',
        "context_size: 16 -> 32",
        "max_tokens: null -> 10",
        "sources: [] -> absent",
    ):
        assert part in text
    assert "model" not in text and contents(store) == before


@pytest.mark.parametrize("damage", ["missing", "short", "folder"])
def test_a_finished_shard_that_is_gone_is_named_or_repaired(whole, store, damage):
    shard = store / "shard-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "short":
        shard.write_bytes(data[:-1])
    if damage == "folder":
        shard.mkdir()
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors was finished, but it .*repair=True") as caught:
        encode(store)
    message(caught)
    if damage == "folder":
        shard.rmdir()
    encode(store, repair=True)
    assert contents(store) == whole


def test_litter_and_shards_without_a_line_are_swept(whole, store):
    (store / ".tmp-shard-00007.safetensors").write_bytes(b"half")
    (store / ".tmp-tokenizer").mkdir()
    (store / ".tmp-tokenizer" / "vocab").write_bytes(b"half")
    (store / "shard-00004.safetensors").write_bytes(b"renamed, but not in the journal")
    (store / "notes.txt").write_text("mine")
    encode(store)
    assert (store / "notes.txt").read_text() == "mine"
    (store / "notes.txt").unlink()
    assert contents(store) == whole


def test_shards_without_a_journal_are_not_deleted(store):
    (store / "shards.jsonl").unlink()
    with pytest.raises(StoreError, match=r"4 shard files but no shards\.jsonl"):
        encode(store)
    assert len(list(store.glob("shard-*"))) == 4


def test_only_whole_shards_in_order_are_taken(tmp_path):
    with StoreWriter.open(tmp_path / "codes", settings_of()) as writer:
        with pytest.raises(StoreError, match="the next is 0"):
            writer.add(1, "k", arrays_of(1))
        arrays = arrays_of(0)
        with pytest.raises(StoreError, match="takes the arrays"):
            writer.add(0, "k", {name: a for name, a in arrays.items() if name != "5.indices_high"})
        with pytest.raises(StoreError, match=r"5\.values of a new shard is float64"):
            writer.add(0, "k", arrays | {"5.values": arrays["5.values"].astype(np.float64)})
        with pytest.raises(StoreError, match="out of order"):
            writer.add(0, "k", arrays | {"doc": arrays["position"][::-1].copy()})
        with pytest.raises(StoreError, match="cannot be kept as JSON"):
            writer.add(0, "k", arrays, {"fvu": float("nan")})
        writer.add(0, "k", arrays)
        with pytest.raises(StoreError, match="totals claim 63 tokens, but the shards hold 64"):
            writer.complete({"tokens": 63})
    with pytest.raises(StoreError, match="is closed"):
        writer.add(1, "k", arrays_of(1))


# --- folders ---------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path):
    with StoreWriter.open(tmp_path / "codes", settings_of()) as writer:
        writer.add(0, "text-0", arrays_of(0))
        before = contents(tmp_path / "codes")
        with pytest.raises(StoreError, match="being written by another process") as caught:
            StoreWriter.open(tmp_path / "codes", settings_of())
        message(caught)
        assert contents(tmp_path / "codes") == before
        writer.add(1, "text-0", arrays_of(1))
    StoreWriter.open(tmp_path / "codes", settings_of()).close()


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"not a feature store: it holds thesis\.tex") as caught:
        StoreWriter.open(tmp_path, settings_of())
    message(caught)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        FeatureStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    for use in (FeatureStore, encode):
        with pytest.raises(StoreError, match="does not describe a feature store"):
            use(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("where", ["codes", "codes/deeper"])
def test_a_path_through_a_file_is_refused_at_once(tmp_path, where):
    (tmp_path / "codes").write_text("x")
    with pytest.raises(StorageError) as caught:
        StoreWriter.open(tmp_path / where, settings_of())
    assert str(tmp_path / where) in message(caught)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, number):
    """The tests may run as root, whom permissions do not bind: the kernel's answer is put in its place."""
    real = os.open

    def refuse(path, flags, *rest, **names):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="may write to") as caught:
        StoreWriter.open(tmp_path / "codes", settings_of())
    assert str(tmp_path / "codes") in message(caught)
    assert list((tmp_path / "codes").iterdir()) == []


def edited(store, **changes):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"] |= changes
    path.write_text(json.dumps(manifest))


def test_a_newer_store_is_refused(store):
    edited(store, store_version=2, a_field_of_tomorrow=1)
    before = contents(store)
    for use in (FeatureStore, encode):
        with pytest.raises(StoreError, match="format 2; this qscope reads up to format 1") as caught:
            use(store)
        message(caught)
    assert contents(store) == before


def test_edited_settings_are_noticed(store):
    edited(store, precision="bf16")
    with pytest.raises(StoreError, match="settings were changed"):
        FeatureStore(store)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\0" * 64,
        "[" * 100_000,
        '{"format": "qscope-feature-store"}',
        '{"format": 3}',
        "\xff",
    ],
)
def test_a_damaged_manifest_is_one_paragraph(store, text):
    (store / "manifest.json").write_bytes(text.encode("latin-1"))
    for use in (FeatureStore, encode):
        with pytest.raises(StoreError) as caught:
            use(store)
        assert "manifest.json" in message(caught)


# --- shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [10, 600, -1])
def test_a_flipped_byte_is_found_by_verify(store, place):
    shard = store / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[place] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"1 of 4 shards are damaged: .*shard-00001") as caught:
        FeatureStore(store).verify()
    message(caught)


def test_missing_and_short_shards_are_all_named(store):
    (store / "shard-00000.safetensors").unlink()
    shard = store / "shard-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    opened = FeatureStore(store)
    with pytest.raises(StoreError, match=r"2 of 4.*shard-00000.*shard-00003"):
        opened.verify()
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors cannot be read"):
        opened.column("token")
    assert opened.document(1).tokens.tolist() == arrays_of(1)["token"].tolist()
    with pytest.raises(StoreError, match="bytes instead of"):
        opened.document(3).codes(5)


def test_links_and_shards_of_other_stores_are_refused(store, tmp_path):
    shard = store / "shard-00001.safetensors"
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="symbolic link"):
        FeatureStore(store).document(1).tokens  # noqa: B018
    shard.unlink()
    with StoreWriter.open(tmp_path / "other", settings_of(precision="bf16")) as writer:
        writer.add(0, "text-0", arrays_of(0))
        writer.add(1, "text-0", arrays_of(1))
    (tmp_path / "other" / shard.name).rename(shard)
    with pytest.raises(StoreError, match="other settings"):
        FeatureStore(store).to_csr(5)


def test_ids_outside_the_dictionary_are_refused(tmp_path):
    """They would index past the end of what scipy and numpy allocate."""
    arrays = arrays_of(0)
    arrays["5.indices_high"][3] = 0xFF
    with StoreWriter.open(tmp_path / "codes", settings_of()) as writer:
        writer.add(0, "k", arrays)
        writer.complete()
    opened = FeatureStore(tmp_path / "codes")
    for use in (opened.to_csr, opened.feature_counts):
        with pytest.raises(StoreError, match="its dictionary has 70000 features"):
            use(5)
