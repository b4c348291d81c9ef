"""What is left to do with gradients after the last backward pass of a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.region import local_part
from megatron_bert.sharding import on_sequence_shards

__all__ = ["BUCKET_BYTES", "complete_gradients", "gradient_norm"]

BUCKET_BYTES = 1 << 28
"""Of gradients that are summed in one message: large enough for a link's full speed, small beside the gradients."""


@torch.no_grad()
def complete_gradients(model: nn.Module, mesh: ParallelMesh) -> None:
    """Sums gradients over the ranks that have a part of them each. To be called once a step, after its last backward
    pass and before anything looks at gradients.

    Under sequence parallelism that is over tensor-parallel ranks, for the weights that each used on its own tokens
    only; for replicas that share no weights, over them, for all weights. (Fully sharded ones have done so by
    themselves.)
    """
    gradients = {
        name: local_part(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    if mesh.sequence_parallel:
        of_parts = [gradient for name, gradient in gradients.items() if on_sequence_shards(name)]
        _sum_over(mesh.tensor.get_group(), of_parts)
    if mesh.data_degree > 1 and not mesh.is_sharded:
        _sum_over(mesh.device_mesh["replicate"].get_group(), list(gradients.values()))


def _sum_over(group: dist.ProcessGroup, parts: Sequence[Tensor]) -> None:
    """Sums each of `parts`, all of one number type, over the ranks of the group, in place."""
    for bucket in _buckets(parts):
        together = torch.cat([part.flatten() for part in bucket])
        dist.all_reduce(together, group=group)
        sums = torch.split(together, [part.numel() for part in bucket])
        torch._foreach_copy_(bucket, [one.view_as(part) for one, part in zip(sums, bucket, strict=True)])


def _buckets(parts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of at most BUCKET_BYTES, or of one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for part in parts:
        if bucket and size + part.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(part)
        size += part.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients of all ranks together, each element counted once: 0-dimensional, the same on every
    rank of the default process group. A rank that none of a gradient's meshes knows has a copy of it. One all-reduce of
    one number.
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
    ranks = dist.get_world_size()
    if not isinstance(gradient, DTensor):
        return ranks
    mesh, placements = gradient.device_mesh, gradient.placements
    return ranks // prod(mesh.size(axis) for axis, place in enumerate(placements) if not place.is_replicate())
