"""What `training.precision: float8` needs: a GPU, layers of a kind, and a way to run them.

The products of the layers are then in 8-bit floating point (`float8_products`). Weights, their gradients and the
optimizer stay float32; embeddings, norms, attention and heads what bfloat16 has them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megatron_bert.errors import UserError
from megatron_bert.training.fused_layers import can_be_fused

__all__ = ["check_device", "check_layers", "device_refusal"]

_MULTIPLE = 16  # of what the hardware's product takes as inner and outer dimensions (cuBLAS, cublasLtMatmul)
_WIDEST = 16384  # a row is in a program's registers


def check_device(device: torch.device) -> None:
    """Raises `UserError` where `device` does not multiply 8-bit numbers by rows, or Triton is not there."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    refusal = device_refusal(capability, has_triton=importlib.util.find_spec("triton") is not None)
    if refusal:
        raise UserError(refusal)


def device_refusal(capability: tuple[int, int] | None, *, has_triton: bool) -> str | None:
    """Why nothing can be trained in float8 on a GPU of this compute capability (None: a CPU); None where it can."""
    if capability is None or capability < (9, 0):
        here = "this is a CPU" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        return (
            f"training.precision float8 needs a GPU of compute capability 9.0 or more (H100), and {here}: use bfloat16"
        )
    if not has_triton:
        return "training.precision float8 needs Triton: pip install triton, or use bfloat16"
    return None


def check_layers(model: Any, *, is_whole: bool) -> None:
    """Raises `UserError` where the model's layers cannot be walked in float8.

    Args:
        is_whole: each layer runs on one device, with all its weights, and nothing is put around it.
    """
    if not is_whole:
        raise UserError(
            "training.precision float8 needs whole layers, once a pass: set mesh.shard to 1 and leave out "
            "runtime.recompute full, or use bfloat16"
        )
    if not can_be_fused(model):
        raise UserError(
            "training.precision float8 is of plain layers: hidden_act gelu, dropout 0 or 0.004 to 0.5, and no "
            "cross-attention; use bfloat16 for this model"
        )
    hidden, intermediate = model.config.hidden_size, model.config.intermediate_size
    if hidden % _MULTIPLE or intermediate % _MULTIPLE or max(3 * hidden, intermediate) > _WIDEST:
        raise UserError(
            f"training.precision float8 needs widths that are multiples of {_MULTIPLE}, and three times hidden_size "
            f"and intermediate_size up to {_WIDEST}, and here they are {hidden} and {intermediate}: use bfloat16"
        )
