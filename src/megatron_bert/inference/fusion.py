"""Queries, keys and values in one product, for a model that only predicts: the weights lie side by side, once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["fuse_projections"]


def fuse_projections(model: nn.Module) -> None:
    """Has each layer compute its queries, keys and values in one product, which fills a GPU better than three.

    The three weights become views of one: names, values and memory stay what they are. A model that is moved to
    another device or number type afterwards has to be loaded anew.
    """
    parts: Any = model
    with torch.no_grad():
        for layer in parts.bert.encoder.layer:
            _fuse(layer.attention.self)


def _fuse(attention: Any) -> None:
    projections = (attention.query, attention.key, attention.value)
    weight = torch.cat([part.weight for part in projections])
    bias = torch.cat([part.bias for part in projections])
    for part, own_weight, own_bias in zip(projections, weight.chunk(3), bias.chunk(3), strict=True):
        part.weight.data, part.bias.data = own_weight, own_bias
    attention.projections = partial(_projected, weight, bias)


def _projected(weight: Tensor, bias: Tensor, hidden_states: Tensor) -> tuple[Tensor, ...]:
    return functional.linear(hidden_states, weight, bias).chunk(3, dim=-1)
