"""All that a run has to remember, as a checkpoint and back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from megatron_bert.checkpoint.native import MODEL_PREFIX, OPTIMIZER_PREFIX, read_state, read_streams
from megatron_bert.checkpoint.tensors import read_tensors, tensor_shapes
from megatron_bert.checkpoint.writer import Snapshot
from megatron_bert.data.batches import Position
from megatron_bert.training.microbatch import FixedShapes
from megatron_bert.training.ranks import ALONE, Ranks
from megatron_bert.training.selection import Best
from megatron_bert.training.step import Sums
from megatron_bert.training.streams import random_streams, set_random_streams

__all__ = ["TrainState", "Window", "restore", "restore_weights", "snapshot"]


class Window:
    """What was seen since the last record, and how long that took. Being saved with the run, a record is the same
    whether or not the run was interrupted since the one before.
    """

    def __init__(self, sums: Sums | None = None, seconds: float = 0.0) -> None:
        self.sums = sums or Sums()
        self._since = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Since the window began."""
        return time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint; waits for the device. Every number is exact: JSON keeps each bit of a float."""
        sums = {name: _number(value) for name, value in vars(self.sums).items()}
        return {"sums": sums, "seconds": self.seconds}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Window:
        """The window that `as_dict` gave, going on now."""
        return cls(Sums(**values["sums"]), values["seconds"])


@dataclass
class TrainState:
    """A run between two steps.

    Attributes:
        model: itself, not a compiled or otherwise wrapped one, so that names are those of its checkpoints.
        step: steps done, skipped ones included; the schedule is a function of it.
        position: where the next step begins in the data.
        skipped, skipped_in_a_row: steps that were not applied, in all and since the last one that was.
        window: of the next training record.
        validation: the last validation's means.
        best: of all evaluations, where the best state is looked for.
        shapes: what batches are filled up to where the model is compiled; it grows with what was seen, and the order of
            a sum may depend on it.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    device: torch.device
    step: int = 0
    position: Position = field(default_factory=Position)
    skipped: int = 0
    skipped_in_a_row: int = 0
    window: Window = field(default_factory=Window)
    validation: dict[str, float] = field(default_factory=dict)
    best: Best = field(default_factory=Best)
    shapes: FixedShapes | None = None


_COUNTERS = ("step", "skipped", "skipped_in_a_row", "validation")


def snapshot(state: TrainState, about: Mapping[str, Any], layout: Sequence[int] = ALONE.layout) -> Snapshot:
    """The state as a checkpoint holds it; the tensors are those in use.

    Args:
        about: what else to put in `state.json`: the recipe and what identifies the run.
        layout: of the processes that share the run; see `Ranks.layout`.
    """
    ties = _ties(state.model)
    record = {name: getattr(state, name) for name in _COUNTERS} | {
        "position": state.position.as_dict(),
        "window": state.window.as_dict(),
        "best": asdict(state.best) if state.best.step else None,
        "shapes": asdict(state.shapes) if state.shapes else None,
        "tied": ties,
        "layout": layout,
        "torch": torch.__version__,
        **about,
    }
    return Snapshot(state.step, _tensors(state, ties), record, random_streams(state.device))


def restore(state: TrainState, checkpoint: Path, ranks: Ranks = ALONE) -> None:
    """Puts the state, its model and optimizer, and this process's random streams to where `snapshot` found them.

    Random streams belong to a layout of processes. Under another one they begin anew, from a seed that is not yet used:
    dropout goes on with other numbers; weights, states and the order of samples are what they were.

    Learning rate, decay and the like are the optimizer's own, not the checkpoint's: they follow from the recipe.

    Raises:
        UserError: the checkpoint is of a model with other shapes.
    """
    record = read_state(checkpoint)
    saved = tensor_shapes(checkpoint)
    _optimizer_state(state)  # gives it states to read into
    targets = _tensors(state, record["tied"])
    targets = {name: value for name, value in targets.items() if name in saved or not name.startswith(OPTIMIZER_PREFIX)}
    read_tensors(checkpoint, targets)
    _set_tensors(state, targets, record["tied"])
    for name in _COUNTERS:
        setattr(state, name, record[name])
    state.position = Position.of(record["position"])
    state.window = Window.of(record["window"])
    state.best = Best(**record["best"]) if record.get("best") else Best()
    state.shapes = FixedShapes(**record["shapes"]) if record["shapes"] else None
    if record["layout"] == ranks.layout:
        set_random_streams(read_streams(checkpoint, ranks.rank), state.device)
    else:
        torch.manual_seed(ranks.stream_seed(torch.initial_seed(), state.step))


def restore_weights(model: nn.Module, checkpoint: Path) -> None:
    """Puts the model's weights to those of the checkpoint.

    Raises:
        UserError: the checkpoint is of a model with other shapes.
    """
    ties = read_state(checkpoint)["tied"]
    weights: Mapping[str, Any] = get_model_state_dict(model)
    targets = {MODEL_PREFIX + name: weight for name, weight in weights.items() if name not in ties}
    read_tensors(checkpoint, targets)
    read = {name.removeprefix(MODEL_PREFIX): weight for name, weight in targets.items()}
    set_model_state_dict(model, read | {name: read[source] for name, source in ties.items()})


def _tensors(state: TrainState, ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights and optimizer states by their names in a checkpoint; tied weights once."""
    weights: Mapping[str, Any] = get_model_state_dict(state.model)
    tensors = {MODEL_PREFIX + name: weight for name, weight in weights.items() if name not in ties}
    if state.optimizer.state:  # or the library would begin it, with a step already counted
        moments: Mapping[str, Any] = _optimizer_state(state)["state"]
        for name, values in moments.items():
            tensors |= {f"{OPTIMIZER_PREFIX}{name}.{key}": value for key, value in values.items()}
    return tensors


def _set_tensors(state: TrainState, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    weights: dict[str, Any] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(MODEL_PREFIX):
            weights[name.removeprefix(MODEL_PREFIX)] = value
        else:
            parameter, _, key = name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")
            moments.setdefault(parameter, {})[key] = value
    set_model_state_dict(state.model, weights | {name: weights[source] for name, source in ties.items()})
    begun = _optimizer_state(state)
    set_optimizer_state_dict(state.model, state.optimizer, {**begun, "state": begun["state"] | moments})
    for name, weight in state.model.named_parameters():
        if name not in moments and weight in state.optimizer.state:  # it had no gradient before it was saved
            del state.optimizer.state[weight]


def _optimizer_state(state: TrainState) -> dict[str, Any]:
    """States of the parameters by name, begun where there are none yet, and the parameter groups."""
    return get_optimizer_state_dict(state.model, state.optimizer)


def _ties(model: nn.Module) -> dict[str, str]:
    """Each tied parameter's other names, and the name under which it is saved."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def _number(value: Tensor | float) -> float:
    return value.item() if isinstance(value, Tensor) else value
