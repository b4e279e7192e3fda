"""Activations on disk: what `qscope encode --activations` writes, and the stream that shuffles across its shards."""

import hashlib
import os

import numpy as np
import pytest
import torch

from qscope.activation_store import ActivationStore, ActivationWriter
from qscope.errors import InputError, StorageError, StoreError
from qscope.training import checkpoint
from qscope.training.stored_activations import stored_stream


def checksums(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def message(caught):
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- the store by itself ---------------------------------------------------------------------------------

SIZES = (300, 1, 517, 64)
WIDTHS = {4: 6, 11: 3}


def settings_of(**changes):
    widths = {str(layer): width for layer, width in WIDTHS.items()}
    return {"layers": list(WIDTHS), "widths": widths, "dtype": "float32", "context_size": 16, **changes}


def shard_of(index):
    """Columns and activations of a shard: column 0 of every layer is the token's number in the whole store."""
    n, before = SIZES[index], sum(SIZES[:index])
    generator = torch.Generator().manual_seed(index)
    numbers = torch.arange(before, before + n, dtype=torch.float32)
    columns = {"doc": np.full(n, index), "position": np.arange(n), "place": np.arange(n) % 16, "token": np.arange(n)}
    layers = {layer: torch.rand(n, width, generator=generator) + 1 for layer, width in WIDTHS.items()}
    for layer, x in layers.items():
        x[:, 0] = numbers
        x[:, 1] = layer
    return columns, layers


def write(path, shards=(0, 1, 2, 3), complete=True, **changes):
    with ActivationWriter.open(path, settings_of(**changes), repair=True) as writer:
        for index in shards:
            writer.add(index, f"text-{index}", *shard_of(index), {"carry": [index, 0]})
        if complete:
            writer.complete({"tokens": sum(SIZES)})
        return writer.repaired


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "acts")
    return tmp_path / "acts"


def test_what_was_written_is_read(store):
    found = ActivationStore(store)
    assert found.layers == (4, 11) and found.widths == WIDTHS and found.tokens == sum(SIZES)
    assert found.totals == {"shards": 4, "tokens": sum(SIZES)}
    assert [record.first for record in found.records] == [19, 1, 33, 4]
    for index in range(len(SIZES)):
        columns, layers = shard_of(index)
        for layer, x in layers.items():
            assert torch.equal(found.rows(index, layer), x)
            assert torch.equal(found.rows(index, layer, 20, 41), x[20:41])
        for name, values in columns.items():
            assert found.column(index, name).tolist() == values.tolist()
    found.verify()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_and_what_float16_cannot_hold(tmp_path, dtype):
    columns, layers = shard_of(3)
    layers[4][5, 3] = 70000.0  # beyond float16's 65504, and nothing for the others
    layers[11][6, 2] = float("nan")
    layers[11][7, 2] = -float("inf")
    with ActivationWriter.open(tmp_path, settings_of(dtype=dtype)) as writer:
        record = writer.add(0, "k", columns, layers)
        writer.complete()
    found = ActivationStore(tmp_path)
    kind = getattr(torch, dtype)
    assert record.dtypes == {"4": "float32" if dtype == "float16" else dtype, "11": dtype}
    assert found.rows(0, 4).dtype == (torch.float32 if dtype == "float16" else kind)
    assert torch.equal(found.rows(0, 4), layers[4].to(found.rows(0, 4).dtype)) and found.rows(0, 4).isfinite().all()
    assert found.rows(0, 11).isnan().sum() == 1 and found.rows(0, 11).isinf().sum() == 1
    assert found.dtype([11]) == kind and found.dtype([4, 11]) == (torch.float32 if dtype == "float16" else kind)


def test_a_second_run_changes_nothing(store):
    before = checksums(store)
    times = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    write(store)
    assert checksums(store) == before
    assert all(path.stat().st_mtime_ns == times[path] for path in store.glob("shard-*"))


def test_interrupted_anywhere_the_result_is_the_same(store, tmp_path):
    whole, path = checksums(store), tmp_path / "part"
    for done in range(len(SIZES)):
        write(path, range(done), complete=False)
        with pytest.raises(StoreError, match="not complete: encoding was interrupted"):
            ActivationStore(path)
        (path / ".tmp-shard-00001.layer-4.safetensors").write_bytes(b"litter")
        for index in (done, 9):
            (path / f"shard-{index:05d}.layer-4.safetensors").write_bytes(b"renamed, not journalled")
        with (path / "shards.jsonl").open("ab") as journal:
            journal.write(b'{"index": 9, "torn' + b"\n" * (done % 2))
    write(path)
    assert checksums(path) == whole


def test_a_changed_text_is_encoded_again_from_there(store):
    whole = checksums(store)
    with ActivationWriter.open(store, settings_of()) as writer:
        writer.add(2, "other", *shard_of(1))
        assert len(writer.finished) == 3
    assert not (store / "shard-00003.tokens.safetensors").exists()
    write(store)
    assert checksums(store) == whole


@pytest.mark.parametrize("file", ["shard-00002.layer-11", "shard-00002.tokens"])
@pytest.mark.parametrize("how", ["gone", "cut", "link"])
def test_a_lost_file_is_written_again(store, tmp_path, file, how):
    whole, path = checksums(store), store / f"{file}.safetensors"
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[:-1])
    if how == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=rf"{file}.safetensors was finished, but it"):
        ActivationStore(store)
    with (
        pytest.raises(StoreError, match=r"was finished, but .*\(repair\)"),
        ActivationWriter.open(store, settings_of()),
    ):
        pass
    assert file in write(store)
    assert checksums(store) == whole


def test_verify_finds_a_flipped_byte(store):
    path = store / "shard-00002.layer-11.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"1 files .*shard-00002.layer-11"):
        ActivationStore(store).verify()


def test_refusals(store, tmp_path):
    before = checksums(store)
    with pytest.raises(StoreError, match='dtype: "float32" -> "float16"') as caught:
        ActivationWriter.open(store, settings_of(dtype="float16"))
    message(caught)
    with ActivationWriter.open(store, settings_of()) as writer:
        with pytest.raises(StoreError, match="written by another process"):
            ActivationWriter.open(store, settings_of())
        columns, layers = shard_of(1)
        with pytest.raises(StoreError, match="the next is 4"):
            writer.add(5, "k", columns, layers)
        for wrong in ({4: layers[4]}, {**layers, 11: layers[11][:, :2]}, {**layers, 4: layers[4].repeat(2, 1)}):
            with pytest.raises(StoreError, match="it was given"):
                writer.add(4, "k", columns, wrong)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="not empty and not a store of activations"):
        ActivationWriter.open(tmp_path, settings_of())
    with pytest.raises(StoreError, match=r"has no activations.json"):
        ActivationStore(tmp_path)
    assert checksums(store) == before and (tmp_path / "thesis.tex").read_text() == "precious"


def test_damaged_and_hostile_files(store):
    manifest, journal = (store / "activations.json").read_text(), (store / "shards.jsonl").read_text()

    def spoiled(name, text, match):
        (store / name).write_text(text)
        with pytest.raises(StoreError, match=match):
            ActivationStore(store)
        (store / "activations.json").write_text(manifest)
        (store / "shards.jsonl").write_text(journal)

    spoiled("activations.json", manifest[:-9], "cannot be read")
    spoiled("activations.json", "[]", "does not describe")
    spoiled("activations.json", manifest.replace('"version": 1', '"version": 2'), "format 2; this qscope reads up to 1")
    spoiled("activations.json", manifest.replace('"context_size": 16', '"context_size": 8'), "settings were changed")
    lines = journal.splitlines(keepends=True)
    spoiled("shards.jsonl", "".join([lines[0][:50] + "\n", *lines[1:]]), "line 1, is damaged")
    spoiled("shards.jsonl", "".join(lines[1:]), "line 1, does not describe shard 0")
    for cut in (journal[:-9], "".join(lines[:-1])):
        spoiled("shards.jsonl", cut, "shards.jsonl lists 3 shards, and 4 were written")
    spoiled("shards.jsonl", journal.replace('"11":["', '"../../11":["'), "names other files")
    # A file of right size and wrong content, as long as nobody verifies.
    path = store / "shard-00001.layer-4.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StoreError, match=r"shard-00001.layer-4.safetensors is damaged"):
        ActivationStore(store).rows(1, 4)


def test_a_full_disk_leaves_what_was_finished(store, tmp_path, monkeypatch):
    write_bytes, count, path = os.write, [0], tmp_path / "part"

    def full(handle, data):
        count[0] += 1
        if count[0] == 12:
            raise OSError(28, os.strerror(28))
        return write_bytes(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="the disk is full"):
            write(path)
    assert not list(path.glob(".tmp-*"))
    write(path)
    assert checksums(path) == checksums(store)


# --- streams ---------------------------------------------------------------------------------------------


def stream_of(store, layers=(4, 11), **options):
    options = {"buffer_tokens": 256, "block": 16, "blocks_at_once": 4, "norm_multiple": None, **options}
    return stored_stream(ActivationStore(store), layers, **options)


def batches(stream, n):
    found = []
    while True:
        try:
            found.append(stream.next(n))
        except StopIteration:
            return found


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x[p], y[p]) for x, y in zip(a, b, strict=True) for p in x)


@pytest.mark.parametrize("first", ["drop", "keep"])
def test_every_token_is_served_exactly_once_from_all_shards(store, first):
    stream = stream_of(store, first_token=first)
    found = batches(stream, 20)
    found.append(stream.next(stream.left))
    x = {layer: torch.cat([batch[layer] for batch in found]) for layer in (4, 11)}
    places = np.concatenate([np.arange(n) % 16 for n in SIZES])
    expected = np.flatnonzero((places > 0) | (first == "keep"))
    assert sorted(x[4][:, 0].tolist()) == expected.tolist()
    assert torch.equal(x[4][:, 0], x[11][:, 0]), "layers stay aligned"
    assert bool((x[4][:, 1] == 4).all()) and bool((x[11][:, 1] == 11).all())
    counts = stream.counts()
    assert counts["tokens"] == sum(SIZES) and counts["dropped_first"] == sum(SIZES) - len(expected)
    shards = np.searchsorted(np.cumsum(SIZES), found[0][4][:, 0].numpy(), side="right")
    assert {0, 2} <= set(shards), "already the first batch comes from several shards"


def test_only_one_layer_is_read(store):
    for path in store.glob("*layer-11*"):
        path.write_bytes(b"\0" * path.stat().st_size)
    found = batches(stream_of(store, [4]), 20)
    assert found and set(found[0]) == {4}


def test_a_restored_stream_goes_on_to_the_bit(store, tmp_path):
    options = dict(cycle=True, seed=5, norm_multiple=1.5)
    stream = stream_of(store, **options)
    states, found = [], []
    for step in range(90):
        states.append(checkpoint.save(tmp_path, step, {}, stream.state(), 0, {}, keep_last=10**6))
        found.append(stream.next(28))
    assert stream.counts()["epoch"] >= 2
    for cut in range(0, 90, 4):
        other = stream_of(store, **options)
        other.next(50)
        other.restore(checkpoint.load(states[cut]).stream)
        assert equal([other.next(28) for _ in found[cut:]], found[cut:]), cut
        assert other.counts() == stream.counts()


def test_epochs_and_seeds_have_their_own_order(store):
    usable = sum(SIZES) - 57
    stream = stream_of(store, cycle=True)
    numbers = torch.cat([stream.next(1)[4][:, 0] for _ in range(2 * usable + 600)])
    seen = numbers.int().bincount()
    assert seen.max() <= 4 and (seen >= 1).sum() == usable
    blocks = {}
    while stream.producer.epoch < 6:
        stream.next(16)
        blocks[stream.producer.epoch] = tuple(stream.producer._order.tolist())
    assert len(blocks) >= 3 and len(set(blocks.values())) == len(blocks), "blocks have another order in every epoch"
    orders = [stream_of(store, seed=seed).next(100)[4][:, 0].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_readers_share_the_blocks(store):
    numbers = [torch.cat([b[4][:, 0] for b in batches(stream_of(store, rank=r, world=3), 1)]) for r in range(3)]
    places = np.concatenate([np.arange(n) % 16 for n in SIZES])
    assert sorted(torch.cat(numbers).tolist()) == np.flatnonzero(places > 0).tolist()
    assert max(map(len, numbers)) - min(map(len, numbers)) < 64


def test_impossible_streams(store):
    usable = sum(SIZES) - 57
    assert stream_of(store, tokens=usable).next(10)
    with pytest.raises(InputError, match=rf"{usable + 1} tokens .* holds only {usable} that can be used"):
        stream_of(store, tokens=usable + 1).next(10)
    assert stream_of(store, tokens=10**6, cycle=True).next(10)
    for layers in ([5], [], [4, 4]):
        with pytest.raises(InputError, match="holds 4, 11"):
            stream_of(store, layers)
    with pytest.raises(InputError, match="first_token 'none'"):
        stream_of(store, first_token="none")
    state = stream_of(store).state()
    with pytest.raises(InputError, match="block: 16 -> 8"):
        stream_of(store, block=8).restore(state)
    with ActivationWriter.open(store, settings_of()) as writer:
        writer.add(3, "other", *shard_of(3))
        writer.complete()
    with pytest.raises(InputError, match="activations: "):
        stream_of(store).restore(state)


def test_a_store_of_nan_is_an_error(tmp_path):
    columns, layers = shard_of(0)
    with ActivationWriter.open(tmp_path, settings_of()) as writer:
        writer.add(0, "k", columns, {layer: x * float("nan") for layer, x in layers.items()})
        writer.complete()
    with pytest.raises(InputError, match=r"No activation .* can be used"):
        stream_of(tmp_path, cycle=True).next(10)
