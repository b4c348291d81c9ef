"""The tasks by the names that the command line knows them by."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from megatron_bert.tasks.task import Task

__all__ = ["TASKS", "Entry", "task_class", "task_of"]


class Entry(NamedTuple):
    """Where a task's class is, what the class is told besides the recipe's settings, and a line about it."""

    module: str
    name: str
    help: str
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed


_CLASSIFICATION = {
    "sst2": "SST-2: accuracy",
    "cola": "CoLA: Matthews correlation",
    "mrpc": "MRPC: accuracy and F1",
    "qqp": "QQP: accuracy and F1",
    "stsb": "STS-B: correlations",
    "mnli": "MNLI: accuracy",
    "qnli": "QNLI: accuracy",
    "rte": "RTE: accuracy",
    "ocnli": "OCNLI: accuracy",
}

TASKS: dict[str, Entry] = {
    "squad": Entry("megatron_bert.tasks.span", "Squad", "SQuAD 1.1 and 2.0: exact match and F1"),
    "cmrc2018": Entry("megatron_bert.tasks.span", "Cmrc", "CMRC 2018: exact match and F1 of characters"),
    "qa": Entry("megatron_bert.tasks.span", "Squad", "your own questions, in SQuAD's format or JSON lines"),
    "ner": Entry("megatron_bert.tasks.tag", "Tagging", "named entities in CoNLL columns: entity-level F1"),
    "cluener": Entry("megatron_bert.tasks.tag", "Cluener", "CLUENER 2020: entity-level F1"),
    "tag": Entry("megatron_bert.tasks.tag", "Tagging", "your own labels of words: columns or JSON lines"),
    **{
        name: Entry("megatron_bert.tasks.classification", "Classification", line, {"format": name})
        for name, line in _CLASSIFICATION.items()
    },
    "classify": Entry("megatron_bert.tasks.classification", "OwnClassification", "your own texts or pairs, in a table"),
    "race": Entry("megatron_bert.tasks.choice", "Choice", "RACE: accuracy"),
    "choice": Entry("megatron_bert.tasks.choice", "Choice", "your own questions with choices"),
}


def task_class(name: str) -> type[Task[Any, Any]]:
    """The class of the task of this name."""
    entry = TASKS[name]
    found: type[Task[Any, Any]] = getattr(importlib.import_module(entry.module), entry.name)
    return found


def task_of(name: str, settings: Any) -> Task[Any, Any]:
    """The task of this name with its settings."""
    options = dict(TASKS[name].options)
    if "format" in options:
        options["format"] = importlib.import_module("megatron_bert.tasks.glue").FORMATS[options["format"]]
    make: Any = task_class(name)
    made: Task[Any, Any] = make(settings, **options)
    return made
