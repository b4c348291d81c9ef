"""A run's own checkpoints: RUN/checkpoints/step-00001000/, one folder a step, whole or absent.

    *.distcp, .metadata    weights (`model.NAME`) and optimizer states (`optimizer.NAME.STATE`): `checkpoint.tensors`
    state.json             everything else that a run needs to go on, its recipe included
    streams-00000.json     the random streams of rank 0, and so on
    manifest.json          sizes and hashes of the other files

JSON and tensors only: nothing in a checkpoint can run.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_bert.checkpoint.manifest import damage
from megatron_bert.checkpoint.tensors import read_all_tensors
from megatron_bert.errors import UserError

__all__ = [
    "MODEL_PREFIX",
    "OPTIMIZER_PREFIX",
    "best_step",
    "checkpoint_of",
    "checkpoints_folder",
    "is_checkpoint",
    "list_checkpoints",
    "load_model_weights",
    "newest_good",
    "read_state",
    "read_streams",
    "state_file",
    "step_of",
    "streams_file",
]

MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."
_NAME = re.compile(r"step-(\d{8,})")

log = logging.getLogger(__name__)


def checkpoints_folder(run: Path) -> Path:
    """Where the checkpoints of the run in the folder `run` are."""
    return run / "checkpoints"


def checkpoint_of(run: Path, step: int) -> Path:
    """The checkpoint after `step` steps."""
    return checkpoints_folder(run) / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """How many steps were done when it was written, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is one of a run's checkpoints, by its name and what lies in it; not looked into."""
    return _NAME.fullmatch(folder.name) is not None and state_file(folder).is_file()


def state_file(checkpoint: Path) -> Path:
    """The file of what is neither a tensor nor a random stream."""
    return checkpoint / "state.json"


def streams_file(checkpoint: Path, rank: int) -> Path:
    """The file of one rank's random streams."""
    return checkpoint / f"streams-{rank:05d}.json"


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, the newest first; not looked into."""
    folder = checkpoints_folder(run)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def newest_good(run: Path) -> Path:
    """The newest checkpoint of the run in the folder `run` whose files are as they were written. Each newer one is
    named in a warning.

    Raises:
        UserError: there is none.
    """
    problems: list[str] = []
    for checkpoint in list_checkpoints(run):
        problem = damage(checkpoint)
        if problem is None:
            if problems:
                log.warning("damaged: %s; using %s, the one before", "; ".join(problems), checkpoint.name)
            return checkpoint
        problems.append(f"{checkpoint.name} ({problem})")
    if problems:
        raise UserError(
            f"{checkpoints_folder(run)}: every checkpoint is damaged: {'; '.join(problems)}; put one back from a copy, "
            f"or start over with --overwrite"
        )
    raise UserError(f"{run} has no checkpoint")


def load_model_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every entry of the model's state dict, in the CPU's memory; tied entries share their memory.

    Raises:
        UserError: the checkpoint is not one.
    """
    weights = read_all_tensors(checkpoint, MODEL_PREFIX)
    ties: dict[str, str] = read_state(checkpoint)["tied"]
    return weights | {name: weights[source] for name, source in ties.items()}


def best_step(checkpoint: Path) -> int | None:
    """The step of the best checkpoint so far, where the run looks for one and this checkpoint can be read."""
    try:
        best = read_state(checkpoint).get("best")
    except UserError:
        return None
    return best["step"] if best else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json`: among others `step`, and `recipe`, the run's configuration in full.

    Raises:
        UserError: it is missing or not readable.
    """
    return _read_json(state_file(checkpoint))


def read_streams(checkpoint: Path, rank: int) -> dict[str, Any]:
    """One rank's random streams.

    Raises:
        UserError: they are missing or not readable.
    """
    return _read_json(streams_file(checkpoint, rank))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file.parent} is not a checkpoint: {file.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file.parent} is not a checkpoint: {file.name} holds no record")
    return content
