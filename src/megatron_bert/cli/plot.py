"""Draw the curves of runs: losses, accuracies or scores, gradient norm, tokens a second.

A run may be finished, stopped or still going.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert plot`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's output folder; several: together")
    parser.add_argument(
        "--output", type=Path, metavar="F.png", help="the picture (default, of one run: RUN/curves.png)"
    )
    parser.add_argument("--json", action="store_true", help="print the picture's path as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Draws and prints where the picture is."""
    from megatron_bert.training.plot import plot_runs

    picture = plot_runs(args.runs, args.output)
    print(json.dumps({"picture": str(picture)}) if args.json else picture)
    return 0
