"""Products that go on while their operands travel: what PyTorch calls asynchronous tensor parallelism.

Under sequence parallelism (arXiv 2205.05198, section 4.2.2) a column-parallel product follows an all-gather of tokens,
and a reduce-scatter follows a row-parallel one; in the backward pass it is the other way round. PyTorch's `symm_mem`
operators do both at once, a rank's tokens at a time: while those of one are multiplied, those of the next are copied
from its memory. The GPUs have to reach each other's memory.

T tokens, t = T / degree, K input and N output features; any dimensions before or after that of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _symmetric_memory  # noqa: F401  (registers the operators)
from torch.distributed.device_mesh import DeviceMesh

from megatron_bert.errors import UserError

__all__ = ["check_overlap", "gathered_product", "scattered_product"]


def check_overlap(mesh: DeviceMesh) -> None:
    """Raises `UserError` where a tensor-parallel group is not of GPUs of one host that reach each other's memory."""
    if mesh.device_type != "cuda":
        raise UserError("mesh.overlap copies from one GPU's memory to another's: leave it out on CPUs")
    here, devices = torch.cuda.current_device(), range(torch.cuda.device_count())
    if mesh.size() > len(devices) or not all(
        torch.cuda.can_device_access_peer(here, other) for other in devices if other != here
    ):
        raise UserError("mesh.overlap needs a tensor-parallel group within one host, whose GPUs reach each other's "
                        "memory (NVLink); leave it out here")  # fmt: skip


def gathered_product(states: Tensor, weight: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """`states` (..., t, ..., K), this rank's tokens in `dim`, of all ranks times `weight` (N, K): (..., T, ..., N)."""
    product: Tensor = _Gathered.apply(states, weight, dim, mesh.get_group().group_name)  # type: ignore[no-untyped-call]
    return product


def scattered_product(states: Tensor, weight: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """`states` (..., T, ..., K) times `weight` (N, K), summed over the ranks: (..., t, ..., N), this rank's tokens in
    `dim`.
    """
    product: Tensor = _Scattered.apply(states, weight, dim, mesh.get_group().group_name)  # type: ignore[no-untyped-call]
    return product


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, dim: int, group: str) -> Tensor:
        gathered, (product,) = torch.ops.symm_mem.fused_all_gather_matmul(states.contiguous(), [weight.mT], dim, group)
        ctx.save_for_backward(gathered, weight)
        ctx.dim, ctx.group = dim, group
        return product  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gathered, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_states = torch.ops.symm_mem.fused_matmul_reduce_scatter(gradient, weight, "sum", ctx.dim, ctx.group)
        return of_states, _of_weight(gradient, gathered), None, None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, dim: int, group: str) -> Tensor:
        states = states.contiguous()
        ctx.save_for_backward(states, weight)
        ctx.dim, ctx.group = dim, group
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(states, weight.mT, "sum", dim, group)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states, weight = ctx.saved_tensors
        gathered, (of_states,) = torch.ops.symm_mem.fused_all_gather_matmul(
            gradient.contiguous(), [weight], ctx.dim, ctx.group
        )
        return of_states, _of_weight(gathered, states), None, None


def _of_weight(gradient: Tensor, states: Tensor) -> Tensor:
    """(N, K), from all tokens' (..., N) and (..., K)."""
    return gradient.flatten(0, -2).mT @ states.flatten(0, -2)
