"""What is to be trained, and how it is laid out over GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bert.model import MegatronBertConfig

__all__ = ["Job", "Layout", "Recompute"]

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Job:
    """One optimizer step of pretraining, whatever computes it.

    Attributes:
        batch_rows: rows of the step, over all GPUs; full rows, so that every position is a token.
        predicted_share: of the tokens, those that are predicted: 0.15 masked, or 1 for the next token.
    """

    config: MegatronBertConfig
    gpus: int
    batch_rows: int
    row_tokens: int = 512
    predicted_share: float = 0.15

    @property
    def tokens(self) -> int:
        """Of the step."""
        return self.batch_rows * self.row_tokens


@dataclass(frozen=True)
class Layout:
    """How a job is spread.

    Attributes:
        tensor: tensor-parallel degree: GPUs that share a sample.
        shard: data-parallel GPUs over which weights, gradients and optimizer states are split.
        replicate: groups of them that hold the same.
        overlap: under sequence parallelism, products go on while tokens travel (`parallel.overlap`).
        micro_rows: rows of one forward pass of a tensor-parallel group.
        keep_layers: what was put together of split weights for the forward pass stays so until the backward pass.
    """

    tensor: int = 1
    shard: int = 1
    replicate: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    micro_rows: int = 1
    overlap: bool = False
    keep_layers: bool = False

    @property
    def data(self) -> int:
        """Data-parallel degree."""
        return self.shard * self.replicate

    @property
    def gpus(self) -> int:
        """In all."""
        return self.tensor * self.data

    @property
    def fully_sharded(self) -> bool:
        """Whether FSDP2 runs it. Replicas that share nothing (`shard` 1) only sum their gradients."""
        return self.shard > 1

    def micro_batches(self, job: Job) -> int:
        """Forward passes of a step."""
        return job.batch_rows // (self.data * self.micro_rows)

    def micro_tokens(self, job: Job) -> int:
        """Tokens of one forward pass."""
        return self.micro_rows * job.row_tokens

    def micro_predicted(self, job: Job) -> int:
        """Predicted positions of one forward pass."""
        return round(self.micro_tokens(job) * job.predicted_share)

    def data_parallelism(self) -> str:
        """In words."""
        if self.data == 1:
            return "none"
        if self.shard == 1:
            return f"replicated {self.replicate}"
        groups = f"sharded {self.shard}" + (f" x {self.replicate}" if self.replicate > 1 else "")
        return f"{groups}, kept" if self.keep_layers else groups
