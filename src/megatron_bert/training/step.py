"""One optimizer step: forward and backward over its micro-batches, clipping, the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron_bert.data.batches import Batch
from megatron_bert.parallel.data import call_within
from megatron_bert.training.graphs import PassGraphs, differentiated
from megatron_bert.training.microbatch import FixedShapes, LaidOut, moved
from megatron_bert.training.ranks import ALONE, Ranks
from megatron_bert.training.sums import Sums

__all__ = ["Minimised", "StepResult", "Sums", "evaluate_batch", "train_step"]

OneBatch = TypeVar("OneBatch", bound=LaidOut)
Losses = TypeVar("Losses")


class Minimised(Protocol[OneBatch, Losses]):
    """What a step minimises: pretraining's objective, or a task's. Called with a micro-batch, it gives the losses, as
    sums that carry gradients.
    """

    model: nn.Module
    device: torch.device
    shapes: FixedShapes | None
    graphs: PassGraphs | None

    def micro_batch(self, batch: Batch) -> OneBatch:
        """A collated batch as this objective takes it, still in the CPU's memory."""

    def numbers(self, batch: OneBatch) -> tuple[int, ...]:
        """Of the terms that the losses are divided by."""

    def __call__(self, cpu_batch: OneBatch) -> Losses: ...

    def mean(self, losses: Losses, numbers: Sequence[Tensor | int]) -> Tensor:
        """The losses divided by the step's global numbers, added."""

    def sums(self, losses: Losses, batch: OneBatch) -> Sums:
        """What was seen of a batch."""


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
    objective: Minimised[OneBatch, Losses],
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[OneBatch],
    *,
    clip_norm: float,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Updates the model once, unless the loss or a gradient is not finite. Never waits for the device.

    The gradient is that of the loss per term (in pretraining: per predicted token, plus the pair loss per pair) over
    all `micro_batches` of all ranks together, clipped to `clip_norm` (norm over all parameters). The optimizer is one
    of PyTorch's fused ones.
    """
    numbers: Sequence[Tensor | int] = [
        sum(column) for column in zip(*map(objective.numbers, micro_batches), strict=True)
    ]
    device, model = objective.device, objective.model
    if ranks.mesh is not None or objective.graphs is not None:
        numbers = ranks.sum_over_data(moved(torch.tensor(numbers), device)).unbind()
    sums = Sums()
    for at, batch in enumerate(micro_batches):
        around = ranks.around_last_pass(model) if at == len(micro_batches) - 1 else None
        if objective.graphs is not None:
            losses = objective.graphs.differentiated(objective, batch, numbers, around, is_first=at == 0)
        else:
            losses = differentiated(objective, batch, numbers, around)
        sums = sums.plus(objective.sums(losses, batch))
    sums, norm = sums.over(ranks, device), ranks.gradient_norm(model)
    applied = norm.isfinite() & sums.losses().isfinite()
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
def evaluate_batch(objective: Minimised[OneBatch, Losses], batch: OneBatch, ranks: Ranks = ALONE) -> Sums:
    """The losses of one batch of every rank, for a model in evaluation mode."""
    return objective.sums(call_within(objective.model, objective, batch), batch).over(ranks, objective.device)
