"""Texts to pooled features: against plain runs text by text, chunks on disk, and the same texts in a feature store."""

import json

import numpy as np
import pytest
import torch

from qscope.errors import InputError
from qscope.finding.pooled import pool
from qscope.model import capture
from qscope.sae import SAE
from qscope.store import FeatureStore
from qscope.workflows import text_features
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encode import run as encode
from qscope.workflows.encoder import load_encoder
from qscope.workflows.text_features import read_features, store_features, tokenize_texts

FIELDS = ("features", "column", "text", "total", "firing", "largest", "last", "tokens")
CONTEXT = 24


@pytest.fixture(scope="module")
def encoder(tiny):
    return load_encoder(
        EncodeConfig(
            text=(), model=tiny.model, sae=tuple(tiny.saes.values()), layers=(0, 2), context_size=CONTEXT,
            dtype="float32", device="cpu",
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def some(texts):
    return [text[i * 90 : i * 90 + 70] for text in texts[:9] for i in range(2)] + ["", "a", texts[3][:400]]


@pytest.fixture
def chunked(monkeypatch):
    monkeypatch.setattr(text_features, "CHUNK_TOKENS", 100)


def same(left, right):
    for layer in left.layers:
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(left.codes(layer), name), getattr(right.codes(layer), name), name)


def test_codes_and_residuals_are_those_of_single_runs(tiny, encoder, some, chunked):
    tokens = tokenize_texts(encoder.tokenizer, some, CONTEXT)
    found = read_features(encoder, tokens, None, keep_residuals=True)
    assert len(found._chunks) > 3
    for layer, path in tiny.saes.items():
        sae = SAE.from_pretrained(path)
        acts, ids, owner, keep = [], [], [], []
        for number, text in enumerate(some):
            line = encoder.tokenizer(text, add_special_tokens=False)["input_ids"][:CONTEXT]
            if not line:
                continue
            with capture(encoder.model, [layer]) as residual, torch.no_grad():
                encoder.model(torch.tensor([line]))
            x = residual[layer][0]
            top_acts, top_indices = sae.encode_topk(x)
            acts.append(top_acts.numpy())
            ids.append(top_indices.numpy())
            owner += [number] * len(line)
            keep += [False] + [True] * (len(line) - 1)
            if len(line) > 1:
                mean = x[1:].double().mean(0).numpy()
                # float32 forward passes in batches and alone differ by rounding of sums of 32 and 64 terms
                np.testing.assert_allclose(found.residual(layer, "mean")[number], mean, rtol=2e-4, atol=2e-6)
                np.testing.assert_allclose(found.residual(layer, "last")[number], x[-1].numpy(), rtol=2e-4, atol=2e-5)
        want = pool(np.concatenate(acts), np.concatenate(ids), np.array(owner), np.array(keep), len(some))
        got = found.codes(layer)
        for name in ("features", "column", "text", "firing", "tokens"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
        for name in ("total", "largest", "last"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-3, atol=1e-5, err_msg=name)
        assert found.facts[layer].kept == sum(keep) and found.facts[layer].tokens == len(keep)
    np.testing.assert_array_equal(found.tokens, found.codes(0).tokens)
    assert not found.residual(0, "mean")[len(some) - 3].any()  # the empty text


def test_the_cut_is_on_the_side_that_was_asked_for(encoder, some):
    whole = tokenize_texts(encoder.tokenizer, some, 10_000)
    right, left = (tokenize_texts(encoder.tokenizer, some, 5, side) for side in ("right", "left"))
    for all_, first, last in zip(whole.ids, right.ids, left.ids, strict=True):
        np.testing.assert_array_equal(first, all_[:5])
        np.testing.assert_array_equal(last, all_[-5:])
    assert right.truncated.sum() == left.truncated.sum() == sum(len(ids) > 5 for ids in whole.ids) > 15
    assert not whole.truncated.any()


def test_finished_chunks_are_not_computed_again(encoder, some, chunked, tmp_path, monkeypatch):
    tokens = tokenize_texts(encoder.tokenizer, some, CONTEXT)
    whole = read_features(encoder, tokens, None, keep_residuals=True)
    real, calls = text_features._compute, []

    def compute(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(text_features, "_compute", compute)
    with pytest.raises(KeyboardInterrupt):
        read_features(encoder, tokens, tmp_path, keep_residuals=True)
    again = read_features(encoder, tokens, tmp_path, keep_residuals=True)
    chunks = len(whole._chunks)
    assert len(calls) == chunks + 1  # two before the stop, the stop, and the rest
    same(whole, again)
    np.testing.assert_array_equal(whole.residual(2, "mean"), again.residual(2, "mean"))
    assert whole.facts == again.facts
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    same(whole, read_features(encoder, tokens, tmp_path, keep_residuals=True))
    assert len(calls) == chunks + 1
    damaged = sorted(tmp_path.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    same(whole, read_features(encoder, tokens, tmp_path, keep_residuals=True))
    assert len(calls) == chunks + 2 and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(InputError, match="were not kept"):
        read_features(encoder, tokens, tmp_path).residual(0, "mean")
    assert len(calls) == 2 * chunks + 2  # without residuals is another question


def test_a_store_of_the_same_texts_gives_the_same_codes(tiny, encoder, some, tmp_path):
    """The store keeps float16 values where they fit, so the activations agree to half of its last place."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    encode(
        EncodeConfig(
            text=(str(tmp_path / "t.jsonl"),), out=tmp_path / "codes", model=tiny.model,
            sae=tuple(tiny.saes.values()), layers=(0, 2), context_size=512, dtype="float32",
            device="cpu", shard_bytes=300,
        )
    )  # fmt: skip
    store = FeatureStore(tmp_path / "codes")
    stored = store_features(store)
    direct = read_features(encoder, tokenize_texts(encoder.tokenizer, some, 512), None)
    assert len(store) > 3 and stored.texts == direct.texts == len(some)
    np.testing.assert_array_equal(stored.tokens, direct.tokens)
    for layer in (0, 2):
        got, want = stored.codes(layer), direct.codes(layer)
        for name in ("features", "column", "text", "firing", "tokens"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
        np.testing.assert_allclose(got.largest, want.largest, rtol=2**-11, atol=1e-4)
        assert stored.facts[layer] == direct.facts[layer] and stored.d_sae(layer) == 512


def test_texts_that_hold_nothing(encoder):
    found = read_features(encoder, tokenize_texts(encoder.tokenizer, ["", ""], CONTEXT), None, keep_residuals=True)
    assert found.codes(0).tokens.tolist() == [0, 0] and len(found.codes(0).features) == 0
    with pytest.raises(InputError, match="no text"):
        read_features(encoder, tokenize_texts(encoder.tokenizer, [], CONTEXT), None)
