"""A task's objective: one head on the model, with the loss of its labels.

n sequences of a batch, T their tokens, k samples, C texts of a sample, L labels, D hidden.

Losses are sums over terms, and whoever adds up micro-batches or ranks divides by the global number of terms: a sample
(class, choice, number, span), a label of a sample (several labels), or a labelled token (tags).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_bert.data.batches import Batch
from megatron_bert.data.labelled import TargetKind
from megatron_bert.data.masking import IGNORED
from megatron_bert.model import (
    MegatronBertForMultipleChoice,
    MegatronBertForQuestionAnswering,
    MegatronBertForSequenceClassification,
    MegatronBertForTokenClassification,
)
from megatron_bert.training.graphs import PassGraphs
from megatron_bert.training.microbatch import FixedShapes, LabelledBatch
from megatron_bert.training.objective import at_least_1, autocast
from megatron_bert.training.sums import Sums

__all__ = ["HEADS", "Head", "Problem", "SupervisedObjective", "TaskLosses", "target_kind"]

# What is predicted: a class or number for a text, one of several texts, a label for each token, a span of tokens.
Head = Literal["sequence", "choice", "token", "span"]
# In Transformers' words; of "sequence" only.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]

HEADS: dict[Head, type[Any]] = {
    "sequence": MegatronBertForSequenceClassification,
    "choice": MegatronBertForMultipleChoice,
    "token": MegatronBertForTokenClassification,
    "span": MegatronBertForQuestionAnswering,
}


def target_kind(head: Head, problem: Problem | None) -> TargetKind:
    """How the targets of a head are given."""
    if head == "sequence" and problem in ("regression", "multi_label_classification"):
        return "values"
    kinds: dict[Head, TargetKind] = {"sequence": "class", "choice": "class", "token": "tags", "span": "span"}
    return kinds[head]


class TaskLosses(NamedTuple):
    """Sums over a micro-batch, 0-dimensional float32 tensors: the loss, which carries gradients, and what was predicted
    right (a number: within a half).
    """

    task: Tensor
    correct: Tensor


@dataclass
class SupervisedObjective:
    """What fine-tuning minimises: a callable from a micro-batch to its losses.

    Divided by its number of terms, the loss is what the model's own forward returns for these labels and no padding.

    Attributes:
        model: of the class that `HEADS` has for the head.
        precision: number type of the computation; weights, gradients and sums stay float32.
        shapes: what every batch is filled up to, where the model is compiled.
        graphs: of training passes, where they are recorded.
    """

    model: nn.Module
    device: torch.device
    head: Head
    problem: Problem | None = None
    precision: str = "float32"
    shapes: FixedShapes | None = None
    graphs: PassGraphs | None = None

    def micro_batch(self, batch: Batch) -> LabelledBatch:
        """A collated batch as this objective takes it, still in the CPU's memory."""
        return LabelledBatch.of(batch, self.shapes, has_tags=self.head == "token")

    def numbers(self, batch: LabelledBatch) -> tuple[int, ...]:
        """Of terms."""
        return (batch.num_terms,)

    def mean(self, losses: TaskLosses, numbers: Sequence[Tensor | int]) -> Tensor:
        """The loss per term, for the step's global number of them."""
        return losses.task / at_least_1(numbers[0])

    def sums(self, losses: TaskLosses, batch: LabelledBatch) -> Sums:
        """What was seen of a micro-batch."""
        return Sums(
            task=losses.task.detach(),
            task_correct=losses.correct,
            num_task=batch.num_terms,
            num_tokens=batch.num_tokens,
            num_attended_pairs=batch.num_attended_pairs,
        )

    def __call__(self, cpu_batch: LabelledBatch) -> TaskLosses:
        """The losses of one micro-batch, summed over its terms."""
        return self._run(cpu_batch.to(self.device))[0]

    def predicted(self, cpu_batch: LabelledBatch) -> tuple[TaskLosses, list[Tensor]]:
        """The losses, and the logits of each sample: [L], [C], [S, L], or [2, S]; float32, on the device."""
        batch = cpu_batch.to(self.device)
        losses, logits = self._run(batch)
        if self.head in ("sequence", "choice"):
            return losses, list(logits[: len(batch.rows)].unbind())
        if self.head == "token":
            return losses, list(torch.split(logits[: sum(batch.lengths)], list(batch.lengths)))
        return losses, [one[:, :length] for one, length in zip(logits, batch.lengths, strict=False)]

    def _run(self, batch: LabelledBatch) -> tuple[TaskLosses, Tensor]:
        with autocast(self.device, self.precision):
            logits = self._logits(batch)
        return TaskLosses(*self._losses(logits, batch.targets)), logits

    def _logits(self, batch: LabelledBatch) -> Tensor:
        """float32 [k, L], [k, C], [T, L], or [k, 2, longest], the smallest number beyond a sequence's end."""
        parts: Any = self.model
        output = parts.bert(**batch.inputs, layout=batch.layout)
        if self.head in ("sequence", "choice"):
            pooled_nD = parts.dropout(output.pooler_output.index_select(0, batch.sequences))
            logits: Tensor = parts.classifier(pooled_nD).float()
            # Each sample has a target, filled up or not; a batch without any, one that fills up a step, has 0 of both.
            choices = max(len(batch.sequences) // max(len(batch.targets), 1), 1)
            return logits if self.head == "sequence" else logits.view(-1, choices)
        states = output.last_hidden_state.flatten(0, 1)
        if self.head == "token":
            tokens: Tensor = parts.classifier(parts.dropout(states.index_select(0, batch.tokens))).float()
            return tokens
        spans: Tensor = parts.qa_outputs(states)[batch.places.clamp(min=0)].float()
        beyond = (batch.places < 0)[..., None]
        return spans.masked_fill(beyond, torch.finfo(torch.float32).min).transpose(1, 2)

    def _losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if target_kind(self.head, self.problem) == "values":
            return _value_losses(logits, targets, is_number=self.problem == "regression")
        if self.head == "span":
            sides = [_class_losses(logits[:, side], targets[:, side]) for side in (0, 1)]
            right = (logits.detach().argmax(-1) == targets).all(-1).sum().float()
            return (sides[0][0] + sides[1][0]) / 2, right
        return _class_losses(logits, targets)


def _class_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    loss = functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    return loss, (logits.detach().argmax(-1) == targets).sum().float()


def _value_losses(logits: Tensor, targets: Tensor, *, is_number: bool) -> tuple[Tensor, Tensor]:
    """Squared error, or binary cross-entropy of each label; NaN is a target that is not known."""
    known = ~targets.isnan()
    wanted = targets.nan_to_num()
    if is_number:
        errors = (logits - wanted).square()
        right = (logits.detach() - wanted).abs() < 0.5
    else:
        errors = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        right = (logits.detach() > 0) == (wanted > 0.5)
    return (errors * known).sum(), (right & known).sum().float()
