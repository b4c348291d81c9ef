"""The tasks by the names that the command line knows them by."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple

from megatron_bert.tasks.task import Task

__all__ = ["TASKS", "Entry", "task_class", "task_of"]


class Entry(NamedTuple):
    """Where a task's class is, what the class is told besides the recipe's settings, and a line about it."""

    module: str
    name: str
    help: str
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed


TASKS: dict[str, Entry] = {
    "squad": Entry("megatron_bert.tasks.span", "Squad", "SQuAD 1.1 and 2.0: exact match and F1"),
    "cmrc2018": Entry("megatron_bert.tasks.span", "Cmrc", "CMRC 2018: exact match and F1 of characters"),
    "qa": Entry("megatron_bert.tasks.span", "Squad", "your own questions, in SQuAD's format or JSON lines"),
    "ner": Entry("megatron_bert.tasks.tag", "Tagging", "named entities in CoNLL columns: entity-level F1"),
    "cluener": Entry("megatron_bert.tasks.tag", "Cluener", "CLUENER 2020: entity-level F1"),
    "tag": Entry("megatron_bert.tasks.tag", "Tagging", "your own labels of words: columns or JSON lines"),
}


def task_class(name: str) -> type[Task[Any, Any]]:
    """The class of the task of this name."""
    entry = TASKS[name]
    found: type[Task[Any, Any]] = getattr(importlib.import_module(entry.module), entry.name)
    return found


def task_of(name: str, settings: Any) -> Task[Any, Any]:
    """The task of this name with its settings."""
    return partial(task_class(name), **TASKS[name].options)(settings)
