"""A checkpoint with a task's head: its configuration, built without values, filled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.folder import check_folder
from megatron_bert.checkpoint.load import check_model
from megatron_bert.checkpoint.shards import load_shards
from megatron_bert.data.tokenization import num_rows
from megatron_bert.model import MegatronBertConfig, MegatronBertPreTrainedModel
from megatron_bert.tasks.configuration import FinetuneConfiguration
from megatron_bert.tasks.task import Task
from megatron_bert.training.network import config_to_start_from
from megatron_bert.training.supervised import HEADS, Head

__all__ = ["HEAD_MODULES", "empty_task_network", "fill_task_network", "labels_of_head", "task_network_config"]

HEAD_MODULES: dict[Head, str] = {
    "sequence": "classifier.", "choice": "classifier.", "token": "classifier.", "span": "qa_outputs.",
}  # fmt: skip


def task_network_config(
    configuration: FinetuneConfiguration,
    task: Task[Any, Any],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> MegatronBertConfig:
    """The checkpoint's shape with a head of these labels; dropout is the recipe's.

    Raises:
        UserError: the checkpoint is missing, damaged or of another family, or too small for the tokenizer or for
            `data.max_length`.
    """
    lengths = {"data.max_length": configuration.data.max_length}
    config = config_to_start_from(configuration.model, num_rows(tokenizer), "", lengths)
    config.is_decoder = config.add_cross_attention = False
    config.problem_type = task.problem()
    if task.head == "span":
        config.num_labels = 2  # start and end
    elif labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    elif task.problem() == "regression":
        config.num_labels = 1
    return config


def labels_of_head(folder: Path, head: Head) -> tuple[str, ...] | None:
    """The labels of the head that a checkpoint has, in its order; None where it has no such head, or no labels.

    Raises:
        UserError: the folder is damaged.
    """
    if not folder.is_dir() or not _has_head(folder, head):
        return None
    config = check_model(folder)
    if head in ("choice", "span") or config.problem_type == "regression":
        return ()
    names: Any = config.id2label
    return tuple(names[number] for number in sorted(names))


def empty_task_network(config: MegatronBertConfig, head: Head) -> MegatronBertPreTrainedModel:
    """A model of this shape with the head, in training mode, on the meta device."""
    with torch.device("meta"):
        network: MegatronBertPreTrainedModel = HEADS[head](config)
    network.train()
    return network


def fill_task_network(network: MegatronBertPreTrainedModel, folder: Path, head: Head, seed: int, *, new: bool) -> None:
    """The checkpoint's values; its head is drawn from `seed` where it is another one's or `new` is wished.

    Raises:
        UserError: the weights have other shapes.
    """
    fresh = new or not _has_head(folder, head)
    load_shards(network, folder, seed=seed, fresh=(HEAD_MODULES[head],) if fresh else ())


def _has_head(folder: Path, head: Head) -> bool:
    """Whether the folder holds the weights of just this head: several have the same names."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    weights = check_folder(folder)
    return HEADS[head].__name__ in named and any(name.startswith(HEAD_MODULES[head]) for name in weights)
