"""The learning rate as a function of the step alone, so that there is no state to lose."""

from __future__ import annotations

import torch

__all__ = ["learning_rate_share", "set_learning_rate"]


def learning_rate_share(step: int, warmup_steps: int, steps: int) -> float:
    """The share of the highest learning rate used in `step` (from 0): up linearly to 1 in `warmup_steps`, then down
    linearly, reaching 0 after the last step (arXiv 1909.08053, section 5.3).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return max(steps - step, 0) / (steps - warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every group of the optimizer this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
