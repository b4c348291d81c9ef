"""One optimizer step: forward and backward over its micro-batches, clipping, the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_bert.parallel.data import call_within
from megatron_bert.training.microbatch import MicroBatch, moved
from megatron_bert.training.objective import Losses, Objective, mean_loss
from megatron_bert.training.ranks import ALONE, Ranks

__all__ = ["StepResult", "Sums", "evaluate_batch", "train_step"]

_SUMMED = torch.float64  # exact for every number that is counted


@dataclass(frozen=True)
class Sums:
    """What a step (or several, added) saw. The tensors stay on the device until somebody looks.

    The losses and their numbers leave out steps that were not applied; tokens and attended pairs count all work.
    """

    masked_lm: Tensor | float = 0.0
    pair: Tensor | float = 0.0
    masked_lm_correct: Tensor | float = 0.0
    pair_correct: Tensor | float = 0.0
    num_masked: Tensor | int = 0
    num_pairs: Tensor | int = 0
    num_predicted: Tensor | int = 0
    num_tokens: Tensor | int = 0
    num_attended_pairs: Tensor | int = 0

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        names = [field.name for field in fields(self)]
        return Sums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def of(cls, losses: Losses, batch: MicroBatch) -> Sums:
        """Those of one batch."""
        return cls(
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

    def over(self, ranks: Ranks, device: torch.device) -> Sums:
        """Those of all ranks together, as tensors; one process keeps what it has."""
        if ranks.mesh is None:
            return self
        measured = {name: value.to(_SUMMED) for name, value in vars(self).items() if isinstance(value, Tensor)}
        counted = {name: value for name, value in vars(self).items() if name not in measured}
        counts = moved(torch.tensor([*counted.values()], dtype=_SUMMED), device)
        totals = ranks.sum_over_data(torch.cat([torch.stack([*measured.values()]), counts]))
        return Sums(**dict(zip([*measured, *counted], totals.unbind(), strict=True)))

    def where(self, applied: Tensor) -> Sums:
        """These sums, or for a step that was not applied none of its losses; without waiting for the device."""
        losses: dict[str, Any] = {
            name: torch.where(applied, getattr(self, name), 0.0)
            for name in ("masked_lm", "pair", "masked_lm_correct", "pair_correct")
        }
        return replace(self, **losses, num_masked=applied * self.num_masked, num_pairs=applied * self.num_pairs)

    def means(self) -> dict[str, float]:
        """Losses in nats per predicted token and per pair, and the shares predicted right; nothing of what was not
        there. `loss` is their sum, the quantity that is minimised. Waits for the device.
        """
        num_masked, num_pairs = int(self.num_masked), int(self.num_pairs)
        means: dict[str, float] = {}
        if num_masked:
            means["masked_lm_loss"] = float(self.masked_lm) / num_masked
            means["masked_lm_accuracy"] = float(self.masked_lm_correct) / num_masked
        if num_pairs:
            means["pair_loss"] = float(self.pair) / num_pairs
            means["pair_accuracy"] = float(self.pair_correct) / num_pairs
        if not means:
            return {}
        return {"loss": means.get("masked_lm_loss", 0.0) + means.get("pair_loss", 0.0), **means}


class StepResult(NamedTuple):
    """What a step saw, and what became of it; the tensors are 0-dimensional and stay on the device.

    sums: without the losses of a step that was not applied.
    gradient_norm: over all parameters, before clipping.
    applied: bool; False where the loss or the norm was not finite, and parameters and optimizer are as before.
    """

    sums: Sums
    gradient_norm: Tensor
    applied: Tensor


def train_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    clip_norm: float,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Updates the model once, unless the loss or a gradient is not finite. Never waits for the device.

    The gradient is that of the loss per predicted token plus the pair loss per pair over all `micro_batches` of all
    ranks together, clipped to `clip_norm` (norm over all parameters). The optimizer is one of PyTorch's fused ones.
    """
    num_masked: Tensor | int = sum(batch.num_masked for batch in micro_batches)
    num_pairs: Tensor | int = sum(batch.num_pairs for batch in micro_batches)
    device, model = objective.device, objective.model
    if ranks.mesh is not None:
        num_masked, num_pairs = ranks.sum_over_data(moved(torch.tensor([num_masked, num_pairs]), device)).unbind()
    sums = Sums()
    for batch in micro_batches:
        losses = call_within(model, objective, batch)
        mean_loss(losses, num_masked, num_pairs).backward()  # type: ignore[no-untyped-call]
        sums = sums.plus(Sums.of(losses, batch))
    sums, norm = sums.over(ranks, device), ranks.complete_gradients(model)
    applied = norm.isfinite() & torch.isfinite(torch.as_tensor(sums.masked_lm + sums.pair))
    _update(optimizer, norm, applied, clip_norm)
    return StepResult(sums.where(applied), norm, applied)


def _update(optimizer: torch.optim.Optimizer, norm: Tensor, applied: Tensor, clip_norm: float) -> None:
    """Steps with the gradients divided by max(norm / clip_norm, 1), where `applied`.

    Fused optimizers read both from the two attributes that PyTorch's gradient scaler sets: clipping costs no pass over
    the gradients of its own, and no host has to know whether the step counts.
    """
    scaled: Any = optimizer
    scaled.grad_scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0)  # 1e-6: `torch.nn.utils.clip_grad_norm_`'s
    scaled.found_inf = (~applied).float()
    try:
        optimizer.step()
    finally:
        del scaled.grad_scale, scaled.found_inf
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate_batch(objective: Objective, batch: MicroBatch, ranks: Ranks = ALONE) -> Sums:
    """The losses of one batch of every rank, for a model in evaluation mode."""
    return Sums.of(call_within(objective.model, objective, batch), batch).over(ranks, objective.device)
