"""The order in which a model is made parallel. One function, so that there is one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_bert.parallel.data import apply_fully_sharded
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.tensor import apply_tensor_parallel

__all__ = ["parallelize"]


def parallelize(
    model: Any,
    mesh: ParallelMesh,
    *,
    prepare_layers: Callable[[Any], None] | None = None,
    gathers_logits: bool = False,
    parameter_dtype: torch.dtype | None = None,
    keeps_layers: bool = False,
) -> None:
    """Spreads `model`, the same on every rank or on the meta device, over the ranks of `mesh`, in place:

    1. Tensor and sequence parallelism first: it changes what a layer computes, and all else wraps that.
    2. `prepare_layers(model)`: recomputation, then compilation. A compiler has to see the collectives, to overlap them,
       and a recomputed layer has to send again what it computes again.
    3. Fully sharded data parallelism last: its hooks put a layer's weights together before all of the above runs, also
       when it is run again in the backward pass, and they would break a compiler's graph. Replicas that share nothing
       need none: `completed_gradients` sums their gradients, once a step.

    Then come memory and values for a model on the meta device (`materialize`, and `initialize` or
    `checkpoint.shards.load_shards`), and then its optimizer. A step's last backward pass is within
    `completed_gradients`.

    Args:
        gathers_logits: see `apply_tensor_parallel`.
        parameter_dtype, keeps_layers: see `apply_fully_sharded`.

    Raises:
        UserError: the model's shape cannot be split so.
    """
    if mesh.tensor_degree > 1:
        apply_tensor_parallel(model, mesh.region, gathers_logits=gathers_logits)
    if prepare_layers is not None:
        prepare_layers(model)
    if mesh.is_sharded:
        apply_fully_sharded(model, mesh, parameter_dtype=parameter_dtype, keeps_layers=keeps_layers)
