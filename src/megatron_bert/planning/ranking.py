"""All layouts of a job, the feasible ones by predicted time, and for each other one the reason against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt

from megatron_bert.errors import UserError
from megatron_bert.parallel.tensor import check_degree
from megatron_bert.planning.communication import Collective, collectives_of_step
from megatron_bert.planning.devices import GIB, Gpu
from megatron_bert.planning.layout import Job, Layout, Recompute
from megatron_bert.planning.memory import Memory, memory_of_step
from megatron_bert.planning.speed import StepTime, step_flops, step_time

__all__ = ["Choice", "Plan", "check_layout", "plan_of", "rank"]

RESERVE = 0.05
"""Of a GPU's memory, for what no formula counts: the context, NCCL's buffers, gaps between blocks of the allocator."""


@dataclass(frozen=True)
class Plan:
    """A layout and what is predicted for it.

    Attributes:
        mfu: model FLOPs a second, over what a large product reaches on all its GPUs.
        scaling_efficiency: time of one GPU with endless memory, by the number of GPUs, over this layout's.
        against: why it is not the one to take; empty for the best.
    """

    layout: Layout
    micro_batches: int
    memory: Memory
    time: StepTime
    collectives: list[Collective]
    mfu: float
    scaling_efficiency: float
    fits: bool
    against: str = ""


@dataclass(frozen=True)
class Choice:
    """What of a layout is fixed; None leaves it open."""

    tensor: int | None = None
    shard: int | None = None
    sequence_parallel: bool | None = None
    recompute: Recompute | None = None
    micro_rows: int | None = None
    overlap: bool | None = None
    keep_layers: bool | None = None


def rank(job: Job, gpu: Gpu, choice: Choice | None = None) -> list[Plan]:
    """The best micro-batch of each layout that `choice` leaves open; the fastest first, then those that do not fit.

    Raises:
        UserError: no layout has a shape that the job can be cut into.
    """
    choice = choice or Choice()
    if choice.overlap and (choice.tensor or 1) > gpu.node_gpus:
        raise UserError(f"overlap needs tensor-parallel GPUs of one node, which has {gpu.node_gpus}")
    plans = [_best_micro_batch(job, gpu, layout, choice) for layout in _layouts(job, gpu, choice)]
    if not plans:
        check_layout(job, _any_layout(job, choice))
        raise UserError(
            f"a batch of {job.batch_rows} rows of {job.row_tokens} tokens and this model cannot be split over "
            f"{job.gpus} GPUs: give a batch with more divisors"
        )
    plans.sort(key=lambda plan: (not plan.fits, plan.time.total if plan.fits else plan.memory.total))
    best = plans[0]
    return [replace(plan, against=_reason(plan, best, gpu)) for plan in plans]


def plan_of(job: Job, layout: Layout, gpu: Gpu) -> Plan:
    """The predictions for one layout, with nothing said against it.

    Raises:
        UserError: the job cannot be laid out so.
    """
    check_layout(job, layout)
    memory, time = memory_of_step(job, layout), step_time(job, layout, gpu)
    alone = step_time(replace(job, gpus=1), Layout(micro_rows=job.batch_rows), gpu)
    return Plan(
        layout=layout,
        micro_batches=layout.micro_batches(job),
        memory=memory,
        time=time,
        collectives=collectives_of_step(job, layout),
        mfu=step_flops(job) / time.total / (gpu.flops_per_second * job.gpus),
        scaling_efficiency=alone.total / (job.gpus * time.total),
        fits=memory.total <= (1 - RESERVE) * gpu.memory_bytes,
    )


def check_layout(job: Job, layout: Layout) -> None:
    """Raises `UserError` where the job's shape, batch or number of GPUs cannot be split as `layout` says."""
    if layout.gpus != job.gpus:
        raise UserError(
            f"{job.gpus} GPUs cannot be split into tensor {layout.tensor} x shard {layout.shard} x replicate "
            f"{layout.replicate} = {layout.gpus}"
        )
    check_degree(job.config, layout.tensor)
    if layout.sequence_parallel and layout.tensor == 1:
        raise UserError("sequence parallelism needs a tensor-parallel degree of 2 or more")
    if layout.keep_layers and not layout.fully_sharded:
        raise UserError("keep_layers needs weights that are split over 2 or more data-parallel ranks")
    if layout.overlap and not layout.sequence_parallel:
        raise UserError("overlap needs sequence parallelism")
    if job.batch_rows % layout.data:
        raise UserError(f"a batch of {job.batch_rows} rows is not divisible by {layout.data} data-parallel ranks")
    rows = job.batch_rows // layout.data
    if rows % layout.micro_rows:
        raise UserError(f"{rows} rows a data-parallel rank are not divisible by micro-batches of {layout.micro_rows}")


def _any_layout(job: Job, choice: Choice) -> Layout:
    """One that `choice` allows, whether or not it is possible."""
    tensor = choice.tensor or 1
    shard = choice.shard or max(job.gpus // tensor, 1)
    return Layout(
        tensor=tensor,
        shard=shard,
        replicate=max(job.gpus // (tensor * shard), 1),
        sequence_parallel=choice.sequence_parallel or False,
        recompute=choice.recompute or "none",
        micro_rows=choice.micro_rows or 1,
        overlap=choice.overlap or False,
        keep_layers=choice.keep_layers or False,
    )


def _layouts(job: Job, gpu: Gpu, choice: Choice) -> Iterator[Layout]:
    """Possible ones, with micro-batches of one row, or as chosen. Without a choice, tensor-parallel groups stay within
    a node, products overlap with what sequence parallelism sends there, and data-parallel ranks share everything,
    nothing, or what a node can hold.
    """
    degrees = [choice.tensor] if choice.tensor else _divisors(job.gpus, gpu.node_gpus)
    for tensor in degrees:
        data, rest = divmod(job.gpus, tensor)
        if rest or not data:
            continue
        shards = {choice.shard} if choice.shard else {1, data, max(min(gpu.node_gpus // tensor, data), 1)}
        sequences = (False, True) if tensor > 1 else (False,)
        kinds: tuple[Recompute, ...] = ("none", "selective", "full")
        for shard in sorted(shards):
            for sequence_parallel in sequences if choice.sequence_parallel is None else (choice.sequence_parallel,):
                can_overlap = sequence_parallel and tensor <= gpu.node_gpus
                for recompute, keep_layers in product(
                    kinds if choice.recompute is None else (choice.recompute,),
                    (False, True) if choice.keep_layers is None else (choice.keep_layers,),
                ):
                    layout = Layout(
                        tensor, shard, data // shard, sequence_parallel, recompute, choice.micro_rows or 1,
                        can_overlap if choice.overlap is None else choice.overlap, keep_layers,
                    )  # fmt: skip
                    if _is_possible(job, layout):
                        yield layout


def _is_possible(job: Job, layout: Layout) -> bool:
    try:
        check_layout(job, layout)
    except UserError:
        return False
    return True


def _best_micro_batch(job: Job, gpu: Gpu, layout: Layout, choice: Choice) -> Plan:
    """The fastest that fits; where none does, the smallest."""
    sizes = [choice.micro_rows] if choice.micro_rows else _divisors(job.batch_rows // layout.data)
    best = plan_of(job, replace(layout, micro_rows=sizes[0]), gpu)
    for size in sizes[1:] if best.fits else []:
        plan = plan_of(job, replace(layout, micro_rows=size), gpu)
        if not plan.fits:
            break
        best = min(best, plan, key=lambda one: one.time.total)
    return best


def _reason(plan: Plan, best: Plan, gpu: Gpu) -> str:
    """The one reason against a plan: memory, or the part of its time that exceeds the best's the most."""
    if not plan.fits:
        return f"needs {plan.memory.total / GIB:.0f} GiB of {gpu.memory_gib:.0f}"
    if plan is best:
        return ""
    excess = {name: getattr(plan.time, name) - getattr(best.time, name) for name in vars(plan.time)}
    part = max(excess, key=lambda name: excess[name])
    slower = plan.time.total / best.time.total - 1
    if slower < 0.0005:
        return "as fast as the first"
    layout = plan.layout
    if part in ("products", "attention", "elementwise") and layout.recompute != "none":
        words = "computes activations twice"
    elif part == "elementwise" and layout.fully_sharded and (layout.tensor == 1 or layout.sequence_parallel):
        words = "norms and dropouts of sharded layers go without kernels of their own"
    else:
        words = {
            "products": "smaller products of matrices",
            "attention": "attention",
            "elementwise": "every tensor-parallel rank does all norms and dropouts",
            "optimizer": "more of the optimizer's work on each GPU",
            "tensor_communication": "communication between tensor-parallel ranks",
            "data_communication": "communication between data-parallel ranks",
            "host": "the host, which queues sharded, recomputed layers' kernels one by one",
        }[part]
    return f"{slower:.1%} slower: {words} (+{excess[part] * 1e3:.0f} ms)"


def _divisors(number: int, largest: int | None = None) -> list[int]:
    """In order, those up to `largest` only."""
    bound = number if largest is None else largest
    small = [divisor for divisor in range(1, min(isqrt(number), bound) + 1) if number % divisor == 0]
    return [divisor for divisor in sorted({*small, *(number // one for one in small)}) if divisor <= bound]
