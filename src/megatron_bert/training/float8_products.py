"""Products of a layer in 8-bit floating point, with what follows them, and their gradients.

An operand is narrowed to e4m3, a row (a token's states, a weight's output) by one scale that takes the row's largest
magnitude to 448, the format's (Micikevicius et al. 2022, arXiv 2209.05433): a maximum costs nothing where a kernel has
whole rows (`layer_kernels`), and a row of large numbers costs another nothing. Three rules beyond that:

- Gradients are e4m3, too. e5m2's range, for which that paper has it, is needed where one scale serves a whole tensor;
  with one a row, a bit of mantissa is worth more (DeepSeek-V3, arXiv 2412.19437, section 3.3.2; torchao's `rowwise`).
- A weight is narrowed once, and written in both layouts. Its outputs' scales s cannot leave the sum over outputs that a
  gradient of the input is, dx = dy W = (dy s) (W / s); so dy is multiplied by s before it is narrowed.
- Gradients of weights are products of bfloat16 operands, as in torchao's recipe `rowwise_with_gw_hp`: there the sum is
  over tokens, whose scales would not leave it either, and small gradients are not lost beside large ones.

Hopper's tensor cores add 8-bit products up in some 14 bits unless told not to, which costs a tenth to a quarter of the
rate. Here they may, forward and in gradients, as in torchao's row-wise recipes; NVIDIA's Transformer Engine has it
forward alone, and DeepSeek-V3 (ibid.) warns of it in long sums. docs/roofline.md has the loss beside bfloat16's.

T tokens, K inputs, N outputs of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_bert.training.layer_kernels import (
    cast_rows,
    cast_weight,
    gelu_backward,
    gelu_forward,
    norm_backward,
    norm_forward,
)

__all__ = ["Rows", "Weight", "linear", "linear_gelu", "linear_residual_norm", "narrowed", "narrowed_weight"]

_FAST_SUMS = True


class Rows(NamedTuple):
    """A product's input: states (.., K) in bfloat16, for the weight's gradient; values e4m3 (.., K), scales (T)."""

    states: Tensor
    values: Tensor
    scales: Tensor


class Weight(NamedTuple):
    """A parameter, float32 (N, K), which gets the gradient; values e4m3 (N, K) and (K, N), scales (N)."""

    parameter: Tensor
    values: Tensor
    transposed: Tensor
    scales: Tensor


def narrowed(states: Tensor) -> Rows:
    """What no kernel of ours wrote."""
    values, scales, _ = cast_rows(states.detach())
    return Rows(states, values, scales)


def narrowed_weight(parameters: Sequence[Tensor]) -> Weight:
    """Weights of the same inputs, as one."""
    values, transposed, scales = cast_weight([parameter.detach() for parameter in parameters])
    parameter = parameters[0] if len(parameters) == 1 else torch.cat(list(parameters))
    return Weight(parameter, values, transposed, scales)


def linear(rows: Rows, weight: Weight, biases: Sequence[Tensor]) -> Tensor:
    """x W^T + the biases side by side, (.., N) in bfloat16."""
    product: Tensor = _applied(_Linear, *rows, *weight, torch.cat(list(biases)))
    return product


def linear_gelu(rows: Rows, weight: Weight, bias: Tensor) -> Rows:
    """gelu(x W^T + bias), as `biased_gelu`, ready for a product."""
    return Rows(*_applied(_LinearGelu, *rows, *weight, bias))


def linear_residual_norm(
    rows: Rows, weight: Weight, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    *, eps: float, dropout: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Rows]:  # fmt: skip
    """The sum residual + dropout(x W^T + bias) and its layer norm, as `residual_norm`, the norm ready for a product."""
    total, *normed = _applied(
        _LinearResidualNorm, *rows, *weight, bias, residual, norm_weight, norm_bias, seed, site, dropout, eps
    )
    return total, Rows(*normed)


def _applied(function: Any, *args: Any) -> Any:
    return function.apply(*args)


# Each begins with the three of `Rows` and the four of `Weight`.


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        rows, weight, (bias,) = _operands(inputs)
        ctx.save_for_backward(rows.states, weight.transposed, weight.scales)
        return _product(rows, weight, bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        states, transposed, weight_scales = ctx.saved_tensors
        values, scales, of_bias = cast_rows(grad, weight_scales)
        of_states, of_weight = _gradients(grad, values, scales, states, transposed)
        return of_states, None, None, of_weight, None, None, None, of_bias


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, weight, (bias,) = _operands(inputs)
        product = _product(rows, weight, None)
        activated, values, scales = gelu_forward(product, bias, True)
        ctx.save_for_backward(rows.states, weight.transposed, weight.scales, product, bias)
        ctx.mark_non_differentiable(values, scales)
        return activated, values, scales

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        states, transposed, weight_scales, product, bias = ctx.saved_tensors
        of_product, of_bias, values, scales = gelu_backward(grad, product, bias, weight_scales)
        of_states, of_weight = _gradients(of_product, values, scales, states, transposed)
        return of_states, None, None, of_weight, None, None, None, of_bias


class _LinearResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, weight, (bias, residual, norm_weight, norm_bias, seed, site, dropout, eps) = _operands(inputs)
        total, normed, mean, rstd, values, scales = norm_forward(
            _product(rows, weight, None), bias, residual, norm_weight, norm_bias, seed, site, dropout, eps, True
        )
        ctx.save_for_backward(rows.states, weight.transposed, weight.scales, total, mean, rstd, norm_weight, seed)
        ctx.site, ctx.dropout = site, dropout
        ctx.mark_non_differentiable(values, scales)
        return total, normed, values, scales

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor, *_: Any) -> Any:
        states, transposed, weight_scales, total, mean, rstd, norm_weight, seed = ctx.saved_tensors
        of_residual, of_product, sums, values, scales = norm_backward(
            grad_total, grad_normed, total, mean, rstd, norm_weight, seed, ctx.site, ctx.dropout, weight_scales
        )
        if ctx.dropout == 0.0:
            of_product = of_residual.to(grad_normed.dtype)
        of_states, of_weight = _gradients(of_product, values, scales, states, transposed)
        of_norm_weight, of_norm_bias, of_bias = sums.unbind(0)
        return (
            of_states, None, None, of_weight, None, None, None,
            of_bias, of_residual, of_norm_weight, of_norm_bias, None, None, None, None,
        )  # fmt: skip


def _operands(inputs: tuple[Any, ...]) -> tuple[Rows, Weight, tuple[Any, ...]]:
    return Rows(*inputs[:3]), Weight(*inputs[3:7]), inputs[7:]


def _product(rows: Rows, weight: Weight, bias: Tensor | None) -> Tensor:
    product: Tensor = scaled_product(rows.values, rows.scales, weight.values, weight.scales, bias, _FAST_SUMS)
    return product


def _gradients(
    grad: Tensor, values: Tensor, scales: Tensor, states: Tensor, transposed: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the states and, float32, of the weight, for the product's gradient: (.., N), and narrowed."""
    of_states: Tensor = scaled_product(values, scales, transposed, None, None, _FAST_SUMS)
    of_weight = grad.flatten(0, -2).t() @ states.flatten(0, -2)
    return of_states, of_weight.float()


@torch.library.custom_op("megatron_bert::scaled_product", mutates_args=())
def scaled_product(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor | None, bias: Tensor | None, fast: bool
) -> Tensor:
    """x W^T + bias in bfloat16 (.., N), of e4m3 (.., K) with scales (T), and (N, K) with scales (N), or ones."""
    if weight_scales is None:
        weight_scales = _ones(len(weight), weight.device)
    product = _multiply(values.flatten(0, -2), scales, weight, weight_scales, bias, fast)
    # Not a view: who looks for the tensor behind parts of this one (`attention_kernel.joined`) has to end up here.
    shaped: Tensor = torch.ops.aten._unsafe_view(product, [*values.shape[:-1], len(weight)])
    return shaped


@scaled_product.register_fake
def _product_result(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor | None, bias: Tensor | None, fast: bool
) -> Tensor:
    return values.new_empty(*values.shape[:-1], len(weight), dtype=torch.bfloat16)


def _multiply(
    values: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, fast: bool
) -> Tensor:
    by_rows = functional.ScalingType.RowWise
    product: Tensor = functional.scaled_mm(
        values, weight.t(), scales[:, None], by_rows, weight_scales[None], by_rows,
        bias=bias, output_dtype=torch.bfloat16, use_fast_accum=fast,
    )  # fmt: skip
    return product


@cache
def _ones(number: int, device: torch.device) -> Tensor:
    return torch.ones(number, device=device)
