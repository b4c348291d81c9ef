"""Sums of gradients over the ranks that have a part of them each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
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

__all__ = ["BUCKET_BYTES", "completed_gradients", "gradient_norm", "sum_in_place"]

BUCKET_BYTES = 1 << 25
"""Of gradients that are summed in one message: enough for a link's full speed, and few that wait for the last one."""


@contextmanager
def completed_gradients(model: nn.Module, mesh: ParallelMesh) -> Iterator[None]:
    """Around a step's last backward pass, or after it: at the end of the block, gradients are those of all samples.

    Under sequence parallelism they are summed over tensor-parallel ranks, for the weights that each used on its own
    tokens only; for replicas that share no weights, over them, for all weights. (Fully sharded ones have done so by
    themselves.) Replicas' sums run beside the backward pass, a bucket of gradients at a time, as soon as they are there
    (Li et al. 2020, arXiv 2006.15704, section 3.2).
    """
    if mesh.is_replicated:
        with _summed_beside(mesh.device_mesh["replicate"].get_group(), list(model.parameters())):
            yield
    else:
        yield
    if mesh.sequence_parallel:
        of_parts = _gradients(one for name, one in model.named_parameters() if on_sequence_shards(name))
        if of_parts:
            sum_in_place(mesh.tensor.get_group(), of_parts).wait()


@contextmanager
def _summed_beside(group: dist.ProcessGroup, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Sends in one order, the model's last parameters first, so that every rank puts the same into a bucket. What has
    no gradient when the block ends keeps none, and holds back those that come after it until then.
    """
    left = [one for one in parameters if one.requires_grad]
    there, bucket, works = set[Tensor](), list[Tensor](), list[Any]()

    def add(gradients: list[Tensor], *, is_end: bool = False) -> None:
        bucket.extend(gradients)
        if bucket and (is_end or sum(one.nbytes for one in bucket) >= BUCKET_BYTES):
            works.append(sum_in_place(group, bucket))
            bucket.clear()

    def complete(parameter: Tensor) -> None:
        there.add(parameter)
        while left and left[-1] in there:
            add(_gradients([left.pop()]))

    hooks = [one.register_post_accumulate_grad_hook(complete) for one in left]  # type: ignore[no-untyped-call]
    try:
        yield
        while left:
            add(_gradients([left.pop()]))
        add([], is_end=True)
    finally:
        for hook in hooks:
            hook.remove()
        for work in works:  # also where the pass failed: a recording cannot end with what it has not waited for
            work.wait()


def sum_in_place(group: dist.ProcessGroup, tensors: list[Tensor]) -> Any:
    """Sums each, in place and in one message. Returns what to wait for."""
    return group.allreduce_coalesced(tensors)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [local_part(one.grad) for one in parameters if one.grad is not None]


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
