"""A small random Llama and SAEs for two of its blocks."""

import pytest
import torch

WIDTH, FEATURES, K = 32, 96, 6


def make_model(seed: int = 0, layers: int = 3):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float().eval().requires_grad_(False)


def make_sae(seed: int):
    from qscope.sae import SAE

    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(FEATURES, WIDTH, generator=generator)
    W_dec = torch.randn(FEATURES, WIDTH, generator=generator)
    b_enc = 0.1 * torch.randn(FEATURES, generator=generator)
    return SAE(W_enc, W_dec, b_enc, torch.zeros(WIDTH), k=K).requires_grad_(False).eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def saes():
    return {0: make_sae(10), 1: make_sae(11)}


@pytest.fixture
def prompts():
    """Two prompts of 5 and 8 tokens, padded on the left with 0."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 64, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :3] = mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}
