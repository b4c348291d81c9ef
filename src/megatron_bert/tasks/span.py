"""Answers in a passage, as fine-tuning tasks: SQuAD 1.1 and 2.0, CMRC 2018, and one's own questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from megatron_bert.tasks import squad
from megatron_bert.tasks.squad import Prediction, Question, WindowOptions
from megatron_bert.tasks.squad_metrics import best_threshold, cmrc_scores, f1, squad_scores
from megatron_bert.tasks.task import Head, Making, Outputs, Row, Task, TaskSettings, Text

__all__ = ["Cmrc", "SpanSettings", "Squad"]


class SpanSettings(TaskSettings):
    """How passages become windows, and logits answers; in tokens."""

    stride: int | None = Field(128, gt=0)  # from one window's start to the next one's; null: a passage must fit
    max_question: int = Field(64, gt=0)  # a longer question is cut
    max_answer: int = Field(30, gt=0)
    n_best: int = Field(20, gt=0)  # starts and ends that are looked at, and answers that are kept
    # No answer where the null score, [CLS]'s logits less the best answer's, is above it; null: chosen on the validation
    # file, where some of its questions have no answer
    null_threshold: float | None = None


class Squad(Task[Question, Prediction]):
    """Exact match and F1 by the official scripts; with questions that have no answer (2.0), a threshold for them."""

    settings_class: ClassVar = SpanSettings
    settings: SpanSettings
    head: ClassVar[Head] = "span"

    @property
    def selects_by(self) -> str:
        """F1."""
        return "f1"

    def read(self, file: Path) -> list[Question]:
        """SQuAD's format, or JSON lines."""
        return squad.read(file)

    def left_out(self, examples: Sequence[Question]) -> list[tuple[int, str]]:
        """Questions whose answer is not where it says."""
        misplaced = {question.name for question in squad.misplaced(examples)}
        return [
            (number, f"{question.where}: the answer {question.answers[0].text[:40]!r} is not in the passage at "
             f"{question.answers[0].start}")
            for number, question in enumerate(examples) if question.name in misplaced
        ]  # fmt: skip

    def rows(self, examples: Sequence[Question], making: Making) -> list[Row]:
        """Windows; one that does not hold the answer has the span of [CLS]."""
        settings = self.settings
        options = WindowOptions(making.max_length, settings.stride, settings.max_question)
        return [
            Row(one.example, (Text(one.input_ids, one.token_type_ids),), (one.start, one.end), one)
            for one in squad.features(examples, making.tokenizer, options)
        ]

    def tuned(self, examples: Sequence[Question], rows: Sequence[Row], outputs: Outputs) -> dict[str, Any]:
        """The threshold, where some questions have no answer."""
        if all(example.answers for example in examples):
            return {}
        found = self._decoded(examples, rows, outputs, None)
        texts = {name: one.n_best[0][0] if one.n_best else "" for name, one in found.items()}
        nulls = {name: one.null_score for name, one in found.items()}
        return {"null_threshold": best_threshold(f1, texts, nulls, squad.answers_by_name(examples))[1]}

    def predictions(
        self, examples: Sequence[Question], rows: Sequence[Row], outputs: Outputs, making: Making
    ) -> list[Prediction]:
        """The best answer of each question over its windows."""
        found = self._decoded(examples, rows, outputs, self.settings.null_threshold)
        return [found[example.name] for example in examples]

    def scores(self, examples: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """`exact` and `f1` in percent, of 2.0 also by whether there is an answer."""
        return squad_scores(*_texts(examples, predictions))

    def record(self, example: Question, prediction: Prediction) -> dict[str, Any]:
        """The answer, and the n best with the sums of their logits."""
        return {
            "id": example.name,
            "prediction": prediction.text,
            "answers": [answer.text for answer in example.answers],
            "null_score": prediction.null_score if prediction.n_best else None,
            "n_best": [{"text": text, "score": score} for text, score in prediction.n_best],
        }

    def _decoded(
        self, examples: Sequence[Question], rows: Sequence[Row], outputs: Outputs, threshold: float | None
    ) -> dict[str, Prediction]:
        return squad.decode(
            examples,
            [row.feature for row in rows],
            [one[0] for one in outputs],
            [one[1] for one in outputs],
            n_best=self.settings.n_best,
            max_answer=self.settings.max_answer,
            null_threshold=threshold,
        )


class Cmrc(Squad):
    """CMRC 2018: F1 of the longest common substring of characters, and the mean of it and exact match."""

    @property
    def selects_by(self) -> str:
        """The mean of exact match and F1, the official ranking."""
        return "average"

    def scores(self, examples: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """`exact`, `f1` and `average` in percent."""
        return cmrc_scores(*_texts(examples, predictions))


def _texts(
    examples: Sequence[Question], predictions: Sequence[Prediction]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    by_name = {example.name: one.text for example, one in zip(examples, predictions, strict=True)}
    return by_name, squad.answers_by_name(examples)
