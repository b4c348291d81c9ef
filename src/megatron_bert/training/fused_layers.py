"""Layers on the operators of `layer_kernels`: a walk along the residual path.

A layer is written as two halves that begin with a norm (`model/layers.py`). Between two products lie the end of one
half and the beginning of the next: bias, dropout, residual and norm, which are one operator here. So what goes from
layer to layer is the residual path and its norm. Weights, names and, up to rounding, what is computed stay the same.
In float8 (`float8_layers`) the products are steps of the walk, too. On tensor-parallel ranks each has its part of them,
and what lies between two is on every rank, or under sequence parallelism on the rank that has the tokens.

T tokens (or B, S), D hidden, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

from megatron_bert.model.linear import Linear
from megatron_bert.parallel.layers import ColumnParallelLinear, ReplicatedLayerNorm, RowParallelLinear
from megatron_bert.training.layer_kernels import biased_gelu, can_drop, drawn_seed, residual_norm

__all__ = ["BFLOAT16", "BFLOAT16_ON_RANKS", "Steps", "can_be_fused", "dropout_of", "walk_layers"]

_WIDEST = 8192  # a row is in a program's registers
# A layer's three products and two norms.
_WHOLE = (Linear, Linear, Linear, nn.LayerNorm, nn.LayerNorm)
_ON_RANKS = (RowParallelLinear, ColumnParallelLinear, RowParallelLinear, ReplicatedLayerNorm, ReplicatedLayerNorm)


@dataclass(frozen=True)
class Steps:
    """What the walk is made of, in a number type. What follows a norm or an activation is called rows here: states, and
    what else a product makes use of.

    Attributes:
        first: norm, states -> rows.
        activated: dense, rows -> rows.
        joined: half, states or rows, residual, norm, seed, site -> residual, rows. See `_joined`.
        states: rows -> states.
    """

    first: Callable[..., Any]
    activated: Callable[..., Any]
    joined: Callable[..., tuple[Tensor, Any]]
    states: Callable[[Any], Tensor]


def can_be_fused(model: Any) -> bool:
    """Whether the model's layers are those that this walk computes: plain ones, with the exact GELU, on one device or
    as tensor-parallel ranks have them.
    """
    config = model.config
    return (
        config.hidden_size <= _WIDEST
        and not config.chunk_size_feed_forward
        and not config.add_cross_attention
        and all(map(_is_plain, model.bert.encoder.layer))
    )


def _is_plain(layer: Any) -> bool:
    attention, output, activation = layer.attention.output, layer.output, layer.intermediate.intermediate_act_fn
    kinds = tuple(map(type, (attention.dense, layer.intermediate.dense, output.dense, layer.attention.ln, layer.ln)))
    return (
        kinds in (_WHOLE, _ON_RANKS)
        and all(can_drop(half.dropout.p) for half in (attention, output))
        and isinstance(activation, GELUActivation)
        and activation.act is functional.gelu
    )


def walk_layers(model: Any, together: int, steps: Steps, *, compiled: bool = True, **options: Any) -> None:
    """Has the encoder walk its layers so, `together` of them at a time, compiled by the same code.

    Args:
        options: for `torch.compile`.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return _run_layers(steps, *args, **kwargs)

    first: Callable[..., Any] = steps.first
    if compiled:
        first, run = (torch.compile(function, dynamic=False, **options) for function in (first, run))
    encoder = model.bert.encoder
    ordinary, layers = encoder.forward, list(encoder.layer)
    following = [layer.attention.ln for layer in layers[1:]] + [encoder.ln]
    groups = [(layers[at : at + together], following[at : at + together]) for at in range(0, len(layers), together)]

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **kwargs: Any) -> Tensor:
        if any(other is not None for other in others):  # cross-attention, a cache
            result: Tensor = ordinary(hidden_states, attention_mask, *others, **kwargs)
            return result
        rows = first(layers[0].attention.ln, hidden_states)
        for group, norms in groups:
            hidden_states, rows = run(group, norms, hidden_states, rows, attention_mask, **kwargs)
        return steps.states(rows)

    encoder.forward = forward


def _run_layers(
    steps: Steps, layers: list[Any], norms: list[nn.LayerNorm], residual: Tensor, rows: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The residual path (.., D) after these layers, and its norm by the last of `norms`: what follows each layer."""
    has_dropout = any(dropout_of(half) > 0.0 for layer in layers for half in (layer.attention.output, layer.output))
    seed = drawn_seed(residual.device) if has_dropout else None
    for number, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
        residual, rows = _run_layer(steps, layer, norm, seed, 2 * number, residual, rows, *args, **kwargs)
    return residual, rows


def _run_layer(
    steps: Steps, layer: Any, norm: nn.LayerNorm, seed: Tensor | None, site: int, residual: Tensor, rows: Any,
    *args: Any, **kwargs: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """A function of its own, without a loop: where a compiler is stopped within attention, it compiles what is around
    that.
    """
    context, _ = layer.attention.self(rows, *args, **kwargs)
    residual, rows = steps.joined(layer.attention.output, context, residual, layer.ln, seed, site)
    rows = steps.activated(layer.intermediate.dense, rows)
    return steps.joined(layer.output, rows, residual, norm, seed, site + 1)


def dropout_of(half: Any) -> float:
    """Of the end of a layer's half; none where it is evaluated."""
    return float(half.dropout.p) if half.training else 0.0


# --- in bfloat16


def _first(norm: nn.LayerNorm, hidden_states: Tensor) -> Tensor:
    normed: Tensor = norm(hidden_states)
    return normed.to(hidden_states.dtype)  # autocast has widened it


def _activated(dense: Any, normed: Tensor) -> Tensor:
    return biased_gelu(functional.linear(normed, dense.weight), dense.bias)


def _joined(
    half: Any, states: Tensor, residual: Tensor, norm: nn.LayerNorm, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    """The end of a layer's half, whose states come back into the residual path, and the next half's norm."""
    return _ended(half, functional.linear(states, half.dense.weight), residual, norm, seed, site)


def _ended(
    half: Any, product: Tensor, residual: Tensor, norm: nn.LayerNorm, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    dropout = dropout_of(half)
    return residual_norm(
        product, half.dense.bias, residual, norm.weight, norm.bias,
        eps=norm.eps, dropout=dropout, seed=seed if dropout > 0.0 else None, site=site,
    )  # fmt: skip


def _themselves(normed: Tensor) -> Tensor:
    return normed


BFLOAT16 = Steps(_first, _activated, _joined, _themselves)


# --- in bfloat16, on tensor-parallel ranks (`parallel.layers`; attention enters the sharded region by itself)


def _activated_on_ranks(dense: Any, normed: Tensor) -> Tensor:
    return biased_gelu(dense.region.enter_linear(normed, dense.weight), dense.bias)


def _joined_on_ranks(
    half: Any, states: Tensor, residual: Tensor, norm: nn.LayerNorm, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    """As `_joined`. What the seed says is dropped alike on every rank, or on its own tokens by each: it is drawn from
    the stream in force (`SequenceParallelEncoder`).
    """
    product = half.dense.region.leave_linear(states, half.dense.weight)
    return _ended(half, product, residual, norm, seed, site)


BFLOAT16_ON_RANKS = Steps(_first, _activated_on_ranks, _joined_on_ranks, _themselves)
