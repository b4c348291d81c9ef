"""A sample of the masked objective: what it is made of, and how it is made. It depends only on (seed, epoch, index)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from megatron_bert.data.indexed import IndexedReader, files_of
from megatron_bert.data.masking import IGNORED, Masker
from megatron_bert.data.randomness import Purpose, generator

__all__ = [
    "IN_ORDER",
    "OTHER_ORDER",
    "Builder",
    "IntArray",
    "MaskedBuilder",
    "Pair",
    "Sample",
    "SampleIndex",
    "SampleKey",
    "SamplePlan",
    "SampleRules",
    "TokenFile",
]

# The pair label, as Transformers' `next_sentence_label` has it: 0 for "B follows A"; 1 for an exchanged pair, or a B
# from another document.
IN_ORDER, OTHER_ORDER = 0, 1

IntArray = npt.NDArray[np.int64]
Pair = Literal["sentence-order", "next-sentence", "none"]


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Where a sample stands: the part of the blend, the epoch of that part, and the place in the epoch."""

    corpus: int
    epoch: int
    index: int


class SamplePlan(NamedTuple):
    """What a sample is made of: spans (first token, number) of its token file, the tokens that its row will have, and
    the pair label. Without spans it is an empty row, there for its shape."""

    key: SampleKey
    spans: tuple[tuple[int, int], ...]
    row_tokens: int
    label: int = IGNORED


class Sample(NamedTuple):
    """One row: `input_ids`, `token_type_ids` and `labels` are int64 [S]; the pair label is IGNORED without a pair."""

    input_ids: IntArray
    token_type_ids: IntArray
    labels: IntArray
    pair_label: int = IGNORED


@dataclass(frozen=True)
class SampleRules:
    """What decides the samples, besides the text.

    Attributes:
        row_tokens: longest row, special tokens included.
        short_share: share of samples with a target length drawn from 2 to the longest, so that short texts are seen.
        pair: the pair objective.
        corpus: number of the token file in a blend.
    """

    seed: int
    row_tokens: int
    short_share: float = 0.1
    pair: Pair = "sentence-order"
    corpus: int = 0

    @property
    def text_tokens(self) -> int:
        """Longest row without its special tokens: [CLS] A [SEP] B [SEP], or [CLS] A [SEP] where there are no pairs."""
        return self.row_tokens - (2 if self.pair == "none" else 3)


class SampleIndex(Protocol):
    """The samples of one epoch, in training order."""

    def __len__(self) -> int: ...

    def plan(self, index: int) -> SamplePlan:
        """What sample `index` is made of."""


class Builder(Protocol):
    """Makes samples from plans."""

    def build(self, plan: SamplePlan) -> Any:
        """The sample that `plan` describes."""


class TokenFile:
    """The tokens of a token file, memory-mapped; a loader's worker maps the file anew and receives none of it."""

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._prefix, self._dtype = prefix, np.dtype(dtype)
        path = files_of(prefix)[0]
        num = path.stat().st_size // self._dtype.itemsize
        # As a plain array: slices of a `memmap` cost much more. An empty file cannot be mapped.
        self._tokens = np.asarray(np.memmap(path, self._dtype, "r", shape=num)) if num else np.empty(0, self._dtype)

    @classmethod
    def of(cls, reader: IndexedReader) -> Self:
        """The tokens that `reader` has."""
        return cls(reader.prefix, reader.tokens.dtype)

    def __reduce__(self) -> tuple[type[Self], tuple[Path, np.dtype[Any]]]:
        return type(self), (self._prefix, self._dtype)

    def __getitem__(self, span: tuple[int, int]) -> npt.NDArray[Any]:
        """The tokens of (first token, number), a view into the file."""
        start, num = span
        return self._tokens[start : start + num]


class MaskedBuilder:
    """Makes rows [CLS] A [SEP] B [SEP] with masks; it holds no state that a sample could depend on.

    Args:
        cls_id, sep_id: the ids of [CLS] and [SEP].
    """

    def __init__(self, tokens: TokenFile, rules: SampleRules, masker: Masker, cls_id: int, sep_id: int) -> None:
        self._tokens, self._rules, self._masker = tokens, rules, masker
        self._cls, self._sep = np.array([cls_id]), np.array([sep_id])

    def build(self, plan: SamplePlan) -> Sample:
        """The sample that `plan` describes."""
        key = plan.key
        rng = generator(self._rules.seed, Purpose.SAMPLE, key.epoch, key.index, key.corpus)
        segments = self._segments(plan, rng)
        parts = [self._cls]
        for segment in segments:
            parts += [segment, self._sep]
        row = np.concatenate(parts, dtype=np.int64)
        types = np.zeros(len(row), np.int64)
        types[len(segments[0]) + 2 :] = 1
        masked = self._masker.mask(row, rng)
        return Sample(masked.input_ids, types, masked.labels, plan.label)

    def _segments(self, plan: SamplePlan, rng: np.random.Generator) -> list[npt.NDArray[Any]]:
        """One or two segments, truncated, in the order of the row."""
        segments = [self._tokens[span] for span in plan.spans]
        if len(segments) < 2:
            segment = segments[0] if segments else np.empty(0, np.int64)
            return [_cut(segment, min(len(segment), self._rules.row_tokens - 2), rng)]
        keep = _kept(len(segments[0]), len(segments[1]), self._rules.row_tokens - 3)
        segments = [_cut(segment, num, rng) for segment, num in zip(segments, keep, strict=True)]
        exchange = self._rules.pair == "sentence-order" and plan.label == OTHER_ORDER
        return segments[::-1] if exchange else segments


def _kept(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each segment stay when the longer one gives way until both fit into `room`."""
    if first + second <= room:
        return first, second
    half = room // 2
    if first <= half:
        return first, room - first
    if second <= half:
        return room - second, second
    return room - half, half


def _cut(segment: npt.NDArray[Any], keep: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    """`keep` tokens of the segment; each one too many goes from the front or the end with even odds."""
    excess = len(segment) - keep
    front = int(rng.binomial(excess, 0.5)) if excess else 0
    return segment[front : front + keep]
