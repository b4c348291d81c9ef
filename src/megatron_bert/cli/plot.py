"""Draw the curves of a pretraining run: losses, accuracies, gradient norm, tokens a second.

The run may be finished, stopped or still going.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert plot`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the output folder of a pretraining run")
    parser.add_argument("--output", type=Path, metavar="F.png", help="the picture (default: RUN/curves.png)")
    parser.add_argument("--json", action="store_true", help="print the picture's path as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Draws and prints where the picture is."""
    from megatron_bert.training.plot import plot_run

    picture = plot_run(args.run, args.output)
    print(json.dumps({"picture": str(picture)}) if args.json else picture)
    return 0
