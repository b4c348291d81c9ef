"""Write the model of a pretraining run as a folder that Transformers loads: configuration, safetensors, tokenizer.

It is the newest good checkpoint; the run may be finished, stopped or still going.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert convert`."""
    parser.add_argument("source", type=Path, metavar="RUN", help="the output folder of a pretraining run")
    parser.add_argument("destination", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the run's tokenizer, where it was moved since it was trained"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="number type of the weights written (default: %(default)s, the checkpoint's)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR")
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Converts and prints where the model is."""
    import torch
    from transformers.utils import logging as transformers_logging

    from megatron_bert.training.export import convert_run

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    dtype = getattr(torch, args.dtype)
    steps = convert_run(args.source, args.destination, tokenizer=args.tokenizer, dtype=dtype, overwrite=args.overwrite)
    if args.json:
        print(json.dumps({"model": str(args.destination), "steps": steps}))
    else:
        print(f"model  {args.destination}, after {steps:,} steps")
    return 0
