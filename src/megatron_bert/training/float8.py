"""Products of the layers in 8-bit floating point, by torchao: operands are scaled and rounded at each product (one
scale a tensor; Micikevicius et al. 2022, arXiv 2209.05433), activations and weights to e4m3, gradients to e5m2.

Weights, their gradients and the optimizer stay float32; embeddings, norms, attention and heads what bfloat16 has them.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bert.errors import UserError

__all__ = ["check_float8", "convert_layers", "float8_refusal", "fuse_float8_projections"]

_MULTIPLE = 16  # of what the hardware's product takes as inner and outer dimensions


def check_float8(device: torch.device) -> None:
    """Raises `UserError` where `device` does not multiply 8-bit numbers, or torchao is not there."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    refusal = float8_refusal(capability, has_torchao=importlib.util.find_spec("torchao") is not None)
    if refusal:
        raise UserError(refusal)


def float8_refusal(capability: tuple[int, int] | None, *, has_torchao: bool) -> str | None:
    """Why nothing can be trained in float8 on a GPU of this compute capability (None: a CPU); None where it can."""
    if capability is None or capability < (8, 9):
        here = "this is a CPU" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        return (
            "training.precision float8 needs a GPU of compute capability 8.9 or more (H100, L40S), and "
            f"{here}: use bfloat16"
        )
    if not has_torchao:
        return "training.precision float8 needs torchao: pip install 'megatron-bert[fp8]', or use bfloat16"
    return None


def convert_layers(model: Any, *, pads: bool, emulate: bool = False) -> None:
    """Has the linear layers of the model's layers compute in float8. Parameters stay the same, by the same names.

    Args:
        pads: whether the number of tokens may be something else than a multiple of 16, to which it is then filled up.
        emulate: compute what the hardware would, on any device; for tests.

    Raises:
        UserError: the layers' widths are not multiples of 16.
    """
    linears = [
        (name, module) for name, module in model.bert.encoder.layer.named_modules() if isinstance(module, nn.Linear)
    ]
    for name, module in linears:
        if module.in_features % _MULTIPLE or module.out_features % _MULTIPLE:
            raise UserError(
                f"training.precision float8 needs widths that are multiples of {_MULTIPLE}, and layer {name} is "
                f"{module.in_features} x {module.out_features}: use bfloat16"
            )
    with _quiet_import():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415
    convert_to_float8_training(model.bert.encoder.layer, config=Float8LinearConfig(pad_inner_dim=pads, emulate=emulate))


def fuse_float8_projections(model: Any) -> None:
    """As `execution.fuse_projections`, of converted layers: one scale for the three weights, which are of a kind."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args  # noqa: PLC0415

    def projections(self: Any, hidden_states: Tensor) -> tuple[Tensor, ...]:
        parts = (self.query, self.key, self.value)
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):  # which knows nothing of this product
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        product: Tensor = matmul_with_hp_or_float8_args.apply(
            hidden_states, weight.t(), self.query.linear_mm_config, self.query.config
        )
        return (product + bias.to(product.dtype)).chunk(3, dim=-1)

    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.projections = MethodType(projections, attention)


@contextmanager
def _quiet_import() -> Iterator[None]:
    """torchao logs each of its own libraries that it cannot load; none of them is needed here.

    Raises:
        UserError: it does not go with this PyTorch.
    """
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        message = f"training.precision float8: torchao does not go with PyTorch {torch.__version__}: {error}"
        raise UserError(message) from error
    finally:
        logger.setLevel(level)
