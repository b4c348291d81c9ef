"""Train a model from a recipe. The run's folder gets metrics.jsonl, the resolved recipe.yaml, checkpoints/ and model/.

The same command goes on with a run that was stopped or killed. Under torchrun, all processes share the run as the
recipe's `mesh` says: torchrun --nproc-per-node 8 -m megatron_bert pretrain RECIPE.yaml --set mesh.tensor=2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_bert.cli import is_first_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert pretrain`."""
    add_recipe_arguments(parser)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every verb that trains from a recipe."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the run's configuration")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value; may be repeated"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over where the output folder holds a run")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="SECTION.KEY",
        help="go on although this value of the run's recipe was changed; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object, without a bar")


def run(args: argparse.Namespace) -> int:
    """Trains and prints where the model is, or how to go on."""
    from megatron_bert.training.configuration import load_configuration

    configuration = load_configuration(args.recipe, args.set)

    from transformers.utils import logging as transformers_logging

    from megatron_bert.training.pretrain import pretrain

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar, and it is ours
    outcome = pretrain(configuration, overwrite=args.overwrite, allow=args.allow, progress=not args.json)
    if not is_first_process():
        return 0
    if args.json:
        record = {
            "step": outcome.step,
            "stopped_by": outcome.stopped_by,
            "model": str(outcome.model) if outcome.model else None,
            "metrics": str(outcome.metrics),
            "validation": outcome.validation,
        }
        print(json.dumps(record))
    elif outcome.stopped_by:
        done = f"step {outcome.step} of {outcome.steps}"
        print(f"stopped  by {outcome.stopped_by} after {done}; the same command goes on from there")
    else:
        print(f"model    {outcome.model}\nmetrics  {outcome.metrics}")
    return 0
