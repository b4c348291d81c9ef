"""The ranks of a run as a grid: tensor-parallel inside, data-parallel around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_bert.errors import UserError
from megatron_bert.parallel.region import TensorRegion
from megatron_bert.parallel.streams import key

__all__ = ["ParallelMesh"]

_DIMS = ("replicate", "shard", "tensor")


@dataclass(frozen=True)
class ParallelMesh:
    """Replicas x shards x tensor ranks. Neighbouring ranks are of one tensor-parallel group: it talks most, and should
    lie within a node.

    Attributes:
        device_mesh: of the dimensions `replicate`, `shard` and `tensor`. `replicate` x `shard` are data-parallel:
            weights, gradients and optimizer states are split over `shard` and are the same over `replicate`.
        sequence_parallel, overlap: see `TensorRegion`.
    """

    device_mesh: DeviceMesh
    sequence_parallel: bool = False
    overlap: bool = False

    @classmethod
    def of(
        cls,
        *,
        device_type: str,
        tensor: int = 1,
        replicate: int = 1,
        sequence_parallel: bool = False,
        overlap: bool = False,
    ) -> ParallelMesh:
        """All ranks of the initialised default process group; `shard` takes those that the others leave.

        Raises:
            UserError: the numbers do not multiply to the number of ranks, or sequence parallelism is asked of one rank.
        """
        if sequence_parallel and tensor == 1:
            raise UserError("sequence parallelism splits a sequence over the ranks of a tensor-parallel group: with a "
                            "tensor-parallel degree of 1, leave it out")  # fmt: skip
        ranks = dist.get_world_size()
        shard, rest = divmod(ranks, tensor * replicate)
        if rest or not shard:
            raise UserError(
                f"{ranks} processes cannot be split into tensor-parallel groups of {tensor}"
                + (f" in {replicate} replicas" if replicate > 1 else "")
                + f": start a multiple of {tensor * replicate}"
            )
        grid = init_device_mesh(device_type, (replicate, shard, tensor), mesh_dim_names=_DIMS)
        return cls(grid, sequence_parallel, overlap)

    @cached_property
    def tensor(self) -> DeviceMesh:
        """This rank's tensor-parallel group."""
        return self.device_mesh["tensor"]

    @cached_property
    def region(self) -> TensorRegion:
        """That group as a layer sees it."""
        return TensorRegion(self.tensor, self.sequence_parallel, self.overlap)

    @cached_property
    def sharding(self) -> DeviceMesh:
        """The data-parallel ranks as `fully_shard` takes them: `shard`, or `replicate` x `shard`."""
        return self.device_mesh["replicate", "shard"] if self.device_mesh.size(0) > 1 else self.device_mesh["shard"]

    @cached_property
    def data(self) -> DeviceMesh:
        """The data-parallel ranks in one dimension."""
        return self.device_mesh["replicate", "shard"]._flatten("data")

    @property
    def is_sharded(self) -> bool:
        """Whether data-parallel ranks share weights and states."""
        return self.device_mesh.size(1) > 1

    @property
    def is_replicated(self) -> bool:
        """Whether there are several data-parallel ranks and each has its own weights and states."""
        return self.data_degree > 1 and not self.is_sharded

    @property
    def tensor_degree(self) -> int:
        """Ranks that share one sample."""
        return self.tensor.size()

    @property
    def data_degree(self) -> int:
        """Groups of ranks that have samples of their own."""
        return self.device_mesh.size(0) * self.device_mesh.size(1)

    @property
    def data_rank(self) -> int:
        """Which of those groups this rank is in."""
        return self.data.get_local_rank()

    def stream_seed(self, seed: int) -> int:
        """What to seed this rank's random stream with: the same within a tensor-parallel group, different between."""
        return key(seed, self.data_rank)
