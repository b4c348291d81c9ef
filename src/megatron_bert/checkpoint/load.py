"""Loads a model for use: the folder is looked at first, and what is wrong is said in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from megatron_bert.checkpoint.folder import WEIGHT_FILES, check_config, check_folder, read_index, refusing_pickles
from megatron_bert.data.tokenization import local_path
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertPreTrainedModel

Model = TypeVar("Model", bound=MegatronBertPreTrainedModel)


def load_model(
    model_class: type[Model],
    path_or_name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    required: tuple[str, ...] = (),
    **changes: Any,
) -> Model:
    """The model in a folder, or of that name on the hub, ready to predict (evaluation mode, on the CPU).

    ``required`` lists the beginnings of weight names without which the model is of no use to the caller. Other weights
    that the checkpoint lacks are initialised and those it has too many ignored, with a line in the log each.
    ``changes`` are fields of the configuration that are to differ from the checkpoint's.

    Raises ``UserError`` for what ``check_folder`` finds (before the weights are read), a checkpoint that lacks what is
    required, and a model that the hub does not have or cannot be asked for. A folder never asks the network.
    """
    where = os.fspath(path_or_name)
    is_local = local_path(where) is not None
    if not is_local:
        check_model(where)  # before its weights are fetched
    check_required(required, set(check_folder(model_folder(where))), where)
    model, info = _from_pretrained(model_class, where, dtype=dtype, local_files_only=is_local, **changes)
    missing = sorted(name for name in info["missing_keys"] if name.startswith(required)) if required else []
    if missing:
        raise UserError(f"{where} lacks {missing[0]}, without which it cannot do this")
    model.train(False)
    return model


def check_model(path_or_name: str | os.PathLike[str]) -> MegatronBertConfig:
    """The configuration of a model in a folder or on the hub.

    Raises ``UserError`` where there is none, and for what ``check_config`` finds.
    """
    where = os.fspath(path_or_name)
    source = local_path(where)
    if source is None:
        with _explained(where):
            source = Path(str(cached_file(where, "config.json"))).parent
    elif not source.is_dir():
        raise UserError(f"{where} is a file; a model is a folder with config.json and its weights")
    return check_config(source)


def model_folder(path_or_name: str | os.PathLike[str]) -> Path:
    """The folder of a model: that of this name, or where the hub's files are kept, which are fetched if need be.

    Raises ``UserError`` where the hub does not have the model or cannot be asked.
    """
    where = os.fspath(path_or_name)
    source = local_path(where)
    if source is not None:
        return source
    with _explained(where):
        folder = Path(str(cached_file(where, "config.json"))).parent
        for name in WEIGHT_FILES:
            if found := cached_file(where, name, _raise_exceptions_for_missing_entries=False):
                parts = read_index(Path(found)) if found.endswith(".json") else []
                for part in parts:
                    cached_file(where, part)
                break
    return folder


def check_required(required: tuple[str, ...], present: set[str], where: str) -> None:
    """Raises ``UserError`` where of a beginning in ``required`` no weight is ``present``."""
    for beginning in required:
        if not any(name.startswith(beginning) for name in present):
            raise UserError(f"{where} has no {beginning}* among its weights, without which it cannot do this")


def _from_pretrained(model_class: type[Model], where: str, **options: Any) -> tuple[Model, dict[str, Any]]:
    with refusing_pickles(where), _explained(where):
        loaded: tuple[Model, dict[str, Any]] = model_class.from_pretrained(where, output_loading_info=True, **options)
        return loaded


@contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{where}: the weights are truncated or damaged: {error}") from error
    except ImportError as error:  # quantized weights need packages of their own
        raise UserError(f"cannot load the model {where}: {error}") from error
    except OSError as error:
        if error.errno is not None:  # the disk or the network at work, not Transformers' advice
            raise
        raise UserError(f"cannot load the model {where}: {error}") from error
