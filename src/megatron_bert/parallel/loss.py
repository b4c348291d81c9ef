"""Cross-entropy where each tensor-parallel rank has a part of the vocabulary's logits (arXiv 1909.08053, section 3).

Only a few numbers a token travel, never logits.

M tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from megatron_bert.parallel.region import TensorRegion

__all__ = ["token_losses_on", "vocabulary_parallel_cross_entropy"]


def vocabulary_parallel_cross_entropy(
    logits_MV: Tensor, targets_M: Tensor, region: TensorRegion, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """What `torch.nn.functional.cross_entropy(..., reduction="none")` gives for the whole vocabulary's logits.

    Args:
        logits_MV: (M, V / degree), this rank's part of the vocabulary, in the ranks' order; float32.
        targets_M: int64, rows of the whole vocabulary or `ignore_index`.

    Returns:
        The losses in nats, float32 (M,), 0 where ignored; and whether the target is the argmax, bool (M,), without a
        gradient. Both the same on every rank.
    """
    losses, correct = _CrossEntropy.apply(logits_MV, targets_M, region, ignore_index)  # type: ignore[no-untyped-call]
    return losses, correct


def token_losses_on(region: TensorRegion) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function from (head, hidden (M, D), targets (M,)) to the summed loss in nats and the number of right
    predictions, for a head that gives this rank's logits.
    """

    def token_losses(head: nn.Module, hidden_MD: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        losses_M, correct_M = vocabulary_parallel_cross_entropy(head(hidden_MD).float(), targets_M, region)
        return losses_M.sum(), correct_M.sum().float()

    return token_losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_MV: Tensor, targets_M: Tensor, region: TensorRegion, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        rows = logits_MV.shape[-1]
        local_targets_M = targets_M - region.rank * rows
        is_here_M = (local_targets_M >= 0) & (local_targets_M < rows)
        local_targets_M = local_targets_M.where(is_here_M, 0)
        counts_M = targets_M != ignore_index

        highest_M, place_M = logits_MV.max(dim=-1)
        top_M = _all_reduced(highest_M, "max", region)
        exponentials_MV = (logits_MV - top_M[:, None]).exp_()
        # The lowest row of several highest ones is the argmax: one before the target, here, makes the target wrong.
        is_beaten_M = (highest_M == top_M) & (place_M + region.rank * rows < targets_M)
        target_logits_M = logits_MV.gather(-1, local_targets_M[:, None])[:, 0].where(is_here_M, 0.0)
        parts_3M = torch.stack([exponentials_MV.sum(-1), target_logits_M, is_beaten_M.float()])
        sums_M, target_logits_M, beaten_M = _all_reduced(parts_3M, "sum", region)

        ctx.save_for_backward(exponentials_MV, sums_M, local_targets_M, is_here_M, counts_M)
        correct_M = (target_logits_M == top_M) & (beaten_M == 0) & counts_M
        ctx.mark_non_differentiable(correct_M)
        return (sums_M.log() + top_M - target_logits_M).where(counts_M, 0.0), correct_M

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        """The softmax, less 1 at the target."""
        exponentials_MV, sums_M, local_targets_M, is_here_M, counts_M = ctx.saved_tensors
        gradient_M = gradient_M * counts_M
        gradient_MV = exponentials_MV * (gradient_M / sums_M)[:, None]
        gradient_MV.scatter_add_(-1, local_targets_M[:, None], -(gradient_M * is_here_M)[:, None])
        return gradient_MV, None, None, None


def _all_reduced(values: Tensor, operation: str, region: TensorRegion) -> Tensor:
    reduced: Tensor = collectives.all_reduce(values, operation, region.mesh)
    return reduced
