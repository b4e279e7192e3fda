"""Features on disk: what `qscope encode` wrote, read lazily and in bounded memory.

    store = qscope.FeatureStore("codes/")
    counts = store.feature_counts(layer=15)                       # [F] int64
    hits = store.top_contexts(15, features=[7], n=20)[7]          # doc, position, value
    codes = store.document(3).codes(15)                           # values, indices [n, K]

:class:`StoreWriter` writes a store, :mod:`qscope.store_format` describes it.
"""

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from qscope.errors import InputError, StoreError
from qscope.store_format import (
    JOURNAL,
    TOKENIZER,
    MissingPackageError,
    ShardRecord,
    StoreSettings,
    array_forms,
    read_journal,
    read_manifest,
)
from qscope.store_hits import BestHits, FeatureHits, join, row_range
from qscope.store_packing import (
    COLUMNS,
    EXTREME_ROW,
    NAN_ROW,
    Form,
    LayerCodes,
    layer_forms,
    pack_layer,
    shard_arrays,
    unpack_layer,
)
from qscope.store_writer import StoreWriter

if TYPE_CHECKING:
    import scipy.sparse
    import torch

__all__ = [
    "EXTREME_ROW",
    "NAN_ROW",
    "FeatureHits",
    "FeatureStore",
    "LayerCodes",
    "Shard",
    "ShardRecord",
    "StoreSettings",
    "StoreWriter",
    "StoredDocument",
    "pack_layer",
    "shard_arrays",
    "unpack_layer",
]

_BLOCK_ROWS = 1 << 16
_OPEN_SHARDS = 4


class _ShardError(StoreError):
    """A shard file that is not what was written. `verify` names several, and gives one `advice`."""

    def __init__(self, path: Path, problem: str, advice: str) -> None:
        super().__init__(f"{path} {problem}. {advice}")
        self.summary = f"{path.name} {problem}"
        self.advice = advice


class Shard:
    """One finished shard. Nothing is read before it is asked for; the file is memory-mapped."""

    def __init__(self, folder: Path, record: ShardRecord, settings: StoreSettings, settings_key: str) -> None:
        self.path = folder / record.file
        self.record = record
        self._settings = settings
        self._settings_key = settings_key

    def __len__(self) -> int:
        return self.record.tokens

    @cached_property
    def doc(self) -> npt.NDArray[np.uint32]:
        """[N] document number of each token, ascending."""
        return self._read("doc")

    @cached_property
    def position(self) -> npt.NDArray[np.uint32]:
        """[N] position of each token within its document."""
        return self._read("position")

    @cached_property
    def token(self) -> npt.NDArray[np.uint32]:
        """[N] token ids."""
        return self._read("token")

    def layer(self, layer: int, rows: slice | None = None) -> LayerCodes:
        """Codes of all tokens of the shard, or of a range of them (step 1)."""
        sae = self._settings.sae(layer)
        names = layer_forms(sae.d_sae, sae.k)
        return unpack_layer({name: self._read(f"{layer}.{name}", rows) for name in names}, sae.d_sae)

    def blocks(self, layer: int, rows: int = _BLOCK_ROWS) -> Iterator[tuple[slice, LayerCodes]]:
        """Codes of the whole shard in pieces, so that memory does not grow with the shard."""
        for start in range(0, len(self), rows):
            piece = slice(start, min(start + rows, len(self)))
            yield piece, self.layer(layer, piece)

    @cached_property
    def _forms(self) -> dict[str, Form]:
        return array_forms(self._settings)

    @cached_property
    def _file(self) -> Any:
        from safetensors import SafetensorError, safe_open

        if self.path.is_symlink():
            raise _ShardError(self.path, "is a symbolic link", f"Put the file itself in place of {self.path.name}.")
        try:
            size = self.path.stat().st_size
            if size != self.record.bytes:
                raise _ShardError(self.path, f"has {size} bytes instead of {self.record.bytes}", self._again())
            file = safe_open(self.path, framework="numpy")
        except FileNotFoundError as error:
            raise _ShardError(self.path, "cannot be read: it is missing", self._again()) from error
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
            raise _ShardError(self.path, problem, f"Make {self.path.name} readable.") from error
        except SafetensorError as error:
            raise _ShardError(self.path, f"cannot be read: {error}", self._again(delete=True)) from error
        if (file.metadata() or {}).get("settings_key") != self._settings_key:
            raise _ShardError(self.path, "was written with other settings than this store's", self._again(delete=True))
        return file

    def _again(self, delete: bool = False) -> str:
        # encode looks at the sizes of finished shards only; it does not read them.
        first = f"Delete {self.path.name} and run" if delete else "Run"
        again = f"it encodes shard {self.record.index} and what follows again"
        return f"{first} the same `qscope encode` command again: {again}."

    def verify(self) -> None:
        """Compares the file's sha256 with the recorded one. `StoreError`: it is missing or was changed."""
        self._file.metadata()
        digest = hashlib.sha256()
        try:
            with open(self.path, "rb") as handle:
                while chunk := handle.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
            raise _ShardError(self.path, problem, f"Make {self.path.name} readable.") from error
        if digest.hexdigest() != self.record.sha256:
            raise _ShardError(self.path, "was changed: its sha256 is not the recorded one", self._again(delete=True))

    def _read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        from safetensors import SafetensorError

        start, stop = row_range(rows, len(self))
        dtypes, shape = self._forms[name]
        try:
            part = self._file.get_slice(name)
            whole = tuple(part.get_shape())
            if whole != (len(self), *shape):
                raise StoreError(f"{self.path}: {name} has shape {list(whole)}, expected {[len(self), *shape]}.")
            if start == stop:
                return np.empty((0, *shape), dtypes[0])
            array: npt.NDArray[Any] = part[start:stop]
        except SafetensorError as error:
            raise StoreError(f"{self.path}: {name} cannot be read: {error}. Restore the file.") from error
        if array.dtype.name not in dtypes:
            raise StoreError(f"{self.path}: {name} is {array.dtype.name}, expected {' or '.join(dtypes)}.")
        return array


class StoredDocument:
    """One document, or a part of it. Nothing is read before it is asked for."""

    def __init__(self, store: "FeatureStore", index: int, parts: list[tuple[ShardRecord, slice]]) -> None:
        self.index = index
        self._parts = parts  # never empty: an empty range still tells the shape of its codes
        self._store = store

    def __len__(self) -> int:
        return sum(rows.stop - rows.start for _, rows in self._parts)

    @cached_property
    def tokens(self) -> npt.NDArray[np.uint32]:
        """[n] token ids."""
        return join([self._store._cached(record).token[rows] for record, rows in self._parts], np.uint32)

    @cached_property
    def positions(self) -> npt.NDArray[np.uint32]:
        """[n] positions within the document."""
        return join([self._store._cached(record).position[rows] for record, rows in self._parts], np.uint32)

    def codes(self, layer: int) -> LayerCodes:
        """Codes of the document's tokens, [n, K]."""
        pieces = [self._store._cached(record).layer(layer, rows) for record, rows in self._parts]
        if len(pieces) == 1:
            return pieces[0]
        return LayerCodes(*(np.concatenate(columns) for columns in zip(*pieces, strict=True)))

    def part(self, rows: slice) -> "StoredDocument":
        """A range of its tokens (step 1)."""
        start, stop = row_range(rows, len(self))
        parts, first = [], 0
        for record, held in self._parts:
            low, high = max(start - first, 0) + held.start, min(stop - first + held.start, held.stop)
            first += held.stop - held.start
            if low < high:
                parts.append((record, slice(low, high)))
        return StoredDocument(self._store, self.index, parts or [(self._parts[0][0], slice(0, 0))])


class FeatureStore:
    """A feature store, open for reading. Iterating gives its shards; `len` is their number.

    Raises `StoreError` when the folder is no store, is damaged, or was written by a newer qscope. A store
    whose encoding has not finished is read with a warning: only its finished shards are there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        self.settings: StoreSettings = manifest.settings
        self.complete: bool = manifest.complete
        self.totals: dict[str, Any] = manifest.totals
        self.settings_key = manifest.settings_key
        self.records: list[ShardRecord] = read_journal(self.path)[0]
        self._starts = np.cumsum([0] + [record.tokens for record in self.records])
        self._open: OrderedDict[int, Shard] = OrderedDict()
        if self.complete and self.totals.get("shards") != len(self.records):
            raise StoreError(
                f"{self.path} is marked complete with {self.totals.get('shards')} shards, but {JOURNAL} names"
                f" {len(self.records)}. Restore {JOURNAL}, or encode into a new folder."
            )
        if not self.complete:
            warnings.warn(
                f"{self.path} is incomplete: encoding has not finished, only the {len(self.records)} finished shards"
                " are read. Run the same encode command again to finish it.",
                stacklevel=2,
            )

    @property
    def layers(self) -> tuple[int, ...]:
        return self.settings.layers

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents are numbered 0 to num_documents - 1; some may have no tokens."""
        return 1 + max((record.last_doc for record in self.records if record.last_doc is not None), default=-1)

    def d_sae(self, layer: int) -> int:
        return self.settings.sae(layer).d_sae

    def k(self, layer: int) -> int:
        return self.settings.sae(layer).k

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Shard]:
        return (self._shard(record) for record in self.records)

    def __repr__(self) -> str:
        return (
            f"FeatureStore({str(self.path)!r}: {self.num_documents:,} documents, {self.num_tokens:,} tokens,"
            f" layers {list(self.layers)}, {len(self)} shards{'' if self.complete else ', incomplete'})"
        )

    def document(self, index: int) -> StoredDocument:
        """One document, read without touching the rest of the store. `InputError`: there is none."""
        if not 0 <= index < self.num_documents:
            raise InputError(
                f"document {index} is not in {self.path}: it holds documents 0 to {self.num_documents - 1}."
            )
        parts = []
        for record in self.records:
            if record.first_doc is None or record.last_doc is None or not record.first_doc <= index <= record.last_doc:
                continue
            start, stop = 0, record.tokens
            if record.first_doc != record.last_doc:
                start, stop = (int(i) for i in np.searchsorted(self._cached(record).doc, [index, index + 1]))
            if start < stop:
                parts.append((record, slice(start, stop)))
        return StoredDocument(self, index, parts or [(self.records[0], slice(0, 0))])

    @overload
    def column(self, name: str, as_torch: Literal[False] = False) -> npt.NDArray[np.uint32]: ...
    @overload
    def column(self, name: str, as_torch: Literal[True]) -> "torch.Tensor": ...
    def column(self, name: str, as_torch: bool = False) -> "npt.NDArray[np.uint32] | torch.Tensor":
        """`doc`, `position` or `token` of all tokens, [num_tokens] uint32; as_torch: an int64 tensor."""
        if name not in COLUMNS:
            raise InputError(f"column {name!r} is not in a feature store; it has {', '.join(COLUMNS)}.")
        joined = join([getattr(shard, name) for shard in self], np.uint32)
        if not as_torch:
            return joined
        import torch

        return torch.from_numpy(joined.astype(np.int64))

    def to_csr(self, layer: int, rows: slice | None = None) -> "scipy.sparse.csr_matrix":
        """Codes as a matrix [num_tokens, F] float32, or [len(rows), F] for a range of tokens (step 1).

        Rows that were flagged NaN are empty. Needs scipy.
        """
        try:
            import scipy.sparse
        except ImportError as error:
            raise MissingPackageError(
                f"FeatureStore.to_csr needs scipy, which cannot be imported ({error}). Install it: pip install"
                " 'qscope[report]' or pip install scipy."
            ) from error
        start, stop = row_range(rows, self.num_tokens)
        counts, ids, values = [np.zeros(1, np.int64)], [], []
        for shard, first in zip(self, self._starts[:-1], strict=True):
            inside = slice(max(0, start - int(first)), max(0, min(len(shard), stop - int(first))))
            if inside.start >= inside.stop:
                continue
            codes = shard.layer(layer, inside)
            active = codes.values > 0
            counts.append(active.sum(axis=1, dtype=np.int64))
            ids.append(codes.indices[active])
            values.append(codes.values[active])
        parts = (join(values, np.float32), join(ids, np.int32), np.cumsum(np.concatenate(counts)))
        return scipy.sparse.csr_matrix(parts, shape=(stop - start, self.d_sae(layer)))

    def feature(self, layer: int, feature: int) -> FeatureHits:
        """All hits of a feature, in the order of the store. Flagged rows with extreme norm are among them."""
        self._check_features(layer, [feature])
        docs, positions, values = [], [], []
        for shard in self:
            for rows, codes in shard.blocks(layer):
                row, slot = np.nonzero((codes.indices == feature) & (codes.values > 0))
                docs.append(shard.doc[rows][row])
                positions.append(shard.position[rows][row])
                values.append(codes.values[row, slot])
        return FeatureHits(join(docs, np.uint32), join(positions, np.uint32), join(values, np.float32))

    def feature_counts(self, layer: int, exclude_flagged: bool = True) -> npt.NDArray[np.int64]:
        """Tokens at which each feature is active, [F] int64. exclude_flagged: without flagged rows."""
        counts = np.zeros(self.d_sae(layer), np.int64)
        for _, ids, _ in self._entries(layer, exclude_flagged):
            counts += np.bincount(ids, minlength=len(counts))
        return counts

    def feature_max(self, layer: int, exclude_flagged: bool = True) -> npt.NDArray[np.float32]:
        """Largest activation of each feature, [F] float32; 0 where it is never active."""
        largest = np.zeros(self.d_sae(layer), np.float32)
        for _, ids, values in self._entries(layer, exclude_flagged):
            np.maximum.at(largest, ids, values)
        return largest

    def top_features(self, layer: int, n: int, exclude_flagged: bool = True) -> npt.NDArray[np.int64]:
        """The n features active at most tokens, most frequent first, lowest id first among equals. Dead ones
        never."""
        counts = self.feature_counts(layer, exclude_flagged)
        order = np.argsort(-counts, kind="stable")[:n]
        return order[counts[order] > 0]

    def top_contexts(
        self,
        layer: int,
        features: Iterable[int],
        n: int,
        one_per_document: bool = False,
        exclude_flagged: bool = True,
    ) -> dict[int, FeatureHits]:
        """The n strongest hits of each feature: value descending, then document, then position ascending.

        Streams over the shards; memory grows with len(features) * n, not with the store. one_per_document
        keeps the strongest hit of each document only.
        """
        wanted = np.array(sorted({int(feature) for feature in features}), np.int64)
        self._check_features(layer, wanted.tolist())
        if n < 1:
            raise InputError(f"top_contexts got n={n}; it takes n >= 1.")
        if not len(wanted):
            return {}
        slot_of = np.full(self.d_sae(layer), -1, np.int32)
        slot_of[wanted] = np.arange(len(wanted))
        best = BestHits.empty()
        bar = np.zeros(len(wanted), np.float32)
        for rows, ids, values in self._entries(layer, exclude_flagged):
            slots = slot_of[ids]
            # Ties with the bar lose: they come later in the store than all that is kept.
            keep = (slots >= 0) & (values > bar[slots])
            if not keep.any():
                continue
            new = BestHits(slots[keep], rows.doc[keep], rows.position[keep], values[keep])
            best = best.merged(new, n, one_per_document)
            full = np.bincount(best.slot, minlength=len(wanted)) == n
            last = np.searchsorted(best.slot, np.arange(len(wanted)), side="right") - 1
            bar[full] = best.value[last[full]]
        return {
            int(feature): FeatureHits(best.doc[hits], best.position[hits], best.value[hits])
            for slot, feature in enumerate(wanted)
            for hits in [best.slot == slot]
        }

    def verify(self) -> None:
        """Recomputes the sha256 of every shard. `StoreError`: some are missing or damaged."""
        damaged = []
        for shard in self:
            try:
                shard.verify()
            except _ShardError as error:
                damaged.append(error)
        if damaged:
            named = "; ".join(error.summary for error in damaged[:5]) + ("; ..." if len(damaged) > 5 else "")
            # The first one's advice serves all: what follows it is encoded again.
            raise StoreError(
                f"{self.path}: {len(damaged)} of {len(self)} shards are damaged: {named}. {damaged[0].advice}"
            )

    def tokenizer(self) -> Any:
        """The tokenizer that was copied into the store, through transformers and without a network."""
        folder = self.path / TOKENIZER
        if not folder.is_dir():
            raise StoreError(
                f"{self.path} holds no tokenizer folder. Load the tokenizer of {self.settings.model.name}."
            )
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{folder} is damaged: {str(error).strip().splitlines()[0]} Delete that folder and run the same "
                "`qscope encode` command again: it copies the tokenizer once more."
            ) from error

    def _shard(self, record: ShardRecord) -> Shard:
        return Shard(self.path, record, self.settings, self.settings_key)

    def _cached(self, record: ShardRecord) -> Shard:
        shard = self._open.pop(record.index, None) or self._shard(record)
        self._open[record.index] = shard
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def _check_features(self, layer: int, features: list[int]) -> None:
        size = self.d_sae(layer)
        wrong = [feature for feature in features if not 0 <= feature < size]
        if wrong:
            raise InputError(f"feature {wrong[0]} does not exist: layer {layer} has features 0 to {size - 1}.")

    def _entries(
        self, layer: int, exclude_flagged: bool
    ) -> Iterator[tuple["_Rows", npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Active entries block by block: where they are, feature ids, values."""
        self.settings.sae(layer)
        for shard in self:
            for rows, codes in shard.blocks(layer):
                active = codes.values > 0
                if exclude_flagged:
                    active &= (codes.flags == 0)[:, None]
                yield _Rows(shard, rows, active), codes.indices[active], codes.values[active]


class _Rows:
    """Documents and positions of the active entries of a block, gathered only when asked for."""

    def __init__(self, shard: Shard, rows: slice, active: npt.NDArray[np.bool_]) -> None:
        self._shard, self._rows, self._active = shard, rows, active

    @cached_property
    def _row(self) -> npt.NDArray[np.intp]:
        return np.nonzero(self._active)[0]

    @property
    def doc(self) -> npt.NDArray[np.uint32]:
        return self._shard.doc[self._rows][self._row]

    @property
    def position(self) -> npt.NDArray[np.uint32]:
        return self._shard.position[self._rows][self._row]
