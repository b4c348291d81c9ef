"""Samples -> batches, in an order that depends on nothing but the seed: not on ranks, workers or micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_bert.data.masking import IGNORED
from megatron_bert.data.samples import EpochIndex, Sample, SampleBuilder, SampleKey

__all__ = [
    "Batch",
    "BatchLayout",
    "BatchPlan",
    "Position",
    "StepBatches",
    "collate",
    "evaluation_batches",
    "training_batches",
    "training_steps",
]

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BatchLayout:
    """How an optimizer step's samples are dealt out; none of it changes which samples the step has.

    Attributes:
        samples: samples of one step, over all ranks.
        micro_samples: samples that one forward pass takes on one rank.
        rank, world_size: this process among those that share the step.
    """

    samples: int
    micro_samples: int
    rank: int = 0
    world_size: int = 1

    @property
    def micro_batches(self) -> int:
        """Forward passes of one rank in one step."""
        return -(-self.samples // self.world_size // self.micro_samples)


@dataclass(frozen=True)
class Position:
    """Where the next step begins; opaque to everybody but this package. `Position()` is the start of the data."""

    epoch: int = 0
    offset: int = 0

    def as_dict(self) -> dict[str, int]:
        """For a checkpoint; `Position.of` reads it."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Self:
        """The position that `as_dict` gave."""
        return cls(**values)


class StepBatches(NamedTuple):
    """One optimizer step of one rank.

    micro_batches: at least one, as many as on every other rank; the number may differ from step to step.
    keys: of the whole step's samples, over all ranks.
    next: where the next step begins.
    """

    micro_batches: list[Batch]
    keys: list[SampleKey]
    next: Position


class _PlannedStep(NamedTuple):
    num_micro_batches: int
    keys: list[SampleKey]
    next: Position


class BatchPlan(Sampler[list[SampleKey]]):
    """Yields the keys of one rank's micro-batches, step after step, epoch after epoch, without end.

    A step that reaches the end of an epoch goes on with the next one's first samples; none is left out.

    Args:
        index_of: the index of an epoch; called once an epoch.
        start: where the first step begins.
    """

    def __init__(self, index_of: Callable[[int], EpochIndex], layout: BatchLayout, start: Position) -> None:
        self._index_of, self._layout, self._start = index_of, layout, start
        self.planned: deque[_PlannedStep] = deque()  # steps whose micro-batches were handed to the loader
        assert layout.samples % layout.world_size == 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        layout = self._layout
        share = layout.samples // layout.world_size
        keys = self._keys()
        while True:
            step = [next(keys) for _ in range(layout.samples)]
            self.planned.append(
                _PlannedStep(
                    layout.micro_batches, step, replace(self._start, epoch=step[-1].epoch, offset=step[-1].index + 1)
                )
            )
            mine = step[layout.rank * share : (layout.rank + 1) * share]
            for at in range(0, share, layout.micro_samples):
                yield mine[at : at + layout.micro_samples]

    def _keys(self) -> Iterator[SampleKey]:
        epoch, offset = self._start.epoch, self._start.offset
        while True:
            index = self._index_of(epoch)
            for at in range(offset, len(index)):
                yield index.key(at)
            epoch, offset = epoch + 1, 0


class _Samples(Dataset[Sample]):
    """What a loader's workers hold."""

    def __init__(self, builder: SampleBuilder) -> None:
        self._builder = builder

    def __getitem__(self, key: SampleKey) -> Sample:
        return self._builder.build(key)


@dataclass(frozen=True)
class _Collate:
    pad_id: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return collate(samples, self.pad_id)


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """The samples as rows of equal length, padded at the right.

    Returns:
        `input_ids`, `token_type_ids`, `attention_mask` (1 at real tokens) and `labels`, int64 [B, S] with S the longest
        sample's length, and `next_sentence_label`, int64 [B]: the names of `MegatronBertForPreTraining.forward`.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), longest)
    ids, types = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    mask, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, sample in enumerate(samples):
        stop = len(sample.input_ids)
        ids[row, :stop], types[row, :stop] = sample.input_ids, sample.token_type_ids
        mask[row, :stop], labels[row, :stop] = 1, sample.labels
    return {
        "input_ids": torch.from_numpy(ids),
        "token_type_ids": torch.from_numpy(types),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "next_sentence_label": torch.tensor([sample.pair_label for sample in samples]),
    }


def training_batches(
    builder: SampleBuilder, plan: BatchPlan, pad_id: int, *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """The plan's micro-batches, made by `num_workers` processes (0: by this one)."""
    loader: DataLoader[Sample] = DataLoader(
        _Samples(builder),
        batch_sampler=plan,
        collate_fn=_Collate(pad_id),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the loader would draw its workers' seed from the model's stream
    )
    return iter(loader)


def training_steps(
    builder: SampleBuilder, plan: BatchPlan, pad_id: int, *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[StepBatches]:
    """The plan's steps, without end; samples are made by `num_workers` processes (0: by this one)."""
    batches = training_batches(builder, plan, pad_id, num_workers=num_workers, pin_memory=pin_memory)
    for first in batches:
        step = plan.planned.popleft()  # the loader hands batches out in the plan's order
        yield StepBatches([first, *islice(batches, step.num_micro_batches - 1)], step.keys, step.next)


def evaluation_batches(builder: SampleBuilder, index: EpochIndex, pad_id: int, samples: int) -> Iterator[Batch]:
    """Every sample of `index` once, `samples` at a time; the same masks each time."""
    for at in range(0, len(index), samples):
        keys = map(index.key, range(at, min(at + samples, len(index))))
        yield collate([builder.build(key) for key in keys], pad_id)
