"""Text to packed windows: which tokens, what is counted, and going on from any position."""

import gzip
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qscope.data import ReadCounts
from qscope.errors import InputError
from qscope.training.text import DatasetText, PackedWindows, TextFiles

_spec = importlib.util.spec_from_file_location("supply", Path(__file__).with_name("supply.py"))
supply = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(supply)
tiny = supply.tiny
drain = supply.drain
equal = supply.equal
rows_of = supply.rows_of
windows_of = supply.windows_of


# --- text to windows -------------------------------------------------------------------------------------


def test_windows_hold_every_token_once_in_order(tiny):
    """Documents joined by the separator, cut every 32 tokens; only the last window is padded."""
    eos = tiny.tokenizer.eos_token_id
    encoded = [tiny.tokenizer(text, add_special_tokens=False).input_ids for text in tiny.texts]
    expected = encoded[0] + [token for ids in encoded[1:] for token in (eos, *ids)]
    windows = windows_of(tiny, first_token="keep")
    found = drain(windows)
    assert [len(batch.ids) for batch in found[:-1]] == [8] * (len(found) - 1)
    tokens = torch.cat([batch.ids[batch.usable] for batch in found]).tolist()
    assert tokens == expected and windows.tokens == sum(batch.tokens for batch in found) == len(expected)
    assert windows.count(10**9) == len(expected) and len(expected) > windows.count(300) >= 300
    dropping = windows_of(tiny)
    found = drain(dropping)
    starts = -(-len(expected) // 32)
    inner = sum(token == eos for i, token in enumerate(expected) if i % 32)
    assert dropping.dropped == starts + inner and dropping.count(10**9) == len(expected) - starts - inner
    assert not any(bool(batch.usable[:, 0].any()) for batch in found)


def test_a_bos_token_takes_the_first_place(tiny):
    bos = tiny.tokenizer.bos_token_id
    plain = torch.cat([batch.ids[batch.usable] for batch in drain(windows_of(tiny, first_token="keep"))])
    found = drain(windows_of(tiny, bos=bos, first_token="keep"))
    assert all(batch.ids.shape[1] == 32 and bool((batch.ids[:, 0] == bos).all()) for batch in found)
    assert torch.equal(torch.cat([batch.ids[:, 1:][batch.usable[:, 1:]] for batch in found]), plain)
    dropped = windows_of(tiny, bos=bos, separator=None)
    drain(dropped)
    assert dropped.dropped == sum(len(batch.ids) for batch in drain(windows_of(tiny, bos=bos, separator=None)))


def test_special_tokens_in_text_are_text(tiny):
    text = DatasetText(rows_of(["a <|end|> b"]))
    found = drain(windows_of(tiny, text, first_token="keep"))[0]
    assert tiny.tokenizer.eos_token_id not in found.ids[found.usable].tolist()
    assert tiny.tokenizer.decode(found.ids[found.usable]) == "a <|end|> b"


def test_readers_share_the_text(tiny):
    whole = drain(windows_of(tiny))
    parts = [windows_of(tiny, rank=rank, world=3) for rank in range(3)]
    found = [drain(part) for part in parts]
    assert len(whole) > 6
    for i, batch in enumerate(whole):
        assert torch.equal(found[i % 3][i // 3].ids, batch.ids)
    assert sum(map(len, found)) == len(whole)


def test_cycling_begins_again_and_counts(tiny):
    once = torch.cat([batch.ids[batch.usable] for batch in drain(windows_of(tiny, first_token="keep"))])
    windows = windows_of(tiny, first_token="keep", cycle=True)
    taken = []
    while sum(map(len, taken)) < 2 * len(once) + 40:
        batch = windows.next()
        assert bool(batch.usable.all()), "no padding inside"
        taken.append(batch.ids.flatten())
    eos = torch.tensor([tiny.tokenizer.eos_token_id])
    expected = torch.cat([once, eos, once, eos, once])
    taken = torch.cat(taken)
    assert torch.equal(taken, expected[: len(taken)]) and windows.epoch >= 2 and not windows.done
    empty = windows_of(tiny, DatasetText(rows_of(["", ""])), cycle=True)
    assert empty.next() is None and empty.done, "text without a token is not read for ever"


def write_files(folder, texts):
    """The same documents as plain, packed and Parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    third = len(texts) // 3
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:third]))
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts[third : 2 * third])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"text": texts[2 * third :]}), folder / "c.parquet")


def equal_windows(a, b):
    return torch.equal(a.ids, b.ids) and torch.equal(a.usable, b.usable)


def test_files_and_datasets_give_the_same_windows(tiny, tmp_path):
    import datasets

    write_files(tmp_path, tiny.texts)
    whole = drain(windows_of(tiny))
    packed = datasets.Dataset.from_list(rows_of(tiny.texts))
    for text in (TextFiles([tmp_path]), DatasetText(packed), DatasetText(packed.to_iterable_dataset())):
        found = drain(windows_of(tiny, text))
        assert len(found) == len(whole)
        assert all(map(equal_windows, found, whole))
    assert TextFiles([tmp_path]).countable() and not DatasetText(packed.to_iterable_dataset()).countable()


def test_files_of_one_document_are_separated(tiny, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = drain(windows_of(tiny, TextFiles([tmp_path]), first_token="keep"))[0]
    assert tiny.tokenizer.decode(found.ids[found.usable]) == "one<|end|>two"


def test_rows_without_text_are_counted(tiny):
    rows = [{"text": "good"}, {"text": None}, {"text": ""}, {"text": 3}, {"text": "lone \ud800 surrogate"}]
    windows = windows_of(tiny, DatasetText(rows))
    drain(windows)
    assert windows.counts()["rows"] == {"documents": 5, "empty": 1, "skipped": 2, "replaced_bytes": 1}
    with pytest.raises(InputError, match="row 1 has no text in field 'text', and strict"):
        drain(windows_of(tiny, DatasetText(rows, strict=True)))
    with pytest.raises(InputError, match="row 0 holds a lone surrogate"):
        drain(windows_of(tiny, DatasetText(rows[-1:], strict=True)))
    with pytest.raises(InputError, match=r"no field 'body'. Its fields: text"):
        drain(windows_of(tiny, DatasetText(rows, field="body")))


def test_a_dataset_in_a_folder_is_streamed_and_known_by_its_name(tiny, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(tiny.texts)))
    text = DatasetText.load(str(folder))
    assert all(map(equal_windows, drain(windows_of(tiny, text)), drain(windows_of(tiny))))
    assert text.identity() == ["corpus/default/train", None, "text"] and not text.countable()
    with pytest.raises(InputError, match=r"dataset .*corpus \(test\) could not be opened: Bad split"):
        DatasetText.load(str(folder), "test")


def test_a_dataset_that_fails_on_the_way_says_where(tiny):
    class Broken(list):
        def __iter__(self):
            yield from super().__iter__()
            raise RuntimeError("Couldn't cast\nint64")  # of no class of its own, as network libraries do

    with pytest.raises(InputError, match=r"Row 12 of the dataset news could not be read: Couldn't cast int64\. Mend"):
        drain(windows_of(tiny, DatasetText(Broken(rows_of(tiny.texts)), name="news")))


def test_text_that_cannot_be_read_again_is_refused():
    with pytest.raises(InputError, match="cannot be read again"):
        TextFiles(["-"])
    with pytest.raises(InputError, match="an iterator, which can be read once only"):
        DatasetText(iter(rows_of(["a"])))


@pytest.mark.parametrize("form", ["files", "rows"])
def test_windows_go_on_from_every_position(tiny, tmp_path, form):
    """Files: the position lies in a part; what is skipped there is read and compared."""
    texts = [text[:400] for text in tiny.texts] * 12
    write_files(tmp_path, texts)
    make = lambda: TextFiles([tmp_path]) if form == "files" else DatasetText(rows_of(texts))  # noqa: E731
    windows = windows_of(tiny, make(), cycle=True)
    states, found = [], []
    while windows.epoch < 2:
        states.append(windows.state())
        found.append(windows.next())
    end = windows.counts()
    assert {state["_part"] for state in states} == ({0, 1, 2} if form == "files" else {0})
    assert len({(state["epoch"], state["_part"], state["_read"]) for state in states}) >= 6
    for cut in range(0, len(states), 5):
        other = windows_of(tiny, make(), cycle=True)
        other.restore(states[cut])
        for batch in found[cut:]:
            ours = other.next()
            assert torch.equal(ours.ids, batch.ids) and torch.equal(ours.usable, batch.usable)
        assert other.counts() == end


def test_changed_text_is_noticed(tiny):
    texts = [text[:300] for text in tiny.texts] * 20
    windows = windows_of(tiny, DatasetText(rows_of(texts)))
    windows.next()
    state = windows.state()
    assert 0 < state["_read"] < len(texts)
    later = [*texts[:-1], "other words"]
    windows_of(tiny, DatasetText(rows_of(later))).restore(state)  # what was not read yet may still grow
    for changed in (["x", *texts[1:]], texts[:3]):
        with pytest.raises(InputError, match="The text was changed"):
            windows_of(tiny, DatasetText(rows_of(changed))).restore(state)


# --- chat ------------------------------------------------------------------------------------------------


CHATS = [
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because of that."}],
    [{"role": "user", "content": "And how?"}],
]


@pytest.mark.parametrize("form", ["rows", "jsonl", "jsonl.gz", "parquet"])
def test_conversations_go_through_the_chat_template(tiny, tmp_path, form):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": CHATS[0]}, {"messages": None}, {"messages": CHATS[1]}]
    path = tmp_path / f"chats.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form != "rows":
        path.write_bytes(gzip.compress(lines) if form == "jsonl.gz" else lines)
    text = DatasetText(rows, chat=True) if form == "rows" else TextFiles([path], chat=True)
    windows_of(tiny).next()  # what plain text asks of the tokenizer does not stay
    windows = windows_of(tiny, text, first_token="keep")
    found = drain(windows)[0]
    expected = [
        token for chat in CHATS for token in tiny.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ]
    assert found.ids[found.usable].tolist() == expected
    assert expected.count(tiny.tokenizer.eos_token_id) == 3, "special tokens of the template are special"
    assert windows.counts()["rows"]["skipped"] == 1 and windows.counts()["rows"]["documents"] == 3


def test_lone_surrogates_in_conversations_are_replaced_and_counted(tiny):
    rows = [{"messages": [{"role": "user", "content": "lone \ud800 surrogate"}]}]
    windows = windows_of(tiny, DatasetText(rows, chat=True), first_token="keep")
    found = windows.next()
    assert "lone \ufffd surrogate" in tiny.tokenizer.decode(found.ids[found.usable])
    assert windows.counts()["rows"]["replaced_bytes"] == 1


def test_chat_that_cannot_be(tiny, tmp_path):
    bad = DatasetText([{"messages": [{"role": "", "content": "x"}]}], chat=True)
    with pytest.raises(InputError, match=r"chat template refused a conversation that begins .*no role"):
        windows_of(tiny, bad).next()
    plain = SimpleNamespace(chat_template=None, backend_tokenizer=tiny.tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        PackedWindows(bad, plain, 32, 8)
    (tmp_path / "chats.jsonl").write_text('{"dialog": []}\n')
    with pytest.raises(InputError, match=r"no field 'messages'. Its fields: dialog"):
        list(TextFiles([tmp_path / "chats.jsonl"], chat=True).read(0, ReadCounts()))
