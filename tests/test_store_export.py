"""The Parquet export of a feature store: same numbers, resumable, readable by other engines."""

import errno
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from qscope.errors import InputError, StorageError, StoreError
from qscope.store import FeatureStore
from qscope.store_export import export

pq = pytest.importorskip("pyarrow.parquet", reason="the export needs pyarrow, an optional dependency")
# Two shards, three layers: ids of 1 byte, 2 bytes and more; layer 7 is float32, the others are float16.
GOLDEN = Path(__file__).parent / "golden" / "store-v1"


@pytest.fixture
def exported(tmp_path):
    export(FeatureStore(GOLDEN), tmp_path / "out")
    return tmp_path / "out"


def test_parquet_holds_the_numbers_of_the_store(exported):
    store = FeatureStore(GOLDEN)
    assert {file.name for file in exported.iterdir()} == {
        ".lock", "export.json", "shard-00000.parquet", "shard-00001.parquet",
    }  # fmt: skip
    files = sorted(exported.glob("*.parquet"))
    table = pq.read_table(files)
    for name in ("doc", "position", "token"):
        assert table.schema.field(name).type == "uint32"
        assert table[name].to_pylist() == store.column(name).tolist()
    for layer, value_type in ((0, "halffloat"), (3, "halffloat"), (7, "float")):
        assert str(table.schema.field(f"indices_{layer}").type).startswith("fixed_size_list<element: int32")
        assert str(table.schema.field(f"values_{layer}").type).startswith(f"fixed_size_list<element: {value_type} ")
        codes = [shard.layer(layer) for shard in store]
        assert table[f"indices_{layer}"].to_pylist() == np.concatenate([c.indices for c in codes]).tolist()
        assert table[f"values_{layer}"].to_pylist() == np.concatenate([c.values for c in codes]).tolist()
        assert table[f"flags_{layer}"].to_pylist() == np.concatenate([c.flags for c in codes]).tolist()
    assert table["values_7"].to_pylist()[0] == [1.0, 100_000.0]


def test_encodings_are_those_that_every_reader_knows(exported):
    """BYTE_STREAM_SPLIT on float16 is refused by DuckDB."""
    group = pq.ParquetFile(exported / "shard-00000.parquet").metadata.row_group(0)
    assert group.num_columns == 12
    for i in range(group.num_columns):
        column = group.column(i)
        values = column.path_in_schema.startswith(("values", "flags"))
        assert column.compression == "ZSTD"
        assert set(column.encodings) - {"RLE"} == ({"PLAIN"} if values else {"DELTA_BINARY_PACKED"})


def test_long_shards_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("qscope.store_export._ROWS", 2)
    export(FeatureStore(GOLDEN), tmp_path)
    file = pq.ParquetFile(tmp_path / "shard-00001.parquet")
    assert file.metadata.num_row_groups == 2
    assert file.read()["token"].to_pylist() == [7, 8, 9]


def test_one_wide_shard_makes_the_column_wide_in_every_file(tmp_path):
    from qscope.store import StoreWriter, pack_layer, shard_arrays

    fields = json.loads((GOLDEN / "manifest.json").read_text())["settings"]
    fields["saes"] = [{"layer": 1, "sha256": "c" * 64, "d_sae": 8, "k": 1}]
    settings = type(FeatureStore(GOLDEN).settings).model_validate(fields)
    with StoreWriter.open(tmp_path / "codes", settings) as writer:
        for index, value in enumerate((1.0, 1e6)):
            packed = {1: pack_layer(np.array([[value]]), np.array([[3]]), 8)}
            writer.add(index, "k", shard_arrays([index], [0], [0], packed))
        writer.complete()
    export(FeatureStore(tmp_path / "codes"), tmp_path / "out")
    table = pq.read_table(sorted((tmp_path / "out").glob("*.parquet")))
    assert table["values_1"].to_pylist() == [[1.0], [1e6]]


def test_an_export_resumes(exported):
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in exported.glob("*.parquet")}
    (exported / "shard-00001.parquet").write_bytes(b"half")
    (exported / ".tmp-shard-00001.parquet").write_bytes(b"half")
    (exported / "shard-00002.parquet").write_bytes(b"of a longer store")
    export(FeatureStore(GOLDEN), exported)
    after = {file.name: (file.stat().st_ino, file.read_bytes()) for file in exported.glob("*.parquet")}
    assert not list(exported.glob(".tmp-*"))
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert after["shard-00000.parquet"] == before["shard-00000.parquet"]


def test_a_shard_that_was_encoded_again_is_exported_again(exported):
    """The Parquet file names the shard it came from; a name alone would keep the old numbers."""
    shutil.copy(exported / "shard-00000.parquet", exported / "shard-00001.parquet")
    export(FeatureStore(GOLDEN), exported)
    assert pq.read_table(exported / "shard-00001.parquet")["token"].to_pylist() == [7, 8, 9]


def test_other_folders_stores_and_formats_are_refused(exported, tmp_path):
    store = FeatureStore(GOLDEN)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard-00009.parquet").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        export(store, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["shard-00009.parquet"]
    (exported / "export.json").write_text("{}")
    with pytest.raises(StoreError, match="another feature store"):
        export(store, exported)
    with pytest.raises(InputError, match="accepted: parquet"):
        export(store, tmp_path / "other", to="csv")
    shutil.copytree(GOLDEN, tmp_path / "begun")
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    (tmp_path / "begun" / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "totals": {}}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        begun = FeatureStore(tmp_path / "begun")
    with pytest.raises(StoreError, match="is incomplete"):
        export(begun, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("shard-00001.parquet"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"shard-00001\.parquet could not be written: the disk is full"):
        export(FeatureStore(GOLDEN), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "export.json", "shard-00000.parquet"}
    monkeypatch.undo()
    export(FeatureStore(GOLDEN), tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 2


def test_without_pyarrow_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match=r"needs pyarrow.*qscope\[report\]"):
        export(FeatureStore(GOLDEN), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["duckdb", "polars"])
def test_other_engines_read_the_export(exported, reader):
    engine = pytest.importorskip(reader, reason=f"{reader} is no dependency; checked where it is installed")
    pattern = str(exported / "*.parquet")
    if reader == "duckdb":
        rows = engine.sql(f"select token, values_0 from '{pattern}' order by token").fetchall()
        tokens, values = [row[0] for row in rows], [list(row[1]) for row in rows]
    else:
        table = engine.read_parquet(pattern).sort("token")
        tokens, values = table["token"].to_list(), table["values_0"].to_list()
    assert tokens == [4, 5, 6, 7, 8, 9]
    assert values == np.concatenate([shard.layer(0).values for shard in FeatureStore(GOLDEN)]).tolist()


def test_the_work_per_shard_does_not_grow_with_the_number_of_shards(tmp_path):
    from qscope.store import StoreWriter, pack_layer, shard_arrays

    class Counted(list):
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            return super().__iter__()

    fields = json.loads((GOLDEN / "manifest.json").read_text())["settings"]
    fields["saes"] = [{"layer": 1, "sha256": "c" * 64, "d_sae": 8, "k": 1}]
    settings = type(FeatureStore(GOLDEN).settings).model_validate(fields)
    rounds = []
    for shards in (1, 6):
        folder = tmp_path / f"codes-{shards}"
        with StoreWriter.open(folder, settings) as writer:
            for index in range(shards):
                packed = {1: pack_layer(np.array([[1.0]]), np.array([[3]]), 8)}
                writer.add(index, "k", shard_arrays([index], [0], [0], packed))
            writer.complete()
        store = FeatureStore(folder)
        store.records = Counted(store.records)
        export(store, tmp_path / f"out-{shards}")
        rounds.append(store.records.rounds)
    assert rounds[0] == rounds[1]
