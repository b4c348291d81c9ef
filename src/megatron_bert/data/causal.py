"""Rows of the causal objective: documents in random order, one stream, cut into rows that overlap by one token.

The rule is that of Megatron-LM's GPT data: each epoch's documents are shuffled and joined, each of them followed by a
separator, and row i is the stream's tokens [i * S, (i + 1) * S], of which the first S are seen and the last S are to
be predicted; rows are shuffled. Attention and positions run on over document borders. (Megatron-LM drops the epoch's
last, incomplete row; here it is padded.)
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.masking import IGNORED
from megatron_bert.data.randomness import Purpose, generator
from megatron_bert.data.samples import IntArray, Sample, SampleKey, SamplePlan, SampleRules, TokenFile
from megatron_bert.data.split import document_tokens

__all__ = ["CausalBuilder", "CausalIndex"]


class CausalIndex:
    """The rows of one epoch over some documents, in training order. It keeps 16 bytes a document and 8 a row.

    Attributes:
        num_empty_documents: documents without a token.
    """

    def __init__(self, reader: IndexedReader, documents: IntArray, rules: SampleRules, epoch: int) -> None:
        self.epoch, self.rules = epoch, rules
        tokens = document_tokens(reader)[documents]
        self.num_empty_documents = int((tokens == 0).sum())
        drawn = generator(rules.seed, Purpose.STREAM, epoch, corpus=rules.corpus).permutation(np.flatnonzero(tokens))
        self._starts = reader.starts[reader.documents[documents[drawn]]]
        self._bounds = np.concatenate([[0], np.cumsum(tokens[drawn] + 1)])  # in the stream, separators included
        num_rows = -(-max(int(self._bounds[-1]) - 1, 0) // rules.row_tokens)
        self._order = generator(rules.seed, Purpose.ORDER, epoch, corpus=rules.corpus).permutation(num_rows)

    def __len__(self) -> int:
        return len(self._order)

    def plan(self, index: int) -> SamplePlan:
        """The pieces of documents that row `index` is made of; the last separator is implied, and may be cut off."""
        start = int(self._order[index]) * self.rules.row_tokens
        stop = min(start + self.rules.row_tokens + 1, int(self._bounds[-1]))
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        last = int(np.searchsorted(self._bounds, stop, "left"))
        spans = []
        for at, (begin, end) in enumerate(pairwise(self._bounds[first : last + 1].tolist()), first):
            skipped = max(start - begin, 0)
            spans.append((int(self._starts[at]) + skipped, min(end - 1, stop) - begin - skipped))
        return SamplePlan(SampleKey(self.rules.corpus, self.epoch, index), tuple(spans), stop - 1 - start)


class CausalBuilder:
    """Makes rows of exactly `row_tokens`: what is seen, and at the same place what comes after it.

    Args:
        separator_id: what stands after each document.
        pad_id: fills an epoch's last row.
    """

    def __init__(self, tokens: TokenFile, rules: SampleRules, separator_id: int, pad_id: int) -> None:
        self._tokens, self._row_tokens = tokens, rules.row_tokens
        self._separator, self._pad_id = np.array([separator_id]), pad_id

    def build(self, plan: SamplePlan) -> Sample:
        """The row that `plan` describes."""
        parts: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        for span in plan.spans:
            parts += [self._tokens[span], self._separator]
        stream = np.concatenate(parts, dtype=np.int64)[: self._row_tokens + 1]
        num = max(len(stream) - 1, 0)
        ids = np.full(self._row_tokens, self._pad_id, np.int64)
        labels = np.full(self._row_tokens, IGNORED, np.int64)
        ids[:num], labels[:num] = stream[:num], stream[1:]
        return Sample(ids, np.zeros(self._row_tokens, np.int64), labels)
