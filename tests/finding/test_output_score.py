"""Logit lens and one-token intervention against plain runs of a tiny model."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qscope.errors import ModelError
from qscope.finding.output_score import LENS_TOKENS, final_norm, logit_lens, one_token_effect, typical_tokens
from qscope.sae import SAE

V, D = 64, 16


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 2.0)  # all ones would hide a lens without the norm
        model.lm_head.weight.mul_(20)
    return model


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=32, n_embd=D, n_layer=2, n_head=2)).eval()


@pytest.fixture(scope="module")
def sae():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(12, D, generator=generator)
    return SAE(rows, 0.3 * rows, torch.zeros(12), torch.zeros(D), k=3).requires_grad_(False)


def test_the_lens_is_the_row_through_norm_and_unembedding(sae):
    model, rows = llama(), sae.W_dec[[4, 7]]
    found = logit_lens(model, rows, [5, 9])
    normed = rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + model.config.rms_norm_eps)
    logits = (normed * model.model.norm.weight) @ model.lm_head.weight.T
    assert found.tokens.tolist() == logits.topk(LENS_TOKENS, dim=1).indices.tolist()
    expected = (logits[:, [5, 9]].mean(1) - logits.mean(1)) / logits.std(1)
    np.testing.assert_allclose(found.target, expected.detach(), rtol=1e-5)  # float32 products of 16 terms
    # eps of the norm is not scaled: it is 1e-6 beside a mean square of 0.09 and more
    np.testing.assert_allclose(logit_lens(model, 3 * rows, [5, 9]).target, found.target, rtol=1e-4)
    assert logit_lens(model, rows, []).target.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_intervention_is_a_run_with_the_row_added_at_the_last_token(make, sae):
    model, layer, features, amounts = make(), 1, [4, 7, 2], [0.5, 2.0, 0.0]
    prompts, targets = [[1, 2, 3], [9, 8, 7, 6]], [5, 9]
    lens = logit_lens(model, sae.W_dec[features], targets)
    found = one_token_effect(model, sae, layer, features, amounts, prompts, lens.tokens, targets, factor=10.0)

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    score, change = np.zeros((2, 3)), np.zeros((2, 3))
    for p, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])

        def run(added, ids=ids):
            """(logits, residual) with `added` at the last token."""
            kept = {}

            def hook(module, inputs, output, kept=kept):
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                kept["h"] = hidden[0, -1].clone()
                hidden[0, -1] += added
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = blocks[layer].register_forward_hook(hook)
            logits = model(input_ids=ids).logits[0, -1]
            handle.remove()
            return logits.detach(), kept["h"].detach()

        clean, h = run(torch.zeros(D))
        largest = torch.relu(sae.W_enc @ h).max()
        before = clean.log_softmax(0)[targets].exp().sum().log()
        for i, (feature, amount) in enumerate(zip(features, amounts, strict=True)):
            after = run(10 * largest * sae.W_dec[feature])[0].softmax(0)
            order = after.argsort(descending=True).tolist()
            mine = lens.tokens[i].tolist()
            score[p, i] = (1 - min(map(order.index, mine)) / V) * max(after[t] for t in mine)
            change[p, i] = run(amount * sae.W_dec[feature])[0].log_softmax(0)[targets].exp().sum().log() - before
    np.testing.assert_allclose(found.output_score, score.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.target_change, change.mean(0), rtol=1e-4, atol=1e-6)
    assert found.target_change[2] == pytest.approx(0, abs=1e-6) and abs(found.target_change[1]) > 1e-3
    assert not any(block._forward_hooks for block in blocks)


def test_more_features_than_one_batch_holds_give_the_same(sae, monkeypatch):
    from qscope.finding import output_score

    model, features = llama(), list(range(7))
    lens = logit_lens(model, sae.W_dec[features], [1]).tokens
    whole = one_token_effect(model, sae, 0, features, [1.0] * 7, [[3, 4]], lens, [1], 10.0)
    monkeypatch.setattr(output_score, "ROWS", 3)
    parts = one_token_effect(model, sae, 0, features, [1.0] * 7, [[3, 4]], lens, [1], 10.0)
    np.testing.assert_allclose(parts.output_score, whole.output_score, rtol=1e-5)
    np.testing.assert_allclose(parts.target_change, whole.target_change, rtol=1e-4, atol=1e-6)


def test_final_norm_is_found_or_refused():
    model = llama()
    assert final_norm(model) is model.model.norm
    other = gpt2()
    assert final_norm(other) is other.transformer.ln_f
    model.model.final_layernorm = torch.nn.LayerNorm(D)
    with pytest.raises(ModelError, match="final norm of LlamaForCausalLM could not be told among"):
        final_norm(model)


def test_typical_tokens_are_those_with_a_high_log_odds_z():
    rng = np.random.default_rng(0)
    common = rng.integers(0, 20, 2000)
    positive, negative = np.concatenate([common, [30] * 40, [31] * 15]), np.concatenate([common, [32] * 40])
    found = typical_tokens(positive, negative, 5)
    assert found.tolist() == [30, 31]  # 32 is typical of the others, common tokens of neither

    # Monroe, Colaresi and Quinn, written out for one token
    prior = 1000 * 40 / len(np.concatenate([positive, negative]))
    y, n, m = 40.0, len(positive), len(negative)
    delta = np.log((y + prior) / (n + 1000 - y - prior)) - np.log(prior / (m + 1000 - prior))
    assert delta / np.sqrt(1 / (y + prior) + 1 / prior) > 1.96
    assert typical_tokens(np.zeros(0, np.int64), negative, 5).tolist() == []
