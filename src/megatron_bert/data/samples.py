"""Which sentences make a sample, and the sample made from them.

A document's sentences are taken in order until they reach the target length; the next sample starts after them. Such a
run is cut at a sentence border into a first and a second segment, which are exchanged half of the time; telling which
is sentence-order prediction, the pair objective of the paper (arXiv 1909.08053, section 5.3, after Lan et al. 2019,
arXiv 1909.11942, section 3.1). A sample depends only on (seed, epoch, index).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import IGNORED, Masker
from megatron_bert.data.randomness import Purpose, generator
from megatron_bert.errors import UserError

__all__ = [
    "IN_ORDER",
    "SWAPPED",
    "EpochIndex",
    "Sample",
    "SampleBuilder",
    "SampleKey",
    "SampleRules",
    "split_documents",
]

IN_ORDER, SWAPPED = 0, 1  # the pair label, as Transformers' `next_sentence_label` has it: 0 for "B follows A"
_FRAME_TOKENS = 3  # [CLS] A [SEP] B [SEP]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Where a sample stands, and the sentences [first, stop) that it is made from."""

    epoch: int
    index: int
    first: int
    stop: int


class Sample(NamedTuple):
    """One row: `input_ids`, `token_type_ids` and `labels` are int64 [S]; the pair label is IGNORED without a pair."""

    input_ids: IntArray
    token_type_ids: IntArray
    labels: IntArray
    pair_label: int


@dataclass(frozen=True)
class SampleRules:
    """What decides the samples, besides the text.

    Attributes:
        row_tokens: longest row, special tokens included.
        short_share: share of samples with a target length drawn from 2 to the longest, so that short texts are seen.
        pairs: cut runs in two for sentence-order prediction.
    """

    seed: int
    row_tokens: int
    short_share: float = 0.1
    pairs: bool = True

    @property
    def text_tokens(self) -> int:
        """Longest row without its special tokens."""
        return self.row_tokens - _FRAME_TOKENS


class EpochIndex:
    """The samples of one epoch over some documents: sentences [firsts[i], stops[i]) for sample i, in training order.

    Vectorised: where a sample that began at each sentence would end is one binary search over all sentences, and which
    beginnings are reached from the documents' first sentences takes log2(longest chain) passes.
    """

    def __init__(self, reader: IndexedReader, documents: IntArray, rules: SampleRules, epoch: int) -> None:
        self.epoch = epoch
        document_ends = np.repeat(reader.documents[1:], np.diff(reader.documents))
        following = _following(reader, document_ends, rules, epoch)
        roots = reader.documents[documents]
        roots = roots[reader.documents[documents + 1] > roots]  # an empty document has no first sentence
        firsts = np.flatnonzero(_reached(following, document_ends, roots))
        order = generator(rules.seed, Purpose.ORDER, epoch).permutation(len(firsts))
        self.firsts = firsts[order]
        self.stops = following[self.firsts]

    def __len__(self) -> int:
        return len(self.firsts)

    @property
    def num_pairs(self) -> int:
        """Samples with two sentences or more."""
        return int((self.stops - self.firsts > 1).sum())

    def key(self, index: int) -> SampleKey:
        """The key of sample `index`."""
        return SampleKey(self.epoch, index, int(self.firsts[index]), int(self.stops[index]))


def _following(reader: IndexedReader, document_ends: IntArray, rules: SampleRules, epoch: int) -> IntArray:
    """int64 [S]: where a sample that begins at each sentence ends; never beyond its document, two sentences at least
    where there are two (so that a long first sentence does not make a sample without a pair)."""
    num = len(reader)
    rng = generator(rules.seed, Purpose.LENGTHS, epoch)
    targets = np.full(num, rules.text_tokens, np.int64)
    short = np.flatnonzero(rng.random(num) < rules.short_share)
    targets[short] = rng.integers(2, rules.text_tokens, len(short), endpoint=True)
    ends = reader.starts + reader.lengths
    reach = np.searchsorted(ends, reader.starts + targets) + 1  # the sentence that reaches the target is taken too
    return np.minimum(np.maximum(reach, np.arange(num) + 2), document_ends)


def _reached(following: IntArray, document_ends: IntArray, roots: IntArray) -> npt.NDArray[np.bool_]:
    """bool [S]: the sentences that a chain root -> following[root] -> ... visits before it leaves its document.

    Pointer doubling: after k passes, everything less than 2**k steps from a root is known, and `jump` goes 2**k steps.
    """
    outside = len(following)
    jump = np.append(np.where(following == document_ends, outside, following), outside)
    reached = np.zeros(outside + 1, bool)
    reached[roots] = reached[outside] = True
    while True:
        targets = jump[np.flatnonzero(reached)]
        new = targets[~reached[targets]]
        if not len(new):
            return reached[:outside]
        reached[new] = True
        jump = jump[jump]


class SampleBuilder:
    """Makes samples from a token file; it holds no state that a sample could depend on.

    Args:
        cls_id, sep_id: the ids of [CLS] and [SEP].
    """

    def __init__(self, reader: IndexedReader, rules: SampleRules, masker: Masker, cls_id: int, sep_id: int) -> None:
        self.reader, self.rules, self.masker = reader, rules, masker
        self._cls, self._sep = [cls_id], [sep_id]

    def build(self, key: SampleKey) -> Sample:
        """The sample that `key` names."""
        rng = generator(self.rules.seed, Purpose.SAMPLE, key.epoch, key.index)
        segments, label = self._segments(key, rng)
        parts: list[Any] = [self._cls]
        for segment in segments:
            parts += [segment, self._sep]
        row = np.concatenate(parts)
        types = np.zeros(len(row), np.int64)
        types[len(segments[0]) + 2 :] = 1
        masked = self.masker.mask(row, rng)
        return Sample(masked.input_ids, types, masked.labels, label)

    def _segments(self, key: SampleKey, rng: np.random.Generator) -> tuple[list[npt.NDArray[Any]], int]:
        first, second = self._tokens(key.first, key.stop), None
        if self.rules.pairs and key.stop - key.first > 1:
            border = int(rng.integers(key.first + 1, key.stop))
            first, second = self._tokens(key.first, border), self._tokens(border, key.stop)
        if second is None:
            keep = min(len(first), self.rules.text_tokens)
            return [_cut(first, keep, rng)], IGNORED
        keep_first, keep_second = _kept(len(first), len(second), self.rules.text_tokens)
        pair = [_cut(first, keep_first, rng), _cut(second, keep_second, rng)]
        label = SWAPPED if rng.random() < 0.5 else IN_ORDER
        return (pair[::-1] if label == SWAPPED else pair), label

    def _tokens(self, first: int, stop: int) -> npt.NDArray[Any]:
        reader = self.reader
        last = stop - 1
        return reader.tokens[int(reader.starts[first]) : int(reader.starts[last]) + int(reader.lengths[last])]


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


def split_documents(reader: IndexedReader, validation_share: float, seed: int) -> tuple[IntArray, IntArray]:
    """The documents to train on and those held out: drawn at random until they hold `validation_share` of the tokens.

    Returns:
        two sorted int64 arrays of document numbers.

    Raises:
        UserError: the split would leave nothing to train on, or nothing to validate on.
    """
    bounds = np.append(reader.starts, reader.starts[-1:] + reader.lengths[-1:])[reader.documents]
    tokens = np.diff(bounds)
    drawn = generator(seed, Purpose.SPLIT).permutation(len(tokens))
    before = np.cumsum(tokens[drawn]) - tokens[drawn]
    held_out = before < validation_share * tokens.sum()
    training, validation = np.sort(drawn[~held_out]), np.sort(drawn[held_out])
    if not tokens[training].sum():
        raise UserError(
            f"data.validation_share {validation_share} takes all {len(tokens):,} documents and leaves none to train "
            f"on; lower it or name a separate file in data.validation"
        )
    if validation_share and not tokens[validation].sum():
        raise UserError("data.validation_share takes only empty documents; raise it")
    return training, validation
