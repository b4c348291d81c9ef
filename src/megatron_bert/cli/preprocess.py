"""Turn text into a token file (PREFIX.bin, PREFIX.idx) for pretraining.

Input: plain text with a blank line between documents, or JSON lines; either may be .gz or .xz.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert preprocess`."""
    parser.add_argument("--input", nargs="+", required=True, metavar="F", help="files or quoted globs")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a tokenizer's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="the token file, no suffix")
    parser.add_argument("--language", default="en", metavar="CODE", help="whose sentence rules (default: %(default)s)")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key of a JSON line's text (default: text)")
    parser.add_argument(
        "--wrapped-lines", action="store_true", help="a line break is a space, not the end of a sentence"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a token file that is already there")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Writes the token file and prints the report."""
    from megatron_bert.data.preprocess import preprocess
    from megatron_bert.data.sentences import SentenceSplitter
    from megatron_bert.data.text import expand_inputs
    from megatron_bert.data.tokenization import load_tokenizer

    splitter = SentenceSplitter(args.language, wrapped_lines=args.wrapped_lines)
    files = expand_inputs(args.input)
    tokenizer = load_tokenizer(args.tokenizer)
    report = preprocess(
        files,
        tokenizer.backend_tokenizer,
        str(args.tokenizer),
        args.output,
        splitter=splitter,
        json_key=args.json_key,
        overwrite=args.overwrite,
        progress=not args.json,
    )
    if args.json:
        print(json.dumps({"output": str(args.output), **report.as_dict()}))
    else:
        print("\n".join([f"output     {args.output}.bin, {args.output}.idx", *report.lines()]))
    return 0
