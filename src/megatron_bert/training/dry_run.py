"""The real step of the real model with tensors that have no values, for any number of ranks, in one process.

The process group is PyTorch's fake one, of which this process is rank 0; nothing is sent and nothing computed. What can
be seen so: that shapes and placements fit, which collectives a rank takes part in, and how much memory it needs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bert.model import MegatronBertForPreTraining, attention, layers, linear
from megatron_bert.parallel.tensor import apply_tensor_parallel
from megatron_bert.parallel.data import apply_fully_sharded, call_within
from megatron_bert.parallel.gradients import gradient_norm, sum_sequence_gradients
from megatron_bert.parallel.loss import token_losses_on
from megatron_bert.parallel.materialize import materialize
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.region import TensorRegion
from megatron_bert.planning.communication import Collective
from megatron_bert.planning.counting import CollectiveCounter, MemoryCounter
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.execution import build_objective, fuse_projections
from megatron_bert.training.microbatch import MicroBatch
from megatron_bert.training.objective import Objective, mean_loss
from megatron_bert.training.optimizer import build_optimizer

__all__ = ["DryRun", "dry_run"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class DryRun:
    """What rank 0 saw in one step.

    Attributes:
        parameters: that it holds.
        peak_bytes: the most that tensors took.
        state_bytes: weights and optimizer states, between steps.
        collectives: equal ones together.
        seconds: that the dry run took.
    """

    parameters: int
    peak_bytes: int
    state_bytes: int
    collectives: list[Collective]
    seconds: float


def dry_run(job: Job, layout: Layout) -> DryRun:
    """Two steps, of which the second is counted: the first makes the optimizer's states.

    Raises:
        UserError: the shape cannot be split so.
    """
    before = time.perf_counter()
    with _fake_ranks(layout.gpus), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        mesh = ParallelMesh.of(device_type="cpu", tensor=layout.tensor, replicate=layout.replicate)
        region = TensorRegion(mesh.tensor, layout.sequence_parallel)
        objective = _objective(job, layout, mesh, region)
        batch = _batch(job, layout)
        axes = {dist.distributed_c10d._get_default_group().group_name: "all"}
        axes |= {mesh.device_mesh[axis].get_group().group_name: axis for axis in ("replicate", "shard", "tensor")
                 if mesh.device_mesh[axis].size() > 1}  # fmt: skip
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryCounter() as memory:
            materialize(objective.model, _CPU)
            optimizer = build_optimizer(objective.model, OptimizerSection(learning_rate=1e-4))
            _step(objective, optimizer, batch, layout.micro_batches(job), region)
            memory.restart_peak()
            state_bytes = memory.live_bytes
            with CollectiveCounter(axes) as counter:
                _step(objective, optimizer, batch, layout.micro_batches(job), region)
        parameters = sum(_local(parameter).numel() for parameter in objective.model.parameters())
    seconds = time.perf_counter() - before
    return DryRun(parameters, memory.peak_bytes, state_bytes, counter.collectives(), seconds)


@contextmanager
def _fake_ranks(number: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _objective(job: Job, layout: Layout, mesh: ParallelMesh, region: TensorRegion) -> Objective:
    """The model on the meta device, spread and prepared as a run's."""
    with torch.device("meta"):
        model = MegatronBertForPreTraining(job.config).train()
    if layout.tensor > 1:
        apply_tensor_parallel(model, region, gathers_logits=False)
    _keep_what_a_gpu_keeps(model)
    objective = build_objective(
        model, _CPU, precision="bfloat16", rows=layout.micro_rows, row_tokens=job.row_tokens, recompute=layout.recompute
    )
    fuse_projections(model)
    if layout.tensor > 1:
        objective.token_losses = token_losses_on(region)
    if layout.fully_sharded:
        apply_fully_sharded(model, mesh, parameter_dtype=torch.bfloat16)
    return objective


def _keep_what_a_gpu_keeps(model: nn.Module) -> None:
    """A GPU's dropout keeps a mask of one byte an element; a CPU's keeps one as wide as its input."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = MethodType(_fused_dropout, module)  # type: ignore[method-assign]


def _fused_dropout(self: Any, states: Tensor) -> Tensor:
    return torch.native_dropout(states, self.p, self.training)[0]


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Takes the paths that a GPU takes, which fake tensors of any device can go: the variable-length attention kernel,
    and products in the number type of their operands.
    """
    originals = layers.packed_attention, linear.cpu_multiplies

    def packed_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Any, *, implementation: str,
        is_causal: bool, scaling: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        return attention._varlen_attention(query, key, value, layout, is_causal, scaling, dropout)

    layers.packed_attention, linear.cpu_multiplies = packed_attention, lambda dtype: True  # type: ignore[assignment]
    try:
        yield
    finally:
        layers.packed_attention, linear.cpu_multiplies = originals


def _batch(job: Job, layout: Layout) -> MicroBatch:
    """Full packed rows, a sequence each, with predicted positions spread evenly."""
    rows, columns = layout.micro_rows, job.row_tokens
    ids, predicted = torch.zeros(rows * columns, dtype=torch.long), layout.micro_predicted(job)
    labels = torch.full_like(ids, -100)
    labels[torch.arange(predicted) * len(ids) // max(predicted, 1)] = 1
    return MicroBatch.of(
        {
            "input_ids": ids.view(rows, columns),
            "token_type_ids": ids.view(rows, columns),
            "position_ids": torch.arange(columns).expand(rows, columns).contiguous(),
            "labels": labels.view(rows, columns),
            "cu_seq_lens": (torch.arange(rows + 1) * columns).int(),
            "next_sentence_label": torch.zeros(rows, dtype=torch.long),
        }
    )


def _step(
    objective: Objective, optimizer: torch.optim.Optimizer, batch: MicroBatch, micro_batches: int, region: TensorRegion
) -> None:
    """A step of `micro_batches` micro-batches."""
    with _as_on_a_gpu():
        for _ in range(micro_batches):
            losses = call_within(objective.model, objective, batch)
            mean_loss(losses, batch.num_masked * micro_batches, batch.num_pairs * micro_batches).backward()
            del losses
    sum_sequence_gradients(objective.model, region)
    if dist.get_world_size() > 1:
        gradient_norm(objective.model.parameters())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local
