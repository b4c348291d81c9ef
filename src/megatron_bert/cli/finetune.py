"""Fine-tune a model for a task, from a recipe and local files in the task's published format.

The run's folder gets model/ (for Transformers), scores.json, predictions-*.jsonl, metrics.jsonl, curves.png, the
resolved recipe.yaml and checkpoints/; with several seeds, in a folder each. The same command goes on with a run that
was stopped or killed. Under torchrun, all processes share the run:
torchrun --nproc-per-node 8 -m megatron_bert finetune TASK RECIPE.yaml
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from megatron_bert.cli import is_first_process
from megatron_bert.cli.pretrain import add_recipe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert finetune`."""
    from megatron_bert.tasks.table import TASKS

    width = max(map(len, TASKS))
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="what to learn; see below")
    parser.epilog = "tasks:\n" + "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in TASKS.items())
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints the scores and where the model is, or how to go on."""
    from transformers.utils import logging as transformers_logging

    from megatron_bert.tasks.configuration import configuration_of
    from megatron_bert.tasks.finetune import finetune
    from megatron_bert.tasks.table import task_class
    from megatron_bert.training.configuration import load_recipe

    configuration = load_recipe(args.recipe, args.set, configuration_of(task_class(args.task)))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar, and it is ours
    report = finetune(args.task, configuration, overwrite=args.overwrite, allow=args.allow, progress=not args.json)
    if not is_first_process():
        return 0
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
        return 0
    for one in report.runs:
        if one.stopped_by:
            done = f"step {one.step} of {one.steps}"
            print(f"stopped  by {one.stopped_by} after {done}; the same command goes on from there")
            return 0
        shown = ", ".join(f"{name} {scores[report.selects_by]:.2f}" for name, scores in one.scores.items())
        print(f"seed {one.seed}  {report.selects_by} of step {one.best_step}: {shown}\nmodel    {one.model}")
    if len(report.runs) > 1:
        shown = ", ".join(f"{name} {scores[report.selects_by]:.2f}" for name, scores in report.median.items())
        print(f"median   {report.selects_by}: {shown}")
    return 0
