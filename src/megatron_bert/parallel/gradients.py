"""What is left to do with gradients after the last backward pass of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_bert.parallel.region import TensorRegion, local_part
from megatron_bert.sharding import on_sequence_shards

__all__ = ["gradient_norm", "sum_sequence_gradients"]


@torch.no_grad()
def sum_sequence_gradients(model: nn.Module, region: TensorRegion) -> None:
    """Under sequence parallelism, completes the gradients of the weights that each rank used on its own tokens only,
    in one all-reduce of them all. To be called once a step, before anything looks at gradients.
    """
    if not region.sequence_parallel:
        return
    parts = [
        local_part(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and on_sequence_shards(name)
    ]
    if not parts:
        return
    together = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(together, group=region.mesh.get_group())
    for part, complete in zip(parts, torch.split(together, [part.numel() for part in parts]), strict=True):
        part.copy_(complete.view_as(part))


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients of all ranks together, each element counted once: 0-dimensional, the same on every
    rank of the default process group, which all of them have to be distributed over. One all-reduce of one number.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_copies[_num_copies(parameter.grad)].append(local_part(parameter.grad))
    squares = [nn.utils.get_total_norm(parts).square() / copies for copies, parts in by_copies.items()]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


def _num_copies(gradient: Tensor) -> int:
    """On how many ranks each element of the gradient is."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size()
    mesh, placements = gradient.device_mesh, gradient.placements
    assert mesh.size() == dist.get_world_size(), "a gradient that is not distributed over all ranks"
    return prod(mesh.size(axis) for axis, placement in enumerate(placements) if placement.is_replicate())
