"""Write a model as a folder that Transformers loads: configuration, safetensors, tokenizer; or for Megatron-LM.

Of a pretraining run it is the newest good checkpoint; the run may be finished, stopped or still going. Of a checkpoint
of Megatron-LM's or NeMo's (BERT) it is what all ranks together hold.
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
        help="the output folder of a pretraining run, or one of its checkpoints; a model's folder; or a checkpoint of "
        "Megatron-LM's or NeMo's: a folder, a zip file, model_optim_rng.pt or a .nemo file",
    )
    parser.add_argument("destination", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--to", choices=["transformers", "megatron"], default="transformers", help="whose (default: %(default)s)"
    )
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="ranks that Megatron-LM's checkpoint is for "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer",
        type=lambda name: Path(resolved(name)),
        metavar="DIR",
        help="the run's, where it was moved since it was trained; a folder, mini or vocab.txt to go with another "
        "model (default: its own)",
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

    from megatron_bert.training.conversion import convert

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if args.heads is not None and args.heads < 1:
        raise UserError(f"--heads {args.heads} is not a number above 0")
    if args.tensor_parallel < 1:
        raise UserError(f"--tensor-parallel {args.tensor_parallel} is not a number above 0")
    if args.tensor_parallel > 1 and args.to != "megatron":
        raise UserError("--tensor-parallel is for --to megatron: Transformers' folder is for any number of processes")
    steps = convert(
        Path(resolved(args.source)), args.destination, to=args.to, tensor_parallel=args.tensor_parallel,
        tokenizer=args.tokenizer, heads=args.heads, dtype=getattr(torch, args.dtype) if args.dtype else None,
        overwrite=args.overwrite,
    )  # fmt: skip
    if args.json:
        print(json.dumps({"model": str(args.destination), "steps": steps}))
    else:
        print(f"model  {args.destination}" + (f", after {steps:,} steps" if steps is not None else ""))
    return 0
