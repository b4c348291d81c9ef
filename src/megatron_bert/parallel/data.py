"""Data parallelism with weights, gradients and optimizer states split over the ranks: PyTorch's FSDP2.

Gradients are summed over ranks, not averaged: the loss is divided by the global number of its terms (see
`training/objective.py`), so that how samples are dealt to ranks never changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from megatron_bert.parallel.mesh import ParallelMesh

__all__ = ["apply_fully_sharded", "call_within"]

Result = TypeVar("Result")


def apply_fully_sharded(
    model: Any, mesh: ParallelMesh, *, parameter_dtype: torch.dtype | None = None, keeps_layers: bool = False
) -> None:
    """Splits each layer's parameters over `mesh.sharding`, and the rest together; each is put together when it is used.

    Comes last of all that is put onto a model, and before its optimizer is made. The model is then run through
    `call_within`, or its own forward.

    Args:
        parameter_dtype: what the parts are put together in, and computed with; the parts themselves, and the sums of
            gradients, stay what they are.
        keeps_layers: whether layers stay whole between the forward and the backward pass (more memory, less traffic).
    """
    precision = MixedPrecisionPolicy(param_dtype=parameter_dtype, reduce_dtype=torch.float32)
    outer = replace(precision, cast_forward_inputs=False)  # targets of regression stay what they are
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh.sharding, mp_policy=precision, reshard_after_forward=not keeps_layers)
    fully_shard(model, mesh=mesh.sharding, mp_policy=outer, reshard_after_forward=False)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.call = MethodType(_call, model)
    register_fsdp_forward_method(model, "call")


def call_within(model: Any, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, which uses `model` in other ways than by calling it as a whole.

    A backward pass takes apart again what the forward pass has put together. Where none follows, that is done here: a
    step may be a recording, which changes the parts only, and the next evaluation would use the old whole.
    """
    if not isinstance(model, FSDPModule):
        return function(*args)
    entered: Any = model
    result: Result = entered.call(function, *args)
    if not torch.is_grad_enabled():
        for module in _sharded(model):
            module.reshard()
    return result


def _sharded(model: Any) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _call(self: Any, function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
