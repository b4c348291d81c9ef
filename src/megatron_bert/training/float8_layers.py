"""The steps of a walk along the layers (`fused_layers`) whose products are in float8 (`float8_products`)."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.training.float8_products import (
    Rows,
    linear,
    linear_gelu,
    linear_residual_norm,
    narrowed,
    narrowed_weight,
)
from megatron_bert.training.fused_layers import Steps, dropout_of, walk_layers

__all__ = ["walk_layers_in_float8"]


def walk_layers_in_float8(model: Any, together: int, *, compiled: bool = True, **options: Any) -> None:
    """As `walk_layers`; weights, and what is in a checkpoint, stay what they are.

    Args:
        options: for `torch.compile`.
    """
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.projections = MethodType(_projections, attention)
    walk_layers(model, together, _FLOAT8, compiled=compiled, **options)


def _projections(self: Any, states: Tensor | Rows) -> tuple[Tensor, ...]:
    """Queries, keys and values, in one product."""
    parts = (self.query, self.key, self.value)
    rows = states if isinstance(states, Rows) else narrowed(states)
    return linear(rows, narrowed_weight([part.weight for part in parts]), [part.bias for part in parts]).chunk(3, -1)


def _first(norm: nn.LayerNorm, hidden_states: Tensor) -> Rows:
    return narrowed(norm(hidden_states).to(torch.bfloat16))


def _activated(dense: Any, rows: Rows) -> Rows:
    return linear_gelu(rows, narrowed_weight([dense.weight]), dense.bias)


def _joined(
    half: Any, states: Tensor | Rows, residual: Tensor, norm: nn.LayerNorm, seed: Tensor | None, site: int
) -> tuple[Tensor, Rows]:
    """The end of a layer's half, whose states come back into the residual path, and the next half's norm."""
    rows, dropout = states if isinstance(states, Rows) else narrowed(states), dropout_of(half)
    return linear_residual_norm(
        rows, narrowed_weight([half.dense.weight]), half.dense.bias, residual, norm.weight, norm.bias,
        eps=norm.eps, dropout=dropout, seed=seed if dropout > 0.0 else None, site=site,
    )  # fmt: skip


def _states(rows: Rows) -> Tensor:
    return rows.states


_FLOAT8 = Steps(_first, _activated, _joined, _states)
