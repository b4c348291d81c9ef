"""What a model that only predicts may have done to it, from outside: projections in one product, compiled layers."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["compile_layers", "fuse_projections"]


def fuse_projections(model: nn.Module) -> None:
    """Has each layer compute its queries, keys and values in one product, which fills a GPU better than three.

    The three weights become views of one: names, values and memory stay what they are. A model that is moved to
    another device or number type afterwards has to be loaded anew.
    """
    with torch.no_grad():
        for layer in _layers(model):
            _fuse(layer.attention.self)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles the layers, which share their code, for batches of any size: elementwise work becomes few kernels.

    The first batch takes some ten seconds longer.
    """
    for layer in _layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def _fuse(attention: Any) -> None:
    projections = (attention.query, attention.key, attention.value)
    weight = torch.cat([part.weight for part in projections])
    bias = torch.cat([part.bias for part in projections])
    for part, own_weight, own_bias in zip(projections, weight.chunk(3), bias.chunk(3), strict=True):
        part.weight.data, part.bias.data = own_weight, own_bias
    attention.fused = weight, bias  # no parameters: the state dict has them by their own names
    attention.projections = MethodType(_projected, attention)


def _projected(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
    return functional.linear(hidden_states, *self.fused).chunk(3, dim=-1)


def _layers(model: Any) -> list[Any]:
    return list(model.bert.encoder.layer)
