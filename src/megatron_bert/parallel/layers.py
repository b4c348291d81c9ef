"""The modules of `model/` on tensor-parallel ranks (arXiv 1909.08053, section 3).

A module is turned into its twin here by changing its class: names, weights and configuration stay. Parameters are
DTensors, which know the whole shape; what computes with them sees this rank's part.

B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from megatron_bert.model.layers import MegatronBertEncoder, MegatronBertIntermediate, MegatronBertSelfAttention
from megatron_bert.model.linear import Linear
from megatron_bert.parallel.region import TensorRegion
from megatron_bert.parallel.streams import own_stream

__all__ = [
    "ColumnParallelLinear",
    "ParallelIntermediate",
    "ParallelSelfAttention",
    "ReplicatedEmbedding",
    "ReplicatedLayerNorm",
    "ReplicatedLinear",
    "RowParallelLinear",
    "SequenceParallelEncoder",
    "VocabularyParallelEmbedding",
    "VocabularyParallelLinear",
]


class _LocalParameter:
    """A parameter as this rank computes with it: its part; the gradient becomes this rank's part of the parameter's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module, owner: type) -> Any:
        parameter: Any = module._parameters[self.name]
        # One that is sharded over data-parallel ranks too lies idle: FSDP asks for it, and nobody computes with it.
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim == 1:
            return parameter.to_local()
        return parameter


class _OnShards(nn.Module):
    region: TensorRegion
    weight: Any = _LocalParameter()
    bias: Any = _LocalParameter()


class ReplicatedLinear(_OnShards, Linear):
    """The same on every rank."""


class ReplicatedLayerNorm(_OnShards, nn.LayerNorm):
    """The same on every rank, or under sequence parallelism on this rank's tokens."""


class ReplicatedEmbedding(_OnShards, nn.Embedding):
    """The same on every rank."""


class ColumnParallelLinear(_OnShards, Linear):
    """This rank's output features of all input features. Whoever calls it has entered the sharded region."""


class RowParallelLinear(_OnShards, Linear):
    """All output features of this rank's input features, and out of the sharded region."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, S, features / degree) -> (B, S, D). The bias is added once, after the ranks' parts are summed."""
        summed = self.region.leave_linear(_as_computed(input), self.weight)
        return summed + self.bias.to(summed.dtype)  # type: ignore[no-any-return]  # autocast would widen the sum


class VocabularyParallelEmbedding(_OnShards, nn.Embedding):
    """Each rank looks up the tokens whose rows it has; the sum over ranks has every token once."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, S) token ids -> (B, S, D)."""
        weight = self.weight
        rows = weight.shape[0]
        local_ids = input - self.region.rank * rows
        is_here = (local_ids >= 0) & (local_ids < rows)
        padding = -1 if self.padding_idx is None else self.padding_idx - self.region.rank * rows
        embeddings = functional.embedding(
            local_ids.where(is_here, 0), weight, padding_idx=padding if 0 <= padding < rows else None
        )
        return self.region.sum(embeddings * is_here.unsqueeze(-1))


class VocabularyParallelLinear(_OnShards, Linear):
    """This rank's part of the vocabulary's logits; with `gathers_logits` all of them."""

    gathers_logits: bool

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., V / degree) or (..., V)."""
        logits = super().forward(self.region.copy(_as_computed(input)))
        return self.region.gather_features(logits) if self.gathers_logits else logits


class ParallelSelfAttention(MegatronBertSelfAttention):
    """This rank's heads of all tokens. Attention probabilities that are asked for are those of this rank's heads."""

    region: TensorRegion

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        num_tokens: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class; `num_tokens` is the sequence's length where `hidden_states` has a part of it."""
        hidden_states = _as_computed(hidden_states)
        if self.region.overlaps and not self.is_cross_attention:
            parts = (self.query, self.key, self.value)
            weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
            hidden_states = self.region.enter_linear(hidden_states, weight, num_tokens) + bias.to(hidden_states.dtype)
        else:
            hidden_states = self.region.enter(hidden_states, num_tokens)
        if encoder_hidden_states is not None:
            encoder_hidden_states = self.region.copy(encoder_hidden_states)
        return super().forward(hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)

    def projections(self, hidden_states: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """As the base class, or what `forward` has computed while the tokens travelled."""
        return hidden_states.chunk(3, dim=-1) if self.region.overlaps else super().projections(hidden_states)

    def core(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the base class; dropout draws from this rank's own stream."""
        if not self.training or self.dropout.p == 0.0 or self.region.sequence_parallel:
            return super().core(query, *args, **kwargs)
        result: tuple[Tensor, Tensor | None] = self._core_in_own_stream(query, *args, **kwargs)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph cannot change a random stream
    def _core_in_own_stream(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with own_stream(self.region.rank, query.device):
            return super().core(query, *args, **kwargs)


class ParallelIntermediate(MegatronBertIntermediate):
    """This rank's part of the MLP's width."""

    region: TensorRegion

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, F / degree)."""
        if not self.region.overlaps:
            return super().forward(self.region.enter(_as_computed(hidden_states)))
        dense: Any = self.dense
        wide = self.region.enter_linear(_as_computed(hidden_states), dense.weight)
        activated: Tensor = self.intermediate_act_fn(wide + dense.bias.to(wide.dtype))
        return activated


class SequenceParallelEncoder(MegatronBertEncoder):
    """The layers on this rank's tokens: each rank's dropout masks are its own."""

    region: TensorRegion

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S, D) -> (B, S, D), whole on every rank, before and after. (Around `forward`, whatever that is by now: it
        may have been replaced, to compile several layers together.)
        """
        num_tokens, drops = hidden_states.shape[1], self.training and _has_dropout(self)
        with own_stream(self.region.rank, hidden_states.device) if drops else nullcontext():
            tokens = self.region.split_tokens(hidden_states)
            tokens = super().__call__(tokens, *args, num_tokens=num_tokens, **kwargs)
        return self.region.gather_tokens(tokens, num_tokens)


def _as_computed(states: Tensor) -> Tensor:
    """In the number type that the product after it takes: autocast has norms give float32, and twice as much would be
    sent.
    """
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
