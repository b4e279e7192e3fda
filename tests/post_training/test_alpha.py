"""Thresholds and features from texts of groups, against plain sums over the same tokens."""

import json

import pytest
import torch

from qscope.errors import InputError, StorageError
from qscope.model import residuals
from qscope.post_training import alpha as alpha_module
from qscope.post_training.alpha import Alpha, estimate, mine
from qscope.post_training.penalty import FeaturePenalty
from qscope.post_training.rows import direction_rows, sae_rows
from qscope.sae import SAE

TEXTS = {
    "en": ["The quick brown fox jumps over the lazy dog.", "a", "Statements and expressions, and one more line of it."],
    "num": ["1234 5678 9012 3456", "77 88 99 11 22 33 44"],
    "code": ["def f(x): return {x: [x]}", "if a == b: raise KeyError('x')", ""],
}


@pytest.fixture(scope="module")
def world():
    """A random Llama of width 32 with a byte tokenizer, and SAEs of layers 0 and 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, attention_dropout=0.5,
        )
    )  # fmt: skip
    saes = {}
    for layer in (0, 2):
        W = torch.randn(96, 32)
        saes[layer] = SAE(W, W.clone(), torch.randn(96), torch.zeros(32), k=6).requires_grad_(False)
    return model.train(), PreTrainedTokenizerFast(tokenizer_object=backend), saes


def tokens_of(world, group, layer, size=512):
    """[n, D] float64: one window at a time, without batches or padding, first tokens of windows dropped."""
    model, tokenizer, _ = world
    found = []
    model.eval()
    for text in TEXTS[group]:
        ids = tokenizer(text)["input_ids"]
        for start in range(0, len(ids), size):
            part = torch.tensor([ids[start : start + size]])
            found.append(residuals(model, part, [layer])[layer][0, 1:])
    model.train()
    return torch.cat(found)


@pytest.mark.parametrize("size", [512, 10])
def test_alpha_is_the_mean_pre_activation_per_group(world, size):
    model, tokenizer, saes = world
    rows = sae_rows(saes, {0: (3, 90), 2: (7,)})
    found = estimate(model, tokenizer, rows, TEXTS, context_size=size, batch_tokens=64)
    assert found.groups == ("en", "num", "code") and found.left_out == 0 and model.training
    for row, group in enumerate(TEXTS):
        for layer, one in rows.items():
            x = tokens_of(world, group, layer, size).double()
            want = (x @ one.W.double().T + one.b.double()).mean(0)
            # Padding and other batch shapes: float32 sums in another order, through three blocks.
            torch.testing.assert_close(found.values[layer][row].double(), want, rtol=1e-5, atol=1e-5)
            assert found.tokens[row] == len(x)


def test_tokens_are_averaged_not_texts(world):
    model, tokenizer, _ = world
    rows = direction_rows({0: torch.ones(1, 32)})
    short, long = ["ab"], ["The quick brown fox jumps over the lazy dog."]
    values = [estimate(model, tokenizer, rows, {"g": t}).values[0].double() for t in (short, long, short + long)]
    n = len(long[0]) - 1
    torch.testing.assert_close(values[2], (values[0] + n * values[1]) / (n + 1), rtol=1e-5, atol=1e-6)


def test_mining_takes_the_largest_nu(world):
    model, tokenizer, saes = world
    found = mine(model, tokenizer, saes, TEXTS, "num", count=3, batch_tokens=64)
    for layer, sae in saes.items():
        means = []
        for group in TEXTS:
            x = tokens_of(world, group, layer)
            means.append(sae.encode(x).double().mean(0))
        scores = means[1] - (means[0] + means[2]) / 2
        best = scores.topk(3)
        assert found.features[layer] == tuple(best.indices.tolist())
        torch.testing.assert_close(torch.tensor(found.nu[layer]).double(), best.values, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"96 features of layer 0.* fire more on 'num'"):
        mine(model, tokenizer, saes, TEXTS, "num", count=96)


def test_saved_and_loaded(world, tmp_path):
    model, tokenizer, saes = world
    rows = sae_rows(saes, {0: (3, 90), 2: (7,)})
    found = estimate(model, tokenizer, rows, TEXTS)
    again = Alpha.load(found.save(tmp_path / "alpha.json"))
    assert (again.groups, again.tokens, again.left_out) == (found.groups, found.tokens, found.left_out)
    for layer in rows:
        assert torch.equal(again.values[layer], found.values[layer])
        assert again.layers[layer].sae_hash == saes[layer].weight_hash()
    penalty = FeaturePenalty(saes, {0: (3, 90), 2: (7,)}, alpha=again, target_groups=("num",))
    assert torch.equal(penalty.alpha_0, found.values[0]) and penalty.groups == ("en", "num", "code")
    other = {0: saes[0], 2: saes[0]}
    with pytest.raises(InputError, match="may mean other things"):
        FeaturePenalty(other, {0: (3, 90), 2: (7,)}, alpha=again)
    with pytest.raises(StorageError):
        found.save(tmp_path / "nowhere" / "alpha.json")


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda d: d.update(format=2), "format"),
        (lambda d: d.pop("groups"), "groups"),
        (lambda d: d["layers"]["0"].update(alpha=[[1.0, "x"]]), "alpha"),
        (lambda d: d["layers"]["0"]["alpha"].pop(), "a row of numbers for each"),
        (lambda d: d["layers"]["0"]["alpha"][0].pop(), "a row of numbers for each"),
        (lambda d: d.update(layers={}), "layers"),
        (lambda d: d.update(extra=1), "extra"),
    ],
)
def test_a_damaged_file(world, tmp_path, change, word):
    model, tokenizer, saes = world
    path = estimate(model, tokenizer, sae_rows(saes, {0: (3, 90)}), TEXTS).save(tmp_path / "alpha.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=word):
        Alpha.load(path)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Alpha.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("alpha")
    with pytest.raises(InputError, match="JSON"):
        Alpha.load(tmp_path / "text.json")


@pytest.mark.parametrize(
    "texts, word",
    [
        ({"en": ["some text"], "de": []}, "no text of the group 'de'"),
        ({"en": ["some text"], "de": [" ", ""]}, "no text of the group 'de'"),
        ({"en": ["some text"], "de": ["a"]}, "'de' hold no token"),
        ({}, "any group"),
    ],
)
def test_groups_without_text(world, texts, word):
    model, tokenizer, saes = world
    with pytest.raises(InputError, match=word):
        estimate(model, tokenizer, sae_rows(saes, {0: (3,)}), texts)
    if len(texts) > 1:
        with pytest.raises(InputError, match=word):
            mine(model, tokenizer, saes, texts, "en")


def test_tokens_that_are_not_finite_are_left_out(world, monkeypatch):
    model, tokenizer, _ = world
    rows = direction_rows({0: torch.ones(1, 32)})

    def broken(*args, **kwargs):
        found = residuals(*args, **kwargs)
        found[0][0, 1] = float("nan")
        return found

    monkeypatch.setattr(alpha_module, "residuals", broken)
    found = estimate(model, tokenizer, rows, {"g": ["some text"]})
    assert found.left_out == 1 and found.tokens == (7,) and found.values[0].isfinite().all()
    with pytest.raises(InputError, match="no token"):
        estimate(model, tokenizer, rows, {"g": ["so"]})


def test_an_unknown_target_and_rows_of_another_width(world):
    model, tokenizer, saes = world
    for texts in (TEXTS, {"fr": ["du texte"]}):
        with pytest.raises(InputError, match="Features of the group 'fr'"):
            mine(model, tokenizer, saes, texts, "fr")
    with pytest.raises(InputError, match="width 16"):
        estimate(model, tokenizer, direction_rows({0: torch.ones(1, 16)}), TEXTS)
