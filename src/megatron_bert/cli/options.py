"""Options that several verbs have."""

from __future__ import annotations

import argparse

from megatron_bert.bundled import MINI, resolved


def count(word: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")
    return int(word)


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Which model fills masks, and where and how it is computed."""
    parser.add_argument(
        "--model",
        type=resolved,
        default=MINI,
        metavar="DIR|NAME",
        help="a model's folder, or its name on the hub; mini, the default, is the small one in the box",
    )
    parser.add_argument("--truncate", action="store_true", help="cut texts that are too long for the model")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number type; auto is bfloat16 where the GPU or CPU has it, else float32",
    )
    parser.add_argument(
        "--batch-tokens", type=count, metavar="N", help="tokens predicted together (default: 8192; on a GPU 32768)"
    )
