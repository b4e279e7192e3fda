"""Text to token windows: sources, documents, shards of text, batches.

A *document* is one row of input (a line of JSONL, a row of Parquet, a whole .txt file) and its number is
that row's place in the input, counted over all sources and including rows that are skipped. A *piece*
is at most `PIECE_CHARS` characters of a document, cut before white space, so that one huge document
cannot fill the memory. A *shard of text* is a run of pieces whose boundaries depend on the text alone;
it is the unit in which features are written. A *window* is at most `context_size` tokens of a document.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from qscope.errors import InputError

PIECE_CHARS = 1 << 16
STDIN = "-"
FORMATS = ("txt", "jsonl", "parquet")
_SUFFIXES = {".txt": "txt", ".md": "txt", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}
_ACCEPTED = ".txt, .md, .jsonl, .jsonl.gz, .parquet, a folder of these, or - for standard input"


@dataclass
class ReadCounts:
    """What became of the input rows; `documents` is their number."""

    documents: int = 0
    empty: int = 0
    """Rows whose text is the empty string."""
    skipped: int = 0
    """Rows without usable text: broken JSON, a missing field, null, not a string."""
    replaced_bytes: int = 0
    """Invalid UTF-8 sequences and lone surrogates that became U+FFFD."""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class TextOptions:
    """How text is read. `strict` turns everything that is otherwise counted and mended into an error."""

    format: str = "auto"
    field: str = "text"
    strict: bool = False


class Piece(NamedTuple):
    document: int
    text: str


# --- sources ---------------------------------------------------------------------------------------------


def find_sources(inputs: Sequence[str | Path], options: TextOptions) -> list[Path]:
    """The files that `inputs` name, folders expanded in sorted order. Raises InputError for what cannot be read."""
    if not inputs:
        raise InputError(f"No text was given. Accepted: {_ACCEPTED}.")
    sources: list[Path] = []
    for entry in map(Path, inputs):
        if str(entry) == STDIN:
            sources.append(entry)
        elif entry.is_dir():
            inside = sorted(
                path for path in _files_below(entry) if _format_of(path, options) and not _in_store(path, entry)
            )
            if not inside:
                raise InputError(f"The folder {entry} holds no text that qscope reads. Accepted: {_ACCEPTED}.")
            sources += inside
        elif not entry.exists():
            raise InputError(f"There is no file or folder {entry}. Accepted: {_ACCEPTED}.")
        elif _format_of(entry, options) is None:
            raise InputError(
                f"{entry} has a name that does not tell its format. Accepted: {_ACCEPTED}; "
                f"for another name, say --format {' or --format '.join(FORMATS)}."
            )
        else:
            sources.append(entry)
    for path in sources:
        _check_readable(path)
    return sources


def _files_below(top: Path) -> Iterator[Path]:
    """Regular files below a folder; one that cannot be listed is an error, not an absence of text."""

    def refuse(error: OSError) -> None:
        raise InputError(
            f"The folder {error.filename} cannot be read: {error.strerror}. Mend its permissions or leave it out."
        ) from error

    for folder, _, names in os.walk(top, onerror=refuse):
        yield from (path for name in names if (path := Path(folder, name)).is_file())


_MARKS = (("shards.jsonl", "manifest.json"), ("shards.jsonl", "activations.json"), ("train.json", "log.jsonl"))


def _in_store(path: Path, top: Path) -> bool:
    """What qscope wrote below the folder that is read (the output may lie there) is not text: stores and runs."""
    folders = itertools.takewhile(lambda folder: folder != top.parent, path.parents)
    return any(all((folder / name).exists() for name in marks) for folder in folders for marks in _MARKS)


def _format_of(path: Path, options: TextOptions) -> str | None:
    if options.format != "auto":
        return options.format
    if str(path) == STDIN:
        return "txt"
    name = path.name.lower()
    return next((form for suffix, form in _SUFFIXES.items() if name.endswith(suffix)), None)


def _check_readable(path: Path) -> None:
    if str(path) == STDIN:
        return
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Mend its permissions or leave it out.") from error


# --- documents -------------------------------------------------------------------------------------------


def read_pieces(sources: Sequence[Path], options: TextOptions, counts: ReadCounts) -> Iterator[Piece]:
    """All pieces of all documents in order; `counts` is updated as rows are read."""
    readers = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for path in sources:
        form = _format_of(path, options)
        assert form is not None, path
        try:
            yield from readers[form](path, options, counts)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} cannot be read to its end: {error}. Mend the file or leave it out.") from error


def _open(path: Path) -> IO[bytes]:
    if str(path) != STDIN:
        return path.open("rb")
    if sys.stdin is None:
        raise InputError("Text was to come from standard input (-), which is closed. Pipe text into the command.")
    return sys.stdin.buffer


def _read_txt(path: Path, options: TextOptions, counts: ReadCounts) -> Iterator[Piece]:
    """A plain text file is one document, read in blocks: it may be larger than memory."""
    document, counts.documents = counts.documents, counts.documents + 1
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    rest, offset, seen = "", 0, False
    with _open(path) as file:
        while True:
            block = file.read(1 << 20)
            text = _mend(
                decoder.decode(block, final=not block),
                f"{path} (before byte {offset + len(block)})",
                options,
                counts,
            )
            offset += len(block)
            rest += text if seen else text.removeprefix("\ufeff")
            seen = seen or bool(text)
            pieces, rest = _cut(rest, last=not block)
            yield from (Piece(document, piece) for piece in pieces)
            if not block:
                break
    if not seen:
        counts.empty += 1


def _read_jsonl(path: Path, options: TextOptions, counts: ReadCounts) -> Iterator[Piece]:
    with _open(path) as file:
        head = file.peek(2)[:2] if isinstance(file, io.BufferedReader) else b""
        lines: IO[bytes] = gzip.open(file) if head == b"\x1f\x8b" else file  # type: ignore[assignment]  # noqa: SIM115
        first = True
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            where = f"{path}, line {number}"
            line = _mend(raw.decode("utf-8", "surrogateescape"), where, options, counts).removeprefix("\ufeff")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                _skip(f"{where} is not JSON ({error})", options, counts)
                continue
            if first:
                _check_field(path, row, options)
                first = False
            text = row.get(options.field) if isinstance(row, dict) else None
            yield from _row(text, where, options, counts)


def _read_parquet(path: Path, options: TextOptions, counts: ReadCounts) -> Iterator[Piece]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file, and pyarrow is not installed: pip install 'qscope[report]'."
        ) from error
    try:
        source: Any = pa.BufferReader(_open(path).read()) if str(path) == STDIN else path
        with pq.ParquetFile(source) as file:
            _check_field(path, dict.fromkeys(file.schema_arrow.names), options)
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[options.field]):
                for text in _strings(batch.column(0)):
                    row += 1
                    yield from _row(text, f"{path}, row {row}", options, counts)
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}. Mend the file or leave it out.") from error


def _strings(column: Any) -> list[Any]:
    """Python values of an Arrow column. Arrow does not check that its strings are UTF-8: `_mend` does."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast("large_string").cast("large_binary").to_pylist()
        values = [value if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
    return values


def _check_field(path: Path, row: Any, options: TextOptions) -> None:
    """A field that the first row lacks is a mistyped option, not a gap in the data."""
    if not isinstance(row, dict):
        raise InputError(
            f"The rows of {path} are {type(row).__name__}s, not objects with fields. Accepted: one JSON object a line "
            f'with its text in a field, for example {{"text": "..."}}.'
        )
    if options.field not in row:
        raise InputError(
            f"{path} has no field {options.field!r}. Its fields: {', '.join(map(str, row)) or 'none'}. "
            "Name the one that holds the text with --field."
        )


def _row(text: Any, where: str, options: TextOptions, counts: ReadCounts) -> Iterator[Piece]:
    if not isinstance(text, str):
        _skip(f"{where} has no text in field {options.field!r}", options, counts)
        return
    document, counts.documents = counts.documents, counts.documents + 1
    counts.empty += not text
    for piece in _cut(_mend(text, where, options, counts), last=True)[0]:
        yield Piece(document, piece)


def _skip(reason: str, options: TextOptions, counts: ReadCounts) -> None:
    if options.strict:
        raise InputError(f"{reason}, and --strict was given. Mend the row, or leave --strict out to skip and count it.")
    counts.documents += 1
    counts.skipped += 1


def _mend(text: str, where: str, options: TextOptions, counts: ReadCounts) -> str:
    """Replace what is not text: bytes that were not UTF-8 (as lone surrogates) and lone surrogates of JSON."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        if options.strict:
            raise InputError(
                f"{where} holds invalid UTF-8 near {text[max(0, error.start - 20) : error.start]!r}, and --strict was "
                "given. Convert the text to UTF-8, or leave --strict out to replace and count such bytes."
            ) from error
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # joins escaped pairs
    counts.replaced_bytes += joined.count("\ufffd") - text.count("\ufffd")
    return joined


def _cut(text: str, last: bool) -> tuple[list[str], str]:
    """Pieces of at most PIECE_CHARS, cut before white space so that words keep their tokens, and the rest."""
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        at = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        at = at if at > start + PIECE_CHARS // 2 else end
        pieces.append(text[start:at])
        start = at
    if last and start < len(text):
        pieces.append(text[start:])
        start = len(text)
    return pieces, text[start:]


# --- shards of text --------------------------------------------------------------------------------------


@dataclass
class TextShard:
    """Consecutive pieces: what one shard of the feature store is made from."""

    index: int
    pieces: list[Piece] = field(default_factory=list)
    last: bool = False

    def key(self) -> str:
        """sha256 over the documents' numbers and texts."""
        h = hashlib.sha256()
        for document, text in self.pieces:
            data = text.encode()
            h.update(f"{document} {len(data)}\n".encode())
            h.update(data)
        return h.hexdigest()


def text_shards(pieces: Iterable[Piece], shard_bytes: int) -> Iterator[TextShard]:
    """Group pieces until `shard_bytes` of UTF-8 are reached. Boundaries depend on the text alone."""
    shard, size = TextShard(0), 0
    for piece in pieces:
        if size >= shard_bytes:
            yield shard
            shard, size = TextShard(shard.index + 1), 0
        shard.pieces.append(piece)
        size += len(piece.text.encode())
    shard.last = True
    if shard.pieces:
        yield shard


# --- windows and batches ---------------------------------------------------------------------------------


class Windows(NamedTuple):
    """The tokens of a shard in document order, and where its windows lie."""

    document: np.ndarray
    """[N] uint32"""
    position: np.ndarray
    """[N] uint32, place of the token within its document"""
    token: np.ndarray
    """[N] uint32"""
    starts: np.ndarray
    """[W + 1] int64: window w is tokens starts[w] : starts[w + 1]"""


def tokenize(
    tokenizer: Any,
    pieces: Sequence[Piece],
    context_size: int,
    carry: tuple[int, int],
    max_tokens: int | None = None,
) -> Windows:
    """Token windows of `pieces`; no special token is added, and none is read out of the text.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        carry: (document, tokens of it that earlier shards hold), for a document that continues here.
        max_tokens: cut after this many tokens.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # "<|im_start|>" in a text is text
    backend.no_truncation()  # a tokenizer file may ask for either, and would drop text or store padding
    backend.no_padding()
    encoded = backend.encode_batch_fast([p.text for p in pieces], add_special_tokens=False)
    documents, positions, tokens, starts = [], [], [], [0]
    seen, left = dict([carry]), max_tokens
    for piece, encoding in zip(pieces, encoded, strict=True):
        ids = encoding.ids if left is None else encoding.ids[:left]
        if not ids:
            continue
        offset = seen.get(piece.document, 0)
        seen = {piece.document: offset + len(ids)}
        tokens.append(np.asarray(ids, np.uint32))
        documents.append(np.full(len(ids), piece.document, np.uint32))
        positions.append(np.arange(offset, offset + len(ids), dtype=np.uint32))
        base = starts[-1]
        starts += [base + min(at + context_size, len(ids)) for at in range(0, len(ids), context_size)]
        left = None if left is None else left - len(ids)
        if left == 0:
            break
    join = lambda parts: np.concatenate(parts) if parts else np.zeros(0, np.uint32)  # noqa: E731
    return Windows(join(documents), join(positions), join(tokens), np.asarray(starts, np.int64))


def places_of(windows: Windows) -> np.ndarray:
    """Place of every token in its window: [N] int64."""
    lengths = np.diff(windows.starts)
    return np.arange(len(windows.token)) - np.repeat(windows.starts[:-1], lengths)


def batches(starts: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of windows whose padded size fits `batch_tokens` (a longer window comes alone), longest first.

    Sorting by length keeps padding small; the order is stable, so batches depend on the shard alone.
    """
    lengths = np.diff(starts)
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        rows = max(1, batch_tokens // int(lengths[order[at]]))
        yield order[at : at + rows]
        at += rows
