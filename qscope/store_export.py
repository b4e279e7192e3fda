"""A feature store as Parquet, for DuckDB, Polars, Spark and whatever else reads tables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qscope.errors import InputError, StoreError
from qscope.files import LOCK, acquire_lock, fsync_folder, storage_error, write_file
from qscope.store import FeatureStore, Shard
from qscope.store_format import MissingPackageError, canonical_json
from qscope.store_packing import COLUMNS

EXPORT_VERSION = 1
MARKER = "export.json"
_ROWS = 1 << 16  # per row group: what a reader must decode to get at one token
_SHARD_KEY = b"qscope.shard_sha256"


def export(store: FeatureStore, path: str | os.PathLike[str], to: str = "parquet") -> None:
    """Writes a complete store into a new or empty folder, one Parquet file per shard; resumes what was begun.

    Columns: `doc`, `position`, `token` uint32; per layer L `indices_L` and `values_L`, fixed-size lists [K]
    of int32 and float16 (float32 if a shard of the layer needs it), and `flags_L` uint8. As in the store, a
    token's active entries ascend by id and padding (id 0, value 0) follows. Needs pyarrow.

    Raises `InputError`: another format was asked for. `StoreError`: the store is incomplete, the folder holds
    something else or is being written by another process. `StorageError`: the disk refused.
    """
    if to != "parquet":
        raise InputError(f"A feature store cannot be exported to {to!r}; accepted: parquet.")
    if not store.complete:
        raise StoreError(f"{store.path} is incomplete; run its encode command again until it ends, then export.")
    _require_pyarrow()
    folder = Path(path)
    marker = {"format": "qscope-parquet", "version": EXPORT_VERSION, "settings_key": store.settings_key}
    text = canonical_json(marker).encode() + b"\n"
    _claim(folder, text)
    lock = acquire_lock(folder)
    try:
        write_file(folder / MARKER, [text], len(text))
        wanted = {_name(shard) for shard in store}
        with _storage(folder):
            for name in os.listdir(folder):
                if name.startswith(".tmp-shard-") or (name.startswith("shard-") and name not in wanted):
                    (folder / name).unlink()
        schema = _schema(store)
        for shard in store:
            shard.verify()  # the export vouches for the shard's sha256
            _export_shard(store, shard, folder / _name(shard), schema)
    finally:
        lock.release()


def _name(shard: Shard) -> str:
    return f"{Path(shard.record.file).stem}.parquet"


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"The Parquet export needs pyarrow, which cannot be imported ({error}). Install it: pip install"
            " 'qscope[report]' or pip install pyarrow."
        ) from error


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(error, path) from error


def _claim(folder: Path, marker: bytes) -> None:
    """Makes the folder, or finds it empty or begun from the same store."""
    with _storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name in sorted(os.listdir(folder)) if name not in (LOCK, f".tmp-{MARKER}")]
        if not names:
            return
        if MARKER not in names:
            raise StoreError(
                f"{folder} is not empty and no export of a feature store: it holds {', '.join(names[:3])}."
                " Give a new or empty folder."
            )
        if (folder / MARKER).read_bytes() != marker:
            raise StoreError(f"{folder} holds the export of another feature store. Give a new or empty folder.")


def _schema(store: FeatureStore) -> Any:
    """Of every file of the export, without the metadata that names its shard."""
    import pyarrow as pa

    fields = [pa.field(name, pa.uint32(), nullable=False) for name in COLUMNS]
    for layer in store.layers:
        wide = any(record.layers[layer].values == "float32" for record in store.records)
        value = pa.field("element", pa.float32() if wide else pa.float16(), nullable=False)
        index = pa.field("element", pa.int32(), nullable=False)
        fields += [
            pa.field(f"indices_{layer}", pa.list_(index, store.k(layer)), nullable=False),
            pa.field(f"values_{layer}", pa.list_(value, store.k(layer)), nullable=False),
            pa.field(f"flags_{layer}", pa.uint8(), nullable=False),
        ]
    return pa.schema(fields)


def _is_done(path: Path, shard: Shard) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return False
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid:
        return False
    return bool(metadata.get(_SHARD_KEY) == shard.record.sha256.encode())


def _export_shard(store: FeatureStore, shard: Shard, path: Path, schema: Any) -> None:
    import pyarrow.parquet as pq

    if _is_done(path, shard):
        return
    metadata = {_SHARD_KEY: shard.record.sha256.encode(), b"qscope.settings_key": store.settings_key.encode()}
    schema = schema.with_metadata(metadata)
    # BYTE_STREAM_SPLIT would make the float16 values smaller, but DuckDB refuses it for that type.
    leaves = [f"indices_{layer}.list.element" for layer in store.layers]
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with _storage(path):
            with pq.ParquetWriter(
                temporary,
                schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                column_encoding=dict.fromkeys([*COLUMNS, *leaves], "DELTA_BINARY_PACKED"),
                write_statistics=list(COLUMNS),
            ) as writer:
                for start in range(0, len(shard), _ROWS):
                    rows = slice(start, min(start + _ROWS, len(shard)))
                    writer.write_table(_table(store, shard, rows, schema))
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _table(store: FeatureStore, shard: Shard, rows: slice, schema: Any) -> Any:
    import pyarrow as pa

    columns = [pa.array(getattr(shard, name)[rows]) for name in COLUMNS]
    for layer in store.layers:
        codes = shard.layer(layer, rows)
        value_type = schema.field(f"values_{layer}").type
        values = codes.values.reshape(-1).astype(value_type.value_type.to_pandas_dtype())
        indices = pa.array(codes.indices.reshape(-1))
        columns += [
            pa.FixedSizeListArray.from_arrays(indices, type=schema.field(f"indices_{layer}").type),
            pa.FixedSizeListArray.from_arrays(pa.array(values), type=value_type),
            pa.array(codes.flags),
        ]
    return pa.Table.from_arrays(columns, schema=schema)
