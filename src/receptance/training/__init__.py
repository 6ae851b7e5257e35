"""Objective, schedule, one step, and a run of many."""

from receptance.training.objective import head_loss
from receptance.training.options import TrainOptions, learning_rate
from receptance.training.trainer import StepReport, Trainer, make_optimizer

__all__ = [
    "StepReport",
    "TrainOptions",
    "Trainer",
    "head_loss",
    "learning_rate",
    "make_optimizer",
]
