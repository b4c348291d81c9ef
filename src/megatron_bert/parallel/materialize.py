"""Memory and first values for a model that was built on the meta device: each rank its own part only."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megatron_bert.parallel.region import local_part
from megatron_bert.parallel.streams import key

__all__ = ["initialize", "local_slices", "materialize"]


def materialize(model: nn.Module, device: torch.device) -> None:
    """Gives parameters and buffers memory on `device`, without values. Ties stay."""
    names: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for part, parameter in module._parameters.items():
            names.setdefault(id(parameter), []).append((module, part))
    model.to_empty(device=device)
    for (first, first_part), *others in names.values():
        for module, part in others:
            module._parameters[part] = first._parameters[first_part]


@torch.no_grad()
def initialize(model: Any, seed: int, only: set[str] | None = None) -> None:
    """The model's own first values, of which each rank keeps its part.

    A module's numbers follow from `seed` and its name: they do not depend on the number of ranks, nor on the device.
    Each rank draws them whole, on the CPU, for one module at a time, so that it never holds more than the largest (the
    word embeddings) beside its own parts.

    Args:
        only: names of the parameters to fill; all of them by default.
    """
    done: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            parts = {
                part: parameter
                for part, parameter in module._parameters.items()
                if parameter is not None and id(parameter) not in done
                and (only is None or _joined(name, part) in only)
            }  # fmt: skip
            if not parts and not module._buffers:
                continue
            torch.manual_seed(key(seed, name))
            whole = copy.copy(module)
            whole._parameters = {
                part: None if parameter is None else nn.Parameter(torch.empty(parameter.shape))
                for part, parameter in module._parameters.items()
            }
            model._init_weights(whole)
            for part, parameter in parts.items():
                done.add(id(parameter))
                drawn = whole._parameters[part]
                assert drawn is not None
                local_part(parameter).copy_(drawn[local_slices(parameter)])


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole parameter this rank has."""
    if not isinstance(parameter, DTensor):
        return (slice(None),) * parameter.ndim
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _joined(module: str, part: str) -> str:
    return f"{module}.{part}" if module else part
