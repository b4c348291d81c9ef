"""Puts tensor and sequence parallelism onto a model, as the sharding table says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.model.layers import MegatronBertEncoder, MegatronBertIntermediate, MegatronBertSelfAttention
from megatron_bert.model.linear import Linear
from megatron_bert.parallel import layers
from megatron_bert.parallel.region import TensorRegion
from megatron_bert.sharding import Sharding, sharding_of, split_dim

__all__ = ["apply_tensor_parallel", "check_degree"]

_TWINS: dict[tuple[type[nn.Module], Sharding], type[nn.Module]] = {
    (Linear, "column"): layers.ColumnParallelLinear,
    (Linear, "row"): layers.RowParallelLinear,
    (Linear, "vocabulary"): layers.VocabularyParallelLinear,
    (Linear, "replicated"): layers.ReplicatedLinear,
    (nn.LayerNorm, "replicated"): layers.ReplicatedLayerNorm,
    (nn.Embedding, "vocabulary"): layers.VocabularyParallelEmbedding,
    (nn.Embedding, "replicated"): layers.ReplicatedEmbedding,
}
_BLOCK_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    MegatronBertSelfAttention: layers.ParallelSelfAttention,
    MegatronBertIntermediate: layers.ParallelIntermediate,
}


def apply_tensor_parallel(model: Any, region: TensorRegion, *, gathers_logits: bool = True) -> None:
    """Leaves on each rank its part of `model`, whose values, or meta device, are the same on all of them.

    Every parameter becomes a DTensor. Ties stay. The model is called as before, with the whole batch on every rank, and
    gives what it gave before.

    Args:
        gathers_logits: whether the vocabulary's logits are put together; otherwise a language model's are this rank's
            part, as `loss` takes them.

    Raises:
        UserError: the shape cannot be split so.
    """
    check_degree(model.config, region.degree)
    distributed: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for part, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in distributed:
                distributed[id(parameter)] = _distributed(parameter, split_dim(f"{name}.{part}"), region)
        if module._parameters:
            _change_class(module, _TWINS.get((type(module), sharding_of(name))), region)
        _change_class(module, _BLOCK_TWINS.get(type(module)), region)
        if region.sequence_parallel and type(module) is MegatronBertEncoder:
            _change_class(module, layers.SequenceParallelEncoder, region)
        if isinstance(module, layers.VocabularyParallelLinear):
            module.gathers_logits = gathers_logits
    for module in model.modules():
        for part, parameter in module._parameters.items():
            module._parameters[part] = None if parameter is None else distributed[id(parameter)]


def check_degree(config: MegatronBertConfig, degree: int) -> None:
    """Raises `UserError` where a model of this shape cannot be split over `degree` tensor-parallel ranks."""
    for field in ("num_attention_heads", "intermediate_size", "vocab_size"):
        size = getattr(config, field)
        if size % degree:
            hint = f"; pad the vocabulary to a multiple of {128 * degree}" if field == "vocab_size" else ""
            raise UserError(f"{field} {size} is not divisible by the tensor-parallel degree {degree}{hint}")


def _distributed(parameter: Tensor, dim: int | None, region: TensorRegion) -> nn.Parameter:
    """As a DTensor that holds this rank's part only, in memory of its own."""
    part = parameter.detach() if dim is None else parameter.detach().chunk(region.degree, dim)[region.rank].clone()
    placement = Replicate() if dim is None else Shard(dim)
    tensor = DTensor.from_local(part.contiguous(), region.mesh, [placement], run_check=False)
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _change_class(module: nn.Module, twin: type[nn.Module] | None, region: TensorRegion) -> None:
    if twin is not None:
        module.__class__ = twin
        module.region = region  # type: ignore[assignment]
