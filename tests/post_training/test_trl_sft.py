"""Loss terms inside Trainer and SFTTrainer: gradients of a plain loop, groups through the collator, two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qscope.errors import InputError
from qscope.post_training.controls import EntropyTerm, FeatureTerm, TokenTerm
from tests.post_training.grpo_world import make_tokenizer
from tests.post_training.penalty_world import make_model, make_penalty

pytest.importorskip("trl", reason="the extra post-training")
GROUPS = ("a", "b", "c")
RATE = 0.5
WORKER = Path(__file__).with_name("sft_worker.py")


def rows():
    """Eight examples of different lengths with prompts of three tokens; groups as names."""
    gen = torch.Generator().manual_seed(4)
    found = []
    for i in range(8):
        ids = torch.randint(3, 50, (6 + i % 4,), generator=gen).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "group": GROUPS[i % 3], "source": "x"})
    return found


def terms():
    return [FeatureTerm(make_penalty(groups=GROUPS, target_groups=("c",))), TokenTerm(0.4, 2, (4, 5))]


def make(kind, folder, terms, batch=8, accumulate=1, steps=1, **options):
    """Plain SGD without momentum: the change of the parameters is the gradient."""
    from datasets import Dataset

    dataset = Dataset.from_list(rows())
    settings = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": steps,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "gradient_checkpointing": False, "seed": 0,
    } | options  # fmt: skip
    if kind == "trl":
        from trl import SFTConfig

        from qscope.post_training.trl_sft import FeatureSFTTrainer

        return FeatureSFTTrainer(
            make_model(), args=SFTConfig(str(folder), **settings), train_dataset=dataset,
            processing_class=make_tokenizer(), terms=terms, groups=GROUPS,
        )  # fmt: skip
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    from qscope.post_training.trainer import FeatureTrainer

    return FeatureTrainer(
        make_model(), args=TrainingArguments(str(folder), **settings), train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(make_tokenizer()), processing_class=make_tokenizer(), terms=terms,
        groups=GROUPS,
    )  # fmt: skip


def change(trainer):
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]) - before


def by_hand(with_terms=True):
    """(gradient step, parts) of the loss over all eight examples, in a plain loop over single examples."""
    model, mine = make_model(), terms()
    items = sum(label != -100 for row in rows() for label in row["labels"])
    penalty = mine[0]
    parts = {"penalty": 0.0, "token": 0.0}
    with penalty.penalty.attach(model):
        for row in rows():
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = model(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
            loss = loss / items
            if with_terms:
                one = penalty.penalty.loss([row["group"]], labels, num_items_in_batch=items)
                mass = logits[0, :-1].softmax(-1)[:, [4, 5]].sum(-1)[labels[0, 1:] != -100].sum()
                two = 0.4 * mass / items * (row["group"] != "c")
                parts["penalty"] += float(one.detach())
                parts["token"] += float(two.detach())
                loss = loss + one + two
            loss.backward()
    step = -RATE * torch.cat([p.grad.flatten() for p in model.parameters()])
    return step, parts


def close(found, expected):
    # float32 sums in another order: batches are padded, and the examples come shuffled
    return float((found - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.parametrize("kind", ["plain", "trl"])
@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (2, 4)])
def test_a_step_is_that_of_a_plain_loop(tmp_path, kind, batch, accumulate):
    trainer = make(kind, tmp_path, terms(), batch, accumulate)
    expected, parts = by_hand()
    assert close(change(trainer), expected)
    logged = trainer.state.log_history[0]
    assert logged["term/penalty"] == pytest.approx(parts["penalty"], rel=1e-4) and parts["penalty"] > 0
    assert logged["term/token"] == pytest.approx(parts["token"], rel=1e-4)


def test_the_fused_head_of_trl_with_a_feature_term_alone(tmp_path):
    """No term needs logits, so TRL computes its loss as ever; without terms it is its own step."""
    found = change(make("trl", tmp_path, terms()[:1], 4, 2))
    with_terms = make("plain", tmp_path, terms()[:1], 8)
    assert close(found, change(with_terms))
    plain, _ = by_hand(with_terms=False)
    none = change(make("trl", tmp_path, (), 4, 2))
    assert close(none, plain) and not close(none, found)


def test_hooks_are_gone_after_training_and_evaluation_has_no_terms(tmp_path):
    from datasets import Dataset

    trainer = make("trl", tmp_path, terms())
    trainer.train()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
    bare = make("trl", tmp_path, ())
    bare.model.load_state_dict(trainer.model.state_dict())
    data = Dataset.from_list(rows())
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(bare.evaluate(data)["eval_loss"], abs=1e-7)


def test_the_weight_follows_the_trainer_step(tmp_path):
    seen = []

    class Noting(EntropyTerm):
        def weight_at(self, step):
            seen.append(step)
            return 0.0

    make("plain", tmp_path, [Noting(1.0, None)], 4, 2, steps=3).train()
    assert seen == [0, 0, 1, 1, 2, 2]


def test_errors_are_explained(tmp_path):
    from datasets import Dataset

    with pytest.raises(InputError, match="packing or padding_free"):
        make("trl", tmp_path, terms(), packing=True, max_length=16)
    trainer = make("plain", tmp_path, terms())
    trainer.train_dataset = Dataset.from_list([row | {"group": "d"} for row in rows()])
    with pytest.raises(InputError, match=r"group 'd'.*a, b, c"):
        trainer.train()
    trainer = make("plain", tmp_path, terms())
    trainer.train_dataset = trainer.train_dataset.remove_columns("group")
    with pytest.raises(InputError, match="group None"):
        trainer.train()
    with pytest.raises(InputError, match="name of its own"):
        make("plain", tmp_path, [EntropyTerm(1.0, None), EntropyTerm(2.0, None)])
    with pytest.raises(InputError, match="loss_type"):
        make("trl", tmp_path, terms(), loss_type="dft").train()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    done = subprocess.run(
        [*run, str(WORKER), str(tmp_path)], env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected, parts = by_hand()
    found = torch.load(tmp_path / "step.pt", weights_only=True)
    assert close(found["step"], expected)
    assert found["penalty"] == pytest.approx(parts["penalty"], rel=1e-4)
    assert found["token"] == pytest.approx(parts["token"], rel=1e-4)
