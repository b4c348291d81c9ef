"""Score a model by a published protocol, on local files.

Causal models and masked ones are told apart by their configuration; figures of masked ones are named as such.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_bert.bundled import resolved
from megatron_bert.cli.options import count
from megatron_bert.errors import UserError

if TYPE_CHECKING:
    from megatron_bert.tasks.scoring import TokenScorer


class Task(NamedTuple):
    """Where a task's module is, its class in it, and the line about it in `--help`."""

    module: str
    name: str
    help: str


TASKS: dict[str, Task] = {
    "wikitext103": Task("megatron_bert.tasks.wikitext103", "WikiText103", "perplexity per original token"),
    "lambada": Task("megatron_bert.tasks.lambada", "Lambada", "accuracy of the last word, all its pieces"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-bert evaluate``."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, line in (*((name, task.help) for name, task in TASKS.items()), *_finetuned_tasks().items()):
        one = tasks.add_parser(name, help=line, description=line, allow_abbrev=False)
        one.add_argument(
            "--model", type=resolved, required=True, metavar="DIR|NAME", help="a model's folder, or its name on the hub"
        )
        one.add_argument("--data", required=True, type=Path, metavar="F", help="the task's published file")
        one.add_argument("--output", type=Path, metavar="F", help="write predictions here; a killed run goes on")
        one.add_argument("--overwrite", action="store_true", help="replace a finished predictions file")
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
        one.add_argument(
            "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="number type"
        )
        one.add_argument("--batch-tokens", type=count, default=8192, metavar="N", help="tokens together (8192)")
        if name not in TASKS:
            one.add_argument("--plot", type=Path, metavar="F.png", help="draw a confusion matrix of single labels")
        if name == "wikitext103":
            one.add_argument("--window", type=count, metavar="N", help="tokens of a window (what the model takes)")
            one.add_argument("--overlap", type=_whole, metavar="N", help="of them seen before (half)")


def _finetuned_tasks() -> dict[str, str]:
    """The tasks that a model is fine-tuned for, with the line about each."""
    from megatron_bert.tasks.table import TASKS as FINETUNED

    return {name: entry.help for name, entry in FINETUNED.items()}


def _whole(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number")
    return int(word)


def run(args: argparse.Namespace) -> int:
    """Prints the figures; returns the exit code."""
    import torch
    from transformers.utils import logging as transformers_logging

    from megatron_bert.data.files import refuse_to_overwrite

    if not (args.data.is_file() if args.task in TASKS else args.data.exists()):
        raise UserError(f"--data {args.data}: no such file")
    if args.output is not None:
        refuse_to_overwrite([args.output], overwrite=args.overwrite)
    evaluate = _evaluate if args.task in TASKS else _evaluate_finetuned
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        figures = {"task": args.task, **evaluate(args)}
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory: use fewer --batch-tokens than {args.batch_tokens}") from error
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name.replace('_', ' ')}: {f'{value:.6g}' if isinstance(value, float) else value}")
    return 0


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_bert.tasks.scoring import load_scorer
    from megatron_bert.tasks.zero_shot import fingerprint, predict

    scorer = load_scorer(args.model, device=args.device, dtype=args.dtype, batch_tokens=args.batch_tokens)
    task = _task(args, scorer)
    belongs_to = None
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        dtype = str(scorer.model.dtype).removeprefix("torch.")
        belongs_to = fingerprint(args.model, args.data, task=args.task, dtype=dtype, **task.settings)
    records = predict(task, scorer, args.output, belongs_to)
    return {**task.result(records), **task.settings, "model": "causal" if scorer.causal else "masked"}


def _evaluate_finetuned(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_bert.tasks.evaluation import evaluate_task

    return evaluate_task(
        args.task, args.model, args.data, device=args.device, dtype=args.dtype, batch_tokens=args.batch_tokens,
        output=args.output, picture=args.plot,
    )  # fmt: skip


def _task(args: argparse.Namespace, scorer: TokenScorer) -> Any:
    make = getattr(importlib.import_module(TASKS[args.task].module), TASKS[args.task].name)
    more = (args.window, args.overlap) if args.task == "wikitext103" else ()
    return make(args.data, scorer, *more)
