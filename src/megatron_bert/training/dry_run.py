"""The real step of the real model with tensors that have no values, for any number of ranks, in one process.

The process group is PyTorch's fake one, of which this process is rank 0; nothing is sent and nothing computed. What can
be seen so: that shapes and placements fit, which collectives a rank takes part in, and how much memory it needs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_bert.data.batches import Batch
from megatron_bert.data.masking import IGNORED
from megatron_bert.model import MegatronBertForPreTraining, attention, layers, linear
from megatron_bert.parallel import gradients
from megatron_bert.parallel.data import call_within
from megatron_bert.parallel.gradients import completed_gradients, gradient_norm
from megatron_bert.parallel.materialize import materialize
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.region import local_part
from megatron_bert.planning.communication import Axis
from megatron_bert.planning.counting import CollectiveCounter, DryRun, MemoryCounter
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.ranking import check_layout
from megatron_bert.training.configuration import OptimizerSection
from megatron_bert.training.execution import build_objective, fuse_projections
from megatron_bert.training.microbatch import MicroBatch
from megatron_bert.training.objective import Objective, mean_loss
from megatron_bert.training.optimizer import build_optimizer

__all__ = ["dry_run", "full_rows"]

_CPU = torch.device("cpu")


def dry_run(job: Job, layout: Layout) -> DryRun:
    """One step, after a first one that makes the optimizer's states and fills DTensor's caches, which would count.

    The third micro-batch and those after it, which do what the second does, are counted and not run.

    Raises:
        UserError: the job cannot be laid out so.
    """
    check_layout(job, layout)
    before = time.perf_counter()
    with _fake_ranks(layout.gpus), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of operators that are not meant for tensors without values
        mesh = ParallelMesh.of(
            device_type="cpu",
            tensor=layout.tensor,
            replicate=layout.replicate,
            sequence_parallel=layout.sequence_parallel,
        )
        objective = _objective(job, layout, mesh)
        batch = MicroBatch.of(full_rows(job, layout))
        with FakeTensorMode(allow_non_fake_inputs=True), MemoryCounter() as memory, _as_on_a_gpu():
            materialize(objective.model, _CPU)
            optimizer = build_optimizer(objective.model, OptimizerSection(learning_rate=1e-4))
            _step(objective, optimizer, batch, 1, mesh)
            memory.restart_peak()
            state_bytes = memory.live_bytes
            with CollectiveCounter(_axes(mesh)) as counter:
                _step(objective, optimizer, batch, layout.micro_batches(job), mesh, counter)
        parameters = sum(local_part(parameter).numel() for parameter in objective.model.parameters())
    seconds = time.perf_counter() - before
    return DryRun(parameters, memory.peak_bytes, state_bytes, counter.collectives(), seconds)


def _axes(mesh: ParallelMesh) -> dict[str, Axis]:
    """The mesh's axes by the names of their process groups."""
    axes: dict[str, Axis] = {dist.distributed_c10d._get_default_group().group_name: "all"}
    names: tuple[Axis, ...] = ("replicate", "shard", "tensor")
    return axes | {
        mesh.device_mesh[name].get_group().group_name: name for name in names if mesh.device_mesh[name].size() > 1
    }


@contextmanager
def _fake_ranks(number: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _objective(job: Job, layout: Layout, mesh: ParallelMesh) -> Objective:
    """The model on the meta device, spread and prepared as a run's."""
    with torch.device("meta"):
        model = MegatronBertForPreTraining(job.config).train()
    _keep_what_a_gpu_keeps(model)
    objective = build_objective(
        model,
        _CPU,
        precision="bfloat16",
        rows=layout.micro_rows,
        row_tokens=job.row_tokens,
        predicted_share=job.predicted_share,
        recompute=layout.recompute,
        mesh=mesh,
        keeps_layers=layout.keep_layers,
    )
    fuse_projections(model)
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
    and products in the number type of their operands; and one that they cannot, sums of several tensors in one message.
    """
    attending: Any = layers
    multiplying: Any = linear
    summing: Any = gradients
    originals = attending.packed_attention, multiplying.cpu_multiplies, summing.sum_in_place

    def packed_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Any, *, implementation: str,
        is_causal: bool, scaling: float, dropout: float,
    ) -> Tensor:  # fmt: skip
        return attention._varlen_attention(query, key, value, layout, is_causal, scaling, dropout)

    def sum_in_place(group: dist.ProcessGroup, tensors: list[Tensor]) -> Any:
        return [dist.all_reduce(one, group=group, async_op=True) for one in tensors][-1]

    attending.packed_attention, multiplying.cpu_multiplies = packed_attention, lambda dtype: True
    summing.sum_in_place = sum_in_place
    try:
        yield
    finally:
        attending.packed_attention, multiplying.cpu_multiplies, summing.sum_in_place = originals


def full_rows(job: Job, layout: Layout) -> Batch:
    """A micro-batch as the planner takes it to be: packed rows full with one sequence, predicted positions all over."""
    rows, columns = layout.micro_rows, job.row_tokens
    ids, predicted = torch.zeros(rows * columns, dtype=torch.long), layout.micro_predicted(job)
    labels = torch.full_like(ids, IGNORED)
    labels[torch.arange(predicted) * len(ids) // max(predicted, 1)] = 1
    return {
        "input_ids": ids.view(rows, columns),
        "token_type_ids": ids.view(rows, columns),
        "position_ids": torch.arange(columns).expand(rows, columns).contiguous(),
        "labels": labels.view(rows, columns),
        "cu_seq_lens": (torch.arange(rows + 1) * columns).int(),
        "next_sentence_label": torch.zeros(rows, dtype=torch.long),
    }


def _step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: MicroBatch,
    micro_batches: int,
    mesh: ParallelMesh,
    counter: CollectiveCounter | None = None,
) -> None:
    """A step of `micro_batches` micro-batches."""
    for index in range(min(micro_batches, 2)):
        if counter:
            counter.times = 1 if index == 0 else micro_batches - 1
        losses = call_within(objective.model, objective, batch)
        mean_loss(losses, batch.num_masked * micro_batches, batch.num_pairs * micro_batches).backward()  # type: ignore[no-untyped-call]
        del losses
    if counter:
        counter.times = 1
    with completed_gradients(objective.model, mesh):
        pass  # the last pass of one kind stands for several, and these sums are made once
    if dist.get_world_size() > 1:
        gradient_norm(objective.model.parameters())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
