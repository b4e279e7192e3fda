"""Text to packed token windows, from a position that can be saved.

A *part* is what can be opened by itself: one file, or a whole dataset. The position is a part and the number
of its rows that were read; going on reads that part again from its beginning, without tokenising, and compares
a hash of what it skips, so text that changed meanwhile is noticed.
"""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from qscope.data import STDIN, ReadCounts, TextOptions, find_sources, read_pieces
from qscope.errors import InputError

_GROUP_ROWS = 64  # rows tokenised at once
_GROUP_CHARS = 1 << 18  # or fewer, when they are long


class Row(NamedTuple):
    document: int
    """Rows of one document follow each other: a long text comes in several."""
    content: Any
    """Text, or a conversation: a list of messages."""


class Text(Protocol):
    """Text in parts that can be read again."""

    chat: bool
    """Whether rows are conversations."""

    def parts(self) -> int: ...

    def read(self, part: int, counts: ReadCounts) -> Iterator[Row]: ...

    def identity(self) -> list[Any]:
        """What tells this text from other text without reading it, as JSON."""

    def countable(self) -> bool:
        """Whether it may be read twice without great cost."""


class TextFiles:
    """Text or conversations in files: .txt, .md, .jsonl, .jsonl.gz, .parquet, or folders of these.

    chat: rows hold conversations, lists of {"role", "content"}, in `options.field` ("messages" as a rule).
    """

    def __init__(self, inputs: Sequence[str | Path], options: TextOptions | None = None, chat: bool = False) -> None:
        self.options, self.chat = options or TextOptions(field="messages" if chat else "text"), chat
        self.sources = find_sources(inputs, self.options)
        if any(str(path) == STDIN for path in self.sources):
            raise InputError(
                "Text to train on was to come from standard input (-), which cannot be read again when a run is "
                "resumed. Save it to a file and name that."
            )

    def parts(self) -> int:
        return len(self.sources)

    def read(self, part: int, counts: ReadCounts) -> Iterator[Row]:
        path = self.sources[part]
        if not self.chat:
            yield from (Row(*piece) for piece in read_pieces([path], self.options, counts))
            return
        try:
            for content in _field_of(path, self.options):
                yield from _conversation(content, str(path), self.options, counts)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} cannot be read to its end: {error}. Mend the file or leave it out.") from error

    def identity(self) -> list[Any]:
        return [[path.name, path.stat().st_size] for path in self.sources]

    def countable(self) -> bool:
        return True


class DatasetText:
    """Rows of a Hugging Face dataset, streaming or not, or of anything that starts over when it is iterated again.

    rows: yields mappings. field: holds the text, or with `chat` the conversation. Shuffle the dataset itself
    with a fixed seed before it is given; its order must be the same every time.
    """

    def __init__(
        self, rows: Iterable[Any], field: str | None = None, chat: bool = False, name: str = "", strict: bool = False
    ) -> None:
        if iter(rows) is rows:
            raise InputError(
                "The text to train on is an iterator, which can be read once only. Give something that starts over, "
                "such as a list, a datasets.Dataset or IterableDataset."
            )
        field = field or ("messages" if chat else "text")
        self.rows, self.chat, self.name = rows, chat, name
        self.options = TextOptions(field=field, strict=strict)

    @classmethod
    def load(cls, name: str, split: str = "train", config: str | None = None, **options: Any) -> "DatasetText":
        """A dataset of the Hugging Face Hub, or a folder of one, streamed. Needs the package datasets."""
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                f"The dataset {name} was named, and the package datasets is not installed: pip install datasets."
            ) from error
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
        except (OSError, ValueError) as error:  # DatasetNotFoundError is an OSError
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(f"The dataset {name} ({split}) could not be opened: {reason}. Check the name.") from error
        local = Path(name).resolve().name if Path(name).is_dir() else name  # as for files: not where it lies
        return cls(rows, name=f"{local}/{config or 'default'}/{split}", **options)

    def parts(self) -> int:
        return 1

    def read(self, part: int, counts: ReadCounts) -> Iterator[Row]:
        field = self.options.field
        for number, row in enumerate(self._rows()):
            if field not in row:
                raise InputError(
                    f"Row {number} of the dataset {self.name} has no field {field!r}. Its fields: "
                    f"{', '.join(map(str, row)) or 'none'}. Name the one that holds the text."
                )
            where = f"the dataset {self.name}, row {number}"
            yield from (_conversation if self.chat else _plain)(row[field], where, self.options, counts)

    def _rows(self) -> Iterator[Any]:
        rows = iter(self.rows)
        for number in itertools.count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # builders, file systems and networks of others: they raise anything
                reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
                raise InputError(
                    f"Row {number} of the dataset {self.name} could not be read: {reason}. Mend the data, or start the "
                    "same command again if it is the network."
                ) from error
            yield row

    def identity(self) -> list[Any]:
        size = len(self.rows) if isinstance(self.rows, Sized) else None
        return [self.name, size, self.options.field]

    def countable(self) -> bool:
        return isinstance(self.rows, Sized)


def _plain(content: Any, where: str, options: TextOptions, counts: ReadCounts) -> Iterator[Row]:
    if not isinstance(content, str):
        _skip(f"{where} has no text in field {options.field!r}", options, counts)
        return
    text = _mended(content, where, options, counts)
    document, counts.documents = counts.documents, counts.documents + 1
    counts.empty += not content
    if text:
        yield Row(document, text)


def _conversation(content: Any, where: str, options: TextOptions, counts: ReadCounts) -> Iterator[Row]:
    if not isinstance(content, list) or not content or not all(isinstance(turn, dict) for turn in content):
        _skip(f"{where} has no list of messages in field {options.field!r}", options, counts)
        return
    messages = _mended(content, where, options, counts)
    document, counts.documents = counts.documents, counts.documents + 1
    yield Row(document, messages)


def _mended(value: Any, where: str, options: TextOptions, counts: ReadCounts) -> Any:
    """A value whose strings, in lists and dicts too, have U+FFFD for lone surrogates, which are not text."""
    if isinstance(value, list):
        return [_mended(item, where, options, counts) for item in value]
    if isinstance(value, dict):
        return {key: _mended(item, where, options, counts) for key, item in value.items()}
    if not isinstance(value, str) or value.isascii():
        return value
    text = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    replaced = text.count("\ufffd") - value.count("\ufffd")
    if replaced and options.strict:
        raise InputError(
            f"{where} holds a lone surrogate, which is not text, and strict reading was asked for. Mend the row, or "
            "let such places be counted."
        )
    counts.replaced_bytes += replaced
    return text


def _skip(reason: str, options: TextOptions, counts: ReadCounts) -> None:
    if options.strict:
        raise InputError(f"{reason}, and strict reading was asked for. Mend the row, or let such rows be counted.")
    counts.documents += 1
    counts.skipped += 1


def _field_of(path: Path, options: TextOptions) -> Iterator[Any]:
    """One field of all rows of a JSON Lines or Parquet file; None where a row has none."""
    if path.suffix == ".parquet" or options.format == "parquet":
        yield from _field_of_parquet(path, options)
        return
    with path.open("rb") as raw:
        first = True
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        lines: Iterable[bytes] = gzip.open(raw) if packed else raw  # noqa: SIM115
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if first and isinstance(row, dict):
                _check_field(path, row, options)
                first = False
            yield row.get(options.field) if isinstance(row, dict) else None


def _field_of_parquet(path: Path, options: TextOptions) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"{path} is a Parquet file, and pyarrow is not installed: pip install 'qscope[report]'."
        ) from error
    try:
        with pq.ParquetFile(path) as file:
            _check_field(path, file.schema_arrow.names, options)
            for batch in file.iter_batches(batch_size=256, columns=[options.field]):
                yield from batch.column(0).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}. Mend the file or leave it out.") from error


def _check_field(path: Path, names: Iterable[str], options: TextOptions) -> None:
    if options.field not in names:
        raise InputError(
            f"{path} has no field {options.field!r}. Its fields: {', '.join(names) or 'none'}. Name the one that holds "
            "the conversations."
        )


# --- packing ---------------------------------------------------------------------------------------------


class WindowBatch(NamedTuple):
    """Token windows for one forward pass."""

    ids: torch.Tensor
    """[B, S] int64, padded on the right with 0"""
    usable: torch.Tensor
    """[B, S] bool: text whose activations are wanted; neither padding nor what `first_token` drops"""
    tokens: int
    """Tokens in them, without padding"""


class PackedWindows:
    """Windows of `context_size` tokens, documents joined by a separator; no special token is read out of plain text.

    separator: token between documents; None puts nothing there. Conversations go through the tokenizer's chat
        template, whose special tokens are special, and get no separator.
    bos: token put before every window; it counts as the window's first token.
    first_token: "drop" leaves out the first token of every window (an attention sink as a rule) and the
        separators, "keep" uses all.
    cycle: begin again when the text ends.
    rank, world: this reader takes every `world`-th batch of windows, beginning with number `rank`.
    """

    def __init__(
        self,
        text: Text,
        tokenizer: Any,
        context_size: int,
        windows: int,
        *,
        separator: int | None = None,
        bos: int | None = None,
        first_token: str = "drop",
        cycle: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if first_token not in ("drop", "keep"):
            raise InputError(f"first_token is {first_token!r}; drop and keep are accepted.")
        if context_size < 2 or windows < 1 or not 0 <= rank < world:
            raise InputError(
                f"Windows of {context_size} tokens, {windows} at once, were asked for by reader {rank} of {world}. "
                "Accepted: at least 2 tokens, at least 1 window, readers 0 to their number less 1."
            )
        if text.chat and not getattr(tokenizer, "chat_template", None):
            raise InputError("The text is conversations, and the model's tokenizer has no chat template. Give text.")
        self.text, self.tokenizer = text, tokenizer
        self.context_size, self.windows = context_size, windows
        self.separator = None if text.chat else separator
        self.bos, self.first_token, self.cycle = bos, first_token, cycle
        self.rank, self.world = rank, world
        self.backend = tokenizer.backend_tokenizer
        self._start()

    def _start(self) -> None:
        self.epoch = self.tokens = self.dropped = self._batch = 0
        self._base = ReadCounts()  # of the parts before this one
        self._rest = np.zeros(0, np.int64)  # tokens that are in no window yet
        self._last: int | None = None  # document that they end with
        self._epoch_tokens = 0
        self._ended = False
        self._open(0)

    def _open(self, part: int) -> None:
        self._part, self._read, self._digest = part, 0, hashlib.sha256()
        self._counts = ReadCounts()
        self._rows = iter(()) if part >= self.text.parts() else self.text.read(part, self._counts)

    @property
    def done(self) -> bool:
        """Whether no window is left."""
        return self._ended and len(self._rest) == 0

    def next(self) -> WindowBatch | None:
        """This reader's next batch of windows, at most `windows` of them; None at the end of the text."""
        while True:
            found = self._next_batch()
            if found is None:
                return None
            self._batch += 1
            if (self._batch - 1) % self.world == self.rank:
                self.tokens += found.tokens
                self.dropped += found.tokens - int(found.usable.sum())
                return found

    def _next_batch(self) -> WindowBatch | None:
        body = self.context_size - (self.bos is not None)
        while len(self._rest) < body * self.windows and not self._ended:
            self._tokenize_group()
        count = min(self.windows, -(-len(self._rest) // body))
        if count == 0:
            return None
        taken, self._rest = self._rest[: count * body], self._rest[count * body :].copy()
        padded = np.zeros(count * body, np.int64)
        padded[: len(taken)] = taken
        ids = padded.reshape(count, body)
        usable = (np.arange(count * body) < len(taken)).reshape(count, body)
        tokens = len(taken)
        if self.bos is not None:
            ids = np.concatenate([np.full((count, 1), self.bos), ids], axis=1)
            usable = np.concatenate([np.ones((count, 1), bool), usable], axis=1)
            tokens += count
        if self.first_token == "drop":
            usable = usable.copy()
            usable[:, 0] = False
            if self.separator is not None:
                usable &= ids != self.separator
        return WindowBatch(torch.from_numpy(ids), torch.from_numpy(usable), tokens)

    def _tokenize_group(self) -> None:
        """Tokens of the next rows go to `_rest`; the end of a part or of the text is passed."""
        rows = self._take_rows()
        if not rows:
            self._next_part()
            return
        encoded = self._encode([row.content for row in rows])
        pieces = [self._rest]
        for row, ids in zip(rows, encoded, strict=True):
            new = self._last is not None and row.document != self._last
            if new and self.separator is not None:
                pieces.append(np.asarray([self.separator]))
            self._last = row.document
            pieces.append(np.asarray(ids, np.int64))
        self._epoch_tokens += sum(map(len, pieces[1:]))
        self._rest = np.concatenate(pieces)

    def _take_rows(self) -> list[Row]:
        rows: list[Row] = []
        size = 0
        for row in self._rows:
            rows.append(row)
            size += self._note(row)
            if len(rows) >= _GROUP_ROWS or size >= _GROUP_CHARS:
                break
        self._read += len(rows)
        return rows

    def _note(self, row: Row) -> int:
        """Adds a row to the hash of what was read; its length in characters."""
        data = row.content if isinstance(row.content, str) else json.dumps(row.content, sort_keys=True, default=str)
        self._digest.update(f"{row.document} {len(data)}\n{data}".encode())
        return len(data)

    def _next_part(self) -> None:
        self._base = _sum(self._base, self._counts)
        self._last = -1 if self._last is not None else None  # documents of another part are other documents
        if self._part + 1 < self.text.parts():
            self._open(self._part + 1)
        elif self.cycle and self._epoch_tokens:
            self.epoch += 1
            self._epoch_tokens = 0
            self._open(0)
        else:
            self._open(self.text.parts())
            self._ended = True

    def _encode(self, contents: list[Any]) -> list[list[int]]:
        self.backend.no_truncation()
        self.backend.no_padding()
        if not self.text.chat:
            self.backend.encode_special_tokens = True  # "<|im_start|>" in a text is text
            texts = contents
        else:
            self.backend.encode_special_tokens = False
            texts = [self._render(content) for content in contents]
        return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            import jinja2
        except ImportError as error:
            raise InputError("Chat templates need the package jinja2: pip install jinja2.") from error
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (jinja2.TemplateError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"The chat template refused a conversation that begins {str(messages)[:80]!r}: {error}. Mend it or "
                "leave it out."
            ) from error
        return text

    def count(self, limit: int) -> int:
        """Usable tokens of this reader in the whole text, from its beginning; counting stops at `limit`."""
        other = PackedWindows(
            self.text,
            self.tokenizer,
            self.context_size,
            self.windows,
            separator=self.separator,
            bos=self.bos,
            first_token=self.first_token,
            rank=self.rank,
            world=self.world,
        )
        while other.tokens - other.dropped < limit and other.next() is not None:
            pass
        return other.tokens - other.dropped

    def counts(self) -> dict[str, Any]:
        """Rows of text as far as they were read, tokens in windows, and those that `first_token` dropped."""
        rows = _sum(self._base, self._counts).as_dict()
        return {"tokens": self.tokens, "dropped_first": self.dropped, "epoch": self.epoch, "rows": rows}

    def settings(self) -> dict[str, Any]:
        names = ("context_size", "windows", "separator", "bos", "first_token", "cycle", "rank", "world")
        return {**{name: getattr(self, name) for name in names}, "chat": self.text.chat, "text": self.text.identity()}

    def state(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        numbers |= {"digest": self._digest.hexdigest(), "base": self._base.as_dict()}
        return {**numbers, "rest": torch.from_numpy(self._rest)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Raises InputError if the text before that position is not what it was."""
        self._open(int(state["_part"]))
        for row in itertools.islice(self._rows, int(state["_read"])):
            self._note(row)
        if self._digest.hexdigest() != state["digest"]:
            raise InputError(
                "The text was changed since the run was begun: what comes before the saved position is not what it "
                "was. Restore the text, or begin a new run in another folder."
            )
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self._base = ReadCounts(**state["base"])
        self._rest = state["rest"].numpy().copy()


_NUMBERS = ("_part", "_read", "_last", "_ended", "_epoch_tokens", "_batch", "epoch", "tokens", "dropped")


def _sum(a: ReadCounts, b: ReadCounts) -> ReadCounts:
    return ReadCounts(**{name: value + getattr(b, name) for name, value in a.as_dict().items()})
