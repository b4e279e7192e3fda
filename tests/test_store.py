"""Feature stores: packing, reading, statistics and the golden store."""

import functools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from qscope.errors import InputError, StoreError
from qscope.store import (
    EXTREME_ROW,
    NAN_ROW,
    FeatureStore,
    Shard,
    StoreSettings,
    StoreWriter,
    pack_layer,
    shard_arrays,
    unpack_layer,
)
from qscope.store_writer import safetensors_parts

GOLDEN = Path(__file__).parent / "golden" / "store-v1"
D_SAE = {0: 200, 3: 300, 7: 70_000}
K = 4


def settings_of(d_sae=D_SAE, k=K, **changes):
    fields = {
        "qscope_version": "0.1.0",
        "model": {"name": "tiny", "sha256": "a" * 64},
        "tokenizer_sha256": "b" * 64,
        "saes": [{"layer": n, "sha256": f"{n}" * 64, "d_sae": f, "k": k} for n, f in d_sae.items()],
        "dtype": "float32",
        "precision": "exact",
        "context_size": 16,
        "shard_bytes": 1024,
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "sources": ["corpus.jsonl"],
    }
    return StoreSettings.model_validate(fields | changes)


def random_codes(seed, n, k, d_sae, broken=True):
    """[n, k] activations and distinct ids: exact ties, zeros, negatives and, if broken, NaN and Inf rows."""
    rng = np.random.default_rng(seed)
    acts = (rng.integers(-3, 40, (n, k)) / 8).astype(np.float32)
    ids = np.stack([rng.choice(d_sae, k, replace=False) for _ in range(n)]) if n else np.zeros((0, k))
    if broken and n > 3:
        acts[rng.integers(n)] = np.nan
        acts[rng.integers(n), rng.integers(k)] = np.inf
    return acts, ids.astype(np.int32)


# Three shards; document 2 has no tokens, document 3 continues in the second shard, the third shard is empty.
DOCS = [np.repeat([0, 1, 3], [5, 9, 6]), np.repeat([3, 4], [4, 26]), np.repeat([5], [0])]


def make_store(path, d_sae=D_SAE, k=K, docs=DOCS, finish=True):
    """Writes a store; returns what it holds as plain arrays: columns, per layer dense [N, F] and flags."""
    columns = SimpleNamespace(doc=[], position=[], token=[])
    dense = {layer: [] for layer in d_sae}
    flags = {layer: [] for layer in d_sae}
    with StoreWriter.open(path, settings_of(d_sae, k)) as writer:
        for index, doc in enumerate(docs):
            n = len(doc)
            rng = np.random.default_rng(index)
            position = np.concatenate([np.arange((doc == d).sum()) for d in np.unique(doc)] or [doc])
            if index == 1:
                position[doc == 3] += 6
            token = rng.integers(0, 50_000, n)
            norms = rng.uniform(1, 2, n)
            norms[: 2 if n else 0] = 100
            packed = {}
            for layer, size in d_sae.items():
                acts, ids = random_codes(100 * index + layer, n, k, size)
                packed[layer] = pack_layer(acts, ids, size, norms)
                finite = np.isfinite(acts).all(axis=1)
                rows = np.zeros((n, size), np.float32)
                np.put_along_axis(rows, ids.astype(np.int64), np.where((acts > 0) & finite[:, None], acts, 0), 1)
                dense[layer].append(rows)
                flags[layer].append(np.where(finite, 0, NAN_ROW) | np.where(norms == 100, EXTREME_ROW, 0))
            for name, value in (("doc", doc), ("position", position), ("token", token)):
                getattr(columns, name).append(value)
            writer.add(index, f"key-{index}", shard_arrays(doc, position, token, packed), {"carry": [index, n]})
        if finish:
            writer.complete({"rows": {"documents": 5}})
    join = np.concatenate
    return (
        SimpleNamespace(**{name: join(parts) for name, parts in vars(columns).items()}),
        {layer: join(parts) for layer, parts in dense.items()},
        {layer: join(parts) for layer, parts in flags.items()},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "codes"
    return (path, *make_store(path))


# --- packing ---------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 40),
    k=st.integers(1, 13),
    d_sae=st.sampled_from([13, 256, 257, 65536, 65537, 131072, 1_000_003, 2**31 - 1]),
    scale=st.sampled_from([1.0, 1e4, 1e-9]),
)
def test_packing_returns_every_positive_entry(seed, n, k, d_sae, scale):
    rng = np.random.default_rng(seed)
    acts, _ = random_codes(seed, n, k, 64)
    acts *= np.float32(scale)
    ids = np.sort(rng.integers(0, d_sae - k + 1, (n, k))) + np.arange(k)  # distinct, and both ends are reached
    ids = rng.permuted(ids, axis=1).astype(np.int32)
    packed = pack_layer(acts, ids, d_sae)
    codes = unpack_layer(packed, d_sae)

    wide = scale != 1.0 and packed["values"].dtype == np.float32
    assert wide or packed["values"].dtype == np.float16
    assert packed["indices"].dtype == (np.uint8 if d_sae <= 256 else np.uint16)
    high = (d_sae - 1).bit_length() - 16
    assert ("indices_high" in packed) == (d_sae > 65536)
    if d_sae > 65536:
        assert packed["indices_high"].shape == (n, math.ceil(k * high / 8))
    assert codes.values.dtype == np.float32 and codes.indices.dtype == np.int32
    for row in range(n):
        broken = not np.isfinite(acts[row]).all()
        stored = acts[row] if wide else acts[row].astype(np.float16).astype(np.float32)
        expected = sorted((int(i), float(v)) for i, v in zip(ids[row], stored, strict=True) if v > 0 and not broken)
        expected += [(0, 0.0)] * (k - len(expected))
        assert list(zip(codes.indices[row].tolist(), codes.values[row].tolist(), strict=True)) == expected
        assert codes.flags[row] == (NAN_ROW if broken else 0)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (65504.0, "float16"),
        (np.nextafter(np.float32(65520), np.float32(0)), "float16"),
        (65520.0, "float32"),  # the first that float16 rounds to infinity
        (np.nextafter(np.float32(2**-25), np.float32(1)), "float16"),
        (2.0**-25, "float32"),  # the last that float16 rounds to zero
        (0.0, "float16"),
        (-1e30, "float16"),
    ],
)
def test_values_are_widened_exactly_where_float16_would_lose_them(value, dtype):
    acts = np.array([[1.0, value]], np.float32)
    packed = pack_layer(acts, np.array([[5, 3]]), 8)
    assert packed["values"].dtype == dtype
    codes = unpack_layer(packed, 8)
    assert np.isfinite(codes.values).all()
    assert (codes.values > 0).sum() == (acts > 0).sum()
    if dtype == "float32":
        assert codes.values[0].tolist() == [np.float32(value), 1.0]


def test_extreme_rows_are_those_above_ten_medians():
    norms = np.array([1, 1, 2, 20.5, 19.5, np.nan, np.inf, 3], np.float32)  # median of the finite ones: 2.5
    norms[3] = 25.1
    norms[4] = 24.9
    flags = pack_layer(np.ones((8, 1)), np.zeros((8, 1), int), 4, norms)["flags"]
    assert flags.tolist() == [0, 0, 0, EXTREME_ROW, 0, NAN_ROW, NAN_ROW, 0]
    assert pack_layer(np.ones((1, 1)), np.zeros((1, 1), int), 4, np.array([np.nan]))["values"].tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("acts", "ids", "d_sae", "message"),
    [
        (np.ones((2, 2)), np.array([[0, 8], [1, 2]]), 8, "outside 0 to 7"),
        (np.ones((2, 2)), np.array([[0, -1], [1, 2]]), 8, "outside 0 to 7"),
        (np.ones((2, 2)), np.array([[3, 3], [1, 2]]), 8, "same feature twice"),
        (np.ones((2, 2)), np.ones((2, 3), int), 8, "top_acts float64"),
        (np.ones((2, 2)), np.ones((2, 2)), 8, "top_indices float64"),
    ],
)
def test_codes_of_another_dictionary_are_refused(acts, ids, d_sae, message):
    with pytest.raises(StoreError, match=message):
        pack_layer(acts, ids, d_sae)


def test_what_is_not_active_may_carry_any_id():
    codes = unpack_layer(pack_layer(np.array([[0.0, -1, 2]]), np.array([[99, -7, 1]]), 8), 8)
    assert codes.indices.tolist() == [[1, 0, 0]] and codes.values.tolist() == [[2, 0, 0]]


# --- reading ---------------------------------------------------------------------------------------------


def test_columns_and_totals(written):
    path, columns, _, _ = written
    store = FeatureStore(path)
    for name in ("doc", "position", "token"):
        assert store.column(name).dtype == np.uint32
        assert store.column(name).tolist() == getattr(columns, name).tolist()
        assert store.column(name, as_torch=True).tolist() == getattr(columns, name).tolist()
    assert (store.num_tokens, store.num_documents, len(store), store.layers) == (50, 5, 3, (0, 3, 7))
    assert [len(shard) for shard in store] == [20, 30, 0]
    assert store.totals == {"rows": {"documents": 5}, "shards": 3, "tokens": 50}
    assert [(r.documents, r.first_doc, r.last_doc) for r in store.records] == [
        (3, 0, 3),
        (2, 3, 4),
        (0, None, None),
    ]
    assert store.records[1].meta == {"carry": [1, 30]}
    assert (store.d_sae(7), store.k(7), store.settings.sae(3).d_sae) == (70_000, 4, 300)
    with pytest.raises(InputError, match="doc, position, token"):
        store.column("tokens")
    with pytest.raises(StoreError, match="holds layers 0, 3, 7"):
        store.d_sae(1)
    store.verify()


@pytest.mark.parametrize("layer", D_SAE)
def test_codes_match_what_was_written(written, layer):
    path, columns, dense, flags = written
    store = FeatureStore(path)
    csr = store.to_csr(layer)
    assert csr.shape == dense[layer].shape and csr.dtype == np.float32
    np.testing.assert_array_equal(csr.toarray(), dense[layer])
    for rows in (slice(3, 27), slice(19, 21), slice(-4, None), slice(30, 10), slice(0, 0)):
        np.testing.assert_array_equal(store.to_csr(layer, rows).toarray(), dense[layer][rows])
    with pytest.raises(InputError, match="step 2"):
        store.to_csr(layer, slice(0, 10, 2))
    for doc in range(5):
        document = store.document(doc)
        mine = columns.doc == doc
        assert document.tokens.tolist() == columns.token[mine].tolist()
        assert document.positions.tolist() == columns.position[mine].tolist() == list(range(mine.sum()))
        codes = document.codes(layer)
        assert codes.values.shape == (mine.sum(), K)
        rows = np.zeros((int(mine.sum()), D_SAE[layer]), np.float32)
        np.maximum.at(rows, (np.arange(len(rows))[:, None], codes.indices), codes.values)
        np.testing.assert_array_equal(rows, dense[layer][mine])
        assert codes.flags.tolist() == flags[layer][mine].tolist()
    with pytest.raises(InputError, match="0 to 4"):
        store.document(5)
    assert [sum(r.layers[layer].nnz for r in store.records)] == [np.count_nonzero(dense[layer])]
    assert sum(r.layers[layer].nan_rows for r in store.records) == (flags[layer] & NAN_ROW != 0).sum()
    assert sum(r.layers[layer].extreme_rows for r in store.records) == 4


@pytest.mark.parametrize("layer", D_SAE)
def test_a_part_of_a_document_crosses_shards(written, layer):
    document = FeatureStore(written[0]).document(3)
    whole = document.codes(layer)
    n = len(document)
    for rows in (slice(0, 0), slice(5), slice(n - 3, None), slice(3, n - 3), slice(None), slice(0, 10 * n)):
        part = document.part(rows)
        assert len(part) == len(whole.flags[rows])
        assert part.tokens.tolist() == document.tokens[rows].tolist()
        assert part.positions.tolist() == document.positions[rows].tolist()
        for mine, expected in zip(part.codes(layer), whole, strict=True):
            np.testing.assert_array_equal(mine, expected[rows])
        assert part.part(slice(2, 4)).positions.tolist() == document.positions[rows][2:4].tolist()


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_shard_that_encode_would_write_again_says_so_once(tmp_path, damage):
    """One advice, whether the shard is met by reading or by verify."""
    make_store(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    if damage == "short":
        shard.write_bytes(data[:-1])
    advice = "Run the same `qscope encode` command again: it encodes shard 1 and what follows again."
    for use in (FeatureStore.verify, lambda store: store.document(4).tokens):
        with pytest.raises(StoreError) as caught:
            use(FeatureStore(tmp_path))
        text = str(caught.value)
        assert "shard-00001.safetensors" in text and text.endswith(f". {advice}")
        assert text.count("again:") == 1 and "Restore" not in text and "new folder" not in text


def test_a_changed_shard_of_the_right_size_has_to_be_deleted_first(tmp_path):
    """encode compares sizes only, so that without this it would find nothing to do."""
    make_store(tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(StoreError, match="2 of 3 shards are damaged") as caught:
        FeatureStore(tmp_path).verify()
    assert str(caught.value).endswith(
        ". Delete shard-00000.safetensors and run the same `qscope encode` command again: it encodes shard 0 and what"
        " follows again."
    )


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("layer", [0, 3])
def test_statistics_match_dense_ones(written, monkeypatch, layer, block):
    path, columns, dense, flags = written
    monkeypatch.setattr(Shard, "blocks", functools.partialmethod(Shard.blocks, rows=block))
    store = FeatureStore(path)
    table = dense[layer]
    for exclude in (True, False):
        counted = table[flags[layer] == 0] if exclude else table
        counts = (counted > 0).sum(axis=0)
        assert store.feature_counts(layer, exclude).tolist() == counts.tolist()
        assert store.feature_max(layer, exclude).tolist() == counted.max(axis=0).tolist()
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda f: (-counts[f], f))
        assert store.top_features(layer, 20, exclude).tolist() == order[:20]
    for feature in (int(store.top_features(layer, 1)[0]), 0):
        rows = np.flatnonzero(table[:, feature])
        hits = store.feature(layer, feature)
        assert hits.doc.tolist() == columns.doc[rows].tolist()
        assert hits.position.tolist() == columns.position[rows].tolist()
        assert hits.value.tolist() == table[rows, feature].tolist()
    with pytest.raises(InputError, match="features 0 to"):
        store.feature(layer, D_SAE[layer])


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("once", [False, True])
def test_top_contexts_are_the_strongest_with_ties_in_order(tmp_path, monkeypatch, block, once):
    """Few features, values in eighths: most hits tie, so document and position decide order and cut."""
    monkeypatch.setattr(Shard, "blocks", functools.partialmethod(Shard.blocks, rows=block))
    columns, dense, flags = make_store(
        tmp_path, {2: 8}, docs=[np.repeat([0, 1, 2], [40, 3, 30]), np.repeat([2, 5], 60)]
    )
    store = FeatureStore(tmp_path)
    for n in (1, 3, 500):
        found = store.top_contexts(2, range(7), n, one_per_document=once)
        assert list(found) == list(range(7))
        for feature, hits in found.items():
            value = np.where(flags[2] == 0, dense[2][:, feature], 0)
            expected = sorted((-value[r], columns.doc[r], columns.position[r]) for r in np.flatnonzero(value))
            if once:
                seen = set()
                expected = [hit for hit in expected if not (hit[1] in seen or seen.add(hit[1]))]
            got = list(zip((-hits.value).tolist(), hits.doc.tolist(), hits.position.tolist(), strict=True))
            assert got == expected[:n]
    assert store.top_contexts(2, [], 3) == {}
    with pytest.raises(InputError, match="n >= 1"):
        store.top_contexts(2, [1], 0)


def test_an_incomplete_store_is_read_with_a_warning(tmp_path):
    columns, _, _ = make_store(tmp_path, finish=False)
    with pytest.warns(UserWarning, match="only the 3 finished shards"):
        store = FeatureStore(tmp_path)
    assert not store.complete and store.num_tokens == len(columns.doc)


def test_a_file_is_laid_out_as_the_library_lays_it():
    arrays = shard_arrays(
        [0, 0, 1],
        [0, 1, 0],
        [7, 8, 9],
        {3: pack_layer(*random_codes(1, 3, 4, 70_000), 70_000), 1: {"values": np.ones((3, 1))}},
    )
    arrays["1.values"] = arrays["1.values"].astype(np.float32)
    parts, size = safetensors_parts(arrays, {"key": "x"})
    data = b"".join(parts)
    assert data == save(arrays, metadata={"key": "x"})
    assert len(data) == size


# --- the golden store ------------------------------------------------------------------------------------


def write_golden(path):
    """What tests/golden/store-v1 holds, but for its tokenizer. Change it only with a new store version."""
    codes = {
        0: ([[3.0, 0.5], [np.nan, 1], [2, 0.25]], [[199, 7], [0, 1], [0, 3]]),
        3: ([[1.5, -2], [0, 0], [4, 8]], [[256, 1], [5, 6], [299, 298]]),
        7: ([[1e5, 1], [2, 3], [0.125, 1e-9]], [[69_999, 4], [65_536, 65_535], [0, 32_768]]),
    }
    changes = {"max_tokens": 6, "batch_tokens": 4096, "text": {"field": "body", "strict": True}}
    with StoreWriter.open(path, settings_of(k=2, **changes)) as writer:
        for index, doc in enumerate(([0, 0, 1], [1, 1, 2])):
            packed = {
                layer: pack_layer(
                    np.array(acts, np.float32) * (1 + index),
                    np.array(ids),
                    D_SAE[layer],
                    np.array([90, 1, 2]),
                )
                for layer, (acts, ids) in codes.items()
            }
            arrays = shard_arrays(doc, [[0, 1, 0], [1, 2, 0]][index], [[4, 5, 6], [7, 8, 9]][index], packed)
            writer.add(index, f"{index}" * 64, arrays, {"carry": [index + 1, 1]})
        writer.complete({"rows": {"documents": 3, "empty": 0}})


def test_the_golden_store_stays_readable():
    store = FeatureStore(GOLDEN)
    store.verify()
    assert store.settings == settings_of(k=2, max_tokens=6, batch_tokens=4096, text={"field": "body", "strict": True})
    assert store.column("doc").tolist() == [0, 0, 1, 1, 1, 2]
    assert store.column("token").tolist() == [4, 5, 6, 7, 8, 9]
    assert store.document(1).positions.tolist() == [0, 1, 2]
    codes = store.document(0).codes(7)
    assert codes.indices.tolist() == [[4, 69_999], [65_535, 65_536]]
    assert codes.values.tolist() == [[1.0, 100_000.0], [3.0, 2.0]]
    assert codes.flags.tolist() == [EXTREME_ROW, 0]
    assert store.document(0).codes(0).flags.tolist() == [EXTREME_ROW, NAN_ROW]
    assert store.feature(0, 199).value.tolist() == [3.0, 6.0]
    assert store.feature_counts(3).nonzero()[0].tolist() == [298, 299]
    assert store.top_contexts(3, [298], 1)[298].value.tolist() == [16.0]
    assert store.records[0].layers[7].values == "float32" and store.records[0].layers[0].values == "float16"
    assert store.tokenizer().decode([0, 1], skip_special_tokens=False) == "hello world"


def test_the_same_features_give_the_golden_bytes(tmp_path):
    write_golden(tmp_path)
    names = {path.name for path in GOLDEN.iterdir()} - {"tokenizer"}
    assert names == {path.name for path in tmp_path.iterdir()} - {".lock"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes(), name


# --- optional packages -----------------------------------------------------------------------------------


def test_without_pydantic_the_error_is_one_paragraph():
    code = (
        "import sys; sys.modules['pydantic'] = None\n"
        "import qscope\n"
        "try: qscope.FeatureStore\n"
        "except qscope.errors.QscopeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import qscope.errors\n" + code], capture_output=True, text=True, check=True
    )
    assert "pip install" in done.stdout and done.stdout.count("\n") == 1


def test_without_scipy_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(StoreError, match=r"needs scipy.*qscope\[report\]"):
        FeatureStore(GOLDEN).to_csr(0)
