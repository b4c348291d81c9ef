"""A fine-tuned model scored on a file of its task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bert.checkpoint.folder import check_config
from megatron_bert.checkpoint.load import check_model, load_model, model_folder
from megatron_bert.data.collation import Batch
from megatron_bert.data.files import written_aside
from megatron_bert.data.labelled import LabelledTexts, collate_labelled
from megatron_bert.data.samples import SampleKey, SamplePlan
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.errors import UserError
from megatron_bert.inference.device import choose_device, choose_dtype, scores_are_no_numbers
from megatron_bert.tasks.confusion import draw_confusion
from megatron_bert.tasks.finetune import TASK_FILE
from megatron_bert.tasks.network import HEAD_MODULES, labels_of_head
from megatron_bert.tasks.splits import outputs_of
from megatron_bert.tasks.table import task_class, task_of
from megatron_bert.tasks.task import Making, Task
from megatron_bert.training.supervised import HEADS, SupervisedObjective, target_kind

__all__ = ["evaluate_task"]

_MAX_LENGTH = 384  # tokens, where the model's folder does not say with how many it was trained


def evaluate_task(
    name: str,
    model: str,
    data: Path,
    *,
    device: str,
    dtype: str,
    batch_tokens: int,
    output: Path | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """The scores of the model in a folder, or on the hub, on a file of the task of this name.

    Settings are those that it was fine-tuned with (task.json), where it was by this package.

    Args:
        output: gets the predictions, a line each.
        picture: gets a confusion matrix of single labels.

    Raises:
        UserError: the file cannot be used, the model has no head for the task, the file has labels that it lacks, its
            outputs are not numbers, or there is nothing to draw.
    """
    on, folder = choose_device(device), model_folder(model)
    task, max_length = _task(name, folder)
    labels = labels_of_head(folder, task.head)
    if labels is None:
        raise UserError(f"{model} has no head for {name} ({HEADS[task.head].__name__}): fine-tune it first")
    _check_outputs(task, name, folder, labels)
    labels = task.labels_of_outputs(labels)
    making = Making(load_tokenizer(folder), max_length, labels or task.labels([]))
    examples = task.read(data)
    rows = task.rows(examples, making)
    network = load_model(HEADS[task.head], model, dtype=choose_dtype(dtype, on), required=(HEAD_MODULES[task.head],))
    network.to(on)
    objective = SupervisedObjective(network, on, task.head, task.problem())
    pad_id, num_outputs = making.tokenizer.pad_token_id or 0, network.config.num_labels
    batches = _by_length(LabelledTexts(rows), task, num_outputs, pad_id, batch_tokens)
    outputs, _ = outputs_of(objective, batches)
    if not all(np.isfinite(output).all() for output in outputs):
        raise UserError(scores_are_no_numbers(network.dtype))
    predictions = task.predictions(examples, rows, outputs, making)
    if output is not None:
        with written_aside(output) as aside, aside.open("w", encoding="utf-8") as stream:
            for example, prediction in zip(examples, predictions, strict=True):
                stream.write(json.dumps(task.record(example, prediction), ensure_ascii=False) + "\n")
    if picture is not None:
        draw_confusion(task.confused(examples, predictions), making.labels, picture)
    return task.scores(examples, predictions)


def _check_outputs(task: Task[Any, Any], name: str, folder: Path, labels: Sequence[str]) -> None:
    """Raises `UserError` for a head of labels where the task has numbers, and the other way round."""
    is_number, num_outputs = task.problem() == "regression", check_model(folder).num_labels
    if task.head == "sequence" and num_outputs != (1 if is_number else len(labels)):
        what = "numbers" if is_number else "labels"
        raise UserError(f"{folder}: its head of {num_outputs} outputs is none for the {what} of {name}; fine-tune it")


def _task(name: str, folder: Path) -> tuple[Task[Any, Any], int]:
    """The task with the settings that lie beside the model, and the tokens of a text."""
    file, kind = folder / TASK_FILE, task_class(name)
    positions = check_config(folder).max_position_embeddings
    if not file.is_file():
        return task_of(name, kind.settings_class()), min(_MAX_LENGTH, positions)
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        same = task_class(about["task"]).settings_class is kind.settings_class
        settings = kind.settings_class.model_validate(about["settings"] if same else {})
        return task_of(name, settings), int(about["max_length"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())}; remove it to use defaults") from error


def _by_length(
    texts: LabelledTexts, task: Task[Any, Any], num_outputs: int, pad_id: int, batch_tokens: int
) -> Iterator[Batch]:
    """Rows of similar length together, of at most so many tokens (one row at least)."""
    kind = target_kind(task.head, task.problem())
    group: list[int] = []
    used = 0
    for number in sorted(range(len(texts)), key=lambda number: -texts.row_tokens(number)):
        if group and used + texts.row_tokens(number) > batch_tokens:
            yield _batch(texts, group, kind, num_outputs, pad_id)
            group, used = [], 0
        group.append(number)
        used += texts.row_tokens(number)
    if group:
        yield _batch(texts, group, kind, num_outputs, pad_id)


def _batch(texts: LabelledTexts, rows: Sequence[int], kind: Any, num_outputs: int, pad_id: int) -> Batch:
    samples = [texts.build(SamplePlan(SampleKey(0, 0, row), ((row, 1),), texts.row_tokens(row))) for row in rows]
    return collate_labelled([samples], kind, num_outputs, pad_id)
