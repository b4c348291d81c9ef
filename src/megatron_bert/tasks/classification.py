"""Labels or a number for one text or two: GLUE, OCNLI (formats: `glue.py`), and people's own files."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_bert.errors import UserError
from megatron_bert.tasks.classification_metrics import METRICS, average
from megatron_bert.tasks.glue import Columns, Format, Kind
from megatron_bert.tasks.tables import Fields, table_rows
from megatron_bert.tasks.task import Head, Making, Outputs, Problem, Row, Task, TaskSettings, Text

__all__ = ["Classification", "Example", "OwnClassification", "OwnSettings", "Prediction"]

logger = logging.getLogger(__name__)

Label = str | tuple[str, ...] | float  # by `Format.kind`

_ENCODED_TOGETHER = 1024  # texts
_PROBLEMS: dict[Kind, Problem] = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "number": "regression",
}
_OWN_METRICS: dict[Kind, tuple[str, ...]] = {
    "single": ("accuracy", "macro_f1"),
    "multi": ("micro_f1", "macro_f1", "accuracy"),
    "number": ("pearson", "spearman"),
}


@dataclass(frozen=True)
class Example:
    """One text or two with their label. `reason`: why there is none; `section`: see `Format`."""

    texts: tuple[str, ...]
    label: Label | None
    where: str
    section: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Prediction:
    """A label, and the probability of each of `labels` (of a number: none)."""

    label: Label
    probabilities: tuple[float, ...]
    labels: tuple[str, ...]


class Classification(Task[Example, Prediction]):
    """A task in one of the published formats."""

    head: ClassVar[Head] = "sequence"

    def __init__(self, settings: Any, format: Format) -> None:
        super().__init__(settings)
        self.format = format

    @property
    def selects_by(self) -> str:
        """The format's metric."""
        return self.format.selects

    def problem(self) -> Problem:
        """By the format's kind."""
        return _PROBLEMS[self.format.kind]

    def read(self, file: Path) -> list[Example]:
        """The rows of a file (`table_rows`). One without a label on which its annotators agreed has None.

        Raises:
            UserError: an empty file, columns that are not there, a row that is not of the format.
        """
        section = next((word for word in self.format.sections if word in file.name), "")
        examples: list[Example] = []
        columns: Columns | None = None
        for fields, where in table_rows(file, self.format.header):
            if columns is None:
                columns = _columns(self.format, fields, where)
            examples.append(self._example(fields, columns, where, section))
        if not examples:
            raise UserError(f"{file} is empty: it holds no example")
        return examples

    def labels(self, training: Sequence[Example]) -> tuple[str, ...]:
        """The format's, or those of the examples, sorted. A number is called "score"."""
        if self.format.kind == "number":
            return ("score",)
        seen = {name for example in training for name in _names(example.label)}
        return self.format.labels or tuple(sorted(seen))

    def labels_of_outputs(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names as Transformers makes them up, `LABEL_0` and so on, are of the numbers in files of the format."""
        numbered = tuple(self.format.spellings.get(str(number), "") for number in range(len(names)))
        made_up = tuple(f"LABEL_{number}" for number in range(len(names)))
        return numbered if names == made_up and all(numbered) else names

    def left_out(self, examples: Sequence[Example]) -> list[tuple[int, str]]:
        """Those without a label."""
        return [(at, f"{one.where}: {one.reason}") for at, one in enumerate(examples) if one.label is None]

    def rows(self, examples: Sequence[Example], making: Making) -> list[Row]:
        """[CLS] text [SEP], or [CLS] text [SEP] text [SEP]; of a pair that is too long, the longer text is cut first.
        `feature`: whether it was cut.

        That is BERT's rule (run_classifier.py, `_truncate_seq_pair`) as `tokenizers` has it: where both are cut, to an
        odd number of tokens in all, the odd one goes to the text that was longer; in BERT, to the first.

        Raises:
            UserError: a label is not in `making.labels`; `max_length` leaves no room.
        """
        if making.max_length < 5:
            raise UserError(f"max_length {making.max_length}: at least 5 tokens are needed, for two texts and 3 marks")
        ids = {label: number for number, label in enumerate(making.labels)}
        targets = [_target(example, self.format.kind, ids) for example in examples]
        cut = {"truncation": "longest_first", "max_length": making.max_length, "verbose": False}
        rows: list[Row] = []
        for begin in range(0, len(examples), _ENCODED_TOGETHER):
            sides = zip(*(one.texts for one in examples[begin : begin + _ENCODED_TOGETHER]), strict=True)
            for at, one in enumerate(making.tokenizer(*map(list, sides), **cut).encodings, start=begin):
                texts = (Text(tuple(one.ids), tuple(one.type_ids)),)
                rows.append(Row(at, texts, targets[at], feature=bool(one.overflowing)))
        if num_cut := sum(row.feature for row in rows):
            logger.info("%d of %d texts are cut to %d tokens", num_cut, len(rows), making.max_length)
        return rows

    def predictions(
        self, examples: Sequence[Example], rows: Sequence[Row], outputs: Outputs, making: Making
    ) -> list[Prediction]:
        """The most likely label; each label that is likelier than not; or the number."""
        logits = np.stack([np.asarray(output, dtype=np.float64) for output in outputs])
        names = making.labels
        if self.format.kind == "number":
            return [Prediction(float(value), (), names) for value in logits[:, 0]]
        if self.format.kind == "multi":
            shares = 1 / (1 + np.exp(-logits))
            chosen = [tuple(name for name, value in zip(names, one, strict=True) if value > 0) for one in logits]
            return [Prediction(few, tuple(of), names) for few, of in zip(chosen, shares.tolist(), strict=True)]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        best = logits.argmax(axis=1)
        return [Prediction(names[at], tuple(of), names) for at, of in zip(best, shares.tolist(), strict=True)]

    def scores(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The format's metrics in percent (and their "average" where it selects by that), also by section
        ("matched_accuracy"). Raises `UserError` where no example has a label."""
        known = [(one, found) for one, found in zip(examples, predictions, strict=True) if one.label is not None]
        if not known:
            raise UserError("no example has a label: there is nothing to score")
        scores = self._scores(known)
        for section in sorted({one.section for one, _ in known} - {""}):
            own = self._scores([pair for pair in known if pair[0].section == section])
            scores |= {f"{section}_{name}": value for name, value in own.items()}
        return scores

    def confused(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[tuple[str, str]]:
        """Of the kind "single"."""
        pairs = [(one.label, found.label) for one, found in zip(examples, predictions, strict=True)]
        return [(one, other) for one, other in pairs if isinstance(one, str) and isinstance(other, str)]

    def record(self, example: Example, prediction: Prediction) -> dict[str, Any]:
        """Prediction, label, and the labels' probabilities."""
        shares = dict(zip(prediction.labels, prediction.probabilities, strict=False))
        return {
            "prediction": prediction.label,
            **({} if example.label is None else {"label": example.label}),
            **({"probabilities": shares} if shares else {}),
        }

    def _example(self, fields: Fields, columns: Columns, where: str, section: str) -> Example:
        broken = _broken(fields, columns)
        if not broken and self.format.skips_broken and not all(fields[name].strip() for name in columns.texts):
            broken = "an empty text"
        if broken:
            if not self.format.skips_broken:
                raise UserError(f"{where}: {broken}")
            return Example(("",) * len(columns.texts), None, where, section, broken)
        texts, label = tuple(fields[name] for name in columns.texts), fields[columns.label]
        if self.format.unlabelled is not None and label == self.format.unlabelled:
            return Example(texts, None, where, section, f"its label is {label!r}")
        return Example(texts, _label(label, self.format, where), where, section)

    def _scores(self, known: Sequence[tuple[Example, Prediction]]) -> dict[str, float]:
        ids = {name: number for number, name in enumerate(known[0][1].labels)}
        kind = self.format.kind
        expected = np.array([_target(one, kind, ids) for one, _ in known])
        predicted = np.array([_number(found.label, one.where, kind, ids) for one, found in known])
        scores = {name: METRICS[name](predicted, expected) for name in self.format.metrics}
        return {**scores, "average": average(scores)} if self.format.selects == "average" else scores


class OwnSettings(TaskSettings):
    """Where texts and labels are in one's own files."""

    texts: tuple[str, ...] = ("text",)  # the columns of one or two texts
    label: str = "label"  # the column of the label
    kind: Kind = "single"
    separator: str = ","  # between the labels of a field, of "multi"; JSON lines may have lists


class OwnClassification(Classification):
    """`classify`: one's own files. Raises `UserError` for settings that do not make a task."""

    settings_class: ClassVar[type[TaskSettings]] = OwnSettings

    def __init__(self, settings: OwnSettings) -> None:
        if len(settings.texts) not in (1, 2):
            raise UserError(f"task.texts: {len(settings.texts)} columns; one or two are needed")
        if not settings.separator:
            raise UserError("task.separator is empty: give what stands between two labels")
        metrics = _OWN_METRICS[settings.kind]
        columns = (Columns(settings.texts, settings.label),)
        super().__init__(settings, Format(columns, metrics, metrics[0], settings.kind, separator=settings.separator))


def _columns(format: Format, fields: Mapping[str | None, Any], where: str) -> Columns:
    for columns in format.columns:
        if {*columns.texts, columns.label} <= fields.keys():
            return columns
    wanted = " or ".join(", ".join([*columns.texts, columns.label]) for columns in format.columns)
    there = ", ".join(name for name in fields if name is not None)
    raise UserError(f"{where}: columns {wanted} are needed; there are {there}")


def _broken(fields: Fields, columns: Columns) -> str:
    """What is wrong with a row; nothing: ''."""
    if None in fields:
        return f"{len(fields[None])} more fields than columns"
    for name in (*columns.texts, columns.label):
        if fields.get(name) is None:
            return f"nothing in column {name!r}"
    wrong = [name for name in columns.texts if not isinstance(fields[name], str)]
    return f"{wrong[0]!r} is not a text" if wrong else ""


def _label(value: Any, format: Format, where: str) -> Label:
    if format.kind == "number":
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{where}: label {value!r} is not a number")
        return number
    if format.kind == "multi":
        names = value if isinstance(value, list) else str(value).split(format.separator)
        return tuple(dict.fromkeys(str(name).strip() for name in names if str(name).strip()))
    name = str(value).strip()
    if isinstance(value, (list, dict)) or not name:
        raise UserError(f"{where}: label {value!r} is not one label")
    return format.spellings.get(name, name)


def _names(label: Label | None) -> tuple[str, ...]:
    if label is None:
        return ()
    return label if isinstance(label, tuple) else (str(label),)


def _target(example: Example, kind: Kind, ids: Mapping[str, int]) -> int | float | tuple[float, ...] | None:
    return None if example.label is None else _number(example.label, example.where, kind, ids)


def _number(label: Label, where: str, kind: Kind, ids: Mapping[str, int]) -> int | float | tuple[float, ...]:
    """A label as a head's target."""
    if isinstance(label, float):
        return label
    names = _names(label)
    for name in names:
        if name not in ids:
            raise UserError(f"{where}: label {name!r} is not one of: {', '.join(ids)}")
    return tuple(float(name in names) for name in ids) if kind == "multi" else ids[names[0]]
