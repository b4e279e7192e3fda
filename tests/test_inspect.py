"""What `qscope inspect` shows, against counts made by hand and a slow plain reading of the same store."""

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from qscope.errors import InputError, StorageError
from qscope.report import inspect_page, inspect_text
from qscope.store import FeatureStore, StoreWriter, pack_layer, shard_arrays
from qscope.store_format import ModelIdentity, SAEIdentity, StoreSettings
from qscope.workflows.inspect import InspectConfig, run

HOSTILE = [
    "</script><script>document.title='pwned'</script>",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\x00",
    "\x1b[31m",
    "\u202e",
    "\u200f",
    "<!--",
    "&amp;",
    "\u4f60",
    "\u2028",
]
WORDS = ["the", " cat", " sat", "\n", " mat", ".", *HOSTILE]
SPACES = str.maketrans({" ": "\u0120", "\n": "\u010a"})


def tokenizer():
    """Byte-level, so that a token may be half a character: two more tokens are the halves of an e acute."""
    from transformers import PreTrainedTokenizerFast

    alphabet = {byte: char for char, byte in _byte_chars().items()}
    pieces = ["".join(alphabet[b] for b in word.encode()) for word in WORDS]
    pieces += [alphabet[0xC3], alphabet[0xA9]]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def _byte_chars() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def write_store(folder: Path, shards, d_sae: int, k: int, layers=(3,), source="sae/<b>.safetensors"):
    """shards: lists of rows (doc, position, token, {feature: value}, flags); layers get the same codes."""
    settings = StoreSettings(
        qscope_version="0",
        device="cpu",
        model=ModelIdentity(name="tiny", sha256="0" * 64),
        tokenizer_sha256="0" * 64,
        saes=[SAEIdentity(layer=l, sha256="1" * 64, d_sae=d_sae, k=k, source=source) for l in layers],
        dtype="float32",
        precision="exact",
        context_size=64,
        shard_bytes=1 << 20,
    )
    with StoreWriter.open(folder, settings) as writer:
        for number, rows in enumerate(shards):
            acts = np.zeros((len(rows), k), np.float32)
            ids = np.zeros((len(rows), k), np.int32)
            for i, row in enumerate(rows):
                acts[i, : len(row[3])] = list(row[3].values())
                ids[i, : len(row[3])] = list(row[3])
            packed = pack_layer(acts, ids, d_sae)
            packed["flags"] |= np.array([row[4] for row in rows], np.uint8)
            packed["values"][packed["flags"] & 1 > 0] = 0
            packed["indices"][packed["flags"] & 1 > 0] = 0
            doc, position, token = (np.array([row[c] for row in rows]) for c in range(3))
            writer.add(number, str(number), shard_arrays(doc, position, token, {l: packed for l in layers}))
        writer.save_tokenizer(tokenizer())
        writer.complete()
    return folder


SINK, NAN = 2, 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two documents, the first in two shards. Feature 1 peaks on cat, 2 is nearly always on, 5 once."""
    first = [
        (0, 0, 0, {2: 400.0, 1: 300.0}, SINK),
        (0, 1, 1, {1: 4.0, 2: 1.0}, 0),
        (0, 2, 2, {2: 1.0}, 0),
        (0, 3, 3, {2: 1.0, 1: 0.5}, 0),
    ]
    second = [
        (0, 4, 1, {1: 8.0, 2: 1.0}, 0),
        (0, 5, 5, {2: 1.0}, 0),
        (1, 0, 0, {2: 500.0}, SINK),
        (1, 1, 6, {2: 1.0, 5: 2.0}, 0),
        (1, 2, 1, {1: 6.0, 2: 1.0}, 0),
        (1, 3, 4, {}, NAN),
        (1, 4, 4, {2: 3.0}, 0),
    ]
    return write_store(tmp_path_factory.mktemp("small") / "codes", [first, second], d_sae=8, k=2)


def feature(result, number):
    return next(f for f in result.features if f.id == number)


def test_statistics_leave_out_sinks_and_nan_rows_and_say_so(small):
    result = run(InspectConfig(small))
    assert (result.num_tokens, result.counted_tokens, result.sink_tokens, result.nan_tokens) == (11, 8, 2, 1)
    assert (result.num_documents, result.alive, result.d_sae, result.k, result.layer) == (2, 3, 8, 2, 3)
    assert result.l0 == 13 / 8
    cat = feature(result, 1)
    assert (cat.count, cat.density, cat.mean, cat.max) == (4, 0.5, 18.5 / 4, 8.0)
    # 16 steps of 0.5: the value 0.5 opens the second one, the maximum is in the last
    assert cat.histogram == [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1]
    assert [(t.text, t.count, t.share) for t in cat.top_tokens] == [
        (" cat", 3, 18 / 18.5),
        ("\n", 1, 0.5 / 18.5),
    ]
    assert sum(result.density_histogram) == 3


def test_sinks_are_counted_when_asked_for(small):
    result = run(InspectConfig(small, include_sinks=True))
    assert (result.counted_tokens, result.sink_tokens, result.sinks_counted) == (10, 2, True)
    assert feature(result, 2).max == 500.0
    assert feature(result, 1).count == 5


def test_contexts_cross_shards_stay_in_their_document_and_hide_what_is_left_out(small):
    config = InspectConfig(small, contexts=2, window=3)
    contexts = feature(run(config), 1).contexts
    assert [(c.document, c.position, c.activations[c.peak]) for c in contexts] == [(0, 4, 8.0), (1, 2, 6.0)]
    assert contexts[0].tokens == [" cat", " sat", "\n", " cat", "."]
    assert contexts[0].activations == [4.0, 0.0, 0.5, 8.0, 0.0]
    assert contexts[0].peak == 3
    assert contexts[1].tokens == ["the", HOSTILE[0], " cat", " mat", " mat"]
    beside_a_sink = feature(run(InspectConfig(small, contexts=2, window=4)), 2).contexts[0]
    assert beside_a_sink.activations == [0.0, 1.0, 1.0, 0.0, 3.0]  # the sink's 500 would drown the rest


def test_one_context_per_document_unless_the_store_has_too_few(small):
    by_text = feature(run(InspectConfig(small, contexts=2, window=0)), 1).contexts
    assert [c.document for c in by_text] == [0, 1]
    by_stretch = feature(run(InspectConfig(small, contexts=3, window=0)), 1).contexts
    assert [(c.document, c.position) for c in by_stretch] == [(0, 4), (1, 2), (0, 1)]


def test_orders_follow_their_formulas(small):
    def order(name):
        return [(f.id, f.score) for f in run(InspectConfig(small, order=name)).features]

    assert order("frequent") == [(2, 8.0), (1, 4.0), (5, 1.0)]
    assert order("strongest") == [(1, 8.0), (2, 3.0), (5, 2.0)]
    expected = [(1, 18.5 / 12 * math.log(2)), (5, 2 / 9 * math.log(8)), (2, 0.0)]
    assert [f for f, _ in order("specific")] == [f for f, _ in expected]
    # float64 throughout: only the last bits of log may differ
    assert [s for _, s in order("specific")] == pytest.approx([s for _, s in expected], rel=1e-14)


def test_a_text_shows_each_token_with_its_features(small):
    result = run(InspectConfig(small, document=1, order="strongest"))
    text = result.texts[0]
    assert (text.document, text.num_tokens) == (1, 5)
    assert [t.left_out for t in text.tokens] == [True, False, False, True, False]
    assert text.tokens[1].features == [(5, 2.0), (2, 1.0)]
    assert text.tokens[0].features == []
    assert [(f.id, f.tokens, f.total, f.max, f.peak) for f in text.features] == [
        (1, 1, 6.0, 6.0, 2),
        (2, 3, 5.0, 3.0, 4),
        (5, 1, 2.0, 2.0, 1),
    ]
    assert text.features[1].activations == [(1, 1.0), (2, 1.0), (4, 3.0)]
    assert [f.id for f in result.features] == [1, 2, 5]


def test_texts_in_the_specific_order_lead_with_what_is_rarer_elsewhere(small):
    text = run(InspectConfig(small, document=1)).texts[0]
    # 2 tokens of 5 or 8: feature 5 has 1/5 here against 1/8 in the store; the others are not denser here
    assert text.features[0].id == 5


def test_one_feature_in_depth_and_a_dead_one(small):
    result = run(InspectConfig(small, feature=5))
    assert [f.id for f in result.features] == [5]
    assert [t.document for t in result.texts] == [1]
    dead = run(InspectConfig(small, feature=7)).features[0]
    assert (dead.count, dead.contexts, dead.histogram) == (0, [], [0] * 16)
    assert "never active" in inspect_text.tables(run(InspectConfig(small, feature=7)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": 9}, "holds layers 3"),
        ({"feature": 8}, "0 to 7"),
        ({"feature": -1}, "0 to 7"),
        ({"document": 2}, "0 to 1"),
        ({"features": 0}, "1 or more"),
        ({"order": "best"}, "frequent, strongest, specific"),
        ({"feature": 1, "document": 1}, "Give one"),
    ],
)
def test_options_that_do_not_fit_are_refused(small, options, said):
    with pytest.raises(InputError, match=said):
        run(InspectConfig(small, **options))


def test_an_empty_store_is_shown_as_empty(tmp_path):
    result = run(InspectConfig(write_store(tmp_path / "codes", [], d_sae=4, k=1), html=tmp_path / "page.html"))
    assert (result.num_tokens, result.features, result.texts, result.l0) == (0, [], [], 0.0)
    assert "No feature is active" in inspect_text.render(result)
    assert (tmp_path / "page.html").exists()


def random_rows(seed: int, documents: int, d_sae: int, k: int):
    rng = np.random.default_rng(seed)
    rows = []
    for doc in range(documents):
        for position in range(int(rng.integers(1, 40))):
            ids = rng.choice(d_sae, size=k, replace=False)
            # few different values: ties between places are common and have to fall to the earlier row
            values = rng.integers(1, 9, size=k) / 4.0
            flag = SINK if position == 0 else 0
            rows.append(
                (
                    doc,
                    position,
                    int(rng.integers(len(WORDS))),
                    dict(zip(ids.tolist(), values, strict=True)),
                    flag,
                )
            )
    return rows


@pytest.mark.parametrize("contexts", [1, 3, 7])
def test_places_found_in_blocks_are_those_of_a_full_sort(tmp_path, monkeypatch, contexts):
    rows = random_rows(0, documents=30, d_sae=24, k=3)
    cuts = [0, 100, 101, 333, len(rows)]
    store = write_store(tmp_path / "codes", [rows[a:b] for a, b in pairwise(cuts)], 24, 3)
    monkeypatch.setattr("qscope.workflows.inspect_scan.ROWS", 17)
    result = run(InspectConfig(store, features=24, contexts=contexts, window=2))
    assert len(result.features) == 24
    for found in result.features:
        hits = [(r[3][found.id], i, r) for i, r in enumerate(rows) if found.id in r[3] and not r[4]]
        assert found.count == len(hits)
        assert found.mean == sum(h[0] for h in hits) / len(hits)  # quarters add up exactly
        best = {}
        for value, i, row in sorted(hits, key=lambda h: (-h[0], h[1])):
            best.setdefault(row[0], (value, i, row))
        expected = list(best.values())[:contexts]
        assert [(c.document, c.position, c.activations[c.peak]) for c in found.contexts] == [
            (row[0], row[1], value) for value, _, row in expected
        ]
        assert sum(found.histogram) == len(hits)
        assert sum(t.count for t in found.top_tokens) <= len(hits)
        for context, (_, i, row) in zip(found.contexts, expected, strict=True):
            around = [r for r in rows[max(0, i - 2) : i + 3] if r[0] == row[0]]
            assert context.activations == [0.0 if r[4] else r[3].get(found.id, 0.0) for r in around]


def test_tokens_that_are_half_a_character_show_as_replacements(tmp_path):
    e_acute = len(WORDS)
    rows = [(0, 0, e_acute, {1: 1.0}, 0), (0, 1, e_acute + 1, {1: 2.0}, 0)]
    result = run(InspectConfig(write_store(tmp_path / "codes", [rows], 4, 1)))
    assert result.features[0].contexts[0].tokens == ["\ufffd", "\ufffd"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A store whose every token tries to break out of the page."""
    rows = [(0, i, t, {i % 5: float(i + 1)}, 0) for i, t in enumerate([*range(len(WORDS)), *range(len(WORDS))])]
    return write_store(tmp_path_factory.mktemp("hostile") / "codes", [rows], 8, 1)


class Elements(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.events, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.events += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_corpus_text_adds_no_markup_to_the_page(small, hostile, tmp_path):
    def elements(store):
        parser = Elements()
        parser.feed(inspect_page.page(run(InspectConfig(store, html=tmp_path / "x.html"))))
        return parser

    plain, risky = elements(small), elements(hostile)
    assert risky.tags == plain.tags
    assert risky.tags.count("script") == 2
    assert risky.events == []
    assert risky.links == ["data:,"]


def test_the_page_is_one_file_whose_policy_names_its_own_style_and_script(hostile):
    text = inspect_page.page(run(InspectConfig(hostile)))
    assert "@@" not in text
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
        # what turns strings into markup or code, or fetches
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import\(|url\(", body)
    assert not re.search(r"(src|href)=\"(?!data:,)", text)
    assert "http:" not in text and "https:" not in text


def test_the_data_in_the_page_is_ascii_and_comes_back_as_it_was(hostile):
    text = inspect_page.page(run(InspectConfig(hostile)))
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data.isascii() and not set(data) & set("<>&")
    loaded = json.loads(data)
    words = {t for f in loaded["features"] for c in f["contexts"] for t in c["tokens"]}
    assert HOSTILE[0] in words and HOSTILE[1] in words
    assert "\u2400" in words and "\u27e8U+202E\u27e9" in words  # NUL and the direction mark are made visible
    assert not any(char in word for word in words for char in "\x00\x1b\u202e\u200f\u2028\n")


def test_the_page_is_bounded_and_says_so(hostile, monkeypatch):
    monkeypatch.setattr(inspect_page, "MOST_FEATURES", 2)
    monkeypatch.setattr(inspect_page, "MOST_CONTEXTS", 1)
    monkeypatch.setattr(inspect_page, "MOST_TEXTS", 0)
    text = inspect_page.page(run(InspectConfig(hostile)))
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    loaded = json.loads(data)
    assert (len(loaded["features"]), len(loaded["texts"])) == (2, 0)
    assert max(len(f["contexts"]) for f in loaded["features"]) == 1
    assert "holds 2 of 5 alive features with up to 1 passages" in loaded["foot"]


def test_features_that_lead_in_a_text_get_a_card(hostile, tmp_path):
    result = run(InspectConfig(hostile, features=1, html=tmp_path / "page.html"))
    assert len(result.features) == 1
    assert {f.id for f in result.features + result.text_features} == {0, 1, 2, 3, 4}
    assert run(InspectConfig(hostile, features=1)).text_features == []


def test_a_page_that_cannot_be_written_is_a_storage_error(small, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(InspectConfig(small, html=tmp_path / "file" / "page.html"))
    with pytest.raises(StorageError, match="could not be written"):
        inspect_page.finish(result)


def write_one_text(folder, n, k, d_sae, shards):
    """A text of n tokens with full rows, cut into equal shards; the ids and values of all rows, [n, k]."""
    rng = np.random.default_rng(n)
    step = d_sae // k
    ids = np.arange(k) * step + rng.integers(step, size=(n, k))
    values = rng.integers(1, 200, size=(n, k)).astype(np.float32) / 4  # exact in float16: sums are exact too
    write_store(folder, [], d_sae, k)
    with StoreWriter.open(folder, FeatureStore(folder).settings) as writer:
        for number, rows in enumerate(np.array_split(np.arange(n), shards)):
            packed = pack_layer(values[rows], ids[rows], d_sae)
            writer.add(number, str(number), shard_arrays(rows * 0, rows, rows % len(WORDS), {3: packed}))
        writer.complete()
    return ids, values


@pytest.mark.parametrize("order", ["frequent", "strongest"])
def test_a_text_read_in_blocks_has_the_sums_of_the_whole(tmp_path, monkeypatch, order):
    n, k, d_sae = 1500, 3, 60
    ids, values = write_one_text(tmp_path / "codes", n, k, d_sae, shards=4)
    monkeypatch.setattr("qscope.workflows.inspect_scan.ROWS", 170)
    text = run(InspectConfig(tmp_path / "codes", document=0, order=order, features=d_sae)).texts[0]
    assert (text.num_tokens, len(text.tokens)) == (n, 600)
    sums = np.zeros((n, d_sae))
    sums[np.arange(n)[:, None], ids] = values
    key = (sums > 0).sum(0) if order == "frequent" else sums.sum(0)
    assert [f.id for f in text.features] == np.argsort(-key, kind="stable").tolist()
    for found in text.features:
        column = sums[:, found.id]
        assert (found.tokens, found.total) == (np.count_nonzero(column), column.sum())
        assert (found.max, found.peak) == (column.max(), column.argmax())
        shown = column[:600].nonzero()[0].tolist()
        assert found.activations == [(i, column[i]) for i in shown]
    for row in (0, 374, 375, 599):
        best = sorted(zip(ids[row].tolist(), values[row].tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
        assert text.tokens[row].features == best
        assert text.tokens[row].text == WORDS[row % len(WORDS)]


def test_memory_does_not_grow_with_the_length_of_a_text(tmp_path):
    """`encode book.txt` makes one document of a whole book."""
    peaks = []
    for n in (25_000, 200_000):
        folder = tmp_path / str(n)
        write_one_text(folder, n, 8, 512, shards=n // 12_500)
        tracemalloc.start()
        try:
            result = run(InspectConfig(folder, document=0, features=4))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert result.texts[0].num_tokens == n
    # The codes alone take 2 MB and 14 MB; what a reading of them used to hold, 30 MB and 200 MB.
    assert peaks[1] < peaks[0] + 2e6, peaks


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; the parser tests above cover the markup")
def test_a_browser_draws_the_hostile_page_and_runs_nothing_of_it(hostile, tmp_path):
    page = inspect_page.write_page(run(InspectConfig(hostile)), tmp_path / "page.html")
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [CHROMIUM, *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    for view in ("#f=0", "#t=0"):
        dom = subprocess.run([*command, page.as_uri() + view], capture_output=True, text=True, timeout=50).stdout
        assert "<title>Layer 3 features" in dom
        drawn = dom.partition('id="data"')[0]
        assert "&lt;img src=x onerror=" in drawn and "<img" not in drawn


@pytest.mark.parametrize("width", [40, 61, 100, 200])
@pytest.mark.parametrize("ansi", [False, True])
@pytest.mark.parametrize("options", [{}, {"feature": 1}, {"document": 0}])
def test_no_line_is_wider_than_the_terminal_and_nothing_controls_it(hostile, width, ansi, options):
    text = inspect_text.tables(run(InspectConfig(hostile, **options)), width, ansi)
    bare = text.replace("\x1b[1m", "").replace("\x1b[22m", "") if ansi else text
    assert max(inspect_text.cells(line) for line in bare.split("\n")) <= width
    assert not any(ord(char) < 32 and char != "\n" for char in bare)
    assert "\u202e" not in bare and "\u2028" not in bare
    assert ("\x1b[1m" in text) == ansi
    assert ("\u27e6" in text) != ansi


def test_peaks_are_marked_and_stand_below_each_other(small):
    text = inspect_text.tables(run(InspectConfig(small, feature=1, window=3, contexts=2)), 70)
    marked = [line for line in text.splitlines() if "\u27e6" in line]
    assert [line.index("\u27e6") for line in marked] == [marked[0].index("\u27e6")] * 2
    assert marked[0].endswith(" cat sat\u21b5 \u27e6cat\u27e7.")
    assert "left out 2 attention sinks (extreme norm) and 1 NaN row" in text.replace("\n", " \u00b7 ")
    assert "\u00b7cat  (3)" in text  # leading spaces of a lone token are visible


def test_wide_and_combining_characters_are_measured_in_cells():
    assert inspect_text.cells("a\u4f60e\u0301") == 4
    assert inspect_text.clip("\u4f60\u4f60\u4f60", 5) == "\u4f60\u4f60\u2026"
    assert inspect_text.clip("\u4f60\u4f60\u4f60", 4, from_left=True) == "\u2026\u4f60"
    assert inspect_text.clip("abc", 3) == "abc"


def test_the_result_is_plain_data(small, tmp_path):
    result = run(InspectConfig(small, html=tmp_path / "page.html"))
    loaded = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert loaded["features"][0]["contexts"][0]["tokens"] == result.features[0].contexts[0].tokens
    assert loaded["html"] == str(tmp_path / "page.html")


def test_more_contexts_than_memory_holds_are_refused(tmp_path):
    with pytest.raises(InputError, match="at most 1000 per feature"):
        run(InspectConfig(store=tmp_path, contexts=10**9))
