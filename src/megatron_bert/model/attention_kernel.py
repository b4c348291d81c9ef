"""Attention of packed rows for training on Hopper GPUs: one operator for the fused queries, keys and values.

T packed tokens, N heads, H head dimension. The kernels (`attention_triton`) need Triton, which is optional, and so is
all of this: see `applies`.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["applies", "joined", "packed_attention", "realized_dropout"]

_HEAD_SIZE = 64
_LONGEST = 2**16  # positions of the random numbers' counter: 2 ** 16 pairs, and then some
# Tiles (queries, keys), warps and stages: the fastest of those tried on an H100 at 64 x 512 tokens and 16 heads.
# Registers are bounded where a causal mask would cost a program on each multiprocessor.
_FORWARD = {"M": 128, "N": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
_GRAD_QUERY = {"M": 64, "N": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
_GRAD_KEY_VALUE = {"M": 32, "N": 64, "num_warps": 4, "num_stages": 3}


def applies(query: Tensor, max_length: int, dropout: float) -> bool:
    """Whether the kernel takes these queries (..., H): training, 16 bits, heads of 64, a Hopper GPU with Triton."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == _HEAD_SIZE
        and max_length <= _LONGEST
        and (dropout == 0.0 or 1 <= _dropped_of_256(dropout) <= 128)
        and torch.is_grad_enabled()
        and query.requires_grad
        and _device_has_kernel(query.device.index)
    )


@torch.compiler.assume_constant_result
def _device_has_kernel(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9 and importlib.util.find_spec("triton") is not None


def realized_dropout(dropout: float) -> float:
    """The share that is dropped where `dropout` is asked for: the nearest multiple of 1/256."""
    return _dropped_of_256(dropout) / 256


def _dropped_of_256(dropout: float) -> int:
    return round(dropout * 256)


@torch.compiler.allow_in_graph  # Dynamo does not know where a view begins; the tracer under it does
def joined(query_TNH: Tensor, key_TNH: Tensor, value_TNH: Tensor) -> Tensor:
    """Queries, keys and values as one (T, 3, N, H): without a copy where they are thirds of one product's result."""
    tokens, heads, size = query_TNH.shape
    base = query_TNH._base
    parts = (query_TNH, key_TNH, value_TNH)
    if (
        base is not None
        and all(part._base is base for part in parts)
        and base.is_contiguous()
        and base.numel() == 3 * query_TNH.numel()
        and all(part.stride() == (3 * heads * size, size, 1) for part in parts)
        and all(
            part.storage_offset() == base.storage_offset() + third * heads * size for third, part in enumerate(parts)
        )
    ):
        return base.view(tokens, 3, heads, size)
    return torch.stack(parts, dim=1)


def packed_attention(
    qkv_T3NH: Tensor, cu_seq_lens: Tensor, max_length: int, is_causal: bool, scaling: float, dropout: float
) -> Tensor:
    """softmax(q k^T * scaling) v of each sequence with itself, (T, N, H); its gradient is one (T, 3, N, H).

    Dropout is that of `realized_dropout`; its random numbers follow from one that is drawn from the device's generator.

    Args:
        cu_seq_lens: int32 [n + 1], the boundaries of the sequences, which have all T tokens; some may be empty.
        max_length: no sequence is longer.
    """
    seed = torch.randint(2**62, (1,), device=qkv_T3NH.device) if dropout > 0.0 else None
    context: Tensor = _forward(qkv_T3NH, cu_seq_lens, seed, max_length, is_causal, scaling, dropout)[0]
    return context


@torch.library.custom_op("megatron_bert::packed_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    cu_seq_lens: Tensor,
    seed: Tensor | None,
    max_length: int,
    is_causal: bool,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    from megatron_bert.model import attention_triton  # noqa: PLC0415

    context, lse = _forward_results(qkv, cu_seq_lens)
    qkv = qkv.contiguous()
    dropped = realized_dropout(dropout)
    attention_triton.forward[_grid(qkv, cu_seq_lens, max_length, _FORWARD["M"])](
        *qkv.unbind(1), context, lse, cu_seq_lens, cu_seq_lens if seed is None else seed, qkv.stride(0), lse.stride(0),
        scaling * math.log2(math.e), _addend(dropout), 1 / (1 - dropped),
        H=qkv.shape[-1], CAUSAL=is_causal, DROP=dropout > 0.0, PACKED=qkv.is_cuda, **_FORWARD,
    )  # fmt: skip
    return context, lse


@torch.library.custom_op("megatron_bert::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    context: Tensor,
    lse: Tensor,
    cu_seq_lens: Tensor,
    seed: Tensor | None,
    max_length: int,
    is_causal: bool,
    scaling: float,
    dropout: float,
) -> Tensor:
    from megatron_bert.model import attention_triton  # noqa: PLC0415

    qkv, grad = qkv.contiguous(), grad.contiguous()
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    query, key, value = qkv.unbind(1)
    grad_query, grad_key, grad_value = grad_qkv.unbind(1)
    keep = 1 - realized_dropout(dropout)
    factor = scaling / keep / (attention_triton.LIFT.value if qkv.dtype == torch.float16 else 1.0)
    common = (
        cu_seq_lens, cu_seq_lens if seed is None else seed, qkv.stride(0), lse.stride(0), scaling * math.log2(math.e),
        _addend(dropout),
    )  # fmt: skip
    options: dict[str, Any] = {"H": qkv.shape[-1], "CAUSAL": is_causal, "DROP": dropout > 0.0, "PACKED": qkv.is_cuda}
    attention_triton.grad_query[_grid(qkv, cu_seq_lens, max_length, _GRAD_QUERY["M"])](
        query, key, value, context, grad, lse, delta, grad_query, *common, keep, factor,
        **options, **_GRAD_QUERY,
    )  # fmt: skip
    attention_triton.grad_key_value[_grid(qkv, cu_seq_lens, max_length, _GRAD_KEY_VALUE["N"])](
        query, key, value, grad, lse, delta, grad_key, grad_value, *common, 1 / keep, factor,
        **options, **_GRAD_KEY_VALUE,
    )  # fmt: skip
    return grad_qkv


def _grid(qkv: Tensor, cu_seq_lens: Tensor, max_length: int, tile: int) -> tuple[int, int, int]:
    """A program for every tile that a sequence may have; those of one head, which share keys and values, together."""
    return -(-max_length // tile), qkv.shape[2], len(cu_seq_lens) - 1


def _addend(dropout: float) -> int:
    """See `_flags` of the kernels."""
    return (0x80 - _dropped_of_256(dropout)) * 0x01010101


@_forward.register_fake
def _forward_results(qkv: Tensor, cu_seq_lens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Room for the context (T, N, H), and for the statistics of rows, a float32 each, with a reserve a sequence."""
    tokens, _three, heads, size = qkv.shape
    room = (tokens + 132 * (len(cu_seq_lens) - 1) + 15) // 16 * 16
    return qkv.new_empty(tokens, heads, size), qkv.new_empty(heads, room, dtype=torch.float32)


@_backward.register_fake
def _grad_room(grad: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seq_lens, seed, *ctx.settings = inputs
    ctx.save_for_backward(qkv, *output, cu_seq_lens, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    return _backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


_forward.register_autograd(_differentiate, setup_context=_save)
