"""The trained model as a folder that Transformers loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_bert.checkpoint.manifest import damage
from megatron_bert.checkpoint.megatron import read_megatron
from megatron_bert.checkpoint.native import (
    checkpoints_folder,
    is_checkpoint,
    load_model_weights,
    newest_good,
    read_state,
    step_of,
)
from megatron_bert.data.files import written_aside
from megatron_bert.data.tokenization import load_tokenizer, num_rows
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.launch import agreed
from megatron_bert.parallel.materialize import materialize, parameter_names, whole_parameters
from megatron_bert.training.configuration import ObjectiveSection
from megatron_bert.training.network import empty_network
from megatron_bert.training.ranks import ALONE, Ranks

__all__ = ["convert_megatron", "convert_run", "is_run", "write_model_folder", "write_whole_model"]

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


def convert_run(
    run: Path,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> int:
    """Writes the newest good checkpoint of a pretraining run as a model folder, finished or not; the run may go on
    meanwhile.

    Args:
        run: its output folder; or one of its checkpoints, which is then the one to write.
        tokenizer: the run's, where it is no longer at its recipe's `data.tokenizer`.
        dtype: number type of the weights written; those of a checkpoint are float32, and are rounded to the nearest.
        overwrite: replace `folder`, which then has to be empty or a model's.

    Returns:
        the number of steps that the model was trained for.

    Raises:
        UserError: `run` is none or has no good checkpoint, `folder` is there already or must not be replaced, or the
            tokenizer is missing or another one.
        OSError: what the file system says.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give the output folder of a pretraining run")
    alone = run if is_checkpoint(run) else None
    _check_destination(folder, run if alone is None else alone.resolve().parents[1], overwrite=overwrite)
    checkpoint = alone or newest_good(run)
    if alone and (problem := damage(alone)):
        raise UserError(f"{alone} is damaged: {problem}; choose another one beside it, or the run's folder")
    state = read_state(checkpoint)
    if "objective" not in state["recipe"]:
        raise UserError(f"{run} is of a fine-tuning run, which leaves its model in model/ when it is finished")
    loaded = _tokenizer(tokenizer or Path(state["recipe"]["data"]["tokenizer"]), state["identity"]["data.tokenizer"])
    config = MegatronBertConfig.from_dict(state["config"])
    network = empty_network(config, ObjectiveSection.model_validate(state["recipe"]["objective"]))
    materialize(network, torch.device("cpu"))
    network.load_state_dict(load_model_weights(checkpoint))
    network.to(dtype)  # type: ignore[arg-type]
    write_model_folder(network, loaded, folder)
    return step_of(checkpoint)


def is_run(source: Path) -> bool:
    """Whether `source` looks like the output folder of a run of ours, or one of its checkpoints."""
    return checkpoints_folder(source).is_dir() or is_checkpoint(source)


def convert_megatron(
    source: Path,
    folder: Path,
    *,
    tokenizer: Path | None = None,
    heads: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> int | None:
    """Writes a Megatron-LM checkpoint as a model folder. See `read_megatron`; `convert_run` for the other arguments.

    Args:
        tokenizer: to be put beside the model; without it the folder has none.
        dtype: default: as the checkpoint has them.

    Returns:
        the number of steps that the model was trained for, None where that is not said.

    Raises:
        UserError: `source` is no such checkpoint or cannot be converted, or the tokenizer has more tokens than the
            model; and as `convert_run`.
        OSError: what the file system says.
    """
    for path in (source, tokenizer):
        if path is not None and not path.exists():
            raise UserError(f"{path}: no such file or folder")
    _check_destination(folder, source, overwrite=overwrite)
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    found = read_megatron(source, heads=heads)
    if found is None:
        raise UserError(f"{source} has no checkpoint, neither a pretraining run's nor Megatron-LM's")
    if loaded is not None and num_rows(loaded) > found.config.vocab_size:
        raise UserError(f"{tokenizer} has {num_rows(loaded):,} tokens, and the model {found.config.vocab_size:,}")
    with torch.device("meta"):
        network = found.model_class(found.config)
    materialize(network, torch.device("cpu"))
    network.to(dtype or next(iter(found.weights.values())).dtype)  # type: ignore[arg-type]
    # A model without heads is the body, whose names begin so in the others.
    prefix = f"{network.base_model_prefix}." if network.base_model is network else ""
    weights = {name.removeprefix(prefix): weight for name, weight in found.weights.items()}
    _check_shapes(weights, network.state_dict(), source)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if found.config.tie_word_embeddings:
        missing = [name for name in missing if not name.startswith("cls.predictions.decoder.")]
    if wrong := [*unexpected, *missing]:
        what = "over" if unexpected else "missing"
        raise UserError(f"{source} is no whole {found.model_class.__name__}: {wrong[0]} is {what}")
    write_model_folder(network, loaded, folder)
    return found.steps


def _check_shapes(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path) -> None:
    """Of a checkpoint that does not say by how many ranks it was saved, this is what tells one of several."""
    for name, weight in weights.items():
        if name in wanted and weight.shape != wanted[name].shape:
            raise UserError(
                f"{source}: {name} is {list(weight.shape)}, and a whole model's would be {list(wanted[name].shape)}; "
                "are all tensor-parallel ranks there?"
            )


def _check_destination(folder: Path, run: Path, *, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} is there already; choose another folder or add --overwrite")
    target, checkpoints = folder.resolve(), checkpoints_folder(run).resolve()
    if target in checkpoints.parents:
        raise UserError(f"{folder} would replace what is converted; choose another folder")
    if checkpoints in (target, *target.parents):
        raise UserError(f"{folder} would replace the run's checkpoints; choose another folder")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise UserError(f"{folder} is no model's folder, and is left alone; choose another folder")


def _tokenizer(path: Path, wanted: str) -> PreTrainedTokenizerBase:
    if not path.exists():
        raise UserError(f"{path}, the run's data.tokenizer, is not there any more; name it with --tokenizer DIR")
    loaded = load_tokenizer(path)
    if fingerprint(loaded.backend_tokenizer) != wanted:
        raise UserError(f"{path} is another tokenizer than the run was trained with; name that with --tokenizer DIR")
    return loaded
