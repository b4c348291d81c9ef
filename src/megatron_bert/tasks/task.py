"""What a fine-tuning task says of itself. Batches, losses, training and evaluation are everybody's: `training/`."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_bert.data.labelled import Row, Text
from megatron_bert.training.configuration import Section
from megatron_bert.training.supervised import Head, Problem

__all__ = ["Head", "Making", "Outputs", "Problem", "Row", "Task", "TaskSettings", "Text"]

Example = TypeVar("Example")
Prediction = TypeVar("Prediction")

Outputs = Sequence[npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Making:
    """What rows are made with.

    Attributes:
        tokenizer: a fast one of Transformers.
        max_length: of a text, in tokens.
        labels: the names of the head's outputs, by number.
    """

    tokenizer: Any
    max_length: int
    labels: tuple[str, ...] = ()


class TaskSettings(Section):
    """The keys of a recipe's section `task`; a task adds its own, with defaults."""


class Task(ABC, Generic[Example, Prediction]):
    """One task. All its methods are pure, but for `read`, and raise `UserError` with file and line."""

    settings_class: ClassVar[type[TaskSettings]] = TaskSettings
    head: ClassVar[Head]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def with_settings(self, settings: TaskSettings) -> Self:
        """The same task with others."""
        other = copy.copy(self)
        other.settings = settings
        return other

    @property
    @abstractmethod
    def selects_by(self) -> str:
        """The score by which the best checkpoint is chosen: the higher, the better."""

    def problem(self) -> Problem | None:
        """Of the head "sequence"."""
        return None

    @abstractmethod
    def read(self, file: Path) -> list[Example]:
        """The examples of a file, at least one."""

    def labels(self, training: Sequence[Example]) -> tuple[str, ...]:
        """The names of the head's outputs, from the training examples. None for "choice" and "span"."""
        return ()

    def labels_of_outputs(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """What the outputs of a head with these names are labels of: those, unless a file's numbers are meant."""
        return names

    def left_out(self, examples: Sequence[Example]) -> list[tuple[int, str]]:
        """The numbers of the examples that training leaves out, each with file, place and reason."""
        return []

    @abstractmethod
    def rows(self, examples: Sequence[Example], making: Making) -> list[Row]:
        """What the model reads for the examples, in their order; long ones may have several rows."""

    def tuned(self, examples: Sequence[Example], rows: Sequence[Row], outputs: Outputs) -> dict[str, Any]:
        """Settings that are chosen on the validation file (a threshold); they are kept with the model."""
        return {}

    @abstractmethod
    def predictions(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Outputs, making: Making
    ) -> list[Prediction]:
        """One for each example. `outputs`: of each row, float32, the head's logits without padding: "sequence" [L],
        "choice" [C], "token" [S, L], "span" [2, S] (starts, ends).
        """

    @abstractmethod
    def scores(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The published figures, `selects_by` among them. Examples without a known answer are left out."""

    def confused(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
        """Label and predicted label of each example that has one, for a confusion matrix; none where labels are not
        single.
        """
        return []

    @abstractmethod
    def record(self, example: Example, prediction: Prediction) -> dict[str, Any]:
        """A line of the predictions file, as JSON."""
