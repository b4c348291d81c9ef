"""What a fine-tuning task says of itself. Batches, losses, training and evaluation are everybody's: `training/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_bert.training.configuration import Section

__all__ = ["Head", "Making", "Problem", "Row", "Task", "TaskSettings", "Text"]

Example = TypeVar("Example")
Prediction = TypeVar("Prediction")

# What is predicted: a class or number for a text, one of several texts, a label for each token, a span of tokens.
Head = Literal["sequence", "choice", "token", "span"]
# In Transformers' words; of "sequence" only.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
Outputs = Sequence[npt.NDArray[np.float32]]


class Text(NamedTuple):
    """What the model reads as one sequence, special tokens included."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One input of the head with what it should say.

    Attributes:
        example: the number of the example that it was made of; one may have several rows (windows).
        texts: one; of "choice", one a choice, as many as every other row has.
        target: "sequence": a class (int), a number (float), or a 0 or 1 for each label (tuple of floats); "choice": the
            right one (int); "token": a label, or IGNORED, for each token (tuple of ints); "span": its first and last
            token (two ints). None where it is not known: the row is only predicted.
        feature: what the task needs to decode the head's output, for itself.
    """

    example: int
    texts: tuple[Text, ...]
    target: int | float | tuple[int, ...] | tuple[float, ...] | None
    feature: Any = None


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

    @abstractmethod
    def record(self, example: Example, prediction: Prediction) -> dict[str, Any]:
        """A line of the predictions file, as JSON."""
