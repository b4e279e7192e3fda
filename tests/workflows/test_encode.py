"""`qscope encode` end to end on real text with a tiny model: the numbers, the refusals, and what a kill leaves."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from qscope.errors import CheckpointError, InputError, ModelError, StoreError
from qscope.sae import SAE
from qscope.store import FeatureStore
from qscope.workflows.encode import EncodeConfig, run

ROOT = Path(__file__).parents[2]


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "docs.jsonl", texts[:12])


def config(tiny, corpus, out, **options):
    base = dict(text=(str(corpus),), out=out, model=tiny.model, sae=tuple(tiny.saes.values()), layers=(0, 2))
    return EncodeConfig(
        **{
            **base,
            "context_size": 64,
            "batch_tokens": 512,
            "shard_bytes": 8192,
            "device": "cpu",
            "dtype": "float32",
            **options,
        }
    )


@pytest.fixture(scope="module")
def encoded(tiny, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "codes"
    return run(config(tiny, corpus, out)), out


def test_features_equal_a_plain_run_of_each_window(tiny, texts, encoded):
    """Every stored code against model(window) with hidden_states, one window at a time, and a dense float64 SAE."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    sae = SAE.from_pretrained(tiny.saes[0])
    store = FeatureStore(encoded[1])
    for document in (0, 5, 11):
        ids = tokenizer(texts[document], add_special_tokens=False).input_ids
        stored = store.document(document)
        assert stored.tokens.tolist() == ids
        assert stored.positions.tolist() == list(range(len(ids)))
        codes = stored.codes(0)
        for start in range(0, len(ids), 64):
            window = torch.tensor([ids[start : start + 64]])
            with torch.no_grad():
                x = model(window, output_hidden_states=True).hidden_states[1][0].double()
            dense = (x @ sae.W_enc.double().T + sae.b_enc.double()).clamp_min(0)
            expected = torch.topk(dense, 8, dim=1).values
            got = torch.from_numpy(codes.values[start : start + 64].astype(np.float64))
            # f16 storage: half a unit in the last place, 2^-11 relative; float32 sums of 32 terms are far below it.
            torch.testing.assert_close(got.sort(1, descending=True).values, expected, rtol=2**-11, atol=1e-6)
            chosen = dense.gather(1, torch.from_numpy(codes.indices[start : start + 64].astype(np.int64)))
            torch.testing.assert_close(got, torch.where(got > 0, chosen, 0), rtol=2**-11, atol=1e-6)


def test_counts_add_up(encoded, texts):
    result, out = encoded
    store = FeatureStore(out)
    assert store.complete
    assert result.documents == 12 and result.tokens == store.num_tokens == len(store.column("token"))
    assert result.shards == len(list(store)) >= 3
    for layer in (0, 2):
        csr = store.to_csr(layer)
        assert csr.shape == (result.tokens, 512)
        assert csr.nnz == result.layers[str(layer)]["nnz"] <= 8 * result.tokens
        assert result.layers[str(layer)]["fvu"] > 0
    assert set(result.seconds) == {"load", "tokenize", "model", "encode", "write"}


def test_second_run_changes_nothing_and_other_settings_are_refused(tiny, corpus, encoded):
    out = encoded[1]
    before = checksums(out)
    again = run(config(tiny, corpus, out))
    assert again.resumed_shards == again.shards and again.run_tokens == 0
    assert checksums(out) == before
    with pytest.raises(StoreError, match="context_size: 64 -> 32"):
        run(config(tiny, corpus, out, context_size=32))
    assert checksums(out) == before


def test_a_lost_or_cut_shard_is_encoded_again(tiny, corpus, encoded, tmp_path, capsys):
    before = checksums(encoded[1])
    for spoil in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])):
        spoil(encoded[1] / "shard-00001.safetensors")
        result = run(config(tiny, corpus, encoded[1]))
        assert result.resumed_shards == 1
        assert "shard-00001.safetensors was finished, but" in capsys.readouterr().err
        assert checksums(encoded[1]) == before


def test_output_inside_the_input_folder(tiny, texts, tmp_path):
    (tmp_path / "a.txt").write_text(texts[0])
    whole = run(config(tiny, tmp_path, tmp_path / "codes"))
    again = run(config(tiny, tmp_path, tmp_path / "codes"))
    assert again.resumed_shards == whole.shards and again.tokens == whole.tokens


def test_another_path_to_the_same_model_resumes(tiny, corpus, encoded, tmp_path):
    (tmp_path / "model").symlink_to(tiny.model)
    again = run(config(tiny, corpus, encoded[1], model=str(tmp_path / "model")))
    assert again.run_tokens == 0
    assert "/" not in FeatureStore(encoded[1]).settings.model.name


def test_an_sae_of_another_layer_is_encoded_when_allowed(tiny, corpus, tmp_path):
    result = run(
        config(tiny, corpus, tmp_path / "codes", sae=(tiny.saes[0],), layers=(1,), allow_mismatch=True, max_tokens=50)
    )
    assert list(result.layers) == ["1"]
    assert FeatureStore(tmp_path / "codes").settings.saes[0].mismatch == "it was made for layer 0, not 1"


def test_one_token_has_no_fvu_and_prints(tiny, tmp_path):
    from qscope.cli import to_json
    from qscope.report.encode_text import render

    (tmp_path / "a.txt").write_text("a")
    result = run(config(tiny, tmp_path / "a.txt", tmp_path / "codes"))
    assert result.tokens == 1 and result.layers["0"]["fvu"] is None
    assert "FVU" not in render(result)
    json.dumps(to_json(result), allow_nan=False)


def test_changed_text_is_encoded_again_from_there(tiny, texts, tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", texts[:6])
    run(config(tiny, path, tmp_path / "a"))
    changed = [*texts[:4], "something else entirely", texts[5]]
    write_jsonl(path, changed)
    result = run(config(tiny, path, tmp_path / "a"))
    assert 0 < result.resumed_shards < result.shards
    run(config(tiny, path, tmp_path / "b"))
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")


def test_other_text_under_the_same_name_is_refused(tiny, texts, tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", texts[:3])
    run(config(tiny, path, tmp_path / "codes"))
    before = checksums(tmp_path / "codes")
    write_jsonl(path, texts[5:8])
    with pytest.raises(StoreError, match="features of other text"):
        run(config(tiny, path, tmp_path / "codes"))
    assert checksums(tmp_path / "codes") == before


def test_shorter_text_drops_the_shards_behind_it(tiny, texts, tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", texts[:6])
    run(config(tiny, path, tmp_path / "a"))
    write_jsonl(path, texts[:2])
    run(config(tiny, path, tmp_path / "a"))
    run(config(tiny, path, tmp_path / "b"))
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")


def test_a_document_longer_than_a_shard_keeps_its_positions(tiny, texts, tmp_path):
    long = " ".join(texts)[:120_000]
    path = tmp_path / "long.txt"
    path.write_text(long)
    run(config(tiny, path, tmp_path / "codes", shard_bytes=30_000))
    store = FeatureStore(tmp_path / "codes")
    assert len(list(store)) == 2
    assert store.column("position").tolist() == list(range(store.num_tokens))
    assert store.tokenizer().decode(store.column("token").tolist()) == long


@pytest.mark.parametrize("limit", [1, 700, 1500])
def test_max_tokens_is_exact(tiny, corpus, encoded, tmp_path, limit):
    result = run(config(tiny, corpus, tmp_path / "codes", max_tokens=limit))
    assert result.tokens == limit
    whole, part = FeatureStore(encoded[1]), FeatureStore(tmp_path / "codes")
    assert part.column("token").tolist() == whole.column("token")[:limit].tolist()


def test_bos_is_seen_by_the_model_and_not_stored(tiny, corpus, encoded, tmp_path):
    run(config(tiny, corpus, tmp_path / "codes", bos=True, max_tokens=500))
    plain, bos = FeatureStore(encoded[1]), FeatureStore(tmp_path / "codes")
    assert bos.column("token").tolist() == plain.column("token")[:500].tolist()
    a, b = next(iter(bos)).layer(2).values[:64], next(iter(plain)).layer(2).values[:64]
    assert not np.allclose(a, b)


def test_formats_give_the_same_features(tiny, texts, corpus, encoded, tmp_path):
    packed = tmp_path / "docs.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    run(config(tiny, packed, tmp_path / "codes"))
    shards = {n: h for n, h in checksums(encoded[1]).items() if n.startswith("shard-")}
    # The settings name the source, and every shard's header names the settings: compare the columns.
    ours, theirs = FeatureStore(tmp_path / "codes"), FeatureStore(encoded[1])
    assert len(shards) == len(list(ours))
    for name in ("doc", "position", "token"):
        assert (ours.column(name) == theirs.column(name)).all()
    assert (ours.to_csr(2) != theirs.to_csr(2)).nnz == 0


def test_nan_weights_in_the_model_are_flagged_counted_or_refused(tiny, corpus, tmp_path):
    """One embedding row NaN: its token and, through attention, what follows it in the window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    rare = tokenizer("an @ sign", add_special_tokens=False).input_ids[1]
    assert "@" in tokenizer.decode(rare)
    with torch.no_grad():
        model.model.embed_tokens.weight[rare] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = write_jsonl(tmp_path / "t.jsonl", ["plain words here", "an @ sign", "more plain words"])
    broken = dict(model=str(tmp_path / "model"), layers=(0,), sae=(tiny.saes[0],))
    result = run(config(tiny, text, tmp_path / "codes", **broken))
    codes = next(iter(FeatureStore(tmp_path / "codes"))).layer(0)
    bad = (codes.flags & 1).astype(bool)
    assert result.layers["0"]["nan_rows"] == bad.sum() > 0
    assert (codes.values[bad] == 0).all() and not np.isnan(codes.values).any()
    assert (codes.values[~bad] > 0).any(axis=1).all()
    with pytest.raises(InputError, match="in document 1 at position"):
        run(config(tiny, text, tmp_path / "strict", strict=True, **broken))


# --- refusals --------------------------------------------------------------------------------------------


def sae_file(path, d_in=32, d_sae=64, k=4, layer=0):
    from qscope.sae import SAECard

    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    card = SAECard(None, f"model.layers.{layer}", layer, k, d_in, d_sae, "float32", None, None, None, {})
    return str(SAE(rows, rows.clone(), torch.zeros(d_sae), torch.zeros(d_in), k=k, card=card).save(path))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(text=("missing.jsonl",)), InputError, "no file or folder"),
        (dict(field="body"), InputError, "no field 'body'. Its fields: text, id"),
        (dict(layers=(0, 7)), CheckpointError, "layer=2 according to the card .* layer=7 according to the argument"),
        (dict(layers=(7, 8), allow_mismatch=True), ModelError, "has the layers 0 to 2"),
        (dict(layers=(2, 0)), CheckpointError, "layer=0 according to the card"),
        (dict(layers=(0, 0)), InputError, "names a layer twice"),
        (dict(context_size=513), InputError, "made for at most 512 tokens"),
        (dict(context_size=512, bos=True), InputError, "and a BOS token was given"),
        (dict(layers=(0, 1, 2)), InputError, "2 SAEs were given for 3 layers"),
        (dict(sae=()), InputError, "without --sae"),
        (dict(device="meta"), (ModelError, InputError), "meta"),
        (dict(model="no-such-folder-or-model"), ModelError, "no-such-folder-or-model"),
    ],
)
def test_wrong_requests_write_nothing(tiny, corpus, tmp_path, options, error, message):
    out = tmp_path / "codes"
    with pytest.raises(error, match=message) as caught:
        run(config(tiny, corpus, out, **options))
    assert "\n\n" not in str(caught.value)
    assert not out.exists()


def test_width_mismatch_names_both_widths(tiny, corpus, tmp_path):
    wide = sae_file(tmp_path / "wide", d_in=48)
    with pytest.raises(ModelError, match=r"width 48.*width 32"):
        run(config(tiny, corpus, tmp_path / "codes", sae=(wide,), layers=(0,)))
    assert not (tmp_path / "codes").exists()


def test_empty_corpus_is_refused(tiny, tmp_path):
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(InputError, match="holds no text: 2 documents, 2 of them empty"):
        run(config(tiny, empty, tmp_path / "codes"))
    assert not (tmp_path / "codes").exists()


def test_foreign_folder_is_refused_untouched(tiny, corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="not empty and not a feature store"):
        run(config(tiny, corpus, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


# --- killed runs -----------------------------------------------------------------------------------------


def encode_process(tiny, corpus, out) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "qscope",
        "encode",
        str(corpus),
        "--out",
        str(out),
        "--model",
        tiny.model,
    ]
    command += [
        "--sae",
        *tiny.saes.values(),
        "--layers",
        "0",
        "2",
        "--context-size",
        "64",
        "--shard-bytes",
        "65536",
    ]
    command += ["--dtype", "float32"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_three_times_and_resumed_gives_the_same_bytes(tiny, texts, tmp_path):
    """1 MB of real text, SIGKILL at three random moments; every file equal to an uninterrupted run's."""
    megabyte, size = [], 0
    while size < 1_000_000:
        text = texts[len(megabyte) % len(texts)]
        megabyte.append(text)
        size += len(text.encode())
    corpus = write_jsonl(tmp_path / "docs.jsonl", megabyte)
    whole = encode_process(tiny, corpus, tmp_path / "whole")
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    seed = random.Random(1)
    killed = 0
    for wanted in (1, 5, 9):  # kill at a random moment once this many shards are finished
        process = encode_process(tiny, corpus, tmp_path / "killed")
        journal = tmp_path / "killed" / "shards.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") >= wanted:
                time.sleep(seed.uniform(0, 0.4))
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    assert killed == 3, "a run finished before it could be killed: the test would prove nothing"
    resumed = encode_process(tiny, corpus, tmp_path / "killed")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert "from an earlier run" in out
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")


def test_two_at_once_one_is_refused(tiny, texts, tmp_path):
    corpus = write_jsonl(tmp_path / "docs.jsonl", texts * 2)
    first = encode_process(tiny, corpus, tmp_path / "codes")
    while first.poll() is None and not (tmp_path / "codes" / "shards.jsonl").exists():
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)  # or it could end before the second one begins
    second = encode_process(tiny, corpus, tmp_path / "codes")
    _, err = second.communicate(timeout=120)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "is being written by another process" in err


def test_command_line_errors_are_one_paragraph_with_status_2(tiny, tmp_path):
    process = encode_process(tiny, tmp_path / "missing.jsonl", tmp_path / "codes")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("qscope: error: There is no file or folder") and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "codes").exists()
