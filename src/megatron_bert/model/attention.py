"""Attention kernels: Transformers' attention interface for padded batches, and one function for packed rows.

B batch, S sequence, T packed tokens, N heads, H head dimension. Queries, keys and values arrive as (B, N, S, H).
"""

import logging
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_bert.model import attention_kernel
from megatron_bert.model.packing import PackedLayout

__all__ = ["attention_function", "eager_attention", "packed_attention", "runs_packed", "varlen_refusal"]

log = logging.getLogger(__name__)

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def attention_function(implementation: str) -> AttentionFunction:
    """The function that Transformers' attention interface holds under this name."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(H)) v, with the attention probabilities (B, N, S, S) as second result.

    Takes a boolean mask (True attends), an additive one, or none, which leaves a causal module causal.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    queries, keys = scores.shape[-2:]
    if attention_mask is None and getattr(module, "is_causal", False) and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    context = torch.matmul(probabilities, value)
    return context.transpose(1, 2).contiguous(), probabilities


def runs_packed(implementation: str) -> bool:
    """Whether rows are run packed under this attention implementation (the others get a block-diagonal mask)."""
    return implementation == "sdpa" or "flash" in implementation


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    implementation: str,
    is_causal: bool,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attention of each sequence of a packed row with itself: (1, N, T, H) -> (1, T, N, H).

    CUDA: our kernel for training where it applies, else PyTorch's variable-length kernel (16-bit), or the
    flash-attention library where the model is set to it. CPU: one call a sequence, which no padded call beats.
    Otherwise padded for this step only, which is said once where 16 bits would have done better.
    """
    if "flash" in implementation:
        boundaries, longest = layout.cu_seq_lens, layout.max_length
        context, _ = attention_function(implementation)(
            module,
            query,
            key,
            value,
            None,
            is_causal=is_causal,
            scaling=scaling,
            dropout=dropout,
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=longest,
            max_length_k=longest,
        )
        return context
    if attention_kernel.applies(query, layout.max_length, dropout):
        qkv_T3NH = attention_kernel.joined(*(states.squeeze(0).transpose(0, 1) for states in (query, key, value)))
        context_TNH = attention_kernel.packed_attention(
            qkv_T3NH, layout.cu_seq_lens, layout.max_length, is_causal, scaling, dropout
        )
        return context_TNH.unsqueeze(0)
    is_narrow = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if is_narrow and _has_varlen(query.device.index, query.shape[-1]):
        return _varlen_attention(query, key, value, layout, is_causal, scaling, dropout)
    by_length = _attention_by_sequence if query.device.type == "cpu" else _padded_attention
    return by_length(query, key, value, layout, is_causal, scaling, dropout)


@torch.compiler.assume_constant_result
def _has_varlen(device_index: int | None, head_size: int) -> bool:
    return _asked_for_varlen(device_index, head_size)


@cache
def _asked_for_varlen(device_index: int | None, head_size: int) -> bool:
    """Whether PyTorch's variable-length kernel runs there; says once why not."""
    is_built = bool(torch.backends.cuda.is_flash_attention_available())
    reason = varlen_refusal(torch.cuda.get_device_capability(device_index), head_size, is_built=is_built)
    if reason:
        log.warning("no variable-length attention kernel: %s; attention runs padded, which is slower", reason)
    return reason is None


def varlen_refusal(capability: tuple[int, int], head_size: int, *, is_built: bool) -> str | None:
    """Why PyTorch's variable-length kernel (FlashAttention 2's) does not run on such a GPU; None where it does."""
    if not is_built:
        return f"PyTorch {torch.__version__} is built without FlashAttention"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    if head_size > 256 or head_size % 8:
        return f"heads of {head_size} are not a multiple of 8 up to 256"
    return None


@cache
def _varlen_causal_arguments(is_causal: bool) -> dict[str, Any]:
    """How this release of PyTorch spells causality for its variable-length kernel."""
    if "is_causal" in signature(varlen.varlen_attn).parameters:
        return {"is_causal": is_causal}
    return {"window_size": (-1, 0) if is_causal else (-1, -1)}


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, is_causal: bool, scaling: float, dropout: float
) -> Tensor:
    query_TNH, key_TNH, value_TNH = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    boundaries, longest = layout.cu_seq_lens, layout.max_length
    arguments = (query_TNH, key_TNH, value_TNH, boundaries, boundaries, longest, longest)
    if dropout > 0.0:  # the public function has no dropout; the operator under it has, and a gradient
        operator: Any = torch.ops.aten._flash_attention_forward
        return operator(*arguments, dropout, is_causal, False, scale=scaling)[0].unsqueeze(0)
    context_TNH: Any = varlen.varlen_attn(*arguments, scale=scaling, **_varlen_causal_arguments(is_causal))
    return context_TNH.unsqueeze(0)


# The two below depend on the sequences' lengths: compiled, they would be compiled again for every batch.


@torch.compiler.disable
def _attention_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, is_causal: bool, scaling: float, dropout: float
) -> Tensor:
    """One call of `scaled_dot_product_attention` a sequence."""
    per_sequence = zip(
        *(torch.split(states, list(layout.lengths), dim=2) for states in (query, key, value)), strict=True
    )
    contexts = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal, scale=scaling)
        for q, k, v in per_sequence
    ]
    return torch.cat(contexts, dim=2).transpose(1, 2)


@torch.compiler.disable
def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, is_causal: bool, scaling: float, dropout: float
) -> Tensor:
    """The sequences side by side, padded to the longest, through `scaled_dot_product_attention`."""
    sequences = layout.side_by_side
    query, key, value = (sequences.unpack(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
    mask = layout.side_by_side_mask
    if is_causal:
        mask = mask & torch.ones(2 * [layout.max_length], dtype=torch.bool, device=query.device).tril()
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return sequences.pack(context.transpose(1, 2))
