"""Memory and first values for a model that was built on the meta device: each rank its own part only."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_bert.parallel.region import local_part
from megatron_bert.parallel.streams import key

__all__ = ["initialize", "local_slices", "materialize", "parameter_names", "whole_parameters", "whole_value"]


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives parameters and buffers memory on `device`, without values. Ties stay."""
    ties = [names for _, names in parameter_names(model) if len(names) > 1]
    model.to_empty(device=device)
    for first, *others in ties:
        source, source_part = _owner(model, first)
        for name in others:
            module, part = _owner(model, name)
            module._parameters[part] = source._parameters[source_part]


@torch.no_grad()
def initialize(model: Any, seed: int, only: set[str] | None = None) -> None:
    """The model's own first values, of which each rank keeps its part.

    A module's numbers follow from `seed` and its name: they do not depend on the number of ranks, nor on the device.
    Each rank draws them whole, on the CPU, for one module at a time, so that it never holds more than the largest (the
    word embeddings) beside its own parts.

    Args:
        only: names of the parameters to fill; all of them by default.
    """
    wanted = {names[0]: value for value, names in parameter_names(model) if only is None or names[0] in only}
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            parts = {part: wanted[full] for part in module._parameters if (full := _joined(name, part)) in wanted}
            if not parts and not module._buffers:
                continue
            torch.manual_seed(key(seed, name))
            drawn = copy.copy(module)
            drawn._parameters = {
                part: None if parameter is None else nn.Parameter(torch.empty(parameter.shape))
                for part, parameter in module._parameters.items()
            }
            model._init_weights(drawn)
            for part, parameter in parts.items():
                whole: Any = drawn._parameters[part]
                local_part(parameter).copy_(whole[local_slices(parameter)])


def parameter_names(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Each parameter once, with all its names: a tied one has several."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(names.values())


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole parameter this rank has."""
    if not isinstance(parameter, DTensor):
        return (slice(None),) * parameter.ndim
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@torch.no_grad()
def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value, on the CPU, of each parameter, of tied ones the first name. All ranks have to iterate, and
    put one parameter together at a time.
    """
    for parameter, names in parameter_names(model):
        yield names[0], whole_value(parameter).cpu()


def whole_value(tensor: Tensor) -> Tensor:
    """The whole of a distributed tensor, put together on every rank, or a tensor that is not distributed."""
    if not isinstance(tensor, DTensor):
        return tensor
    for axis in range(tensor.device_mesh.ndim):  # data-parallel parts of a tensor-parallel part come first
        placements = [Replicate() if at == axis else old for at, old in enumerate(tensor.placements)]
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter of this name, and its name there."""
    module, _, part = name.rpartition(".")
    return model.get_submodule(module), part


def _joined(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part
