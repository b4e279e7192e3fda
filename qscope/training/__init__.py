"""Training of sparse autoencoders: recipe, objectives, trainer, and where activations come from."""

from qscope.training.recipe import Recipe
from qscope.training.trainer import SAETrainer, StepStats

__all__ = ["Recipe", "SAETrainer", "StepStats"]
