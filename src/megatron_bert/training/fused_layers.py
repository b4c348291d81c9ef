"""Layers on the operators of `layer_kernels`: a walk along the residual path.

A layer is written as two halves that begin with a norm (`model/layers.py`). Between two products lie the end of one
half and the beginning of the next: bias, dropout, residual and norm, which are one operator here. So what goes from
layer to layer is the residual path and its norm. Weights, names and, up to rounding, what is computed stay the same.

T tokens (or B, S), D hidden, F feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUActivation

from megatron_bert.model.linear import Linear
from megatron_bert.training.layer_kernels import biased_gelu, can_drop, drawn_seed, residual_norm

__all__ = ["can_be_fused", "compile_fused_layers"]

_WIDEST = 8192  # a row is in a program's registers


def can_be_fused(model: Any) -> bool:
    """Whether the model's layers are those that this walk computes: plain ones, on one device, with the exact GELU."""
    config = model.config
    return (
        config.hidden_size <= _WIDEST
        and not config.chunk_size_feed_forward
        and not config.add_cross_attention
        and all(map(_is_plain, model.bert.encoder.layer))
    )


def _is_plain(layer: Any) -> bool:
    attention, output, activation = layer.attention.output, layer.output, layer.intermediate.intermediate_act_fn
    return (
        all(type(dense) is Linear for dense in (attention.dense, layer.intermediate.dense, output.dense))
        and all(type(norm) is nn.LayerNorm for norm in (layer.attention.ln, layer.ln))
        and all(can_drop(half.dropout.p) for half in (attention, output))
        and isinstance(activation, GELUActivation)
        and activation.act is functional.gelu
    )


def compile_fused_layers(model: Any, together: int, **options: Any) -> None:
    """Has the encoder walk its layers so, `together` of them at a time compiled by the same code.

    Args:
        options: for `torch.compile`.
    """
    encoder = model.bert.encoder
    ordinary, layers = encoder.forward, list(encoder.layer)
    following = [layer.attention.ln for layer in layers[1:]] + [encoder.ln]
    norm: Any = torch.compile(_norm, dynamic=False, **options)
    run: Any = torch.compile(_run_layers, dynamic=False, **options)
    groups = [(layers[at : at + together], following[at : at + together]) for at in range(0, len(layers), together)]

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **kwargs: Any) -> Tensor:
        if any(other is not None for other in others):  # cross-attention, a cache
            result: Tensor = ordinary(hidden_states, attention_mask, *others, **kwargs)
            return result
        normed: Tensor = norm(layers[0].attention.ln, hidden_states)
        for group, norms in groups:
            hidden_states, normed = run(group, norms, hidden_states, normed, attention_mask, **kwargs)
        return normed

    encoder.forward = forward


def _norm(norm: nn.LayerNorm, hidden_states: Tensor) -> Tensor:
    normed: Tensor = norm(hidden_states)
    return normed.to(hidden_states.dtype)  # autocast has widened it


def _run_layers(
    layers: list[Any], norms: list[nn.LayerNorm], residual: Tensor, normed: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The residual path (.., D) after these layers, and its norm by the last of `norms`: what follows each layer."""
    has_dropout = any(_dropout(half) > 0.0 for layer in layers for half in (layer.attention.output, layer.output))
    seed = drawn_seed(residual.device) if has_dropout else None
    for number, (layer, norm) in enumerate(zip(layers, norms, strict=True)):
        context, _ = layer.attention.self(normed, *args, **kwargs)
        residual, normed = _joined(layer.attention.output, context, residual, layer.ln, seed, 2 * number)
        dense = layer.intermediate.dense
        activated = biased_gelu(functional.linear(normed, dense.weight), dense.bias)
        residual, normed = _joined(layer.output, activated, residual, norm, seed, 2 * number + 1)
    return residual, normed


def _joined(
    half: Any, states: Tensor, residual: Tensor, norm: nn.LayerNorm, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    """The end of a layer's half, whose states come back into the residual path, and the next half's norm."""
    product, dropout = functional.linear(states, half.dense.weight), _dropout(half)
    return residual_norm(
        product, half.dense.bias, residual, norm.weight, norm.bias,
        eps=norm.eps, dropout=dropout, seed=seed if dropout > 0.0 else None, site=site,
    )  # fmt: skip


def _dropout(half: Any) -> float:
    return float(half.dropout.p) if half.training else 0.0
