"""One of several answers to a question on a passage: RACE, and people's own JSON lines."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from megatron_bert.errors import UserError
from megatron_bert.tasks.classification_metrics import accuracy
from megatron_bert.tasks.reading import json_lines
from megatron_bert.tasks.task import Head, Making, Outputs, Row, Task, TaskSettings, Text

__all__ = ["Choice", "ChoiceSettings", "Cut", "Prediction", "Question"]

logger = logging.getLogger(__name__)

_SECTIONS = ("middle", "high")  # RACE's, by the school whose examinations they are from
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENCODED_TOGETHER = 256  # questions


@dataclass(frozen=True)
class Question:
    """A question on a passage, its choices, and the number of the right one, where it is known."""

    name: str
    context: str
    question: str
    choices: tuple[str, ...]
    label: int | None
    where: str
    section: str = ""


@dataclass(frozen=True)
class Prediction:
    """The number of a choice, and the probability of each."""

    label: int
    probabilities: tuple[float, ...]


class Cut(NamedTuple):
    """Whether something of a question's rows did not fit."""

    passage: bool
    question: bool


class ChoiceSettings(TaskSettings):
    """What else there is to say of the files."""

    blank: str = "_"  # stands in a question where the choice belongs; empty: nothing does


class Choice(Task[Question, Prediction]):
    """RACE (Lai et al. 2017, arXiv 1704.04683) and files of the kind."""

    head: ClassVar[Head] = "choice"
    settings_class: ClassVar[type[TaskSettings]] = ChoiceSettings

    @property
    def selects_by(self) -> str:
        """Of all questions."""
        return "accuracy"

    def read(self, file: Path) -> list[Question]:
        """The questions of a file of JSON lines, or of all *.txt in a folder (RACE as it is published).

        A line is a passage of RACE's, {"article", "questions", "options", "answers", "id"}, or one question,
        {"context", "question", "choices", "label", "id"}; `label` counts from 0, and is null where it is not known.

        Raises:
            UserError: an empty file, a line that is not of the format, another number of choices than the rest.
        """
        files = sorted(file.rglob("*.txt")) if file.is_dir() else [file]
        questions = [question for one in files for question in _read(one)]
        if not questions:
            raise UserError(f"{file} is empty: it holds no question" + (" (*.txt)" if file.is_dir() else ""))
        _check_choices(questions)
        return questions

    def left_out(self, examples: Sequence[Question]) -> list[tuple[int, str]]:
        """Those whose label is null."""
        return [(at, f"{one.where}: it has no label") for at, one in enumerate(examples) if one.label is None]

    def rows(self, examples: Sequence[Question], making: Making) -> list[Row]:
        """For each choice [CLS] question and choice [SEP] passage [SEP], or without the passage where it is empty.

        That is the paper's code (Megatron-LM, tasks/race/data.py): the choice stands in place of the question's blanks,
        or after it; the passage is cut at its end. There, question and choice are cut to 128 tokens; here they stay
        whole, as far as a row can hold them. `feature`: the `Cut`.

        Raises:
            UserError: not all questions have as many choices; `max_length` leaves no room.
        """
        if making.max_length < 4:
            raise UserError(f"max_length {making.max_length}: at least 4 tokens are needed, for a question and 3 marks")
        _check_choices(examples)
        rows: list[Row] = []
        for begin in range(0, len(examples), _ENCODED_TOGETHER):
            some = examples[begin : begin + _ENCODED_TOGETHER]
            options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
            contexts = list(dict.fromkeys(one.context for one in some))
            passages = dict(zip(contexts, making.tokenizer(contexts, **options)["input_ids"], strict=True))
            asked = [self._asked(one, choice) for one in some for choice in one.choices]
            heads = iter(making.tokenizer(asked, **options)["input_ids"])
            for number, one in enumerate(some, start=begin):
                passage, own = passages[one.context], [next(heads) for _ in one.choices]
                texts = tuple(_text(head, passage, making) for head in own)
                room = making.max_length - 3 - max(map(len, own))
                rows.append(Row(number, texts, one.label, feature=Cut(bool(passage) and room < len(passage), room < 0)))
        for kind, name in enumerate(Cut._fields):
            if number := sum(row.feature[kind] for row in rows):
                logger.info(
                    "%d of %d questions: the %s is cut to %d tokens", number, len(rows), name, making.max_length
                )
        return rows

    def predictions(
        self, examples: Sequence[Question], rows: Sequence[Row], outputs: Outputs, making: Making
    ) -> list[Prediction]:
        """The most likely choice of each question."""
        found = []
        for output in outputs:
            shares = np.exp(np.asarray(output, dtype=np.float64) - np.max(output))
            found.append(Prediction(int(np.argmax(output)), tuple((shares / shares.sum()).tolist())))
        return found

    def scores(self, examples: Sequence[Question], predictions: Sequence[Prediction]) -> dict[str, float]:
        """`accuracy` in percent, and of RACE `middle_accuracy` and `high_accuracy` where there are such questions.

        Raises `UserError` where no example has a label."""
        known = [(one, found) for one, found in zip(examples, predictions, strict=True) if one.label is not None]
        if not known:
            raise UserError("no question has a label: there is nothing to score")
        scores = {"accuracy": _accuracy(known)}
        for section in _SECTIONS:
            if own := [pair for pair in known if pair[0].section == section]:
                scores[f"{section}_accuracy"] = _accuracy(own)
        return scores

    def record(self, example: Question, prediction: Prediction) -> dict[str, Any]:
        """The question's name, its prediction and label (numbers from 0), and the choices' probabilities."""
        known = {} if example.label is None else {"label": example.label}
        probabilities = list(prediction.probabilities)
        return {"id": example.name, "prediction": prediction.label, **known, "probabilities": probabilities}

    def _asked(self, one: Question, choice: str) -> str:
        blank: str = self.settings.blank
        if blank and blank in one.question:
            return re.sub(f"(?:{re.escape(blank)})+", lambda _: choice, one.question)
        return f"{one.question} {choice}"


def _text(head: Sequence[int], passage: Sequence[int], making: Making) -> Text:
    head = head[: making.max_length - 3]
    passage = passage[: making.max_length - 3 - len(head)]
    cls, sep = making.tokenizer.cls_token_id, making.tokenizer.sep_token_id
    second = [*passage, sep] if passage else []
    return Text((cls, *head, sep, *second), _types(len(head) + 2, len(second)))


@lru_cache(maxsize=1 << 14)
def _types(first: int, second: int) -> tuple[int, ...]:
    """Token types of so many tokens; rows of the same lengths share them."""
    return (0,) * first + (1,) * second


def _accuracy(known: Sequence[tuple[Question, Prediction]]) -> float:
    return accuracy(np.array([found.label for _, found in known]), np.array([one.label for one, _ in known]))


def _check_choices(questions: Sequence[Question]) -> None:
    first = questions[0]
    for one in questions:
        if len(one.choices) != len(first.choices):
            raise UserError(
                f"{one.where}: {len(one.choices)} choices, where {first.where} has {len(first.choices)}; "
                f"every question needs as many"
            )


def _read(file: Path) -> Iterator[Question]:
    for entry, where in json_lines(file):
        if "article" in entry:
            yield from _of_passage(entry, file, where)
        elif "context" in entry:
            yield _of_question(entry, where)
        else:
            raise UserError(f'{where}: "article" (RACE) or "context" is needed; there are {", ".join(entry)}')


def _of_passage(entry: dict[str, Any], file: Path, where: str) -> Iterator[Question]:
    name = str(entry.get("id", file.name))
    section = next((word for place in (name, file.parent.name, file.name) for word in _SECTIONS if word in place), "")
    lists = [entry.get(key) for key in ("questions", "options", "answers")]
    if not all(isinstance(one, list) for one in lists):
        raise UserError(f'{where}: lists of "questions", "options" and "answers" are needed beside "article"')
    if len({len(one) for one in lists}) > 1:  # type: ignore[arg-type]
        counts = ", ".join(str(len(one)) for one in lists)  # type: ignore[arg-type]
        raise UserError(f"{where}: as many questions, options and answers are needed, not {counts}")
    for number, (question, choices, answer) in enumerate(zip(*lists, strict=True), start=1):
        label = _LETTERS.find(answer) if isinstance(answer, str) and len(answer) == 1 else -1
        place = f"{where}, question {number}"
        yield _question(f"{name}-{number}", entry["article"], question, choices, label, place, section)


def _of_question(entry: dict[str, Any], where: str) -> Question:
    missing = [key for key in ("question", "choices", "label") if key not in entry]
    if missing:
        raise UserError(f'{where}: there is no "{missing[0]}"')
    name = str(entry.get("id", where.rsplit(" ", 1)[-1]))
    return _question(name, entry["context"], entry["question"], entry["choices"], entry["label"], where, "")


def _question(
    name: str, context: Any, question: Any, choices: Any, label: Any, where: str, section: str
) -> Question:  # fmt: skip
    texts = [context, question, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: passage and question must be texts, and the choices a list of texts")
    if len(choices) < 2:
        raise UserError(f"{where}: {len(choices)} choices; at least 2 are needed")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices)):
        raise UserError(f"{where}: the label is not one of the {len(choices)} choices")
    return Question(name, context, question, tuple(choices), label, where, section)
