"""Write a model as a folder that Transformers loads: configuration, safetensors, tokenizer.

Of a pretraining run it is the newest good checkpoint; the run may be finished, stopped or still going. Of a checkpoint
of Megatron-LM's (BERT) it is what all ranks together hold.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_bert.bundled import resolved
from megatron_bert.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert convert`."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="the output folder of a pretraining run, or one of its checkpoints; or a checkpoint of Megatron-LM's: a "
        "folder, a zip file or model_optim_rng.pt",
    )
    parser.add_argument("destination", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--tokenizer",
        type=lambda name: Path(resolved(name)),
        metavar="DIR",
        help="the run's, where it was moved since it was trained; a folder, mini or vocab.txt to go with Megatron-LM's "
        "model",
    )
    parser.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, where Megatron-LM's checkpoint does not say (default: "
        "of 64 features each)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="number type of the weights written (default: the checkpoint's, which is float32 for a run)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR")
    parser.add_argument("--json", action="store_true", help="print the outcome as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Converts and prints where the model is."""
    import torch
    from transformers.utils import logging as transformers_logging

    from megatron_bert.training.export import convert_megatron, convert_run, is_run

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options = {"tokenizer": args.tokenizer, "overwrite": args.overwrite}
    if args.dtype:
        options["dtype"] = getattr(torch, args.dtype)
    if args.heads is not None and args.heads < 1:
        raise UserError(f"--heads {args.heads} is not a number above 0")
    steps: int | None
    if is_run(args.source):
        if args.heads:
            raise UserError("--heads is for checkpoints of Megatron-LM's; a run knows its own")
        steps = convert_run(args.source, args.destination, **options)
    else:
        steps = convert_megatron(args.source, args.destination, heads=args.heads, **options)
    if args.json:
        print(json.dumps({"model": str(args.destination), "steps": steps}))
    else:
        print(f"model  {args.destination}" + (f", after {steps:,} steps" if steps is not None else ""))
    return 0
