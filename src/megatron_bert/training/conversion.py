"""A run, a model's folder or a checkpoint of Megatron-LM's or NeMo's, written for Transformers or Megatron-LM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_bert import model as family
from megatron_bert.checkpoint.folder import check_config
from megatron_bert.checkpoint.load import load_model
from megatron_bert.checkpoint.manifest import damage
from megatron_bert.checkpoint.megatron import read_megatron
from megatron_bert.checkpoint.megatron_writer import is_written_for_megatron, write_for_megatron
from megatron_bert.checkpoint.native import (
    checkpoints_folder,
    is_checkpoint,
    load_model_weights,
    newest_good,
    read_state,
    step_of,
)
from megatron_bert.data.tokenization import load_tokenizer, num_rows
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertPreTrainedModel
from megatron_bert.parallel.materialize import materialize
from megatron_bert.training.configuration import ObjectiveSection
from megatron_bert.training.export import write_model_folder
from megatron_bert.training.network import empty_network

__all__ = ["Target", "convert"]

Target = Literal["transformers", "megatron"]


class _Found(NamedTuple):
    model: MegatronBertPreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    steps: int | None


def convert(
    source: Path,
    folder: Path,
    *,
    to: Target = "transformers",
    tensor_parallel: int = 1,
    tokenizer: Path | None = None,
    heads: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> int | None:
    """Writes a model as another kind of folder.

    Args:
        source: the output folder of a pretraining run, finished or not, of which the newest good checkpoint is taken;
            one of its checkpoints; a model's folder; or what `read_megatron` reads.
        to: a folder that Transformers loads, or a checkpoint for Megatron-LM (`write_for_megatron`).
        tensor_parallel: ranks of Megatron-LM's that the checkpoint is for.
        tokenizer: a run's, where it is no longer at its recipe's `data.tokenizer`; to go with another model, where it
            has none of its own, or in place of that.
        heads: attention heads, where Megatron-LM's checkpoint does not say.
        dtype: number type of the weights written, rounded to the nearest; default: as they are, a run's float32.
        overwrite: replace `folder`, which then has to be empty or a model's.

    Returns:
        the number of steps that the model was trained for, None where that is not said.

    Raises:
        UserError: `source` has no model, or a damaged one, or one that cannot be converted; `folder` is there already
            or must not be replaced; the tokenizer is missing, a run's is another one, or it has more tokens than the
            model.
        OSError: what the file system says.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    run = source.resolve().parents[1] if is_checkpoint(source) else source
    _check_destination(folder, run, overwrite=overwrite)
    is_run = is_checkpoint(source) or checkpoints_folder(source).is_dir()
    is_model = (source / "config.json").is_file()
    if heads is not None and (is_run or is_model):
        raise UserError(f"{source} says itself how many heads it has; --heads is for checkpoints of Megatron-LM's")
    if is_run:
        found = _of_run(source, tokenizer)
    else:
        if tokenizer is not None and not tokenizer.exists():
            raise UserError(f"{tokenizer}: no such file or folder")
        given = load_tokenizer(tokenizer) if tokenizer else None
        found = _of_model(source, given) if is_model else _of_megatron(source, given, heads)
        rows = num_rows(found.tokenizer) if found.tokenizer is not None else 0
        if rows > found.model.config.vocab_size:
            raise UserError(f"{tokenizer or f'the vocabulary of {source}'} has {rows:,} tokens, and the model "
                            f"{found.model.config.vocab_size:,}")  # fmt: skip
    if dtype is not None:
        found.model.to(dtype)  # type: ignore[arg-type]
    if to == "megatron":
        write_for_megatron(found.model, found.tokenizer, folder, tensor_parallel)
    else:
        write_model_folder(found.model, found.tokenizer, folder)
    return found.steps


# --- Sources


def _of_run(run: Path, tokenizer: Path | None) -> _Found:
    alone = is_checkpoint(run)
    checkpoint = run if alone else newest_good(run)
    if alone and (problem := damage(checkpoint)):
        raise UserError(f"{checkpoint} is damaged: {problem}; choose another one beside it, or the run's folder")
    state = read_state(checkpoint)
    if "objective" not in state["recipe"]:
        raise UserError(f"{run} is of a fine-tuning run, which leaves its model in model/ when it is finished")
    loaded = _tokenizer(tokenizer or Path(state["recipe"]["data"]["tokenizer"]), state["identity"]["data.tokenizer"])
    config = MegatronBertConfig.from_dict(state["config"])
    network = empty_network(config, ObjectiveSection.model_validate(state["recipe"]["objective"]))
    materialize(network, torch.device("cpu"))
    network.load_state_dict(load_model_weights(checkpoint))
    return _Found(network, loaded, step_of(checkpoint))


def _tokenizer(path: Path, wanted: str) -> PreTrainedTokenizerBase:
    if not path.exists():
        raise UserError(f"{path}, the run's data.tokenizer, is not there any more; name it with --tokenizer DIR")
    loaded = load_tokenizer(path)
    if fingerprint(loaded.backend_tokenizer) != wanted:
        raise UserError(f"{path} is another tokenizer than the run was trained with; name that with --tokenizer DIR")
    return loaded


def _of_model(source: Path, tokenizer: PreTrainedTokenizerBase | None) -> _Found:
    config = check_config(source)
    config.dtype = None  # the weights' own, whatever it says
    architectures: object = config.architectures
    named = str(architectures[0] or "") if isinstance(architectures, list) and architectures else ""
    model_class = getattr(family, named, None) if named in family.__all__ else None
    abstract = MegatronBertPreTrainedModel
    if not isinstance(model_class, type) or not issubclass(model_class, abstract) or model_class is abstract:
        raise UserError(f"{source}: config.json names no class of this family (architectures: {named or 'none'})")
    if tokenizer is None and any((source / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        tokenizer = load_tokenizer(source)
    return _Found(load_model(model_class, source, required=("",), config=config), tokenizer, None)


def _of_megatron(source: Path, tokenizer: PreTrainedTokenizerBase | None, heads: int | None) -> _Found:
    found = read_megatron(source, heads=heads)
    if found is None:
        raise UserError(f"{source} has no model: neither a pretraining run's checkpoint, nor config.json, nor a "
                        "checkpoint of Megatron-LM's or NeMo's")  # fmt: skip
    try:
        with torch.device("meta"):
            network = found.model_class(found.config)
    except ValueError as error:  # a dropout of 5
        raise UserError(f"{source}: {error}") from error
    materialize(network, torch.device("cpu"))
    network.to(next(iter(found.weights.values())).dtype)  # type: ignore[arg-type]
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
    return _Found(network, tokenizer or found.tokenizer, found.steps)


def _check_shapes(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path) -> None:
    """Of a checkpoint that does not say by how many ranks it was saved, this is what tells one of several."""
    for name, weight in weights.items():
        if name in wanted and weight.shape != wanted[name].shape:
            raise UserError(
                f"{source}: {name} is {list(weight.shape)}, and a whole model's would be {list(wanted[name].shape)}; "
                "are all tensor-parallel ranks there?"
            )


# --- Destination


def _check_destination(folder: Path, run: Path, *, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} is there already; choose another folder or add --overwrite")
    target, checkpoints = folder.resolve(), checkpoints_folder(run).resolve()
    if target in checkpoints.parents:
        raise UserError(f"{folder} would replace what is converted; choose another folder")
    if checkpoints in (target, *target.parents):
        raise UserError(f"{folder} would replace the run's checkpoints; choose another folder")
    is_model = (folder / "config.json").is_file() or is_written_for_megatron(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_model):
        raise UserError(f"{folder} is no model's folder, and is left alone; choose another folder")
