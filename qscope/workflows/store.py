"""Verify a feature store, or export it for other tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qscope.errors import InputError
from qscope.store import FeatureStore
from qscope.store_export import export


@dataclass(frozen=True)
class StoreConfig:
    """Export a feature store for DuckDB, Polars and Spark, or check that nothing in it changed.

    Example: qscope store export codes --to parquet --out codes-parquet
    """

    action: Literal["export", "verify"]
    """export: write it in another format. verify: recompute every checksum."""
    store: Path
    """Folder that `qscope encode` wrote."""
    to: Literal["parquet"] = "parquet"
    """Format of the export."""
    out: Path | None = None
    """Folder of the export. Default: the store's name with the format appended."""


@dataclass(frozen=True)
class StoreResult:
    action: str
    store: str
    tokens: int
    shards: int
    out: str | None


def run(config: StoreConfig) -> StoreResult:
    """Do `config.action`. Raises StoreError for a damaged store."""
    store = FeatureStore(config.store)
    out: Path | None = None
    if config.action == "verify":
        if config.out is not None:
            raise InputError("--out belongs to `store export`; `store verify` writes nothing.")
        store.verify()
    else:
        folder = config.store.resolve()
        out = config.out or folder.with_name(f"{folder.name}-{config.to}")
        export(store, out, to=config.to)
    return StoreResult(config.action, str(config.store), store.num_tokens, len(store), str(out) if out else None)
