"""The pretraining objective: masked tokens plus the pair (arXiv 1909.08053, section 5.3).

Legend: B batch, S sequence, M masked tokens of the batch, D hidden, V vocabulary.

The vocabulary projection, the largest multiplication of a small model, is done at the M masked positions only. Losses
are sums; whoever adds up micro-batches or ranks divides by the global number of terms, so that how a batch is laid out
never changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_bert.data.batches import Batch
from megatron_bert.data.masking import IGNORED

__all__ = ["Losses", "MicroBatch", "mean_loss", "pretraining_losses"]


@dataclass(frozen=True)
class MicroBatch:
    """A batch as the objective takes it; the numbers are known without asking the device.

    input_ids, token_type_ids: int64 [B, S]; attention_mask: the same, or None where nothing is padding;
    positions: int64 [M], where the masked tokens stand in the flattened [B * S]; targets: int64 [M], what they were;
    pair_labels: int64 [B], IGNORED for a row without a pair.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    targets: Tensor
    pair_labels: Tensor
    num_masked: int
    num_pairs: int
    num_tokens: int

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """From a collated batch in the CPU's memory."""
        labels = batch["labels"].flatten()
        positions = (labels != IGNORED).nonzero(as_tuple=True)[0]
        num_tokens = int(batch["attention_mask"].sum())
        return cls(
            input_ids=batch["input_ids"],
            token_type_ids=batch["token_type_ids"],
            attention_mask=None if num_tokens == labels.numel() else batch["attention_mask"],
            positions=positions,
            targets=labels[positions],
            pair_labels=batch["next_sentence_label"],
            num_masked=len(positions),
            num_pairs=int((batch["next_sentence_label"] != IGNORED).sum()),
            num_tokens=num_tokens,
        )

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class Losses(NamedTuple):
    """Sums over a micro-batch: 0-dimensional float32 tensors; only the two losses carry gradients."""

    masked_lm: Tensor
    pair: Tensor
    masked_lm_correct: Tensor
    pair_correct: Tensor


def pretraining_losses(model: nn.Module, batch: MicroBatch) -> Losses:
    """Cross-entropies in nats of a `MegatronBertForPreTraining`, summed over masked tokens and over pairs.

    Divided by their numbers and added, they are the loss that the model's own forward returns for these labels.
    """
    parts: Any = model
    output = parts.bert(
        input_ids=batch.input_ids, token_type_ids=batch.token_type_ids, attention_mask=batch.attention_mask
    )
    hidden_MD = output.last_hidden_state.flatten(0, 1).index_select(0, batch.positions)
    logits_MV = parts.cls.predictions(hidden_MD).float()
    pair_logits = parts.cls.seq_relationship(output.pooler_output).float()
    return Losses(
        masked_lm=functional.cross_entropy(logits_MV, batch.targets, reduction="sum"),
        pair=functional.cross_entropy(pair_logits, batch.pair_labels, ignore_index=IGNORED, reduction="sum"),
        masked_lm_correct=(logits_MV.detach().argmax(-1) == batch.targets).sum().float(),
        pair_correct=(pair_logits.detach().argmax(-1) == batch.pair_labels).sum().float(),
    )


def mean_loss(losses: Losses, num_masked: int, num_pairs: int) -> Tensor:
    """The masked-LM loss per masked token plus the pair loss per pair, for the step's global numbers of both."""
    return losses.masked_lm / max(num_masked, 1) + losses.pair / max(num_pairs, 1)
