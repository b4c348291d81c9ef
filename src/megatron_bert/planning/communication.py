"""Bytes that a step's collectives move, by kind.

Tensor parallelism: arXiv 1909.08053, section 3. Sequence parallelism: arXiv 2205.05198, section 4.2.2. Fully sharded
data parallelism: Rajbhandari et al. 2019 (arXiv 1910.02054, section 7), stage 3. T tokens and M predicted positions of
a micro-batch, h hidden; activations and their gradients travel in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.parameters import (
    layer_parameters,
    outer_parameters,
    sequence_parameters,
)

__all__ = [
    "Axis",
    "Collective",
    "Kind",
    "collectives_of_step",
    "layer_collectives",
    "replica_collectives",
    "sharding_collectives",
    "tensor_collectives",
]

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
Axis = Literal["tensor", "shard", "replicate", "all"]

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Collective:
    """Several equal ones.

    Attributes:
        axis: the ranks that take part.
        num_bytes: of the whole tensor: what is reduced, or the gathered result.
        count: in one step.
    """

    kind: Kind
    axis: Axis
    ranks: int
    num_bytes: int
    count: int = 1

    @property
    def sent_bytes(self) -> float:
        """By each rank and all of `count`, in a ring, which sends the least that is possible: (n - 1) / n of the tensor
        for a gathering or a scattering sum, and both for an all-reduce (Patarasuk and Yuan 2009, J. Parallel Distrib.
        Comput. 69(2), section 3).
        """
        share = (self.ranks - 1) / self.ranks
        return self.count * self.num_bytes * share * (2 if self.kind == "all-reduce" else 1)


def tensor_collectives(job: Job, layout: Layout) -> list[Collective]:
    """Between tensor-parallel ranks: for the layers of one micro-batch, the embedding, the head and the loss."""
    config, ranks = job.config, layout.tensor
    if ranks == 1:
        return []
    num_bytes, predicted = _state_bytes(job, layout), layout.micro_predicted(job)
    embedding_bytes = num_bytes * (1 if layout.fully_sharded else 2)  # of the weights' number type: float32 twice
    # Sequence parallelism gathers once more, after the last layer and back before the first.
    around = [Collective("all-gather", "tensor", ranks, num_bytes, 2)] if layout.sequence_parallel else []
    return [
        Collective("all-reduce", "tensor", ranks, embedding_bytes),
        *layer_collectives(job, layout),
        *around,
        Collective("all-reduce", "tensor", ranks, predicted * config.hidden_size * _BF16),  # the head's backward pass
        Collective("all-reduce", "tensor", ranks, predicted * _FP32),  # highest logit
        Collective("all-reduce", "tensor", ranks, 3 * predicted * _FP32),  # sum, target's logit, whether it was beaten
    ]


def layer_collectives(job: Job, layout: Layout) -> list[Collective]:
    """Of one micro-batch: two all-reduces a layer and direction (arXiv 1909.08053, figure 4), or as many all-gathers
    and reduce-scatters each; recomputation repeats the forward pass's.
    """
    passes = 3 if layout.recompute == "full" else 2
    count, num_bytes = 2 * passes * job.config.num_hidden_layers, _state_bytes(job, layout)
    kinds: tuple[Kind, ...] = ("all-gather", "reduce-scatter") if layout.sequence_parallel else ("all-reduce",)
    return [Collective(kind, "tensor", layout.tensor, num_bytes, count) for kind in kinds]


def _state_bytes(job: Job, layout: Layout) -> int:
    return layout.micro_tokens(job) * job.config.hidden_size * _BF16


def sharding_collectives(job: Job, layout: Layout) -> list[Collective]:
    """Between data-parallel ranks, for one micro-batch: weights gathered in bfloat16, a layer's in both passes, or once
    where layers are kept, and the rest once; gradients summed in float32, over `shard` by reduce-scatter and over
    `replicate` by all-reduce.
    """
    if not layout.fully_sharded:  # see `replica_collectives`
        return []
    layers = job.config.num_hidden_layers
    layer = layer_parameters(job.config, layout.tensor)
    outer = outer_parameters(job.config, layout.tensor)
    found = [
        Collective("all-gather", "shard", layout.shard, layer * _BF16, layers if layout.keep_layers else 2 * layers),
        Collective("all-gather", "shard", layout.shard, outer * _BF16),
        Collective("reduce-scatter", "shard", layout.shard, layer * _FP32, layers),
        Collective("reduce-scatter", "shard", layout.shard, outer * _FP32),
    ]
    if layout.replicate > 1:
        found += [
            Collective("all-reduce", "replicate", layout.replicate, -(-layer // layout.shard) * _FP32, layers),
            Collective("all-reduce", "replicate", layout.replicate, -(-outer // layout.shard) * _FP32),
        ]
    return found


def replica_collectives(job: Job, layout: Layout) -> list[Collective]:
    """Between data-parallel ranks that share no weights, once a step: all gradients, summed in float32."""
    if layout.fully_sharded or layout.replicate == 1:
        return []
    layer, outer = layer_parameters(job.config, layout.tensor), outer_parameters(job.config, layout.tensor)
    return [
        Collective("all-reduce", "replicate", layout.replicate, layer * _FP32, job.config.num_hidden_layers),
        Collective("all-reduce", "replicate", layout.replicate, outer * _FP32),
    ]


def collectives_of_step(job: Job, layout: Layout) -> list[Collective]:
    """All of one optimizer step: every micro-batch's, the sequence-parallel gradients and the gradient's norm."""
    passes = layout.micro_batches(job)
    found = [
        replace(one, count=one.count * passes)
        for one in (*tensor_collectives(job, layout), *sharding_collectives(job, layout))
    ]
    if layout.sequence_parallel:
        num_bytes = sequence_parameters(job.config) // layout.shard * _FP32
        found.append(Collective("all-reduce", "tensor", layout.tensor, num_bytes))
    found += replica_collectives(job, layout)
    if layout.gpus > 1:
        found.append(Collective("all-reduce", "all", layout.gpus, _FP32))
    return found
