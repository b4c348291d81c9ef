"""A task's files as rows, batches, and outputs again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_bert.data.batches import Batch, BatchLayout, StepBatches, StepPlanner, evaluation_batches, training_steps
from megatron_bert.data.blending import Blend, Position
from megatron_bert.data.collation import Collate
from megatron_bert.data.labelled import LabelledIndex, LabelledTexts, collate_labelled
from megatron_bert.data.packing import best_row_tokens
from megatron_bert.errors import UserError
from megatron_bert.parallel.data import call_within
from megatron_bert.parallel.launch import exchange
from megatron_bert.tasks.task import Making, Row, Task
from megatron_bert.training.ranks import ALONE, Ranks
from megatron_bert.training.sums import Sums
from megatron_bert.training.supervised import SupervisedObjective, target_kind

__all__ = ["Batches", "Split", "open_split", "outputs_of"]

log = logging.getLogger(__name__)

_SHOWN = 3  # of the examples that are left out


@dataclass(frozen=True)
class Split:
    """The examples of a file, their rows in order (none of those to train on: they take memory, and nothing is
    decoded of them), and these as the model reads them.
    """

    examples: Sequence[Any]
    rows: Sequence[Row]
    texts: LabelledTexts

    @property
    def longest(self) -> int:
        """Of a row's texts together, in tokens."""
        return max(self.texts.row_tokens(number) for number in range(len(self.texts)))


def open_split(
    task: Task[Any, Any], file: Path, examples: Sequence[Any], making: Making, *, training: bool = False
) -> Split:
    """The split of these examples of `file`. What training leaves out is counted, and the first ones named.

    Raises:
        UserError: what the task finds, or nothing is left.
    """
    if training and (left := task.left_out(examples)):
        gone = {number for number, _ in left}
        log.warning(
            "%d of %d examples of %s are left out: %s%s", len(gone), len(examples), file,
            "; ".join(reason for _, reason in left[:_SHOWN]), "; ..." if len(left) > _SHOWN else "",
        )  # fmt: skip
        examples = [example for number, example in enumerate(examples) if number not in gone]
    rows = task.rows(examples, making) if examples else []
    if not rows:
        raise UserError(f"{file}: none of its examples can be used")
    return Split(examples, [] if training else rows, LabelledTexts(rows))


@dataclass(frozen=True)
class Batches:
    """How rows become batches.

    Attributes:
        row_tokens: of a packed row, into which a compiled model's samples are put; 0: a batch is one row of just its
            tokens.
        text_tokens: of the longest text of packed rows.
    """

    task: Task[Any, Any]
    num_outputs: int
    pad_id: int
    layout: BatchLayout
    row_tokens: int = 0
    text_tokens: int = 0

    @classmethod
    def of(
        cls,
        task: Task[Any, Any],
        num_outputs: int,
        pad_id: int,
        layout: BatchLayout,
        splits: Sequence[Split],
        seed: int,
    ) -> Batches:
        """With packing a micro-batch is one row, as long as the steps of the first of `splits`, which is trained on,
        need it, and at most as `layout.micro_samples` of the longest samples of all splits together.

        Raises:
            UserError: the samples of a step cannot be shared equally.
        """
        made = cls(task, num_outputs, pad_id, layout)
        planner = made._planner(splits[0].texts, seed)  # which looks whether they can
        if not layout.packing:
            return made
        longest = max(split.longest for split in splits)
        limit = layout.micro_samples * longest
        row_tokens = best_row_tokens(planner.lengths_of_steps(), longest, limit, layout.world_size)
        text_tokens = max(split.texts.longest_text for split in splits)
        return cls(task, num_outputs, pad_id, replace(layout, micro_samples=1), row_tokens, text_tokens)

    def steps(
        self, split: Split, seed: int, start: Position, *, num_workers: int, pin: bool
    ) -> Generator[StepBatches, None, None]:
        """This rank's training steps from `start` on, without end; `close` ends the workers."""
        return training_steps(
            self._planner(split.texts, seed), [split.texts], self._collate(), start, num_workers=num_workers,
            pin_memory=pin,
        )  # fmt: skip

    def once(self, split: Split) -> Iterator[Batch]:
        """This rank's part of all rows, each once."""
        return evaluation_batches(self._planner(split.texts, None), [split.texts], self._collate(), [len(split.texts)])

    def _planner(self, texts: LabelledTexts, seed: int | None) -> StepPlanner:
        return StepPlanner(Blend([partial(LabelledIndex, texts, seed)], [1.0]), self.layout, self.row_tokens)

    def _collate(self) -> Collate:
        kind = target_kind(self.task.head, self.task.problem())
        return partial(
            collate_labelled, kind=kind, num_outputs=self.num_outputs, pad_id=self.pad_id, row_tokens=self.row_tokens,
            text_tokens=self.text_tokens,
        )  # fmt: skip


@torch.no_grad()
def outputs_of(
    objective: SupervisedObjective,
    batches: Iterator[Batch],
    ranks: Ranks = ALONE,
    at: Callable[[], None] = lambda: None,
) -> tuple[list[npt.NDArray[np.float32]], dict[str, float]]:
    """The head's logits of every row, in order, and the mean losses, for a model in evaluation mode. The same on every
    rank.
    """
    pending, sums = [], Sums()
    for batch in batches:
        at()
        micro = objective.micro_batch(batch)
        losses, logits = call_within(objective.model, objective.predicted, micro)
        sums = sums.plus(objective.sums(losses, micro).over(ranks, objective.device))
        flat = torch.cat([one.flatten() for one in logits]) if logits else torch.empty(0)
        pending.append((micro.rows, [one.shape for one in logits], flat.to("cpu", non_blocking=True)))
    if objective.device.type == "cuda":
        torch.cuda.synchronize(objective.device)  # once: while the device computes a batch, the next one is made
    found: dict[int, npt.NDArray[np.float32]] = {}
    for rows, shapes, flat in pending:
        pieces = np.split(flat.numpy(), np.cumsum([shape.numel() for shape in shapes])[:-1])
        found |= {row: piece.reshape(shape) for row, piece, shape in zip(rows, pieces, shapes, strict=False)}
    for theirs in exchange(found):
        found |= theirs
    return [found[row] for row in range(len(found))], sums.means()
