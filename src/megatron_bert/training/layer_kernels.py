"""What lies between a layer's products, as two operators for training on a GPU with Triton (`layer_triton`):

    residual' = residual + dropout(product + bias), and its layer norm          `residual_norm`
    gelu(product + bias)                                                        `biased_gelu`

Both take the product without its bias: the pass that writes the product's gradient also sums up the bias's. Nothing
else is kept for the backward pass than what comes in and goes out, and a mean and a deviation a row; dropout's mask is
drawn again. Statistics and sums are float32, also where states are bfloat16.

The same kernels also write in float8 what is an operand of a product next; see `float8_products`.

T tokens (any dimensions), D width. No shape that an operator gives back depends on tiles: PyTorch keeps compiled graphs
from one version to the next, and goes by the operators' names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_bert.model.attention_kernel import realized_dropout

__all__ = [
    "biased_gelu",
    "can_drop",
    "cast_rows",
    "cast_weight",
    "drawn_seed",
    "gelu_backward",
    "gelu_forward",
    "norm_backward",
    "norm_forward",
    "residual_norm",
]

# Of each kernel, at most so many elements a program at once, and warps for so many, or at least so many; of backward
# passes their programs: for norms, which keep three sums a column, no more than have so many columns together.
# An H100 has 132 multiprocessors.
_NORM_FORWARD = {"elements": 2048, "warp_elements": 1024}
_NORM_BACKWARD = {
    "elements": 2048, "warp_elements": 1024, "warps": 4, "programs": 660, "columns": 264 * 4096, "STAGES": 1,
}  # fmt: skip
_GELU_FORWARD = {"ROWS": 4, "COLUMNS": 256, "num_warps": 4}
_GELU_BACKWARD = {"ROWS": 4, "COLUMNS": 1024, "num_warps": 4, "programs": 528, "STAGES": 1}
# With float8, a program of the activation has whole rows, too. A multiprocessor's registers hold two to six of these.
_NORM_FORWARD_NARROW = {"elements": 2048, "warp_elements": 256}
_NORM_BACKWARD_NARROW = {
    "elements": 1024, "warp_elements": 1024, "warps": 4, "programs": 792, "columns": 264 * 4096, "STAGES": 1,
}  # fmt: skip
_GELU_FORWARD_NARROW = {"elements": 2048, "warp_elements": 256}
_GELU_BACKWARD_NARROW = {"elements": 4096, "warp_elements": 256, "programs": 264, "STAGES": 1}
_CAST = {"elements": 4096, "warp_elements": 256, "programs": 396, "STAGES": 1}
_CAST_WEIGHT = {"ROWS": 16, "COLUMNS": 256, "num_warps": 8}
_MOST_WARPS = 16 if torch.version.hip else 32  # 1,024 threads


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
    total, normed, *_ = norm_forward(product_TD, bias, residual_TD, weight, shift, seed, site, dropout, eps)
    return total, normed


def biased_gelu(product_TD: Tensor, bias: Tensor) -> Tensor:
    """gelu(product + bias), exact, in the product's number type."""
    activated: Tensor = gelu_forward(product_TD, bias)[0]
    return activated


# --- residual, dropout and norm


@torch.library.custom_op("megatron_bert::residual_norm", mutates_args=())
def norm_forward(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    site: int,
    dropout: float,
    eps: float,
    narrow: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum, its norm, the mean and the reciprocal deviation of each row (T), and with `narrow` the norm in float8
    (.., D) and its scales (T).
    """
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    product, residual = product.contiguous(), residual.contiguous()
    total, normed, mean, rstd, narrowed, scales = _norm_results(
        product, bias, residual, weight, shift, seed, site, dropout, eps, narrow
    )
    shape = _row_tile(product.shape[-1], _NORM_FORWARD_NARROW if narrow else _NORM_FORWARD)
    layer_triton.norm_forward[(-(-len(mean) // shape["ROWS"]),)](
        product, bias, residual, weight, shift, mean if seed is None else seed, total, normed, mean, rstd,
        narrowed, scales, len(mean), site, *_dropout_arguments(dropout), eps,
        DROP=dropout > 0.0, PACKED=_takes_assembly(product), NARROW=narrow, **shape,
    )  # fmt: skip
    return total, normed, mean, rstd, narrowed, scales


@norm_forward.register_fake
def _norm_results(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    site: int,
    dropout: float,
    eps: float,
    narrow: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = product.numel() // product.shape[-1]
    mean, rstd = (product.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    total, normed = residual.new_empty(product.shape), product.new_empty(product.shape)
    return total, normed, mean, rstd, *_narrow_results(product, narrow)


@torch.library.custom_op("megatron_bert::residual_norm_gradients", mutates_args=())
def norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    site: int,
    dropout: float,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the residual and, with dropout, of the product; (3, D) those of weight, shift and bias; and with
    `factor` (D) the product's times it in float8 (.., D), and its scales (T).
    """
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    grad_normed, limits = grad_normed.contiguous(), _NORM_BACKWARD if factor is None else _NORM_BACKWARD_NARROW
    of_residual, of_product, sums, narrowed, scales = _norm_gradients(
        grad_total, grad_normed, total, mean, rstd, weight, seed, site, dropout, factor
    )
    width = total.shape[-1]
    parts = sums.new_empty(max(1, min(limits["programs"], limits["columns"] // _padded(width))), *sums.shape)
    layer_triton.norm_backward[(len(parts),)](
        grad_normed if grad_total is None else grad_total.contiguous(), grad_normed, total, mean, rstd, weight,
        mean if seed is None else seed, weight if factor is None else factor, of_residual, of_product, parts,
        narrowed, scales, len(mean), site, *_dropout_arguments(dropout),
        HAS_GRAD_SUM=grad_total is not None, DROP=dropout > 0.0, PACKED=_takes_assembly(total),
        NARROW=factor is not None, STAGES=limits["STAGES"], **_row_tile(width, limits),
    )  # fmt: skip
    return of_residual, of_product, torch.sum(parts, 0, out=sums), narrowed, scales


@norm_backward.register_fake
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
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_product = grad_normed.new_empty(total.shape if dropout > 0.0 else (0,))
    sums = total.new_empty(3, total.shape[-1], dtype=torch.float32)
    return total.new_empty(total.shape), of_product, sums, *_narrow_results(total, factor is not None)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    product, bias, _residual, weight, shift, seed, ctx.site, ctx.dropout, _eps, _narrow = inputs
    total, _normed, *others = output
    mean, rstd, _, _ = others
    ctx.save_for_backward(total, mean, rstd, weight, seed)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    ctx.types = product.dtype, bias.dtype, weight.dtype, shift.dtype


def _differentiate_norm(
    ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    total, mean, rstd, weight, seed = ctx.saved_tensors
    product_type, bias_type, weight_type, shift_type = ctx.types
    if grad_normed is None:
        grad_normed = total.new_zeros(total.shape, dtype=product_type)
    of_residual, of_product, sums, _, _ = norm_backward(
        grad_total, grad_normed, total, mean, rstd, weight, seed, ctx.site, ctx.dropout
    )
    if ctx.dropout == 0.0:
        of_product = of_residual.to(product_type)
    of_weight, of_shift, of_bias = sums.unbind(0)
    return (
        of_product, of_bias.to(bias_type), of_residual, of_weight.to(weight_type), of_shift.to(shift_type),
        None, None, None, None, None,
    )  # fmt: skip


norm_forward.register_autograd(_differentiate_norm, setup_context=_save_norm)


# --- the activation


@torch.library.custom_op("megatron_bert::biased_gelu", mutates_args=())
def gelu_forward(product: Tensor, bias: Tensor, narrow: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The activated states, and with `narrow` the same in float8 (.., D), and their scales (T)."""
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    product = product.contiguous()
    activated, narrowed, scales = _gelu_results(product, bias, narrow)
    width = product.shape[-1]
    tokens = product.numel() // width
    options = _row_tile(width, _GELU_FORWARD_NARROW, "COLUMNS") if narrow else {"D": width, **_GELU_FORWARD}
    tiles = -(-width // options["COLUMNS"]) * -(-tokens // options["ROWS"])
    layer_triton.gelu_forward[(tiles,)](
        product, bias, activated, narrowed, scales, tokens, PACKED=_takes_assembly(product), NARROW=narrow, **options
    )
    return activated, narrowed, scales


@gelu_forward.register_fake
def _gelu_results(product: Tensor, bias: Tensor, narrow: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return product.new_empty(product.shape), *_narrow_results(product, narrow)


@torch.library.custom_op("megatron_bert::biased_gelu_gradients", mutates_args=())
def gelu_backward(
    grad: Tensor, product: Tensor, bias: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the product and of the bias, and with `factor` (D) the first times it in float8 (.., D), and its
    scales (T).
    """
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    grad, product = grad.contiguous(), product.contiguous()
    of_product, of_bias, narrowed, scales = _gelu_gradients(grad, product, bias, factor)
    width, limits = product.shape[-1], _GELU_BACKWARD if factor is None else _GELU_BACKWARD_NARROW
    options = _gelu_backward_tile(width, factor is not None)
    strips = -(-width // options["COLUMNS"])
    parts = of_bias.new_empty(max(1, limits["programs"] // strips), width)
    layer_triton.gelu_backward[strips, len(parts)](
        grad, product, bias, bias if factor is None else factor, of_product, parts, narrowed, scales,
        product.numel() // width, PACKED=_takes_assembly(product), NARROW=factor is not None, **options,
    )  # fmt: skip
    return of_product, torch.sum(parts, 0, out=of_bias), narrowed, scales


@gelu_backward.register_fake
def _gelu_gradients(
    grad: Tensor, product: Tensor, bias: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_bias = product.new_empty(product.shape[-1], dtype=torch.float32)
    return product.new_empty(product.shape), of_bias, *_narrow_results(product, factor is not None)


def _gelu_backward_tile(width: int, narrow: bool) -> dict[str, int]:
    if narrow:
        return {**_row_tile(width, _GELU_BACKWARD_NARROW, "COLUMNS"), "STAGES": _GELU_BACKWARD_NARROW["STAGES"]}
    return {"D": width, **{name: value for name, value in _GELU_BACKWARD.items() if name != "programs"}}


def _save_gelu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_gelu(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor, None]:
    product, bias = ctx.saved_tensors
    of_product, of_bias, _, _ = gelu_backward(grad, product, bias)
    return of_product, of_bias.to(bias.dtype), None


gelu_forward.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


# --- what comes from elsewhere, in float8


@torch.library.custom_op("megatron_bert::rows_in_float8", mutates_args=())
def cast_rows(states: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """States in float8 (.., D) and their scales (T). With `factor` (D), they are a gradient: the columns are multiplied
    by it first, and (D) the sums are those of the columns before.
    """
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    states = states.contiguous()
    narrowed, scales, sums = _cast_results(states, factor)
    options = _row_tile(states.shape[-1], _CAST)
    programs = -(-len(scales) // options["ROWS"]) if factor is None else _CAST["programs"]
    parts = sums.new_empty(programs, *sums.shape)
    layer_triton.cast_rows[(programs,)](
        states, scales if factor is None else factor, parts, narrowed, scales, len(scales),
        IS_GRADIENT=factor is not None, STAGES=_CAST["STAGES"], **options,
    )  # fmt: skip
    return narrowed, scales, sums if factor is None else torch.sum(parts, 0, out=sums)


@cast_rows.register_fake
def _cast_results(states: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    columns = 0 if factor is None else states.shape[-1]
    return *_narrow_results(states, True), states.new_empty(columns, dtype=torch.float32)


@torch.library.custom_op("megatron_bert::cast_weight", mutates_args=())
def cast_weight(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (N, D) of the same inputs, as one, in float8: (N, D), its transpose, and the scales (N)."""
    from megatron_bert.training import layer_triton  # noqa: PLC0415

    values, transposed, scales = _weight_results(parts)
    first = 0
    for part in parts:
        outputs, width = part.shape
        rows = slice(first, first + outputs)
        layer_triton.cast_weight[(-(-outputs // _CAST_WEIGHT["ROWS"]),)](
            part.contiguous(), values[rows], transposed[:, rows], scales[rows], outputs, len(scales), D=width,
            **_CAST_WEIGHT,
        )  # fmt: skip
        first += outputs
    return values, transposed, scales


@cast_weight.register_fake
def _weight_results(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    outputs, width = sum(len(part) for part in parts), parts[0].shape[1]
    values, transposed = (
        parts[0].new_empty(shape, dtype=torch.float8_e4m3fn) for shape in ((outputs, width), (width, outputs))
    )
    return values, transposed, parts[0].new_empty(outputs, dtype=torch.float32)


def _narrow_results(states: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Room for rows in float8 and their scales; none where they are not wanted."""
    narrowed = states.new_empty(states.shape if narrow else (0,), dtype=torch.float8_e4m3fn)
    return narrowed, states.new_empty(states.numel() // states.shape[-1] if narrow else 0, dtype=torch.float32)


# --- the kernels' arguments


def _row_tile(width: int, limits: dict[str, int], columns: str = "WIDTH") -> dict[str, int]:
    """Whole rows, as many as fit; `columns` is what the kernel calls the power of two that they fit in.

    As many threads as there can be have 64 registers each, which hold 8 elements: rows of more have half as many.
    """
    padded = _padded(width)
    rows = max(1, limits["elements"] // padded)
    most = _MOST_WARPS if rows * padded <= 8 * 1024 else 16
    warps = min(most, max(limits.get("warps", 1), rows * padded // limits["warp_elements"]))
    return {"D": width, columns: padded, "ROWS": rows, "num_warps": warps}


def _padded(width: int) -> int:
    """The power of two that it fits in."""
    return 1 << (width - 1).bit_length()


def _dropout_arguments(dropout: float) -> tuple[int, float]:
    """See `attention_triton._flags`, and by what is multiplied that is kept."""
    dropped = realized_dropout(dropout)
    return (0x80 - round(dropped * 256)) * 0x01010101, 1 / (1 - dropped)


def _takes_assembly(states: Tensor) -> bool:
    return states.is_cuda and torch.version.hip is None
