"""`qscope encode --activations` end to end on real text with a tiny model."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope.activation_store import ActivationStore, ActivationWriter
from qscope.errors import InputError, ModelError
from qscope.store import FeatureStore, StoreWriter
from qscope.training.stored_activations import stored_stream
from qscope.workflows.encode import EncodeConfig, run

ROOT = Path(__file__).parents[2]


def checksums(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def message(caught):
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def batches(stream, n):
    found = []
    while True:
        try:
            found.append(stream.next(n))
        except StopIteration:
            return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:12]))
    return path


def config(tiny, corpus, folder, **options):
    base = dict(text=(str(corpus),), out=folder / "codes", activations=folder / "acts", model=tiny.model)
    base |= dict(sae=tuple(tiny.saes.values()), layers=(0, 2), context_size=64, batch_tokens=512, shard_bytes=8192)
    return EncodeConfig(**{**base, "device": "cpu", "dtype": "float32", **options})


@pytest.fixture(scope="module")
def encoded(tiny, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded")
    return run(config(tiny, corpus, folder)), folder


def test_stored_rows_equal_a_plain_run_of_each_window(tiny, texts, encoded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, folder = encoded
    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    store = ActivationStore(folder / "acts")
    assert result.activations == str(folder / "acts") and store.tokens == result.tokens
    assert len(store.records) == result.shards >= 3
    column = lambda name: torch.cat([store.column(i, name) for i in range(result.shards)]).numpy()  # noqa: E731
    features = FeatureStore(folder / "codes")
    for name in ("doc", "position", "token"):
        assert (column(name) == features.column(name)).all()
    x = torch.cat([store.rows(i, 0) for i in range(result.shards)])
    for document in (0, 5, 11):
        ids = tokenizer(texts[document], add_special_tokens=False).input_ids
        mine = np.flatnonzero(column("doc") == document)
        assert column("token")[mine].tolist() == ids
        assert column("place")[mine].tolist() == [i % 64 for i in range(len(ids))]
        for start in range(0, len(ids), 64):
            with torch.no_grad():
                window = torch.tensor([ids[start : start + 64]])
                expected = model(window, output_hidden_states=True).hidden_states[1][0]
            # float32 in another batch shape
            torch.testing.assert_close(x[mine[start : start + 64]], expected, rtol=1e-4, atol=1e-5)
    assert sum(record.first for record in store.records) == int((column("place") == 0).sum())


def test_features_do_not_change_and_either_store_can_come_later(tiny, corpus, encoded, tmp_path):
    folder = encoded[1]
    run(config(tiny, corpus, tmp_path, activations=None))
    assert checksums(tmp_path / "codes") == checksums(folder / "codes")
    assert not (tmp_path / "acts").exists()
    late = run(config(tiny, corpus, tmp_path))
    assert late.resumed_shards == 0 and checksums(tmp_path / "acts") == checksums(folder / "acts")
    assert checksums(tmp_path / "codes") == checksums(folder / "codes")
    again = run(config(tiny, corpus, tmp_path))
    assert again.resumed_shards == again.shards and again.run_tokens == 0


def test_activations_alone_need_no_sae(tiny, corpus, encoded, tmp_path):
    from qscope.report.encode_text import render

    result = run(config(tiny, corpus, tmp_path, features=False, sae=(), activations_dtype="bfloat16"))
    assert result.store is None and result.layers == {} and not (tmp_path / "codes").exists()
    assert f"{tmp_path / 'acts'}: {result.tokens:,} tokens" in render(result) and "inspect" not in render(result)
    ours, theirs = ActivationStore(tmp_path / "acts"), ActivationStore(encoded[1] / "acts")
    for shard in range(result.shards):
        for layer in (0, 2):
            assert torch.equal(ours.rows(shard, layer), theirs.rows(shard, layer).bfloat16())
    assert "activations of the same tokens" in render(encoded[0])


def test_places_after_a_bos_token(tiny, corpus, tmp_path):
    run(config(tiny, corpus, tmp_path, features=False, sae=(), bos=True, max_tokens=300))
    store = ActivationStore(tmp_path / "acts")
    assert store.tokens == 300
    assert store.column(0, "place")[:70].tolist() == [*range(1, 65), *range(1, 7)], "the BOS token itself is not stored"
    assert all(record.first == 0 for record in store.records)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(features=False), InputError, "leave --sae out"),
        (dict(features=False, sae=(), activations=None), InputError, "Say where with --activations"),
        (dict(features=False, sae=(), layers=()), InputError, "with --layers"),
        (dict(features=False, sae=(), layers=(0, 3)), ModelError, "Layer 3 .* layers 0 to 2"),
        (dict(features=False, sae=(), layers=(1, 1)), InputError, "names a layer twice"),
        (dict(out=Path("same"), activations=Path("./same")), InputError, "a folder of its own"),
    ],
)
def test_wrong_requests_write_nothing(tiny, corpus, tmp_path, options, error, match):
    with pytest.raises(error, match=match) as caught:
        run(config(tiny, corpus, tmp_path, **options))
    message(caught)
    assert list(tmp_path.iterdir()) == []


def test_strict_refuses_nan_without_an_sae(tiny, corpus, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[5:900] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "model")
    broken = dict(model=str(tmp_path / "model"), features=False, sae=(), max_tokens=200)
    with pytest.raises(InputError, match=r"NaN or infinite at \d+ tokens, first in document 0 at position"):
        run(config(tiny, corpus, tmp_path / "strict", strict=True, **broken))
    run(config(tiny, corpus, tmp_path / "all", **broken))
    assert bool(ActivationStore(tmp_path / "all" / "acts").rows(0, 0).isnan().any())


@pytest.mark.parametrize("which", [ActivationWriter, StoreWriter])
def test_interrupted_at_any_shard_and_resumed_gives_the_same_bytes(tiny, corpus, encoded, tmp_path, monkeypatch, which):
    add = which.add

    def interrupted(self, index, *rest):
        if len(self.finished) == allowed:
            raise KeyboardInterrupt
        return add(self, index, *rest)

    shards = encoded[0].shards
    for allowed in range(shards):  # noqa: B007  (read by interrupted)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(which, "add", interrupted)
            run(config(tiny, corpus, tmp_path))
    result = run(config(tiny, corpus, tmp_path))
    assert result.resumed_shards == shards - 1
    assert checksums(tmp_path) == checksums(encoded[1])


def test_killed_and_resumed_gives_the_same_bytes(tiny, corpus, encoded, tmp_path):
    command = [sys.executable, "-m", "qscope", "encode", str(corpus), "--out", str(tmp_path / "codes")]
    command += ["--activations", str(tmp_path / "acts"), "--model", tiny.model, "--sae", *tiny.saes.values()]
    command += ["--layers", "0", "2", "--context-size", "64", "--batch-tokens", "512", "--shard-bytes", "8192"]
    command += ["--device", "cpu", "--dtype", "float32"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal, deadline = tmp_path / "acts" / "shards.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 1:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it finished before it could be killed: the test would prove nothing"
    process.communicate()
    begun = journal.read_bytes().count(b"\n")
    assert begun < len(ActivationStore(encoded[1] / "acts").records)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{begun} of them from an earlier run" in done.stdout
    ours, theirs = (ActivationStore(folder / "acts") for folder in (tmp_path, encoded[1]))
    assert [record.key for record in ours.records] == [record.key for record in theirs.records]
    ours.verify()
    for shard in range(len(ours.records)):
        assert torch.equal(ours.column(shard, "token"), theirs.column(shard, "token"))


def test_what_encode_stored_can_be_streamed(encoded):
    store = ActivationStore(encoded[1] / "acts")
    stream = stored_stream(store, [2, 0], buffer_tokens=1024, block=64, blocks_at_once=4)
    served = torch.cat([batch[0] for batch in [*batches(stream, 100), stream.next(stream.left)]])
    x = torch.cat([store.rows(record.index, 0) for record in store.records])
    places = torch.cat([store.column(record.index, "place") for record in store.records])
    order = lambda rows: rows[np.lexsort(rows.numpy().T)]  # noqa: E731
    assert stream.counts()["extreme_norm"] == {"2": 0, "0": 0}
    assert torch.equal(order(served), order(x[places.to(torch.int64) > 0]))
