"""TRL's SFTTrainer with loss terms. Importing this imports TRL: pip install 'qscope[post-training]'."""

from trl.trainer.sft_trainer import SFTTrainer

from qscope.post_training.trainer import FeatureTrainerMixin


class FeatureSFTTrainer(FeatureTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with loss terms: everything that it takes, and `terms`, `groups`.

        penalty = qscope.FeaturePenalty(saes, features, alpha=alpha, target_groups=("ja",), weight=1e-3)
        trainer = FeatureSFTTrainer(model, args=SFTConfig(...), train_dataset=dataset,
                                    terms=[FeatureTerm(penalty)], groups=penalty.groups)

    The dataset has TRL's columns and "group". Terms that read logits (KL, entropy, tokens) take the loss from the plain
    Trainer, since TRL's fused head gives no logits; TRL's own figures (entropy, mean_token_accuracy, num_tokens) are
    then not logged.
    """
