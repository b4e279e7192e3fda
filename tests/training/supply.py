"""A tiny model with a real tokenizer and text, and streams of it, for the tests of the activation supply."""

from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch

from qscope.training.activations import model_stream
from qscope.training.text import DatasetText, PackedWindows

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if not messages[0]['role'] %}{{ raise_exception('no role') }}{% endif %}"
)


@pytest.fixture(scope="module")
def tiny():
    """A 3-block Llama of width 16, its tokenizer, and a dozen real texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [topics[name] for name in sorted(topics)][:12]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|start|>")
    tokenizer.chat_template = TEMPLATE
    return SimpleNamespace(model=make_model(), tokenizer=tokenizer, texts=texts)


def make_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).to(torch.float32).eval()


def rows_of(texts):
    return [{"text": text} for text in texts]


def stream_of(tiny, points=(0, 2), texts=None, model=None, **options):
    text = texts if hasattr(texts, "parts") else DatasetText(rows_of(texts or tiny.texts), name="topics")
    options = {"buffer_tokens": 2048, "model_tokens": 256, "context_size": 32, "seed": 3, **options}
    return model_stream(model or tiny.model, tiny.tokenizer, text, list(points), **options)


def windows_of(tiny, text=None, context_size=32, windows=8, **options):
    options = {"separator": tiny.tokenizer.eos_token_id, **options}
    text = text or DatasetText(rows_of(tiny.texts))
    return PackedWindows(text, tiny.tokenizer, context_size, windows, **options)


def drain(windows):
    return list(iter(windows.next, None))


def batches(stream, n):
    found = []
    while True:
        try:
            found.append(stream.next(n))
        except StopIteration:
            return found


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[p], y[p]) for p in x) for x, y in zip(a, b, strict=True)
    )
