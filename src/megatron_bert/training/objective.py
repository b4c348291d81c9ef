"""The pretraining objectives: masked tokens and the pair (arXiv 1909.08053, section 5.3), or the next token (5.2).

Legend: B batch, S sequence, n sequences, M predicted positions of the batch, D hidden, V vocabulary.

The vocabulary projection, the largest multiplication of a small model, is done at the M predicted positions only.
Losses are sums; whoever adds up micro-batches or ranks divides by the global number of terms, so that how a batch is
laid out never changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_bert.data.batches import Batch
from megatron_bert.data.masking import IGNORED
from megatron_bert.training.graphs import PassGraphs
from megatron_bert.training.microbatch import FixedShapes, MicroBatch
from megatron_bert.training.sums import Sums

__all__ = ["Losses", "Objective", "at_least_1", "autocast", "mean_loss", "token_losses"]

TokenLosses = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


class Losses(NamedTuple):
    """Sums over a micro-batch: 0-dimensional float32 tensors; only the two losses carry gradients."""

    masked_lm: Tensor
    pair: Tensor
    masked_lm_correct: Tensor
    pair_correct: Tensor


def token_losses(head: nn.Module, hidden_MD: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """The head's cross-entropy in nats and its right predictions, both summed over targets other than IGNORED."""
    logits_MV = head(hidden_MD).float()
    loss = functional.cross_entropy(logits_MV, targets_M, reduction="sum", ignore_index=IGNORED)
    correct = (logits_MV.detach().argmax(-1) == targets_M).sum()
    return loss, correct.float()


@dataclass
class Objective:
    """What is minimised, and how it is computed: a callable from a micro-batch to its losses.

    Divided by their numbers and added (`mean_loss`), the losses are what the model's own forward returns for these
    labels; those of a causal model are what it returns for the labels before they were shifted.

    Attributes:
        model: a `MegatronBertForPreTraining`, `MegatronBertForMaskedLM` or `MegatronBertForCausalLM`.
        precision: number type of the computation; weights, gradients and sums stay float32.
        token_losses: the function of this name, or a compiled one.
        shapes: what every batch is filled up to, where the model is compiled.
        graphs: of training passes, where they are recorded.
    """

    model: nn.Module
    device: torch.device
    precision: str = "float32"
    token_losses: TokenLosses = token_losses
    shapes: FixedShapes | None = None
    graphs: PassGraphs | None = None

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """A collated batch as this objective takes it, still in the CPU's memory."""
        return MicroBatch.of(batch, self.shapes)

    def numbers(self, batch: MicroBatch) -> tuple[int, ...]:
        """Of predicted tokens and of pairs."""
        return batch.num_masked, batch.num_pairs

    def mean(self, losses: Losses, numbers: Sequence[Tensor | int]) -> Tensor:
        """See `mean_loss`."""
        return mean_loss(losses, *numbers)

    def sums(self, losses: Losses, batch: MicroBatch) -> Sums:
        """What was seen of a micro-batch."""
        return Sums(
            masked_lm=losses.masked_lm.detach(),
            pair=losses.pair.detach(),
            masked_lm_correct=losses.masked_lm_correct,
            pair_correct=losses.pair_correct,
            num_masked=batch.num_masked,
            num_pairs=batch.num_pairs,
            num_predicted=batch.num_masked,
            num_tokens=batch.num_tokens,
            num_attended_pairs=batch.num_attended_pairs,
        )

    def __call__(self, cpu_batch: MicroBatch) -> Losses:
        """The losses of one micro-batch, summed over predicted tokens and over pairs."""
        batch = cpu_batch.to(self.device)
        with autocast(self.device, self.precision):
            return self._losses(batch)

    def _losses(self, batch: MicroBatch) -> Losses:
        parts: Any = self.model
        output = parts.bert(**batch.inputs, layout=batch.layout)
        hidden_MD = output.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
        loss, correct = self.token_losses(parts.cls.predictions, hidden_MD, batch.targets)
        pair_loss = pair_correct = torch.zeros((), device=self.device)
        pair_head = getattr(parts.cls, "seq_relationship", None)  # where the objective has pairs
        if batch.pair_labels is not None and pair_head is not None:
            pair_logits = pair_head(output.pooler_output).float()
            pair_loss = functional.cross_entropy(pair_logits, batch.pair_labels, ignore_index=IGNORED, reduction="sum")
            pair_correct = (pair_logits.detach().argmax(-1) == batch.pair_labels).sum().float()
        return Losses(loss, pair_loss, correct, pair_correct)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a forward pass computes in `precision`, the weights staying float32. (What is in float8 is
    so by itself; all else is in bfloat16 then.)
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32")


def mean_loss(losses: Losses, num_masked: Tensor | int, num_pairs: Tensor | int) -> Tensor:
    """The loss per predicted token plus the pair loss per pair, for the step's global numbers of both."""
    return losses.masked_lm / at_least_1(num_masked) + losses.pair / at_least_1(num_pairs)


def at_least_1(number: Tensor | int) -> Tensor | int:
    """A number to divide by."""
    return number.clamp(min=1) if isinstance(number, Tensor) else max(number, 1)
