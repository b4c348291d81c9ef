"""Samples -> batches, in an order that depends on nothing but the seed: not on ranks, workers or micro-batches.

What a step consists of is planned in the process that trains, from the indexes alone, the same on every rank; the
samples themselves are made, and put together to tensors, a micro-batch at a time, by worker processes.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_bert.data.blending import Blend, Position
from megatron_bert.data.collation import Batch, Collate
from megatron_bert.data.packing import best_num_rows, pack
from megatron_bert.data.samples import Builder, SampleKey, SamplePlan
from megatron_bert.errors import UserError

__all__ = [
    "Batch",
    "BatchLayout",
    "Position",
    "StepBatches",
    "StepPlanner",
    "evaluation_batches",
    "training_steps",
]

_RowPlans = list[list[SamplePlan]]  # a micro-batch: the samples of each of its rows

_EMPTY = SamplePlan(SampleKey(0, 0, 0), (), 0)
_TRIED_STEPS, _TRIED_SAMPLES = 16, 20_000  # to find out how many rows a packed step takes
_MEASURED_STEPS = 64  # and how many tokens: where one step is larger than all these, it takes a pass more


@dataclass(frozen=True)
class BatchLayout:
    """How an optimizer step's samples are dealt out; none of it changes which samples the step has.

    Attributes:
        samples: samples of one step, over all ranks.
        micro_samples: rows that one forward pass takes on one rank; with packing, the most that it may take.
        rank, world_size: this process among those that share the step.
        packing: several samples in a row.
    """

    samples: int
    micro_samples: int
    rank: int = 0
    world_size: int = 1
    packing: bool = False


class StepBatches(NamedTuple):
    """One optimizer step of one rank.

    micro_batches: at least one, as many as on every other rank; the number may differ from step to step.
    keys: of the whole step's samples, over all ranks.
    next: where the next step begins.
    """

    micro_batches: list[Batch]
    keys: list[SampleKey]
    next: Position


class StepPlanner:
    """Deals a step's samples out to rows, micro-batches and ranks.

    Args:
        row_tokens: capacity of a row.

    Raises:
        UserError: the step's samples cannot be shared equally.
    """

    def __init__(self, blend: Blend[Any], layout: BatchLayout, row_tokens: int) -> None:
        if layout.samples % layout.world_size:
            raise UserError(
                f"training.batch_samples {layout.samples} is not a multiple of the {layout.world_size} "
                "data-parallel ranks"
            )
        self.blend, self.layout, self._row_tokens = blend, layout, row_tokens

    def micro_batches(self, keys: Sequence[SampleKey]) -> list[_RowPlans]:
        """This rank's micro-batches of a step; every rank has as many, with packing all of the same shape."""
        layout, plans = self.layout, [self._plan(key) for key in keys]
        rows = self._rows(plans) if layout.packing else [[plan] for plan in plans]
        filling: list[SamplePlan] = [] if layout.packing else [_EMPTY]
        rows += [filling] * (-len(rows) % self._rows_dealt_at_once)
        share = len(rows) // layout.world_size
        mine = rows[layout.rank * share : (layout.rank + 1) * share]
        return [mine[at : at + layout.micro_samples] for at in range(0, share, layout.micro_samples)]

    def best_layout(self) -> BatchLayout:
        """The layout, with as many rows to a packed micro-batch as leave the least to padding, and never more."""
        layout = self.layout
        if not layout.packing:
            return layout
        rows_of_steps = [len(self._rows(plans)) for plans in self._first_steps()]
        return replace(layout, micro_samples=best_num_rows(rows_of_steps, layout.micro_samples, layout.world_size))

    def lengths_of_steps(self) -> list[npt.NDArray[np.int64]]:
        """Of the samples of the first steps, over all ranks, in tokens."""
        return [np.array([plan.row_tokens for plan in plans]) for plans in self._first_steps(_MEASURED_STEPS)]

    def fill_rates(self) -> tuple[float, float]:
        """With packing: real tokens per token of the rows in use, and of all rows that are computed."""
        real = used = computed = 0
        for plans in self._first_steps():
            rows = len(self._rows(plans))
            real += sum(plan.row_tokens for plan in plans)
            used, computed = used + rows, computed + rows + (-rows % self._rows_dealt_at_once)
        return real / (used * self._row_tokens), real / (computed * self._row_tokens)

    @property
    def _rows_dealt_at_once(self) -> int:
        return self.layout.world_size * (self.layout.micro_samples if self.layout.packing else 1)

    def _rows(self, plans: Sequence[SamplePlan]) -> list[list[SamplePlan]]:
        """The samples of each packed row."""
        rows = pack(np.array([plan.row_tokens for plan in plans]), self._row_tokens)
        return [[plans[sample] for sample in row] for row in rows]

    def _plan(self, key: SampleKey) -> SamplePlan:
        plan: SamplePlan = self.blend.index(key.corpus, key.epoch).plan(key.index)
        return plan

    def _first_steps(self, number: int = _TRIED_STEPS) -> Iterator[list[SamplePlan]]:
        """Always those of the start, wherever a run goes on: the shapes of its batches stay as they were."""
        samples, position = self.layout.samples, Position()
        for _ in range(max(1, min(number, _TRIED_SAMPLES // samples))):
            keys, position = self.blend.take(position, samples)
            yield [self._plan(key) for key in keys]


class _PlannedStep(NamedTuple):
    num_micro_batches: int
    keys: list[SampleKey]
    next: Position


class _TrainingPlan(Sampler[_RowPlans]):
    """Hands one rank's micro-batches to a loader, step after step, and remembers which step they belong to."""

    def __init__(self, planner: StepPlanner, start: Position) -> None:
        self._planner, self._start = planner, start
        self.planned: deque[_PlannedStep] = deque()

    def __iter__(self) -> Iterator[_RowPlans]:
        position = self._start
        while True:
            keys, position = self._planner.blend.take(position, self._planner.layout.samples)
            micro_batches = self._planner.micro_batches(keys)
            self.planned.append(_PlannedStep(len(micro_batches), keys, position))
            yield from micro_batches


class _MicroBatches(Dataset["_Joined"]):
    """What a loader's workers hold."""

    def __init__(self, builders: Sequence[Builder], collate: Collate) -> None:
        self._builders, self._collate = builders, collate

    def build(self, rows: _RowPlans) -> Batch:
        """The micro-batch of these rows."""
        return self._collate([[self._builders[plan.key.corpus].build(plan) for plan in row] for row in rows])

    def __getitem__(self, rows: _RowPlans) -> _Joined:
        return _joined(self.build(rows))


class _Joined(NamedTuple):
    """A batch as one tensor: handing a tensor over from a worker takes a millisecond, whatever its size."""

    values: torch.Tensor
    parts: Sequence[tuple[str, Sequence[int], torch.dtype]]


def _joined(batch: Batch) -> _Joined:
    parts = [(name, tensor.shape, tensor.dtype) for name, tensor in batch.items()]
    return _Joined(torch.cat([_as_integers(tensor).flatten().long() for tensor in batch.values()]), parts)


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor  # its bits


def _apart(joined: _Joined) -> Batch:
    sizes = [prod(shape) for _, shape, _ in joined.parts]
    pieces = zip(joined.parts, torch.split(joined.values, sizes), strict=True)
    return {
        name: (piece.int().view(torch.float32) if dtype == torch.float32 else piece.to(dtype)).view(*shape)
        for (name, shape, dtype), piece in pieces
    }


def training_steps(
    planner: StepPlanner,
    builders: Sequence[Builder],
    collate: Collate,
    start: Position,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[StepBatches, None, None]:
    """Steps from `start` on, without end; `close` ends the workers.

    Args:
        num_workers: processes that make samples, and a thread then has the next step ready; 0: this process.
        builders: of each corpus of the blend.
    """
    steps = _training_steps(planner, builders, collate, start, num_workers, pin_memory)
    if num_workers:
        steps = _one_ahead(steps)
    atexit.register(_close, weakref.ref(steps))
    return steps


def _training_steps(
    planner: StepPlanner,
    builders: Sequence[Builder],
    collate: Collate,
    start: Position,
    num_workers: int,
    pin_memory: bool,
) -> Generator[StepBatches, None, None]:
    plan = _TrainingPlan(planner, start)
    loader: DataLoader[_Joined] = DataLoader(
        _MicroBatches(builders, collate),
        sampler=plan,
        batch_size=None,  # the dataset's items are micro-batches
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the loader would draw its workers' seed from the model's stream
        worker_init_fn=_leave_stopping_to_the_parent,
    )
    batches = map(_apart, loader)
    for first in batches:
        step = plan.planned.popleft()  # the loader hands batches out in the plan's order
        yield StepBatches([first, *islice(batches, step.num_micro_batches - 1)], step.keys, step.next)


def _one_ahead(steps: Generator[StepBatches, None, None]) -> Generator[StepBatches, None, None]:
    """The same steps; while one is computed, a thread takes the next one from the workers."""
    with closing(steps), ThreadPoolExecutor(1, thread_name_prefix="next_step") as thread:
        step = next(steps)  # not by the thread: workers are forked here
        while True:
            following = thread.submit(next, steps)
            yield step
            step = following.result()


def _close(steps: Callable[[], Generator[StepBatches, None, None] | None]) -> None:
    """Ends the workers before the interpreter does: it would send SIGTERM, which they ignore, and wait for them."""
    alive = steps()
    if alive is not None:
        alive.close()


def _leave_stopping_to_the_parent(worker: int) -> None:
    """A cluster's SIGTERM and a terminal's SIGINT reach workers too, but the step at hand still needs them. They end
    when their parent says so, or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def evaluation_batches(
    planner: StepPlanner, builders: Sequence[Builder], collate: Collate, num_samples: Sequence[int]
) -> Iterator[Batch]:
    """This rank's part of the first epoch of every corpus, each sample once; the same masks each time.

    Args:
        num_samples: of each corpus.
    """
    made = _MicroBatches(builders, collate)
    keys = (SampleKey(corpus, 0, at) for corpus, num in enumerate(num_samples) for at in range(num))
    while step := list(islice(keys, planner.layout.samples)):
        for rows in planner.micro_batches(step):
            yield made.build(rows)
