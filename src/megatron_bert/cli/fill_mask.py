"""Predict the masked words of texts.

A mask is written [MASK] or <mask>; a text may have several. Texts are arguments, or the lines of a file, or of the
standard input. Results come in the order of the texts. Started by torchrun, each process has a part of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_bert.cli import is_first_process
from megatron_bert.cli.options import add_prediction_options, count
from megatron_bert.errors import SharedError, UserError

if TYPE_CHECKING:
    from megatron_bert.inference.fill_mask import Filled, MaskedTextEncoder, MaskFiller
    from megatron_bert.inference.lines import Text
    from megatron_bert.inference.ranks import InferenceRanks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``megatron-bert fill-mask``."""
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="a text with [MASK] or <mask> in it")
    parser.add_argument("--file", metavar="F", help="read texts from F, one a line; - is the standard input")
    parser.add_argument("--top-k", type=count, default=5, metavar="K", help="predictions for each mask (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    add_prediction_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the predictions; returns the exit code."""
    if args.texts and args.file:
        raise UserError("give texts as arguments or in --file, not both")
    if not args.texts and not args.file and sys.stdin.isatty():
        raise UserError("no text: give texts as arguments, in --file F, or on the standard input")
    if args.file and args.file != "-" and is_first_process() and not os.path.exists(args.file):
        raise UserError(f"--file {args.file}: no such file")
    return _fill(args)


def _fill(args: argparse.Namespace) -> int:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    from megatron_bert.inference.device import choose_device
    from megatron_bert.inference.ranks import ALONE, joined_ranks
    from megatron_bert.parallel.launch import is_launched

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not is_launched():
        choose_device(args.device)  # what can be wrong without the weights is looked at without them
        _predict(args, ALONE)
        return 0
    with joined_ranks(args.device) as ranks:
        _predict(args, ranks)
    return 0


def _predict(args: argparse.Namespace, ranks: InferenceRanks) -> None:
    """The texts are the first rank's, which checks them, hands them on to the others, and prints."""
    import torch
    from tqdm import tqdm

    from megatron_bert.inference.fill_mask import load_encoder
    from megatron_bert.parallel.launch import agreed

    encoder = agreed(lambda: load_encoder(args.model, truncate=args.truncate))
    total = ranks.from_first(lambda: _check_texts(args, encoder))
    filler = _load(args, encoder, ranks)
    _choose_encoding(args.json)
    show = _as_json if args.json else _as_table
    write = tqdm.write if sys.stdout.isatty() else print  # above the bar, where both are on the terminal
    try:
        with tqdm(desc="predicting", total=total, unit=" texts", **_bar_options()) as bar:
            for result in filler.stream(ranks.stream_from_first(_texts(args)), bar.update):
                if ranks.is_first:
                    write(show(result))
                    sys.stdout.flush()  # whoever sends text line by line gets its answer before the next line
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory: use fewer --batch-tokens than {filler.batch_tokens}") from error
    except UserError as error:  # of the texts or the scores, which are the same on all ranks
        raise SharedError(str(error)) from error


def _load(args: argparse.Namespace, encoder: MaskedTextEncoder, ranks: InferenceRanks) -> MaskFiller:
    import torch

    from megatron_bert.inference.fill_mask import load_mask_filler, load_parallel_mask_filler

    options = {"dtype": args.dtype, "top_k": args.top_k, "batch_tokens": args.batch_tokens}
    try:
        if ranks.mesh is None:
            return load_mask_filler(args.model, encoder, device=args.device, **options)
        return load_parallel_mask_filler(args.model, ranks.mesh, encoder, **options)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory: the weights of {args.model} do not fit; use --dtype bfloat16, --device cpu, or "
            f"several GPUs with torchrun"
        ) from error


def _check_texts(args: argparse.Namespace, encoder: MaskedTextEncoder) -> int | None:
    """How many texts there are, all of them checked; None for a stream, whose texts are checked as they come."""
    from tqdm import tqdm

    if _is_stream(args):
        return None
    return encoder.check(tqdm(_texts(args), desc="checking", unit=" chunks", **_bar_options()))


def _bar_options() -> dict[str, Any]:
    """A progress bar on a terminal, for what takes more than two seconds; it is gone when it is done."""
    return {"disable": not (is_first_process() and sys.stderr.isatty()), "delay": 2, "leave": False}


def _texts(args: argparse.Namespace) -> Iterator[list[Text]]:
    from megatron_bert.inference.lines import texts_of_arguments, texts_of_file, texts_of_stream

    if args.texts:
        yield texts_of_arguments(args.texts)
    elif args.file in (None, "-"):
        yield from texts_of_stream(sys.stdin.buffer, "standard input")
    else:
        with open(args.file, "rb") as file:
            yield from (texts_of_stream if _is_stream(args) else texts_of_file)(file, args.file)


def _is_stream(args: argparse.Namespace) -> bool:
    return not args.texts and (args.file in (None, "-") or not stat.S_ISREG(os.stat(args.file).st_mode))


def _choose_encoding(as_json: bool) -> None:
    """JSON is UTF-8 whatever the terminal; in a table, what the terminal cannot show is escaped."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(**({"encoding": "utf-8"} if as_json else {"errors": "backslashreplace"}))


def _as_json(result: Filled) -> str:
    predictions = [[asdict(candidate) for candidate in mask] for mask in result.predictions]
    return json.dumps({"text": result.text, "predictions": predictions}, ensure_ascii=False)


def _as_table(result: Filled) -> str:
    lines = [result.text]
    for number, candidates in enumerate(result.predictions, start=1):
        if len(result.predictions) > 1:
            lines.append(f"  mask {number}")
        lines += [f"  {candidate.score:8.4f}  {candidate.token_str}" for candidate in candidates]
    return "\n".join(lines)
