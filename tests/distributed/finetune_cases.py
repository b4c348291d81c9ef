"""What a test of fine-tuning runs in each process of a world."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_bert.errors import UserError
from megatron_bert.parallel.watch import Watch
from megatron_bert.tasks.configuration import configuration_of
from megatron_bert.tasks.finetune import finetune
from megatron_bert.tasks.table import task_class
from megatron_bert.training.configuration import load_recipe


def finetunes(task: str, recipe: Path, *overrides: str) -> Any:
    """The runs as `torchrun` would do them, in processes that have joined; or what a person is told."""
    try:
        report = finetune(task, load_recipe(recipe, overrides, configuration_of(task_class(task))))
    except UserError as error:
        return str(error)
    return [(outcome.step, outcome.best_step, outcome.scores) for outcome in report.runs]


def places_in(task: str, recipe: Path, *overrides: str) -> list[str]:
    """What such a run tells the watch that it goes on to, which ends a run that is at one thing for too long."""
    plain, said = Watch.at, list[str]()

    def at(watch: Watch, what: str, **options: Any) -> None:
        said.append(what)
        plain(watch, what, **options)

    with patch.object(Watch, "at", at):
        finetunes(task, recipe, *overrides)
    return said
