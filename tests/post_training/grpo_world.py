"""A tiny Qwen3 with a tokenizer of 50 words, an SAE of its layer 1, and a GRPO trainer on three prompts."""

import torch

from qscope.sae import SAE
from qscope.steering import Edit, SteeringSpec

PROMPTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10"]
VOCAB, END, LENGTH, GROUP = 50, 1, 12, 4


def make_model(seed=0):
    """Next words at chance, and a residual along a row of the head makes it say that word."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model.train()


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": END} | {f"w{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def word_sae(model, layer=1):
    """Feature f is the head's row of word f."""
    rows = model.get_output_embeddings().weight.detach().float().clone()
    rows = rows / rows.norm(dim=1, keepdim=True)
    return {layer: SAE(rows, rows.clone(), rows.new_zeros(len(rows)), rows.new_zeros(rows.shape[1]), k=4)}


def say(word, strength=200.0, layer=1):
    return SteeringSpec((Edit(layer=layer, feature=word, strength=strength, tokens="all"),))


def make_trainer(folder, reward=None, model=None, group=GROUP, prompts=2, **options):
    """Batches of `prompts` x `group` rollouts, all in one step."""
    from datasets import Dataset
    from trl import GRPOConfig

    from qscope.post_training.trl_grpo import SteeredGRPOTrainer

    own = {name: options.pop(name) for name in ("negative", "old_logps", "length_cap") if name in options}
    settings = {
        "per_device_train_batch_size": prompts * group,
        "num_generations": group,
        "max_completion_length": LENGTH,
        "temperature": 1.0,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "loss_type": "dapo",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 7,
    } | options
    return SteeredGRPOTrainer(
        model=make_model() if model is None else model,
        reward_funcs=by_length if reward is None else reward,
        args=GRPOConfig(str(folder), **settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=make_tokenizer(),
        **own,
    )


def by_length(completion_ids, **_):
    return [float(len(ids)) + 0.1 * ids[0] for ids in completion_ids]


def batch(trainer):
    """What a step of `trainer` is given: (rows, the inputs of the loss)."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # which Trainer sets in train()
    rows = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(trainer.num_generations)]
    return rows, trainer._generate_and_score_completions(rows)
