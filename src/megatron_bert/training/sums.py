"""What steps saw, added up: losses, right predictions and the numbers of both."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_bert.training.microbatch import moved
from megatron_bert.training.ranks import Ranks

__all__ = ["Sums"]

_SUMMED = torch.float64  # exact for every number that is counted

# Each term of a loss: its sum, the sum of what was predicted right, the number that both are of, and how they are
# called in records.
_TERMS = {
    "masked_lm": ("masked_lm_correct", "num_masked", "masked_lm_"),
    "pair": ("pair_correct", "num_pairs", "pair_"),
    "task": ("task_correct", "num_task", ""),
}


@dataclass(frozen=True)
class Sums:
    """What a step (or several, added) saw. The tensors stay on the device until somebody looks.

    The losses and their numbers leave out steps that were not applied; tokens and attended pairs count all work.
    """

    masked_lm: Tensor | float = 0.0
    pair: Tensor | float = 0.0
    task: Tensor | float = 0.0
    masked_lm_correct: Tensor | float = 0.0
    pair_correct: Tensor | float = 0.0
    task_correct: Tensor | float = 0.0
    num_masked: Tensor | int = 0
    num_pairs: Tensor | int = 0
    num_task: Tensor | int = 0
    num_predicted: Tensor | int = 0
    num_tokens: Tensor | int = 0
    num_attended_pairs: Tensor | int = 0

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        names = [field.name for field in fields(self)]
        return Sums(**{name: getattr(self, name) + getattr(other, name) for name in names})

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
        changes: dict[str, Any] = {}
        for name, (correct, number, _) in _TERMS.items():
            changes |= {one: torch.where(applied, getattr(self, one), 0.0) for one in (name, correct)}
            changes[number] = applied * getattr(self, number)
        return replace(self, **changes)

    def losses(self) -> Tensor:
        """All of them added: finite where each of them is."""
        return torch.as_tensor(sum(getattr(self, name) for name in _TERMS))

    def means(self) -> dict[str, float]:
        """Losses in nats per predicted token, per pair and per term of a task, and the shares predicted right; nothing
        of what was not there. `loss` is their sum, the quantity that is minimised. Waits for the device.
        """
        means: dict[str, float] = {}
        for name, (correct, number, prefix) in _TERMS.items():
            if terms := int(getattr(self, number)):
                means[f"{prefix}loss"] = float(getattr(self, name)) / terms
                means[f"{prefix}accuracy"] = float(getattr(self, correct)) / terms
        if not means:
            return {}
        return {"loss": sum(value for name, value in means.items() if name.endswith("loss")), **means}
