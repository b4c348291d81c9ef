"""Train a model from a recipe. The run's folder gets metrics.jsonl, the resolved recipe.yaml and model/."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert pretrain`."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the run's configuration")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value; may be repeated"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is already in the output folder")
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object, without a bar")


def run(args: argparse.Namespace) -> int:
    """Trains and prints where the model is."""
    from megatron_bert.training.configuration import load_configuration

    configuration = load_configuration(args.recipe, args.set)

    from transformers.utils import logging as transformers_logging

    from megatron_bert.training.pretrain import pretrain

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar, and it is ours
    outcome = pretrain(configuration, overwrite=args.overwrite, progress=not args.json)
    if args.json:
        record = {"model": str(outcome.model), "metrics": str(outcome.metrics), "validation": outcome.validation}
        print(json.dumps(record))
    else:
        print(f"model    {outcome.model}\nmetrics  {outcome.metrics}")
    return 0
