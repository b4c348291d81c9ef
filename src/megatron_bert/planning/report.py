"""Plans as text and as records for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_bert.planning.communication import Collective
from megatron_bert.planning.counting import DryRun
from megatron_bert.planning.devices import GIB, Gpu
from megatron_bert.planning.layout import Job, Layout
from megatron_bert.planning.paper import PaperRow
from megatron_bert.planning.parameters import rank_parameters
from megatron_bert.planning.ranking import Plan

__all__ = [
    "details",
    "dry_run_lines",
    "dry_run_record",
    "paper_lines",
    "plan_lines",
    "plan_record",
    "recipe_settings",
    "sent_by_kind",
]

Record = dict[str, Any]


def plan_record(job: Job, plan: Plan) -> Record:
    """Everything about a plan; units in the names."""
    return {
        **asdict(plan.layout),
        "gpus": job.gpus,
        "micro_batches": plan.micro_batches,
        "fits": plan.fits,
        "against": plan.against or None,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "step_seconds": {**asdict(plan.time), "total": plan.time.total},
        "sent_bytes": {f"{kind}, {axis}": sent for (kind, axis), sent in sent_by_kind(plan.collectives).items()},
        "tokens_per_second": job.tokens / plan.time.total,
        "mfu": plan.mfu,
        "scaling_efficiency": plan.scaling_efficiency,
    }


def sent_by_kind(collectives: Iterable[Collective]) -> dict[tuple[str, str], float]:
    """Bytes that a GPU sends in a step, by kind and axis."""
    sent: dict[tuple[str, str], float] = {}
    for one in collectives:
        sent[one.kind, one.axis] = sent.get((one.kind, one.axis), 0.0) + one.sent_bytes
    return sent


def plan_lines(job: Job, gpu: Gpu, plans: Sequence[Plan], top: int) -> Iterator[str]:
    """A table of the best feasible plans and of as many that do not fit, and all about the best one."""
    parameters = f"{rank_parameters(job.config):,} parameters"
    batch = f"{job.batch_rows} rows of {job.row_tokens} tokens a step"
    reached = f"{gpu.memory_gib:.0f} GiB, {gpu.flops_per_second / 1e12:.0f} TFLOP/s reached"
    yield f"{parameters}; {batch}; {job.gpus} x {gpu.name} ({reached})"
    yield ""
    fitting, others = [plan for plan in plans if plan.fits], [plan for plan in plans if not plan.fits]
    shown = fitting[:top] + others[:top]
    header = (
        "",
        "tensor",
        "sequence",
        "data",
        "recompute",
        "micro-batches",
        "GiB",
        "ms",
        "MFU",
        "efficiency",
        "why not",
    )
    yield from _table([header, *(_row(number, plan) for number, plan in enumerate(shown, 1))])
    if not fitting:
        yield "no layout fits"
    hidden = len(plans) - len(shown)
    yield f"({len(fitting)} layouts fit, {len(others)} do not" + (f"; {hidden} not shown: --top)" if hidden else ")")
    yield ""
    yield from details(plans[0])


def _row(number: int, plan: Plan) -> tuple[str, ...]:
    layout = plan.layout
    return (
        str(number),
        str(layout.tensor),
        "overlap" if layout.overlap else "yes" if layout.sequence_parallel else "no",
        layout.data_parallelism(),
        layout.recompute,
        f"{plan.micro_batches} x {layout.micro_rows}",
        f"{plan.memory.total / GIB:.1f}",
        f"{plan.time.total * 1e3:.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.scaling_efficiency:.1%}",
        plan.against,
    )


def details(plan: Plan) -> Iterator[str]:
    """The parts of a plan's memory, time and communication; where it fits, how `pretrain` lays out so."""
    memory = plan.memory
    parts = ("weights", "gradients", "optimizer", "activations", "working")
    listed = ", ".join(f"{name} {getattr(memory, name) / GIB:.2f}" for name in parts)
    yield f"memory  {memory.total / GIB:.2f} GiB a GPU at its most, which is at the {memory.moment}: {listed}"
    listed = ", ".join(
        f"{name.replace('_', ' ')} {seconds * 1e3:.1f}" for name, seconds in vars(plan.time).items() if seconds
    )
    yield f"time    {plan.time.total * 1e3:.1f} ms a step: {listed}"
    for (kind, axis), sent in sent_by_kind(plan.collectives).items():
        if sent > 1024:
            yield f"sent    {sent / GIB:.3f} GiB a GPU and step: {kind}, {axis} ranks"
    if plan.fits:
        yield "recipe  " + " ".join(f"--set {name}={value}" for name, value in recipe_settings(plan.layout).items())


def recipe_settings(layout: Layout) -> dict[str, str]:
    """The keys of a recipe that a layout is about. A row of a plan is one sample there."""
    return {
        "mesh.tensor": str(layout.tensor),
        "mesh.sequence_parallel": str(layout.sequence_parallel).lower(),
        "mesh.overlap": str(layout.overlap).lower(),
        "mesh.shard": str(layout.shard),
        "mesh.keep_layers": str(layout.keep_layers).lower(),
        "runtime.recompute": layout.recompute,
        "runtime.micro_batch_samples": str(layout.micro_rows),
    }


def dry_run_record(plan: Plan, found: DryRun) -> Record:
    """What a dry run saw."""
    return {
        "dry_run": asdict(plan.layout),
        "parameters": found.parameters,
        "peak_bytes": found.peak_bytes,
        "state_bytes": found.state_bytes,
        "sent_bytes": {f"{kind}, {axis}": sent for (kind, axis), sent in sent_by_kind(found.collectives).items()},
        "collectives": [asdict(one) for one in found.collectives],
        "seconds": found.seconds,
    }


def dry_run_lines(plan: Plan, found: DryRun) -> Iterator[str]:
    """What a dry run saw, beside the formulas."""
    yield f"dry run of rank 0 of {plan.layout.gpus}, {found.seconds:.0f} s; in parentheses the formulas"
    yield f"memory  {found.peak_bytes / GIB:.2f} GiB ({plan.memory.total / GIB:.2f}); {found.parameters:,} parameters"
    predicted = sent_by_kind(plan.collectives)
    for key, sent in sent_by_kind(found.collectives).items():
        kind, axis = key
        if sent > 1024:
            number = sum(one.count for one in found.collectives if (one.kind, one.axis) == key)
            formula = predicted.get(key, 0.0) / GIB
            yield f"sent    {sent / GIB:.3f} GiB ({formula:.3f}): {number} x {kind}, {axis} ranks"


def paper_lines(rows: Iterable[PaperRow]) -> Iterator[str]:
    """The paper's table beside the prediction."""
    header = ("parameters", "GPUs", "tensor", "data", "step, s", "predicted", "paper")
    body = [
        (
            f"{row.parameters / 1e9:.1f}B",
            str(row.gpus),
            str(row.tensor),
            str(row.data),
            f"{row.step_seconds:.2f}",
            f"{row.predicted:.0%}",
            f"{row.paper:.0%}",
        )
        for row in rows
    ]
    yield from _table([header, *body])


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need be, numbers and their headings to the right."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    to_right = [all(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_right, strict=True)
        ]
        yield "  ".join(cells).rstrip()
