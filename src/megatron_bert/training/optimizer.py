"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019), none on biases and layer norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_bert.training.configuration import OptimizerSection

__all__ = ["build_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the order of `named_parameters`: those that decay, and the vectors (biases and layer norms)."""
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """The optimizer; its learning rate is set anew before each step (see `schedule`)."""
    return torch.optim.AdamW(
        parameter_groups(model, section.weight_decay),
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        fused=True,
    )
