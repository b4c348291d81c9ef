"""The learning rate as a function of the step alone, so that there is no state to lose."""

from __future__ import annotations

import math

import torch

from megatron_bert.training.configuration import OptimizerSection, TrainingSection

__all__ = ["learning_rate", "learning_rate_share", "set_learning_rate"]


def learning_rate(step: int, optimizer: OptimizerSection, training: TrainingSection) -> float:
    """The rate that `step` (from 0) is done with."""
    share = learning_rate_share(
        step, training.warmup_steps, training.steps, schedule=optimizer.schedule, final_share=optimizer.final_share
    )
    return share * optimizer.learning_rate


def learning_rate_share(
    step: int, warmup_steps: int, steps: int, *, schedule: str = "linear", final_share: float = 0.0
) -> float:
    """The share of the highest learning rate used in `step` (from 0): up linearly to 1 in `warmup_steps`, then down to
    `final_share`, which is reached after the last step: linearly (arXiv 1909.08053, section 5.3: BERT) or along a
    cosine (section 5.2: GPT-2).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = max(steps - step, 0) / (steps - warmup_steps)
    if schedule == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2.0
    return final_share + (1.0 - final_share) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every group of the optimizer this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
