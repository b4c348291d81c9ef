"""The processes that share a run, as the trainer sees them. One process is the simplest case, and sends nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bert.errors import UserError
from megatron_bert.parallel.gradients import completed_gradients, gradient_norm
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.streams import key
from megatron_bert.parallel.watch import Watch
from megatron_bert.training.configuration import MeshSection

__all__ = ["ALONE", "At", "Ranks"]

log = logging.getLogger(__name__)

_PATIENCE = timedelta(days=30)  # a disk may be slow


class At(Protocol):
    """Takes what this process goes on to; see `Watch.at`."""

    def __call__(self, what: str, *, is_slow: bool = False) -> None: ...


@dataclass(frozen=True)
class Ranks:
    """What a step needs to know of the other processes, and says to them.

    Attributes:
        mesh: how they are laid out; None: this process is alone.
    """

    mesh: ParallelMesh | None = None

    @classmethod
    def of(cls, section: MeshSection, device: torch.device, *, fits_whole: bool = False) -> Ranks:
        """All processes that have joined.

        Args:
            fits_whole: weights and states need not be shared, unless the recipe says so.

        Raises:
            UserError: they cannot be laid out as the recipe says.
        """
        num_processes = dist.get_world_size() if dist.is_initialized() else 1
        groups, rest = divmod(num_processes, section.tensor)
        if rest or not groups:
            raise UserError(
                f"mesh.tensor {section.tensor} with {num_processes} process{'es' if num_processes > 1 else ''}: start "
                f"a multiple of {section.tensor} (torchrun --nproc-per-node {section.tensor} -m megatron_bert ...)"
            )
        shard = section.shard or (1 if fits_whole else groups)
        if groups % shard:
            raise UserError(
                f"mesh.shard {section.shard} with {groups} data-parallel ranks ({num_processes} processes, mesh.tensor "
                f"{section.tensor}): their number has to be a multiple of it"
            )
        if not dist.is_initialized():
            return cls()
        return cls(
            ParallelMesh.of(
                device_type=device.type,
                tensor=section.tensor,
                replicate=groups // shard,
                sequence_parallel=section.sequence_parallel,
                overlap=section.overlap,
            )
        )

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one has to: records, the bar, the model's folder."""
        return self.rank == 0

    @property
    def rank(self) -> int:
        """This process among all."""
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def size(self) -> int:
        """All of them."""
        return 1 if self.mesh is None else dist.get_world_size()

    @property
    def data_rank(self) -> int:
        """Which part of a step's samples this process has."""
        return 0 if self.mesh is None else self.mesh.data_rank

    @property
    def data_degree(self) -> int:
        """Parts that a step's samples are dealt out to."""
        return 1 if self.mesh is None else self.mesh.data_degree

    @property
    def layout(self) -> list[int]:
        """The mesh as numbers, for a checkpoint: replicas, shards, tensor-parallel degree, sequence parallelism."""
        if self.mesh is None:
            return [1, 1, 1, 0]
        grid = self.mesh.device_mesh
        return [*(grid.size(axis) for axis in range(grid.ndim)), int(self.mesh.sequence_parallel)]

    def stream_seed(self, *parts: int) -> int:
        """What to seed PyTorch's random stream with; see `parallel.streams`."""
        return key(*parts, self.data_rank)

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum of `values` over the parts of a step, in place; the same on every rank."""
        if self.mesh is not None:
            dist.all_reduce(values, group=self.mesh.data.get_group())
        return values

    def around_last_pass(self, model: nn.Module) -> Callable[[], AbstractContextManager[None]] | None:
        """What a step's last backward pass has to be within, if anything."""
        if self.mesh is None or not (self.mesh.is_replicated or self.mesh.sequence_parallel):
            return None
        return partial(completed_gradients, model, self.mesh)

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """Of all gradients of all ranks together: 0-dimensional, the same on every rank."""
        if self.mesh is not None:
            return gradient_norm(model.parameters())
        return nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])

    @contextmanager
    def watched(self, patience_seconds: float) -> Iterator[At]:
        """Within the block, a process that hangs is named and the run ended; takes what this one goes on to."""
        if self.mesh is None:
            yield _nowhere
            return
        with Watch(patience_seconds, log.critical) as watch:
            yield watch.at

    @contextmanager
    def patient_group(self) -> Iterator[dist.ProcessGroup | None]:
        """A group of all processes for what is at a disk: they wait for each other as long as it takes. Its messages
        never mix with the training's, so that a thread may send them. Who is gone is noticed at once.
        """
        if self.mesh is None:
            yield None
            return
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        try:
            yield group
        finally:
            dist.destroy_process_group(group)


def _nowhere(what: str, *, is_slow: bool = False) -> None:
    pass


ALONE = Ranks()
