"""Train a WordPiece vocabulary from text files, or show what a tokenizer does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_bert.bundled import resolved


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `megatron-bert tokenizer`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|inspect")
    train = actions.add_parser("train", help="train a vocabulary", description="Train a WordPiece vocabulary.")
    train.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="F",
        help="files or quoted globs, as of preprocess",
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the tokenizer's files")
    train.add_argument("--vocab-size", type=int, default=29056, metavar="N", help="entries (default: %(default)s)")
    train.add_argument("--cased", action="store_true", help="keep upper case and accents")
    train.add_argument("--no-split-chinese", action="store_true", help="do not make each Chinese character a word")
    train.add_argument("--min-frequency", type=int, default=2, metavar="N", help="least occurrences of a new piece")
    train.add_argument("--alphabet-limit", type=int, metavar="N", help="most characters (default: half the size)")
    train.add_argument(
        "--json-key", default="text", metavar="KEY", help="JSON key or Parquet column of the text (default: text)"
    )
    train.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core; 0: this one alone)")
    train.add_argument("--skip-bad", action="store_true", help="leave out documents that are not JSON, not UTF-8 ...")
    train.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is already there")
    inspect = actions.add_parser("inspect", help="show a tokenizer", description="Show what a tokenizer does.")
    inspect.add_argument("folder", type=resolved, metavar="DIR", help="a tokenizer's or model's folder, or mini")
    inspect.add_argument("--text", default="Training a language model, 語言模型!", help="a text to tokenize")
    for action in (train, inspect):
        action.add_argument("--json", action="store_true", help="print one JSON object")
        action.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Does the action and prints what came of it."""
    record = _train(args) if args.action == "train" else _inspect(args)
    if args.json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        print("\n".join(f"{name:<15} {value}" for name, value in record.items()))
    return 0


def _train(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_bert.data.text import expand_inputs
    from megatron_bert.data.vocabulary import (
        VocabularyOptions,
        check_output,
        fingerprint,
        train_vocabulary,
        write_tokenizer,
    )
    from megatron_bert.data.workers import available_cores
    from megatron_bert.errors import UserError

    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers} is not a number of processes")
    if args.vocab_size < 6 or args.min_frequency < 1 or (args.alphabet_limit or 1) < 1:
        raise UserError("--vocab-size must be at least 6, --min-frequency and --alphabet-limit at least 1")
    options = VocabularyOptions(
        size=args.vocab_size,
        cased=args.cased,
        split_chinese=not args.no_split_chinese,
        min_frequency=args.min_frequency,
        alphabet_limit=args.alphabet_limit,
    )
    check_output(args.output, overwrite=args.overwrite)
    tokenizer = train_vocabulary(
        expand_inputs(args.input),
        options,
        args.json_key,
        num_workers=available_cores() if args.workers is None else args.workers,
        skip_bad=args.skip_bad,
        progress=True,
    )
    write_tokenizer(tokenizer, options, args.output, overwrite=args.overwrite)
    return {
        "output": str(args.output),
        "entries": tokenizer.get_vocab_size(),
        "cased": args.cased,
        "fingerprint": fingerprint(tokenizer),
    }


def _inspect(args: argparse.Namespace) -> dict[str, Any]:
    from megatron_bert.data.tokenization import load_tokenizer, lower_cases
    from megatron_bert.data.vocabulary import fingerprint

    tokenizer = load_tokenizer(args.folder)
    normalizer = tokenizer.backend_tokenizer.normalizer
    chinese = normalizer.normalize_str("中文") if normalizer else "中文"
    vocabulary = tokenizer.get_vocab()
    return {
        "folder": args.folder,
        "entries": len(tokenizer),
        "continuations": sum(token.startswith("##") for token in vocabulary),
        "special_tokens": {token: vocabulary[token] for token in tokenizer.all_special_tokens},
        "lower_case": lower_cases(tokenizer),
        "splits_chinese": len(chinese.split()) == 2,
        "fingerprint": fingerprint(tokenizer.backend_tokenizer),
        "text": args.text,
        "pieces": tokenizer.tokenize(args.text),
    }
