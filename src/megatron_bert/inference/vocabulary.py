"""The most probable tokens of a vocabulary, which may lie in parts on several ranks: logits are never sent.

M masks, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megatron_bert.parallel.region import TensorRegion

__all__ = ["most_probable"]


def most_probable(
    logits_MV: Tensor, num_candidates: int, *, num_tokens: int, region: TensorRegion | None = None
) -> tuple[Tensor, Tensor]:
    """The probabilities (fp32) and numbers of the most probable tokens, (M, K) each, the most probable first.

    Args:
        logits_MV: all logits, or with `region` this rank's part (M, V / degree) of them.
        num_tokens: the rows beyond are padding: they are never chosen and have no share in the probabilities.
        region: the tensor-parallel ranks, all of which have to call this; each sends its best K and one sum a mask.
    """
    first = 0 if region is None else region.rank * logits_MV.shape[1]
    logits_MV = logits_MV[:, : max(num_tokens - first, 0)].float()
    best = logits_MV.topk(min(num_candidates, logits_MV.shape[1]), dim=-1)
    total_M1 = logits_MV.logsumexp(dim=-1, keepdim=True)
    values_MK, tokens_MK = best.values, best.indices + first
    if region is not None:
        fill = (0, num_candidates - values_MK.shape[1])
        values_MK = region.gather_features(functional.pad(values_MK, fill, value=-torch.inf))
        tokens_MK = region.gather_features(functional.pad(tokens_MK, fill))
        total_M1 = region.gather_features(total_M1).logsumexp(dim=-1, keepdim=True)
        best = values_MK.topk(num_candidates, dim=-1)
        values_MK, tokens_MK = best.values, tokens_MK.gather(-1, best.indices)
    return (values_MK - total_M1).exp(), tokens_MK
