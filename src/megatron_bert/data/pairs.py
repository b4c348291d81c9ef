"""Which sentences make a sample of the masked objective, and which pair of segments.

A document's sentences are taken in order until they reach the target length: a run. A run of two sentences or more is
cut at a sentence border into a first and a second segment.

- Sentence order (Lan et al. 2019, arXiv 1909.11942, section 3.1; the pair objective of arXiv 1909.08053, section 5.3):
  half of the time the two are exchanged.
- Next sentence (Devlin et al. 2018, arXiv 1810.04805, section 3.1, and their repository's sampling): half of the time
  the second segment is replaced by one from another document, drawn at random; the sentences it would have had are not
  lost, the next run begins with them.

The next run begins where the last one ended. A run of one sentence has no pair: what it would teach, with the label
given by its length, is no property of the text. It is trained on for its masks alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.randomness import Purpose, generator
from megatron_bert.data.samples import IN_ORDER, OTHER_ORDER, IntArray, SampleKey, SamplePlan, SampleRules
from megatron_bert.data.split import document_tokens

__all__ = ["PairIndex"]

_BLOCK_SENTENCES = 1 << 20  # worked on at once: bounds the memory, and changes nothing else


@dataclass(frozen=True)
class _Block:
    """Whole documents, as the sentences [0, n) and the tokens that they have end to end.

    sentences: int64 [n], their numbers in the file; counts: int64, of each document; document_ends: int64 [n], where
    each sentence's document ends; bounds: int64 [n + 1], where each sentence starts in tokens, and the end;
    first_document: the number of the first document, among those that the index is of.
    """

    sentences: IntArray
    counts: IntArray
    document_ends: IntArray
    bounds: IntArray
    first_document: int


@dataclass(frozen=True)
class _Runs:
    """For each of n sentences the run that would begin there, in sentences of the block; `second_stop` is where the
    run ends, `next` where the next one begins, `drawn` whether the pair is the unnatural one."""

    target_tokens: IntArray
    border: IntArray
    second_stop: IntArray
    drawn: npt.NDArray[np.bool_]
    next: IntArray


class PairIndex:
    """The samples of one epoch over some documents, in training order.

    Vectorised, a million sentences at a time: where a run that began at each sentence would end is one binary search
    over all of them, and which beginnings are reached from the documents' first sentences takes log2(longest chain)
    passes. It keeps 17 bytes a sample (25 with next-sentence pairs).

    Attributes:
        starts: int64 [N], the first segment's first token in the token file.
        first_tokens, second_tokens: int32 [N], lengths before truncation; the second is 0 without a pair.
        second_starts: int64 [N], the second segment's first token; None where it always follows the first one.
        labels: int8 [N], IN_ORDER, OTHER_ORDER, or IGNORED without a pair.
        num_empty_documents: documents without a token.
    """

    def __init__(self, reader: IndexedReader, documents: IntArray, rules: SampleRules, epoch: int) -> None:
        self.epoch, self.rules, self._reader = epoch, rules, reader
        self._documents = documents[document_tokens(reader)[documents] > 0]
        self._counts = reader.documents[self._documents + 1] - reader.documents[self._documents]
        self.num_empty_documents = len(documents) - len(self._documents)
        self._random = generator(rules.seed, Purpose.RUNS, epoch, corpus=rules.corpus)
        self._others = generator(rules.seed, Purpose.OTHER, epoch, corpus=rules.corpus)
        parts = [self._samples(block) for block in self._blocks()]
        kept = [np.concatenate(column) if column else np.empty(0, np.int64) for column in zip(*parts, strict=True)]
        starts, first, second, second_starts, labels = kept or [np.empty(0, np.int64)] * 5
        order = generator(rules.seed, Purpose.ORDER, epoch, corpus=rules.corpus).permutation(len(starts))
        self.starts, self.first_tokens, self.second_tokens = starts[order], first[order], second[order]
        self.second_starts = second_starts[order] if len(second_starts) else None
        self.labels = labels[order]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_pairs(self) -> int:
        """Samples with a pair."""
        return int((self.labels != IGNORED).sum())

    def text_and_cut_tokens(self) -> tuple[int, int]:
        """The tokens of all samples' text, and how many of them truncation takes away."""
        text = self.first_tokens.astype(np.int64) + self.second_tokens
        room = self.rules.row_tokens - np.where(self.labels != IGNORED, 3, 2)
        return int(text.sum()), int(np.maximum(text - room, 0).sum())

    def plan(self, index: int) -> SamplePlan:
        """What sample `index` is made of."""
        start, first, second = int(self.starts[index]), int(self.first_tokens[index]), int(self.second_tokens[index])
        key, label = SampleKey(self.rules.corpus, self.epoch, index), int(self.labels[index])
        if label == IGNORED:
            return SamplePlan(key, ((start, first),), min(first + 2, self.rules.row_tokens))
        other = start + first if self.second_starts is None else int(self.second_starts[index])
        row_tokens = min(first + second + 3, self.rules.row_tokens)
        return SamplePlan(key, ((start, first), (other, second)), row_tokens, label)

    def _blocks(self) -> Iterator[_Block]:
        """The documents in blocks of about `_BLOCK_SENTENCES`."""
        ends = np.cumsum(self._counts)
        at = 0
        while at < len(ends):
            done = int(ends[at - 1]) if at else 0
            stop = max(int(np.searchsorted(ends, done + _BLOCK_SENTENCES, "right")), at + 1)
            counts = self._counts[at:stop]
            local = ends[at:stop] - done
            firsts = self._reader.documents[self._documents[at:stop]]
            sentences = np.repeat(firsts - (local - counts), counts) + np.arange(local[-1])
            bounds = np.concatenate([[0], np.cumsum(self._reader.lengths[sentences], dtype=np.int64)])
            yield _Block(sentences, counts, np.repeat(local, counts), bounds, at)
            at = stop

    def _samples(self, block: _Block) -> tuple[npt.NDArray[Any], ...]:
        """The block's samples in the order of the text: starts, lengths of both segments, second starts, labels."""
        runs = self._runs(block)
        firsts = np.flatnonzero(_reached(runs.next, block.document_ends, np.cumsum(block.counts) - block.counts))
        border, stop, drawn = runs.border[firsts], runs.second_stop[firsts], runs.drawn[firsts]
        starts = self._reader.starts[block.sentences[firsts]]
        first = block.bounds[border] - block.bounds[firsts]
        second = block.bounds[stop] - block.bounds[border]
        second_starts = np.empty(0, np.int64)
        if self.rules.pair == "next-sentence":
            second_starts = starts + first
            owners = np.searchsorted(np.cumsum(block.counts), firsts[drawn], "right") + block.first_document
            wanted = runs.target_tokens[firsts[drawn]] - first[drawn]
            second_starts[drawn], second[drawn] = self._segments_elsewhere(owners, wanted)
        paired = (first > 0) & (second > 0)
        labels = np.where(paired, np.where(drawn, OTHER_ORDER, IN_ORDER), IGNORED).astype(np.int8)
        if len(second_starts):
            starts = np.where(first > 0, starts, second_starts)
        first, second = np.where(paired, first, first + second), np.where(paired, second, 0)
        kept = first > 0  # a run whose sentences have no token is no sample
        columns = (starts, first.astype(np.int32), second.astype(np.int32), second_starts, labels)
        return tuple(column[kept] if len(column) else column for column in columns)

    def _runs(self, block: _Block) -> _Runs:
        """The run that would begin at each sentence."""
        rules, num = self.rules, len(block.sentences)
        draws = self._random.random((num, 4))
        short = draws[:, 0] < rules.short_share
        target = np.where(short, 2 + (draws[:, 1] * (rules.text_tokens - 1)).astype(np.int64), rules.text_tokens)
        at = np.arange(num)
        reach = np.searchsorted(block.bounds[1:], block.bounds[:-1] + target) + 1  # the sentence that reaches it too
        if rules.pair != "none":  # two sentences, where there are two: a long first one leaves room for a pair
            reach = np.maximum(reach, at + 2)
        stop = np.minimum(reach, block.document_ends)
        if rules.pair == "none" or (rules.pair == "next-sentence" and len(self._documents) < 2):
            return _Runs(target, stop, stop, np.zeros(num, bool), stop)
        cut = stop - at > 1
        border = np.where(cut, at + 1 + (draws[:, 2] * (stop - at - 1)).astype(np.int64), stop)
        drawn = cut & (draws[:, 3] < 0.5)
        following = np.where(drawn, border, stop) if rules.pair == "next-sentence" else stop
        return _Runs(target, border, stop, drawn, following)

    def _segments_elsewhere(self, owners: IntArray, wanted_tokens: IntArray) -> tuple[IntArray, IntArray]:
        """Sentences of a document other than `owners`, from one drawn at random up to the wanted length or its end.

        Returns:
            first tokens and lengths, int64.
        """
        reader, draws = self._reader, self._others.random((len(owners), 2))
        other = (draws[:, 0] * (len(self._documents) - 1)).astype(np.int64)
        other += other >= owners
        counts = self._counts[other]
        sentences = reader.documents[self._documents[other]]
        document_ends = sentences + counts
        sentences = sentences + (draws[:, 1] * counts).astype(np.int64)
        starts = reader.starts[sentences]
        stops = np.searchsorted(reader.starts, starts + np.maximum(wanted_tokens, 1))
        last = np.minimum(stops, document_ends) - 1
        return starts, reader.starts[last] + reader.lengths[last] - starts


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
