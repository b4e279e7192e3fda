"""A tiny causal LM with a real tokenizer and an SAE for each of two of its layers, made once per session."""

from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch


def english() -> list[str]:
    """Real text of every CPython: the documentation behind help()."""
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return english()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a 3-block Llama (width 32) and of its SAEs: F = 512, K = 8, layers 0 and 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from qscope.sae import SAE, SAECard

    root: Path = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        english(),
        trainers.BpeTrainer(
            vocab_size=4096, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>")

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model_path = root / "model"
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(model_path)
    tokenizer.save_pretrained(model_path)

    saes = {}
    for layer in (0, 2):
        rows = torch.nn.functional.normalize(torch.randn(512, 32, generator=generator), dim=1)
        card = SAECard(None, f"model.layers.{layer}", layer, 8, 32, 512, "float32", None, None, None, {})
        saes[layer] = SAE(rows, rows.clone(), torch.zeros(512), torch.zeros(32), k=8, card=card).save(
            root / f"sae{layer}"
        )
    return SimpleNamespace(model=str(model_path), saes={layer: str(path) for layer, path in saes.items()})
