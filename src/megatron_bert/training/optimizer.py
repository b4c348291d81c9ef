"""AdamW with decoupled weight decay (Loshchilov and Hutter 2019), none on biases and layer norms; or Muon with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.muon import Muon

__all__ = ["build_optimizer", "parameter_groups"]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in the order given: those that decay, and the vectors (biases and layer norms)."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer; its learning rate is set anew before each step (see `schedule`)."""
    betas, eps = (section.beta1, section.beta2), section.epsilon
    parameters = dict(model.named_parameters())
    if section.kind == "adamw":
        groups = parameter_groups(parameters.values(), section.weight_decay)
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, eps=eps, fused=True)
    matrices = [parameters.pop(name) for name in list(parameters) if _is_layer_matrix(name, parameters[name])]
    return Muon(
        [matrix for matrix in matrices if matrix.requires_grad],
        parameter_groups(parameters.values(), section.weight_decay),
        lr=section.learning_rate, momentum=section.momentum, weight_decay=section.weight_decay, betas=betas, eps=eps,
    )  # fmt: skip


def _is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon is for it: it is for hidden layers, not for embeddings and heads (Jordan et al. 2024)."""
    return parameter.ndim == 2 and ".encoder.layer." in f".{name}"
