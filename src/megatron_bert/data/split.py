"""Which documents are trained on and which are held out."""

from __future__ import annotations

import numpy as np

from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.randomness import Purpose, generator
from megatron_bert.data.samples import IntArray
from megatron_bert.errors import UserError

__all__ = ["document_tokens", "split_documents"]


def document_tokens(reader: IndexedReader) -> IntArray:
    """int64 [D]: the tokens of each document."""
    inside = reader.documents < len(reader)
    bounds = np.full(len(reader.documents), int(reader.starts[-1]) + int(reader.lengths[-1]) if len(reader) else 0)
    bounds[inside] = reader.starts[reader.documents[inside]]
    return np.diff(bounds)


def split_documents(
    reader: IndexedReader, validation_share: float, seed: int, corpus: int = 0
) -> tuple[IntArray, IntArray]:
    """The documents to train on and those held out: drawn at random until they hold `validation_share` of the tokens.

    Returns:
        two sorted int64 arrays of document numbers.

    Raises:
        UserError: the split would leave nothing to train on, or nothing to validate on.
    """
    tokens = document_tokens(reader)
    drawn = generator(seed, Purpose.SPLIT, corpus=corpus).permutation(len(tokens))
    before = np.cumsum(tokens[drawn]) - tokens[drawn]
    held_out = before < validation_share * tokens.sum()
    training, validation = np.sort(drawn[~held_out]), np.sort(drawn[held_out])
    if not tokens[training].sum():
        raise UserError(
            f"{reader.prefix}: data.validation_share {validation_share} takes all {len(tokens):,} documents and leaves "
            f"none to train on; lower it or name a separate file in data.validation"
        )
    if validation_share and not tokens[validation].sum():
        raise UserError(f"{reader.prefix}: data.validation_share takes only empty documents; raise it")
    return training, validation
