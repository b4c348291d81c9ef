"""The communication between replicated and sharded computation: f and g of arXiv 1909.08053 (section 3, figure 3), and
their counterparts under sequence parallelism (arXiv 2205.05198, section 4.2.2).

B batch, S sequence (or 1 and T packed tokens), D hidden or any feature size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional

from megatron_bert.model.linear import linear
from megatron_bert.parallel.overlap import check_overlap, gathered_product, scattered_product

__all__ = ["TensorRegion", "local_part"]

_REPLICATED, _PARTIAL, _TOKENS, _FEATURES = Replicate(), Partial(), Shard(1), Shard(-1)


@dataclass(frozen=True)
class TensorRegion:
    """The tensor-parallel ranks as a layer sees them.

    Attributes:
        mesh: of one dimension.
        sequence_parallel: between the sharded regions, hold S / degree tokens (rounded up) on each rank, instead of all
            of them on every rank. Where S is no multiple of the degree, the last ranks' parts end in zeros that nothing
            depends on.
        overlaps: with sequence parallelism, multiply while tokens travel (see `overlap`).
        degree: the number of ranks.
        rank: this process's place among them.
    """

    mesh: DeviceMesh
    sequence_parallel: bool = False
    overlaps: bool = False
    degree: int = field(init=False)
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        if self.overlaps:
            check_overlap(self.mesh)
        object.__setattr__(self, "degree", self.mesh.size())
        object.__setattr__(self, "rank", self.mesh.get_local_rank())

    def copy(self, states: Tensor) -> Tensor:
        """f: into a sharded region. The identity, and in the backward pass an all-reduce."""
        return self._redistribute(states, _REPLICATED, _REPLICATED, gradient=_PARTIAL)

    def enter(self, states: Tensor, num_tokens: int | None = None) -> Tensor:
        """From the residual stream into a sharded region: `copy`; under sequence parallelism an all-gather to
        (B, num_tokens, D), or with the filled-up end where no number is given, and in the backward pass a
        reduce-scatter.
        """
        if not self.sequence_parallel:
            return self.copy(states)
        gathered = self._redistribute_tokens(states, _TOKENS, _REPLICATED, gradient=_PARTIAL)
        return gathered if num_tokens is None else gathered.narrow(1, 0, num_tokens)

    def leave(self, states: Tensor) -> Tensor:
        """g: the sum of the ranks' parts, back into the residual stream. An all-reduce, and in the backward pass the
        identity; under sequence parallelism a reduce-scatter and an all-gather.
        """
        if not self.sequence_parallel:
            return self.sum(states)
        return self._redistribute_tokens(self._filled_up(states), _PARTIAL, _TOKENS, gradient=_TOKENS)

    def enter_linear(self, states: Tensor, weight: Tensor, num_tokens: int | None = None) -> Tensor:
        """`enter` and the column-parallel product after it, without its bias, overlapped or not:
        (B, num_tokens, N / degree).
        """
        if not self.overlaps:
            return linear(self.enter(states, num_tokens), weight, None)
        product = gathered_product(_by_tokens(states), weight.to(states.dtype), self.mesh)
        product = _by_rows(product, len(states))
        return product if num_tokens is None else product.narrow(1, 0, num_tokens)

    def leave_linear(self, states: Tensor, weight: Tensor) -> Tensor:
        """A row-parallel product, and `leave`, overlapped or not."""
        if not self.overlaps:
            return self.leave(linear(states, weight, None))
        tokens = _by_tokens(self._filled_up(states))
        return _by_rows(scattered_product(tokens, weight.to(states.dtype), self.mesh), len(states))

    def sum(self, states: Tensor) -> Tensor:
        """The sum of the ranks' parts, on every rank: an all-reduce, and in the backward pass the identity."""
        return self._redistribute(states, _PARTIAL, _REPLICATED, gradient=_REPLICATED)

    def split_tokens(self, states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S / degree, D): this rank's part, and in the backward pass an all-gather."""
        return self._redistribute_tokens(self._filled_up(states), _REPLICATED, _TOKENS, gradient=_TOKENS)

    def gather_tokens(self, states: Tensor, num_tokens: int) -> Tensor:
        """(B, S / degree, D) -> (B, num_tokens, D): an all-gather, and in the backward pass this rank's part."""
        gathered = self._redistribute_tokens(states, _TOKENS, _REPLICATED, gradient=_REPLICATED)
        return gathered.narrow(1, 0, num_tokens)

    def gather_features(self, states: Tensor) -> Tensor:
        """(..., D / degree) -> (..., D): an all-gather, and in the backward pass this rank's part."""
        return self._redistribute(states, _FEATURES, _REPLICATED, gradient=_REPLICATED)

    def _redistribute(self, states: Tensor, source: Placement, target: Placement, *, gradient: Placement) -> Tensor:
        """The values that every rank has a part of as `source` says, as `target` says; `gradient` is what the ranks'
        gradients of the result are.
        """
        distributed = DTensor.from_local(states, self.mesh, [source], run_check=False)
        return distributed.redistribute(placements=[target]).to_local(grad_placements=[gradient])

    def _redistribute_tokens(
        self, states: Tensor, source: Placement, target: Placement, *, gradient: Placement
    ) -> Tensor:
        """`_redistribute` between parts of a sequence. Those of a batch of one, as packed tokens are, are sent as they
        lie; parts in any other dimension than the first have to be copied together.
        """
        if states.shape[0] > 1:
            return self._redistribute(states, source, target, gradient=gradient)
        source, target, gradient = (Shard(0) if place == _TOKENS else place for place in (source, target, gradient))
        return self._redistribute(states.squeeze(0), source, target, gradient=gradient).unsqueeze(0)

    def _filled_up(self, states: Tensor) -> Tensor:
        missing = -states.shape[1] % self.degree
        return functional.pad(states, (0, 0, 0, missing)) if missing else states


def _by_tokens(states: Tensor) -> Tensor:
    """(B, S, D) -> (S B, D): a rank's tokens lie together. Packed tokens, a batch of one, do as they are."""
    return states.transpose(0, 1).flatten(0, 1)


def _by_rows(tokens: Tensor, rows: int) -> Tensor:
    """(S B, D) -> (B, S, D)."""
    return tokens.view(-1, rows, tokens.shape[-1]).transpose(0, 1)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, or a tensor that is not distributed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
