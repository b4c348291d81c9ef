"""Texts with labels -> samples -> batches of packed sequences.

n sequences, k samples, C texts of a sample, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from megatron_bert.data.collation import Batch
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.randomness import Purpose, generator
from megatron_bert.data.samples import IntArray, SampleKey, SamplePlan

__all__ = ["LabelledIndex", "LabelledSample", "LabelledTexts", "Row", "TargetKind", "Text", "collate_labelled"]

# A class of the sample; a number for each of L outputs; a label for each token; first and last token of a span.
TargetKind = Literal["class", "values", "tags", "span"]
Target = int | float | tuple[int, ...] | tuple[float, ...] | None


class Text(NamedTuple):
    """What the model reads as one sequence, special tokens included."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One input of a head with what it should say.

    Attributes:
        example: the number of the example that it was made of; one may have several rows (windows).
        texts: one; of a choice, one a choice, as many as every other row has.
        target: by the head's kind: a class or the right choice (int); a number (float), or a 0 or 1 for each label
            (tuple of floats); a label or IGNORED for each token (tuple of ints); a span's first and last token (two
            ints). None where it is not known: the row is only predicted.
        feature: what the task needs to decode the head's output, for itself.
    """

    example: int
    texts: tuple[Text, ...]
    target: Target
    feature: Any = None


class LabelledSample(NamedTuple):
    """A row's number, its texts as int64 [S] ids and token types, and its target."""

    number: int
    texts: list[tuple[IntArray, IntArray]]
    target: Target


class LabelledTexts:
    """The texts and targets of rows, in little memory; makes samples of them (a `Builder`)."""

    def __init__(self, rows: Iterable[Row]) -> None:
        ids, types, self.bounds, self._targets = [], [], [0], []
        texts_of = {0}
        for row in rows:
            for text in row.texts:
                ids.append(np.array(text.input_ids, np.int32))
                types.append(np.array(text.token_type_ids, np.int8))
                self.bounds.append(self.bounds[-1] + len(text.input_ids))
            self._targets.append(row.target)
            texts_of.add(len(row.texts))
        assert len(texts_of) <= 2, "rows with different numbers of texts"
        self.texts_of_row = max(texts_of)
        self._ids = np.concatenate(ids) if ids else np.empty(0, np.int32)
        self._types = np.concatenate(types) if types else np.empty(0, np.int8)

    def __len__(self) -> int:
        return len(self._targets)

    def row_tokens(self, number: int) -> int:
        """Of all texts of a row."""
        first = number * self.texts_of_row
        return self.bounds[first + self.texts_of_row] - self.bounds[first]

    @property
    def longest_text(self) -> int:
        """In tokens."""
        return int(np.diff(self.bounds).max(initial=0))

    def build(self, plan: SamplePlan) -> LabelledSample | None:
        """The row of `plan`; None for an empty plan, which is there to fill up a step."""
        if not plan.spans:
            return None
        number = plan.spans[0][0]
        texts = []
        for at in range(number * self.texts_of_row, (number + 1) * self.texts_of_row):
            span = slice(self.bounds[at], self.bounds[at + 1])
            texts.append((self._ids[span].astype(np.int64), self._types[span].astype(np.int64)))
        return LabelledSample(number, texts, self._targets[number])


class LabelledIndex:
    """The rows of one epoch, in an order drawn for it; without a seed, as they stand."""

    def __init__(self, texts: LabelledTexts, seed: int | None, epoch: int = 0) -> None:
        self._texts, self._epoch = texts, epoch
        num = len(texts)
        self._order = np.arange(num) if seed is None else generator(seed, Purpose.ORDER, epoch).permutation(num)

    def __len__(self) -> int:
        return len(self._order)

    def plan(self, index: int) -> SamplePlan:
        """What sample `index` is made of: the number of its row."""
        row = int(self._order[index])
        return SamplePlan(SampleKey(0, self._epoch, index), ((row, 1),), self._texts.row_tokens(row))


def collate_labelled(
    rows: Sequence[Sequence[LabelledSample | None]],
    kind: TargetKind,
    num_outputs: int,
    pad_id: int,
    row_tokens: int = 0,
    text_tokens: int = 0,
) -> Batch:
    """Samples end to end: all in one row that they fill, or with `row_tokens` in the rows given, each filled up with
    sequences of padding, none longer than `text_tokens` (0: than a row): the model may have no positions for more.

    Returns:
        `input_ids`, `token_type_ids` and `position_ids` (from 0 in each sequence), int64 [B, S];
        `cu_seq_lens`, int32 [n + 1], where each of the n sequences starts among the B * S tokens, and the end;
        `sequences`, int64 [k * C], those that are texts; `rows`, int64 [k], the samples' numbers; and `targets`:
        int64 [k] of classes, float32 [k, L] of values (NaN: not known), int64 [tokens of all texts] of tags, int64
        [k, 2] of spans; IGNORED: not known.
    """
    if not row_tokens:
        rows = [[sample for row in rows for sample in row]]
    ids, types, positions, bounds, sequences = [], [], [], [0], []
    samples = []
    for row in rows:
        begin = bounds[-1]
        for sample in row:
            if sample is None:
                continue
            samples.append(sample)
            for text_ids, text_types in sample.texts:
                sequences.append(len(bounds) - 1)
                ids.append(text_ids)
                types.append(text_types)
                positions.append(np.arange(len(text_ids)))
                bounds.append(bounds[-1] + len(text_ids))
        room = row_tokens - (bounds[-1] - begin) if row_tokens else int(bounds[-1] == begin)
        if room:  # a row of padding has one token at least: the model cannot be run on nothing
            ids.append(np.full(room, pad_id, np.int64))
            types.append(np.zeros(room, np.int64))
            longest, end = text_tokens or room, bounds[-1] + room
            positions.append(np.arange(room) % longest)
            bounds += [*range(bounds[-1] + longest, end, longest), end]
    shape = (len(rows), -1)
    return {
        "input_ids": torch.from_numpy(np.concatenate(ids)).view(shape),
        "token_type_ids": torch.from_numpy(np.concatenate(types)).view(shape),
        "position_ids": torch.from_numpy(np.concatenate(positions)).view(shape),
        "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32),
        "sequences": torch.tensor(sequences, dtype=torch.int64),
        "rows": torch.tensor([sample.number for sample in samples], dtype=torch.int64),
        "targets": _targets(samples, kind, num_outputs),
    }


def _targets(samples: Sequence[LabelledSample], kind: TargetKind, num_outputs: int) -> torch.Tensor:
    targets: list[Any] = [sample.target for sample in samples]
    if kind == "class":
        return torch.tensor([IGNORED if target is None else target for target in targets], dtype=torch.int64)
    if kind == "span":
        pairs = [(IGNORED, IGNORED) if target is None else target for target in targets]
        return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    if kind == "values":
        values = [[float("nan")] * num_outputs if one is None else np.atleast_1d(one).tolist() for one in targets]
        return torch.tensor(values, dtype=torch.float32).view(-1, num_outputs)
    tags: list[int] = []
    for sample in samples:
        tags += [IGNORED] * len(sample.texts[0][0]) if sample.target is None else sample.target  # type: ignore[arg-type]
    return torch.tensor(tags, dtype=torch.int64)
