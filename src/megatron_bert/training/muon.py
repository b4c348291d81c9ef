"""Muon on matrices, AdamW on the rest.

Muon: K. Jordan et al. 2024, *Muon: An optimizer for hidden layers in neural networks*
(kellerjordan.github.io/posts/muon). The rate's scale, so that AdamW's learning rate and weight decay carry over: J. Liu
et al. 2025, *Muon is Scalable for LLM Training* (arXiv 2502.16982, section 2.2). The numbers are those of
`torch.optim.Muon`, which takes one matrix at a time, so that a small network's step is mostly launches, and cannot
leave out a step without the host having to ask the device.

Legend: n matrices of one shape, A rows, B columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_bert.parallel.materialize import local_slices, whole_value
from megatron_bert.parallel.region import local_part

__all__ = ["Muon", "orthogonalized"]

# The polynomial a x + b x^3 + c x^5, iterated: it takes every singular value in (0, 1] near 1 (Jordan et al. 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
_RMS_OF_ADAMW = 0.2  # arXiv 2502.16982, section 2.2


def orthogonalized(matrices_nAB: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values between 0.7 and 1.2; bfloat16 [n, A, B]."""
    wide = matrices_nAB.bfloat16()
    if tall := wide.shape[1] > wide.shape[2]:
        wide = wide.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide.mT if tall else wide


class Muon(torch.optim.AdamW):
    """Muon on `matrices`, AdamW on `others`; one optimizer to whoever steps, saves or loads it.

    Like PyTorch's fused optimizers it takes `grad_scale` (gradients are divided by it) and `found_inf` (1: everything
    stays as it is) as attributes. Of matrices that are distributed, each rank keeps its part of the momentum, and puts
    the whole ones together for their update.

    Args:
        others: parameter groups.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Sequence[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        groups = [{"params": list(matrices), "weight_decay": weight_decay, "momentum": momentum}, *others]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called whenever a state is loaded. AdamW's looks for the count of steps, which matrices do not have."""
        groups = state["param_groups"]
        super().__setstate__({**state, "param_groups": groups[1:]})  # type: ignore[no-untyped-call]
        self.param_groups = groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both; there is no closure."""
        assert closure is None
        groups = self.param_groups
        try:
            self.param_groups = groups[1:]
            super().step()
        finally:
            self.param_groups = groups
        group = groups[0]
        alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                places = parameter.placements if isinstance(parameter, DTensor) else ()
                alike.setdefault((parameter.shape, local_part(parameter).shape, places), []).append(parameter)
        for parameters in alike.values():
            self._step_alike(parameters, group["lr"], group["weight_decay"], group["momentum"])

    def _step_alike(
        self, parameters: list[nn.Parameter], rate: float, weight_decay: float, momentum_share: float
    ) -> None:
        """The step of matrices of one shape; a rank's parts of them are of one shape too."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)  # type: ignore[arg-type]
        buffers = [local_part(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        weights = [local_part(parameter) for parameter in parameters]
        skipped = getattr(self, "found_inf", None)
        applied: Tensor | float = 1.0 if skipped is None else 1.0 - skipped
        momentum_nab = torch.stack(buffers)
        gradient_nab = torch.stack([local_part(parameter.grad) for parameter in parameters])  # type: ignore[arg-type]
        gradient_nab = gradient_nab / getattr(self, "grad_scale", 1.0)
        if skipped is not None:  # its gradient may be no number, and 0 times that is none either
            gradient_nab = torch.where(skipped > 0, momentum_nab, gradient_nab)
        momentum_nab = momentum_nab.lerp(gradient_nab, 1 - momentum_share)
        torch._foreach_copy_(buffers, list(momentum_nab.unbind()))
        ahead_nab = gradient_nab.lerp(momentum_nab, momentum_share)  # Nesterov's
        update_nab = orthogonalized(_whole(ahead_nab, parameters[0]))[:, *local_slices(parameters[0])]
        scale = _RMS_OF_ADAMW * max(parameters[0].shape) ** 0.5
        change_nab = update_nab.to(weights[0].dtype) * (-rate * scale * applied)
        torch._foreach_mul_(weights, 1.0 - rate * weight_decay * applied)
        torch._foreach_add_(weights, list(change_nab.unbind()))


def _whole(parts_nab: Tensor, like: nn.Parameter) -> Tensor:
    """The matrices (n, A, B) of which every rank has its part, each distributed as `like` is: put together at once."""
    if not isinstance(like, DTensor):
        return parts_nab
    number, (rows, columns) = len(parts_nab), like.shape
    distributed = DTensor.from_local(
        parts_nab.contiguous(), like.device_mesh, [_one_dim_on(place) for place in like.placements], run_check=False,
        shape=torch.Size((number, rows, columns)), stride=(rows * columns, columns, 1),
    )  # fmt: skip
    return whole_value(distributed)


def _one_dim_on(placement: Placement) -> Placement:
    if isinstance(placement, _StridedShard):  # tensor-parallel and fully sharded in one dimension
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement
