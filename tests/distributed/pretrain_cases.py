"""What a test of the trainer runs in each process of a world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_bert.errors import UserError
from megatron_bert.training.configuration import MeshSection, load_configuration
from megatron_bert.training.pretrain import pretrain
from megatron_bert.training.ranks import Ranks


def trains(recipe: Path, *overrides: str) -> Any:
    """The run as `torchrun` would do it, in processes that have joined; or what a person is told."""
    try:
        return pretrain(load_configuration(recipe, overrides)).step
    except UserError as error:
        return str(error)


def layout(**options: bool) -> list[int]:
    """Of processes where the recipe says nothing of it."""
    return Ranks.of(MeshSection(), torch.device("cpu"), **options).layout
