"""A model that is spread over ranks, from a folder in Transformers' format: each rank reads its own part."""

from __future__ import annotations

import os
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_bert.checkpoint.folder import check_config, check_folder, read_shapes, refusing_pickles, weight_files
from megatron_bert.checkpoint.load import check_required, model_folder
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertPreTrainedModel
from megatron_bert.model.loading import PROJECTION_BIASES, num_tokens_beside, report_differences
from megatron_bert.parallel.launch import agreed, check_agreement
from megatron_bert.parallel.materialize import initialize, local_slices, materialize, parameter_names
from megatron_bert.parallel.mesh import ParallelMesh
from megatron_bert.parallel.parallelize import parallelize
from megatron_bert.parallel.region import local_part
from megatron_bert.parallel.tensor import check_degree

__all__ = ["load_shards", "load_tensor_parallel"]

Model = TypeVar("Model", bound=MegatronBertPreTrainedModel)


def load_tensor_parallel(
    model_class: type[Model],
    path_or_name: str | os.PathLike[str],
    mesh: ParallelMesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    required: tuple[str, ...] = (),
) -> Model:
    """The model in a folder, or of that name on the hub, ready to predict on the tensor-parallel ranks of `mesh`. All
    of them have to call it; a language model's logits are each rank's part of them.

    It is built without memory, and each rank reads its part of each weight: none ever holds more than that, and one
    part more.

    Args:
        required: see `checkpoint.load.load_model`.

    Raises:
        SharedError: on every rank, for what `load_model` finds on any, for a shape that cannot be split over so many,
            and for ranks whose model or number type differs from the first one's.
    """
    folder, config = agreed(lambda: _checked(path_or_name, mesh.tensor_degree, required))
    digest = blake2b(config.to_json_string().encode(), digest_size=4).hexdigest()
    check_agreement({"the configuration's digest": digest, "the number type": str(dtype).removeprefix("torch.")})
    with torch.device("meta"):
        model: Any = model_class(config)
    model.to(dtype)
    parallelize(model, mesh)
    materialize(model, device)
    agreed(lambda: load_shards(model, folder))
    model.train(False)
    return cast(Model, model)


def _checked(
    path_or_name: str | os.PathLike[str], degree: int, required: tuple[str, ...]
) -> tuple[Path, MegatronBertConfig]:
    folder = model_folder(path_or_name)
    config = check_config(folder)
    try:
        check_degree(config, degree)
    except UserError as error:
        fitting = [str(number) for number in range(1, degree) if _fits(config, number)]
        raise UserError(f"{error}; it fits {' or '.join(fitting)} (torchrun --nproc-per-node)") from error
    check_required(required, set(check_folder(folder)), os.fspath(path_or_name))
    return folder, config


def _fits(config: MegatronBertConfig, degree: int) -> bool:
    try:
        check_degree(config, degree)
    except UserError:
        return False
    return True


@torch.no_grad()
def load_shards(model: Any, folder: Path, *, seed: int = 0, fresh: tuple[str, ...] = ()) -> None:
    """Fills the parameters of a materialized `model`, converting their number type to the model's.

    What the folder lacks is initialized from `seed`, and what it has too many is ignored, with a line in the log each,
    as by `from_pretrained`. Of safetensors, no more than one parameter is mapped into memory beside the rank's part.

    Args:
        fresh: beginnings of the names of parameters that are initialized although the folder has them.

    Raises:
        UserError: what `check_folder` finds, or a weight of another shape than the model's.
    """
    shapes = {name: shape for name, shape in check_folder(folder).items() if not name.startswith(fresh)}
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
    adapter = {name for name in missing if ".lora_" in name}
    report_differences(type(model).__name__.removeprefix("FSDP"), missing - adapter, unexpected)
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
    """How a checkpoint may spell a parameter: with or without the base model's prefix. One that an adapter was put
    around (`peft`) has its own name there. The projection's bias has two names, of which one is enough.
    """
    name = name.replace(".base_layer.", ".")
    bare = name.removeprefix("bert.")
    return [name, bare, f"bert.{bare}", *(PROJECTION_BIASES if name in PROJECTION_BIASES else [])]
