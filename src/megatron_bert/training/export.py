"""The trained model as a folder that Transformers loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_bert.data.files import written_aside
from megatron_bert.parallel.launch import agreed
from megatron_bert.parallel.materialize import parameter_names, whole_parameters
from megatron_bert.training.ranks import ALONE, Ranks

__all__ = ["write_model_folder", "write_whole_model"]

_FILE_BYTES = "5GB"


def write_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    ranks: Ranks = ALONE,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes config.json, the weights as safetensors, the tokenizer's files and the texts of `files` to `folder`, whole
    or not at all; a folder that is there already is replaced. All ranks have to call it; the first one writes, and
    holds no more than one file's weights (5 GB) beside its own parts.

    Raises:
        OSError: what the file system says.
    """
    weights, problem = whole_parameters(model), None
    if ranks.is_first:
        try:
            _write_folder(model, weights, tokenizer, folder, files or {})
        except OSError as error:
            problem = error
    for _ in weights:  # the other ranks take part, and whatever happened nobody waits for anybody
        pass
    agreed(lambda: _raise(problem))


def write_whole_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, files: Mapping[str, str]
) -> None:
    """The same of a model that this process has whole, without asking others."""
    _write_folder(model, whole_parameters(model), tokenizer, folder, files)


def _write_folder(
    model: PreTrainedModel,
    weights: Iterator[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    files: Mapping[str, str],
) -> None:
    with written_aside(folder, folder=True) as aside:
        _write_weights(model, weights, aside)
        _write_configuration(model, aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")


def _write_weights(model: PreTrainedModel, weights: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """In files as Transformers splits and names them."""
    sizes = {names[0]: parameter.numel() * parameter.element_size() for parameter, names in parameter_names(model)}
    plan = split_state_dict_into_shards_factory(
        sizes,  # they stand for the tensors, which nobody has
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_FILE_BYTES,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file(dict(islice(weights, len(names))), folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_configuration(model: PreTrainedModel, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _raise(problem: OSError | None) -> None:
    if problem:
        raise problem
