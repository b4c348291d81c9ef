"""What the paper's trainer does to fresh weights beyond the model's own N(0, 0.02)."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["is_residual_projection", "scale_residual_projections"]


def is_residual_projection(name: str) -> bool:
    """Whether the parameter writes into the residual stream: the second matrix of attention and of the MLP."""
    return ".encoder.layer." in f".{name}" and name.endswith(".output.dense.weight")


@torch.no_grad()
def scale_residual_projections(model: nn.Module, num_layers: int) -> None:
    """Scales the weights before each residual addition by 1/sqrt(2N) for N layers, so that the residual stream's
    variance does not grow with depth (arXiv 1909.08053, section 5.1). Only for weights that were just drawn.
    """
    for name, parameter in model.named_parameters():
        if is_residual_projection(name):
            parameter.mul_(1.0 / math.sqrt(2.0 * num_layers))
