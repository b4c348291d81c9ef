"""Fills a model that is spread over ranks from a folder in Transformers' format: each rank reads its own part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_bert.checkpoint.folder import check_folder, read_shapes, refusing_pickles, weight_files
from megatron_bert.errors import UserError
from megatron_bert.model.loading import num_tokens_beside, report_differences
from megatron_bert.parallel.materialize import initialize, local_slices, parameter_names
from megatron_bert.parallel.region import local_part

__all__ = ["load_shards"]


@torch.no_grad()
def load_shards(model: Any, folder: Path, *, seed: int = 0) -> None:
    """Fills the parameters of a materialized `model`, converting their number type to the model's.

    What the folder lacks is initialized from `seed`, and what it has too many is ignored, with a line in the log each,
    as by `from_pretrained`. Of safetensors, no more than one parameter is mapped into memory beside the rank's part.

    Raises:
        UserError: what `check_folder` finds, or a weight of another shape than the model's.
    """
    shapes = check_folder(folder)
    source = _Source(folder)
    missing, found = set[str](), set[str]()
    for parameter, names in parameter_names(model):
        keys = [key for name in names for key in _spellings(name) if key in shapes]
        if not keys:
            missing.add(names[0])
            continue
        key = keys[0]
        found.update(keys)
        if shapes[key] != tuple(parameter.shape):
            raise UserError(f"{folder}: {key} is {list(shapes[key])}, and the model's is {list(parameter.shape)}")
        part = local_part(parameter)
        if part.numel() > 0:
            part.copy_(source.read(key, local_slices(parameter)))
    initialize(model, seed, only=missing)
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected)
    unexpected = [key for key in shapes if key not in found and not re.search(ignored, key)]
    report_differences(type(model).__name__.removeprefix("FSDP"), missing, unexpected)
    num_tokens = num_tokens_beside(folder)
    if num_tokens is not None and num_tokens < model.config.vocab_size:
        model.num_tokens = num_tokens


class _Source:
    """Where in a folder the weights of each name are."""

    def __init__(self, folder: Path) -> None:
        self._files = {key: file for file in weight_files(folder) for key in read_shapes(file)}
        self._pickled: dict[Path, dict[str, Tensor]] = {}

    def read(self, key: str, slices: tuple[slice, ...]) -> Tensor:
        """This part of the weight."""
        file = self._files[key]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:  # each time: what was mapped goes when it is closed
                part: Tensor = opened.get_slice(key)[slices]
                return part
        if file not in self._pickled:
            self._pickled[file] = _unpickled(file)
        return self._pickled[file][key][slices]


def _unpickled(file: Path) -> dict[str, Tensor]:
    with refusing_pickles(str(file)):
        try:
            weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # from before 2020: it cannot be mapped, and is read whole
            weights = torch.load(file, map_location="cpu", weights_only=True)
    return weights


def _spellings(name: str) -> list[str]:
    """How a checkpoint may spell a parameter: with or without the base model's prefix."""
    bare = name.removeprefix("bert.")
    return [name, bare, f"bert.{bare}"]
