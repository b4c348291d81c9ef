"""Turn text into a token file (PREFIX.bin, PREFIX.idx) for pretraining.

Input: plain text with a blank line between documents, JSON lines (.jsonl, .ndjson, .json), either also as .gz, .xz or
.zst; Parquet.

On many machines: each runs the same command with --shard 1/8, --shard 2/8 ... and its own --output, then
'megatron-bert preprocess merge PREFIX... --output PREFIX' puts their token files together.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_bert.bundled import resolved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert preprocess`."""
    parser.usage = (
        "megatron-bert preprocess --input F... --tokenizer DIR --output PREFIX [options]\n"
        "       megatron-bert preprocess merge PREFIX... --output PREFIX [--overwrite] [--json]"
    )
    parser.add_argument("merge", nargs="*", metavar="merge PREFIX...", help="put token files together, see above")
    parser.add_argument(
        "--input", nargs="+", action="extend", metavar="F", help="files or quoted globs, ** for folders of any depth"
    )
    parser.add_argument("--tokenizer", type=resolved, metavar="DIR", help="a tokenizer's folder, or mini")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="the token file, no suffix")
    parser.add_argument("--language", default="en", metavar="CODE", help="whose sentence rules (default: %(default)s)")
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="JSON key or Parquet column of the text (default: text)"
    )
    parser.add_argument(
        "--wrapped-lines", action="store_true", help="a line break is a space, not the end of a sentence"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core; 0: this one alone)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="only the I-th of N parts of the input")
    parser.add_argument(
        "--skip-bad", action="store_true", help="drop and count documents that are not JSON, not UTF-8 or lack the key"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a token file that is already there")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Writes the token file and prints the report."""
    begun = time.monotonic()
    with _terminated_as_interrupted():
        counts, lines = _merge(args) if args.merge else _preprocess(args)
    seconds = time.monotonic() - begun
    if args.json:
        print(json.dumps({"output": str(args.output), **counts, "seconds": round(seconds, 3)}))
    else:
        print("\n".join([f"output     {args.output}.bin, {args.output}.idx", *lines, f"time       {seconds:,.1f} s"]))
    return 0


def _preprocess(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from megatron_bert.data.preprocess import preprocess
    from megatron_bert.data.sentences import SentenceSplitter
    from megatron_bert.data.shards import Shard
    from megatron_bert.data.text import expand_inputs
    from megatron_bert.data.tokenization import load_tokenizer
    from megatron_bert.data.workers import available_cores
    from megatron_bert.errors import UserError

    for option in ("input", "tokenizer"):
        if getattr(args, option) is None:
            raise UserError(f"--{option} is missing ('megatron-bert preprocess --help' lists the options)")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers} is not a number of processes")
    splitter = SentenceSplitter(args.language, wrapped_lines=args.wrapped_lines)
    shard = Shard.of(args.shard)
    files = expand_inputs(args.input)
    tokenizer = load_tokenizer(args.tokenizer)
    report = preprocess(
        files,
        tokenizer.backend_tokenizer,
        args.tokenizer,
        args.output,
        splitter=splitter,
        json_key=args.json_key,
        num_workers=available_cores() if args.workers is None else args.workers,
        shard=shard,
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
        progress=True,
    )
    return report.as_dict(), report.lines()


def _merge(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from megatron_bert.data.shards import merge
    from megatron_bert.errors import UserError

    action, *prefixes = args.merge
    if action != "merge":
        raise UserError(f"unexpected {action!r}: files are named by --input, and the only action is merge")
    if not prefixes or args.input:
        raise UserError("merge takes token files: megatron-bert preprocess merge PREFIX... --output PREFIX")
    made = merge([Path(prefix) for prefix in prefixes], args.output, overwrite=args.overwrite, progress=True)
    counts = {name: getattr(made, name) for name in ("documents", "sentences", "tokens")}
    return counts, [f"{name:<10} {number:,}" for name, number in counts.items()]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Lets SIGTERM end the work like Ctrl-C does, so that what is half-written is removed."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
