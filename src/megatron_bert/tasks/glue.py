"""Where the texts and labels of GLUE's and OCNLI's files are, and how each is scored: a task is a row of `FORMATS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["FORMATS", "Columns", "Format", "Kind"]

Kind = Literal["single", "multi", "number"]  # one label, any number of labels, a number (regression)


@dataclass(frozen=True)
class Columns:
    """The names of the columns (or the keys of JSON lines) of the texts, one or two, and of the label."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Format:
    """What a task's files are, and its scores.

    Attributes:
        columns: the first whose names a file has.
        metrics: names in `classification_metrics.METRICS`; `selects` is the one (or their "average") by which a
            checkpoint is chosen.
        labels: in the order of the head's outputs; none: those of the training file.
        spellings: how files write labels, where that is not their name.
        header: the columns of files that have no line of names.
        unlabelled: what stands in place of a label on which the annotators did not agree.
        skips_broken: whether a row of another number of fields, or with an empty text, is left out; else an error.
        sections: words in a file's name that part the scores.
        separator: between the labels of a field ("multi").
    """

    columns: tuple[Columns, ...]
    metrics: tuple[str, ...]
    selects: str
    kind: Kind = "single"
    labels: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    unlabelled: str | None = None
    skips_broken: bool = False
    sections: tuple[str, ...] = ()
    separator: str = ","


_PAIR = Columns(("text_a", "text_b"), "label")  # JSON lines, as collections of several tasks have them
_SENTENCES = Columns(("sentence1", "sentence2"), "label")
_INFERENCE = ("contradiction", "entailment", "neutral")
_ENTAILMENT = ("entailment", "not_entailment")

FORMATS: dict[str, Format] = {
    "sst2": Format(
        (Columns(("sentence",), "label"),), ("accuracy",), "accuracy",
        labels=("negative", "positive"), spellings={"0": "negative", "1": "positive"},
    ),
    "cola": Format(
        (Columns(("sentence",), "label"),), ("matthews", "accuracy"), "matthews",
        labels=("unacceptable", "acceptable"), spellings={"0": "unacceptable", "1": "acceptable"},
        header=("source", "label", "judgement", "sentence"),
    ),
    "mrpc": Format(
        (Columns(("#1 String", "#2 String"), "Quality"), _SENTENCES, _PAIR), ("accuracy", "f1"), "average",
        labels=("not_equivalent", "equivalent"), spellings={"0": "not_equivalent", "1": "equivalent"},
    ),
    "qqp": Format(
        (Columns(("question1", "question2"), "is_duplicate"), Columns(("question1", "question2"), "label"), _PAIR),
        ("accuracy", "f1"), "accuracy",
        labels=("not_duplicate", "duplicate"), spellings={"0": "not_duplicate", "1": "duplicate"}, skips_broken=True,
    ),
    "stsb": Format(
        (Columns(("sentence1", "sentence2"), "score"), _SENTENCES, _PAIR), ("pearson", "spearman"), "average",
        kind="number",
    ),
    "mnli": Format(
        (Columns(("sentence1", "sentence2"), "gold_label"), _SENTENCES, Columns(("premise", "hypothesis"), "label"),
         _PAIR),
        ("accuracy",), "accuracy", labels=_INFERENCE, unlabelled="-", sections=("mismatched", "matched"),
    ),
    "qnli": Format((Columns(("question", "sentence"), "label"),), ("accuracy",), "accuracy", labels=_ENTAILMENT),
    "rte": Format((_SENTENCES, _PAIR), ("accuracy",), "accuracy", labels=_ENTAILMENT),
    "ocnli": Format((_SENTENCES,), ("accuracy",), "accuracy", labels=_INFERENCE, unlabelled="-"),
}  # fmt: skip
