"""What lies between a layer's products, as two operators for training on a GPU with Triton (`layer_triton`):

    residual' = residual + dropout(product + bias), and its layer norm          `residual_norm`
    gelu(product + bias)                                                        `biased_gelu`

Both take the product without its bias: the pass that writes the product's gradient also sums up the bias's. Nothing
else is kept for the backward pass than what comes in and goes out, and a mean and a deviation a row; dropout's mask is
drawn again. Statistics and sums are float32, also where states are bfloat16.

T tokens (any dimensions), D width, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.attention_kernel import realized_dropout

__all__ = ["biased_gelu", "can_drop", "drawn_seed", "residual_norm"]

# Of each kernel, at most so many elements a program at once, warps for so many, and the backward passes' programs.
# An H100 has 132 multiprocessors.
_NORM_FORWARD = {"elements": 2048, "warp_elements": 256}
_NORM_BACKWARD = {"elements": 2048, "warp_elements": 512, "programs": 660, "STAGES": 1}
_GELU_FORWARD = {"ROWS": 4, "COLUMNS": 256, "num_warps": 4}
_GELU_BACKWARD = {"ROWS": 2, "COLUMNS": 512, "num_warps": 4, "programs": 1056, "STAGES": 1}
_MOST_WARPS = 16


def can_drop(dropout: float) -> bool:
    """Whether the kernels have this dropout: none, or one that is 1/256 to 128/256 when rounded to such a multiple."""
    return dropout == 0.0 or 1 <= round(realized_dropout(dropout) * 256) <= 128


def drawn_seed(device: torch.device) -> Tensor:
    """int64 [1] from the device's generator: what the dropout of several sites follows from."""
    return torch.randint(2**62, (1,), device=device)


def residual_norm(
    product_TD: Tensor, bias: Tensor, residual_TD: Tensor, weight: Tensor, shift: Tensor,
    *, eps: float, dropout: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum residual + dropout(product + bias), and its layer norm in the product's number type.

    Args:
        weight, shift, eps: of the norm.
        dropout: that of `realized_dropout` is drawn.
        seed: of `drawn_seed`; None without dropout.
        site: a number of its own for each call with the same seed.
    """
    total, normed, _, _ = _norm_forward(product_TD, bias, residual_TD, weight, shift, seed, site, dropout, eps)
    return total, normed


def biased_gelu(product_TD: Tensor, bias: Tensor) -> Tensor:
    """gelu(product + bias), exact, in the product's number type."""
    activated: Tensor = _gelu_forward(product_TD, bias)
    return activated


# --- residual, dropout and norm


@torch.library.custom_op("megatron_bert::residual_norm", mutates_args=())
def _norm_forward(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    site: int,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    product, residual = product.contiguous(), residual.contiguous()
    total, normed, mean, rstd = _norm_results(product, bias, residual)
    shape = _row_tile(product.shape[-1], _NORM_FORWARD)
    layer_triton.norm_forward[(-(-len(mean) // shape["ROWS"]),)](
        product, bias, residual, weight, shift, mean if seed is None else seed, total, normed, mean, rstd,
        len(mean), site, *_dropout_arguments(dropout), eps,
        DROP=dropout > 0.0, PACKED=_takes_assembly(product), **shape,
    )  # fmt: skip
    return total, normed, mean, rstd


@_norm_forward.register_fake
def _norm_results(product: Tensor, bias: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the sum, its norm, and the mean and the reciprocal deviation of each row."""
    tokens = product.numel() // product.shape[-1]
    statistics = [product.new_empty(tokens, dtype=torch.float32) for _ in range(2)]
    return residual.new_empty(product.shape), product.new_empty(product.shape), statistics[0], statistics[1]


@torch.library.custom_op("megatron_bert::residual_norm_backward", mutates_args=())
def _norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    site: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    grad_normed = grad_normed.contiguous()
    of_residual, of_product, parts = _norm_gradients(grad_total, grad_normed, total, mean, rstd, weight, seed, site,
                                                     dropout)  # fmt: skip
    layer_triton.norm_backward[(len(parts),)](
        grad_normed if grad_total is None else grad_total.contiguous(), grad_normed, total, mean, rstd, weight,
        mean if seed is None else seed, of_residual, of_product, parts,
        len(mean), site, *_dropout_arguments(dropout),
        HAS_GRAD_SUM=grad_total is not None, DROP=dropout > 0.0, PACKED=_takes_assembly(total),
        STAGES=_NORM_BACKWARD["STAGES"], **_row_tile(total.shape[-1], _NORM_BACKWARD),
    )  # fmt: skip
    return of_residual, of_product, parts


@_norm_backward.register_fake
def _norm_gradients(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    site: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of the residual and, with dropout, of the product, and for (P, 3, D) partial sums."""
    of_product = grad_normed.new_empty(total.shape if dropout > 0.0 else (0,))
    parts = total.new_empty(_NORM_BACKWARD["programs"], 3, total.shape[-1], dtype=torch.float32)
    return total.new_empty(total.shape), of_product, parts


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    product, bias, _residual, weight, shift, seed, ctx.site, ctx.dropout, _eps = inputs
    total, _normed, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, weight, seed)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.types = product.dtype, bias.dtype, weight.dtype, shift.dtype


def _differentiate_norm(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, seed = ctx.saved_tensors
    product_type, bias_type, weight_type, shift_type = ctx.types
    if grad_normed is None:
        grad_normed = total.new_zeros(total.shape, dtype=product_type)
    of_residual, of_product, parts = _norm_backward(
        grad_total, grad_normed, total, mean, rstd, weight, seed, ctx.site, ctx.dropout
    )
    if ctx.dropout == 0.0:
        of_product = of_residual.to(product_type)
    of_weight, of_shift, of_bias = parts.sum(0).unbind(0)
    return (
        of_product, of_bias.to(bias_type), of_residual, of_weight.to(weight_type), of_shift.to(shift_type),
        None, None, None, None,
    )  # fmt: skip


_norm_forward.register_autograd(_differentiate_norm, setup_context=_save_norm)


# --- the activation


@torch.library.custom_op("megatron_bert::biased_gelu", mutates_args=())
def _gelu_forward(product: Tensor, bias: Tensor) -> Tensor:
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    product, activated = product.contiguous(), product.new_empty(product.shape)
    width = product.shape[-1]
    tokens = product.numel() // width
    tiles = -(-width // _GELU_FORWARD["COLUMNS"]) * -(-tokens // _GELU_FORWARD["ROWS"])
    layer_triton.gelu_forward[(tiles,)](
        product, bias, activated, tokens, D=width, PACKED=_takes_assembly(product), **_GELU_FORWARD
    )
    return activated


@_gelu_forward.register_fake
def _gelu_result(product: Tensor, bias: Tensor) -> Tensor:
    return product.new_empty(product.shape)


@torch.library.custom_op("megatron_bert::biased_gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    grad, product = grad.contiguous(), product.contiguous()
    of_product, parts = _gelu_gradients(grad, product, bias)
    width, options = product.shape[-1], {name: value for name, value in _GELU_BACKWARD.items() if name != "programs"}
    layer_triton.gelu_backward[-(-width // options["COLUMNS"]), len(parts)](
        grad, product, bias, of_product, parts, product.numel() // width,
        D=width, PACKED=_takes_assembly(product), **options,
    )  # fmt: skip
    return of_product, parts


@_gelu_backward.register_fake
def _gelu_gradients(grad: Tensor, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the product's gradient, and for (P, D) partial sums of the bias's."""
    width = product.shape[-1]
    programs = max(1, _GELU_BACKWARD["programs"] // -(-width // _GELU_BACKWARD["COLUMNS"]))
    return product.new_empty(product.shape), product.new_empty(programs, width, dtype=torch.float32)


def _save_gelu(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    product, bias = ctx.saved_tensors
    of_product, parts = _gelu_backward(grad, product, bias)
    return of_product, parts.sum(0).to(bias.dtype)


_gelu_forward.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


# --- the kernels' arguments


def _row_tile(width: int, limits: dict[str, int]) -> dict[str, int]:
    """Whole rows, as many as fit."""
    padded = 1 << (width - 1).bit_length()
    rows = max(1, limits["elements"] // padded)
    warps = min(_MOST_WARPS, max(1, rows * padded // limits["warp_elements"]))
    return {"D": width, "WIDTH": padded, "ROWS": rows, "num_warps": warps}


def _dropout_arguments(dropout: float) -> tuple[int, float]:
    """See `attention_triton._flags`, and by what is multiplied that is kept."""
    dropped = realized_dropout(dropout)
    return (0x80 - round(dropped * 256)) * 0x01010101, 1 / (1 - dropped)


def _takes_assembly(states: Tensor) -> bool:
    return states.is_cuda and torch.version.hip is None
