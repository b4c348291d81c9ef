"""The processes that predict together, each with its part of the model: all run the same code on the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch.distributed as dist

from megatron_bert.errors import UserError
from megatron_bert.inference.device import choose_device
from megatron_bert.parallel.launch import from_first, joined_processes, local_device
from megatron_bert.parallel.mesh import ParallelMesh

__all__ = ["ALONE", "InferenceRanks", "joined_ranks"]

Result = TypeVar("Result")

_TIMEOUT_SECONDS = 1800  # between ranks that read a model at different speeds
_PATIENCE = timedelta(days=30)  # with the first rank, which may itself wait for a person to type


@dataclass(frozen=True)
class InferenceRanks:
    """This process among those that predict together.

    Attributes:
        mesh: all of them, as one tensor-parallel group; None for a process by itself.
        is_first: whether this is the one that reads and prints.
        group: of all of them too, over which the first one hands on what it read.
    """

    mesh: ParallelMesh | None = None
    is_first: bool = True
    group: dist.ProcessGroup | None = None

    def from_first(self, function: Callable[[], Result]) -> Result:
        """See `parallel.launch.from_first`; the others wait as long as it takes."""
        return from_first(function, self.group)

    def stream_from_first(self, items: Iterable[Result]) -> Iterator[Result]:
        """On every rank the items of the first one, which alone goes through its own; each is handed on as it comes.

        Raises:
            SharedError: as `from_first`.
        """
        iterator = iter(items)
        while item := self.from_first(lambda: list(islice(iterator, 1))):
            yield item[0]


ALONE = InferenceRanks()


@contextmanager
def joined_ranks(device: str = "auto") -> Iterator[InferenceRanks]:
    """The processes that `torchrun` started, as one tensor-parallel group, for the time of the block.

    Args:
        device: "cuda" (each process has the GPU of its place on the node), "cpu", or "auto": GPUs where there are any.

    Raises:
        UserError: another device, or fewer GPUs than processes on the node.
        LostProcess: another rank is gone or silent.
    """
    if ":" in device:
        raise UserError(f"--device {device}: several processes cannot share one GPU; with cuda, each takes its own")
    place = local_device(choose_device(device).type)
    with joined_processes(place, _TIMEOUT_SECONDS):
        mesh = ParallelMesh.of(device_type=place.type, tensor=dist.get_world_size())
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        yield InferenceRanks(mesh, dist.get_rank() == 0, patient)
