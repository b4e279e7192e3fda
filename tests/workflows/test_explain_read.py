"""Codes of texts beside those of a store of the same texts, and raised tokens beside plain arithmetic."""

import json

import numpy as np
import pytest
import torch

from qscope.errors import InputError
from qscope.explaining.contexts import gather
from qscope.explaining.sources import StoreCodes
from qscope.store import FeatureStore
from qscope.workflows import encode
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encoder import load_encoder
from qscope.workflows.explain_read import decoder, raised_tokens, token_codes
from qscope.workflows.text_features import tokenize_texts


@pytest.fixture(scope="module")
def world(tiny, texts, tmp_path_factory):
    """(store, encoder, texts): layer 2 of the tiny model over 24 texts of at most 64 tokens."""
    folder = tmp_path_factory.mktemp("explain-read")
    texts = [text[:160] for text in texts[:24]]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    options = {"model": tiny.model, "sae": (tiny.saes[2],), "context_size": 64, "device": "cpu", "dtype": "float32"}
    encode.run(EncodeConfig(text=(str(path),), out=folder / "codes", **options))
    return FeatureStore(folder / "codes"), load_encoder(EncodeConfig(text=(), **options)), texts


def test_codes_of_texts_are_those_of_a_store_of_them(world):
    store, encoder, texts = world
    codes = token_codes(encoder, tokenize_texts(encoder.tokenizer, texts, 64))
    assert codes.layers == (2,) and codes.documents == store.num_documents
    assert codes.sae_sha256(2) == store.settings.sae(2).sha256 and codes.d_sae(2) == 512
    stored = store.document(5).codes(2)
    mine = codes.document == 5
    assert np.array_equal(codes.token[mine], store.document(5).tokens)
    values, indices = codes.codes[2].values[mine], codes.codes[2].indices[mine]
    order = np.argsort(indices, axis=1)  # a store sorts a token's features by id
    assert np.array_equal(np.take_along_axis(indices, order, 1), stored.indices)
    # and keeps their values as bfloat16: 8 bits of mantissa
    assert np.allclose(np.take_along_axis(values, order, 1), stored.values, rtol=2**-8, atol=0)
    assert not codes.codes[2].keep[codes.position == 0].any()  # the first token of a text, without a BOS token


def test_a_store_and_its_texts_give_the_same_passages(world):
    store, encoder, texts = world
    chosen = store.top_features(2, 3).tolist()
    from_texts = gather(token_codes(encoder, tokenize_texts(encoder.tokenizer, texts, 64)), 2, chosen)
    for one, other in zip(gather(StoreCodes(store), 2, chosen), from_texts, strict=True):
        assert one.sae_sha256 == other.sae_sha256
        assert one.count >= other.count > 0  # the store counts first tokens that are no sinks
        assert set(p.document for p in one.positives) >= set(p.document for p in other.positives)


def test_raised_tokens_are_those_of_the_largest_logits(world, tiny):
    store, encoder, _ = world
    found, notes = raised_tokens(store, {2: [7, 3]}, True, tiny.model, (tiny.saes[2],), "cpu")
    assert notes == [] and set(found) == {(2, 7), (2, 3)}
    model = encoder.model
    with torch.no_grad():
        logits = model.model.norm(encoder.saes[2].W_dec[7]) @ model.get_output_embeddings().weight.T
    assert model.dtype == torch.float32 and found[2, 7] == tuple(
        encoder.tokenizer.decode([i]) for i in logits.topk(8).indices.tolist()
    )


def test_raised_tokens_are_left_out_or_refused_with_the_reason(world, tiny):
    store, _, _ = world
    assert raised_tokens(store, {2: [7]}, False, None, (), "cpu") == ({}, [])
    found, notes = raised_tokens(store, {2: [7]}, True, None, (), "cpu")
    assert found == {} and "give --model and --sae of model" in notes[0]
    with pytest.raises(InputError, match="Give that SAE, or leave the raised tokens out"):
        raised_tokens(store, {2: [7]}, True, tiny.model, (tiny.saes[0],), "cpu")


def test_text_is_decoded_with_the_stores_tokenizer(world):
    store, _, texts = world
    tokens = store.document(0).tokens.tolist()
    assert texts[0].startswith(decoder(store)(tokens)) and len(tokens) > 10
