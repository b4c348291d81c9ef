"""The command ``megatron-bert``: the table of verbs, and one thin file a verb.

A verb's module has ``add_arguments(parser)`` and ``run(args) -> int``. Its own imports are light (no torch), so that
``--help`` and a mistyped option answer at once; ``run`` imports what the work needs.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Verb(NamedTuple):
    """Where a verb's module is, and the line about it in ``megatron-bert --help``."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "fill-mask": Verb("megatron_bert.cli.fill_mask", "predict the masked words of texts"),
    "serve": Verb("megatron_bert.cli.serve", "fill masks over HTTP"),
    "tokenizer": Verb("megatron_bert.cli.tokenizer", "train and inspect WordPiece vocabularies"),
    "preprocess": Verb("megatron_bert.cli.preprocess", "turn text into a token file for pretraining"),
    "pretrain": Verb("megatron_bert.cli.pretrain", "train a model from a recipe"),
    "finetune": Verb("megatron_bert.cli.finetune", "train a model for a task, from a recipe"),
    "evaluate": Verb("megatron_bert.cli.evaluate", "score a model by a published protocol"),
    "plan": Verb("megatron_bert.cli.plan", "predict memory, communication and speed on many GPUs"),
    "plot": Verb("megatron_bert.cli.plot", "draw the curves of runs"),
    "convert": Verb(
        "megatron_bert.cli.convert", "write a model for Transformers or Megatron-LM: a run's, Megatron-LM's, NeMo's"
    ),
}


def is_first_process() -> bool:
    """Whether this is the one that reads and prints, of several that `torchrun` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
