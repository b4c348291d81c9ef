"""Cross-entropy where each tensor-parallel rank has a part of the vocabulary's logits (arXiv 1909.08053, section 3).

Only a few numbers a token travel, never logits.

M tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from megatron_bert.parallel.region import TensorRegion

__all__ = ["token_losses_on", "vocabulary_parallel_cross_entropy"]


def vocabulary_parallel_cross_entropy(
    logits_MV: Tensor, targets_M: Tensor, region: TensorRegion, ignore_index: int = -100, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """What `torch.nn.functional.cross_entropy(..., reduction="none")` gives for the whole vocabulary's logits.

    Args:
        logits_MV: (M, V / degree), this rank's part of the vocabulary, in the ranks' order; computed with in float32.
        targets_M: int64, rows of the whole vocabulary or `ignore_index`.
        compiled: what lies between two reductions becomes one kernel.

    Returns:
        The losses in nats, float32 (M,), 0 where ignored; and whether the target is the argmax, bool (M,), without a
        gradient. Both the same on every rank.
    """
    local_targets_M = targets_M - region.rank * logits_MV.shape[-1]
    losses, correct = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_MV, local_targets_M, targets_M != ignore_index, region, _compiled() if compiled else _PLAIN
    )
    return losses, correct


def token_losses_on(
    region: TensorRegion, *, compiled: bool = False
) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function from (head, hidden (M, D), targets (M,)) to the summed loss in nats and the number of right
    predictions, for a head that gives this rank's logits.
    """

    def token_losses(head: nn.Module, hidden_MD: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
        losses_M, correct_M = vocabulary_parallel_cross_entropy(head(hidden_MD), targets_M, region, compiled=compiled)
        return losses_M.sum(), correct_M.sum().float()

    return token_losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_MV: Tensor, local_targets_M: Tensor, counts_M: Tensor, region: TensorRegion, pieces: _Pieces
    ) -> tuple[Tensor, Tensor]:
        highest_M, place_M = pieces.highest(logits_MV)
        top_M = _all_reduced(highest_M, "max", region)
        parts_3M = pieces.parts(logits_MV, local_targets_M, highest_M, place_M, top_M)
        sums_M, target_logits_M, beaten_M = _all_reduced(parts_3M, "sum", region)

        ctx.save_for_backward(logits_MV, local_targets_M, counts_M, top_M, sums_M)
        ctx.pieces = pieces
        correct_M = (target_logits_M == top_M) & (beaten_M == 0) & counts_M
        ctx.mark_non_differentiable(correct_M)
        return (sums_M.log() + top_M - target_logits_M).where(counts_M, 0.0), correct_M

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_MV, local_targets_M, counts_M, top_M, sums_M = ctx.saved_tensors
        gradient_MV = ctx.pieces.gradient(logits_MV, local_targets_M, top_M, sums_M, gradient_M * counts_M)
        return gradient_MV, None, None, None, None


# --- What lies between two reductions. A target of another rank is no row of this one's.


def _highest(logits_MV: Tensor) -> tuple[Tensor, Tensor]:
    highest_M, place_M = logits_MV.max(dim=-1)
    return highest_M.float(), place_M


def _parts(logits_MV: Tensor, local_targets_M: Tensor, highest_M: Tensor, place_M: Tensor, top_M: Tensor) -> Tensor:
    """(3, M): the sum of exponentials, the target's logit, and whether a row before the target is as high as any: the
    lowest of several highest ones is the argmax.
    """
    rows = logits_MV.shape[-1]
    is_here_M = (local_targets_M >= 0) & (local_targets_M < rows)
    target_logits_M = logits_MV.gather(-1, local_targets_M.clamp(0, rows - 1)[:, None])[:, 0].float()
    is_beaten_M = (highest_M == top_M) & (place_M < local_targets_M)
    sums_M = torch.sub(logits_MV, top_M[:, None]).exp_().sum(-1)
    return torch.stack([sums_M, target_logits_M.where(is_here_M, 0.0), is_beaten_M.float()])


def _gradient(logits_MV: Tensor, local_targets_M: Tensor, top_M: Tensor, sums_M: Tensor, gradient_M: Tensor) -> Tensor:
    """The softmax, less 1 at the target."""
    gradient_MV = torch.sub(logits_MV, top_M[:, None]).exp_().div_(sums_M[:, None])  # float32; from here on in place
    is_target_MV = torch.arange(logits_MV.shape[-1], device=logits_MV.device) == local_targets_M[:, None]
    return gradient_MV.add_(is_target_MV, alpha=-1).mul_(gradient_M[:, None]).to(logits_MV.dtype)


class _Pieces(NamedTuple):
    highest: Callable[..., tuple[Tensor, Tensor]]
    parts: Callable[..., Tensor]
    gradient: Callable[..., Tensor]


_PLAIN = _Pieces(_highest, _parts, _gradient)


@cache
def _compiled() -> _Pieces:
    pieces: Any = (torch.compile(piece, dynamic=False) for piece in _PLAIN)
    return _Pieces(*pieces)


def _all_reduced(values: Tensor, operation: str, region: TensorRegion) -> Tensor:
    reduced: Tensor = collectives.all_reduce(values, operation, region.mesh)
    return reduced
