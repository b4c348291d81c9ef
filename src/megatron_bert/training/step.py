"""One optimizer step: forward and backward over its micro-batches, clipping, the update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from megatron_bert.training.objective import Losses, MicroBatch, mean_loss, pretraining_losses

__all__ = ["Sums", "autocast", "evaluate_batch", "train_step"]


@dataclass(frozen=True)
class Sums:
    """What a step (or several, added) saw. The tensors stay on the device until somebody looks."""

    masked_lm: Tensor | float = 0.0
    pair: Tensor | float = 0.0
    masked_lm_correct: Tensor | float = 0.0
    pair_correct: Tensor | float = 0.0
    num_masked: int = 0
    num_pairs: int = 0
    num_tokens: int = 0

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        names = [field.name for field in fields(self)]
        return Sums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def of(cls, losses: Losses, batch: MicroBatch) -> Sums:
        """Those of one batch."""
        tensors = [loss.detach() for loss in losses]
        return cls(*tensors, batch.num_masked, batch.num_pairs, batch.num_tokens)  # type: ignore[arg-type, call-arg]

    def means(self) -> dict[str, float]:
        """Losses in nats per masked token and per pair, and the shares predicted right; nothing of what was not there.

        `loss` is their sum, the quantity that is minimised.
        """
        means = {"loss": 0.0}
        if self.num_masked:
            means["masked_lm_loss"] = float(self.masked_lm) / self.num_masked
            means["masked_lm_accuracy"] = float(self.masked_lm_correct) / self.num_masked
        if self.num_pairs:
            means["pair_loss"] = float(self.pair) / self.num_pairs
            means["pair_accuracy"] = float(self.pair_correct) / self.num_pairs
        means["loss"] = means.get("masked_lm_loss", 0.0) + means.get("pair_loss", 0.0)
        return means


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a forward pass computes in `precision`, the weights staying float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    device: torch.device,
    *,
    precision: str,
    clip_norm: float,
) -> tuple[Sums, Tensor]:
    """Updates the model once.

    The gradient is that of the masked-LM loss per masked token plus the pair loss per pair over all `micro_batches`
    together, clipped to `clip_norm` (norm over all parameters).

    Returns:
        what was seen, and the gradient's norm before clipping (0-dimensional).
    """
    num_masked = sum(batch.num_masked for batch in micro_batches)
    num_pairs = sum(batch.num_pairs for batch in micro_batches)
    sums = Sums()
    for cpu_batch in micro_batches:
        batch = cpu_batch.to(device)
        with autocast(device, precision):
            losses = pretraining_losses(model, batch)
        mean_loss(losses, num_masked, num_pairs).backward()  # type: ignore[no-untyped-call]
        sums = sums.plus(Sums.of(losses, batch))
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, norm


@torch.no_grad()
def evaluate_batch(model: nn.Module, cpu_batch: MicroBatch, device: torch.device, *, precision: str) -> Sums:
    """The losses of one batch, for a model in evaluation mode."""
    batch = cpu_batch.to(device)
    with autocast(device, precision):
        losses = pretraining_losses(model, batch)
    return Sums.of(losses, batch)
