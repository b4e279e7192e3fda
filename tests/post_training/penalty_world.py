"""A tiny Qwen3, SAEs for two of its layers, thresholds, a batch, and the penalty made of them."""

import torch

from qscope.post_training.penalty import FeaturePenalty
from qscope.sae import SAE

D, F, BLOCKS, VOCAB = 32, 64, 3, 50
LAYERS = {1: (5, 9), 2: (0, 63, 7)}


def make_model(dtype=torch.float32, seed=0):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(dtype).train()


def make_saes(seed=1):
    gen = torch.Generator().manual_seed(seed)
    saes = {}
    for layer in LAYERS:
        W = torch.randn(F, D, generator=gen)
        saes[layer] = SAE(W, W.clone(), torch.randn(F, generator=gen), torch.zeros(D), k=4).requires_grad_(False)
    return saes


def make_alpha(groups=3, seed=2):
    gen = torch.Generator().manual_seed(seed)
    return {layer: 0.3 * torch.randn(groups, len(ids), generator=gen) for layer, ids in LAYERS.items()}


def make_penalty(**options):
    given = {"alpha": make_alpha(), "target_groups": (2,), "weight": 0.7} | options
    return FeaturePenalty(make_saes(), LAYERS, **given)


def make_batch(rows=4, length=11, seed=3):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=gen)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 5:] = -100
    mask = torch.ones_like(ids)
    mask[1, 8:], labels[1, 8:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, torch.tensor([0, 1, 2, 1])[:rows]
