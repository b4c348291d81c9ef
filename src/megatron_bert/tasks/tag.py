"""A label for each word, as fine-tuning tasks: named entities in CoNLL columns, CLUENER, and one's own labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from megatron_bert.tasks import tagging
from megatron_bert.tasks.tagging import Sentence
from megatron_bert.tasks.tagging_metrics import Entity, entities, entity_scores
from megatron_bert.tasks.task import Head, Making, Outputs, Row, Task, Text

__all__ = ["Cluener", "Tagging"]

_OVERALL = ("precision", "recall", "f1", "macro_f1")


class Tagging(Task[Sentence, list[str]]):
    """Entity-level precision, recall and F1, by the rules of CoNLL's `conlleval`."""

    head: ClassVar[Head] = "token"

    @property
    def selects_by(self) -> str:
        """Micro F1."""
        return "f1"

    def read(self, file: Path) -> list[Sentence]:
        """CoNLL columns, JSON lines, or CLUENER's format."""
        return tagging.read(file)

    def labels(self, training: Sequence[Sentence]) -> tuple[str, ...]:
        """O first, then the others sorted."""
        return tuple(tagging.label_names(training))

    def rows(self, examples: Sequence[Sentence], making: Making) -> list[Row]:
        """A sentence in one row, or cut between words into several."""
        return [
            Row(one.example, (Text(one.input_ids, one.token_type_ids),), one.labels, one)
            for one in tagging.features(examples, making.tokenizer, making.labels, making.max_length)
        ]

    def predictions(
        self, examples: Sequence[Sentence], rows: Sequence[Row], outputs: Outputs, making: Making
    ) -> list[list[str]]:
        """The most likely label of each word's first piece."""
        best = [one.argmax(-1).tolist() for one in outputs]
        return tagging.decode(examples, [row.feature for row in rows], best, making.labels)

    def scores(self, examples: Sequence[Sentence], predictions: Sequence[list[str]]) -> dict[str, float]:
        """In percent, over all entities; `macro_f1` is the mean over types."""
        scores = entity_scores(map(entities, predictions), (entities(example.tags) for example in examples))
        return {name: scores[name] for name in _OVERALL}

    def record(self, example: Sentence, prediction: list[str]) -> dict[str, Any]:
        """Words, tags and the predicted ones."""
        return {"words": example.words, "tags": example.tags, "prediction": prediction,
                "entities": [_named(example.words, one) for one in entities(prediction)]}  # fmt: skip


class Cluener(Tagging):
    """CLUENER 2020, whose official score is the mean of the types' F1."""

    @property
    def selects_by(self) -> str:
        """Macro F1."""
        return "macro_f1"


def _named(words: Sequence[str], entity: Entity) -> dict[str, Any]:
    kind, first, last = entity
    return {"type": kind, "first": first, "last": last, "words": words[first : last + 1]}
