"""Sums of gradients over the ranks that have a part of them each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.region import local_part
from megatron_bert.sharding import on_sequence_shards

__all__ = ["SENT_ALONE_BYTES", "completed_gradients", "gradient_norm"]

SENT_ALONE_BYTES = 1 << 18
"""Gradients of this size are summed one by one, as soon as they are there: nearly all bytes are in such. The others'
messages would take their time to start and little more: they are put together in one.
"""


@contextmanager
def completed_gradients(model: nn.Module, mesh: ParallelMesh) -> Iterator[None]:
    """Around a step's last backward pass, or after it: at the end of the block, gradients are those of all samples.

    Under sequence parallelism they are summed over tensor-parallel ranks, for the weights that each used on its own
    tokens only; for replicas that share no weights, over them, for all weights. (Fully sharded ones have done so by
    themselves.) Replicas' sums run beside the backward pass, each from when its gradient is complete (Li et al. 2020,
    arXiv 2006.15704, section 3.2), in an order that is the same on every rank.
    """
    if mesh.is_replicated:
        group = mesh.device_mesh["replicate"].get_group()
        with _summed_beside(group, [one for one in model.parameters() if one.requires_grad]):
            yield
    else:
        yield
    if mesh.sequence_parallel:
        of_parts = [one for name, one in model.named_parameters() if on_sequence_shards(name)]
        _sum_together(mesh.tensor.get_group(), of_parts)


@contextmanager
def _summed_beside(group: dist.ProcessGroup, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    large = [one for one in parameters if local_part(one).nbytes >= SENT_ALONE_BYTES]
    unsent, complete, works = list(large), set[Tensor](), list[Any]()

    def send(parameter: Tensor) -> None:
        works.append(dist.all_reduce(local_part(parameter.grad), group=group, async_op=True))

    def completed(parameter: Tensor) -> None:
        complete.add(parameter)
        while unsent and unsent[-1] in complete:  # the model's last ones come first
            send(unsent.pop())

    hooks = [one.register_post_accumulate_grad_hook(completed) for one in large]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for parameter in reversed(unsent):
        if parameter.grad is not None:
            send(parameter)
    sent = set(large)
    _sum_together(group, [one for one in parameters if one not in sent])
    for work in works:
        work.wait()


@torch.no_grad()
def _sum_together(group: dist.ProcessGroup, parameters: Iterable[nn.Parameter]) -> None:
    """Sums their gradients, all of one number type, in one message."""
    parts = [local_part(one.grad) for one in parameters if one.grad is not None]
    if parts:
        together = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(together, group=group)
        sums = together.split([part.numel() for part in parts])
        torch._foreach_copy_(parts, [one.view_as(part) for one, part in zip(sums, parts, strict=True)])


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
