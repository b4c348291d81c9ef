"""Small token files, given as the lengths of sentences."""

from pathlib import Path

import numpy as np

from megatron_bert.data.indexed import IndexedReader, IndexedWriter, Provenance

VOCABULARY_SIZE = 105  # of tests/unit/test_masking.py: ordinary ids from 5 on


def write_token_file(prefix: Path, documents: list[list[int]], *, numbered: bool = False) -> IndexedReader:
    """Documents of sentences of so many tokens; ids are drawn from the ordinary ones, or `numbered` count up from 5."""
    lengths = np.array([length for document in documents for length in document], np.int32)
    num = int(lengths.sum())
    tokens = np.arange(5, num + 5) if numbered else np.random.default_rng(0).integers(5, VOCABULARY_SIZE, num)
    with IndexedWriter(prefix, "int32" if numbered else "uint16") as writer:
        writer.add(tokens, lengths, [len(document) for document in documents])
        writer.finish(Provenance(fingerprint="", vocabulary_size=0, tokenizer="", documents=0, sentences=0, tokens=0))
    return IndexedReader(prefix)


def many(num: int = 40) -> list[list[int]]:
    """Documents of 0 to 30 sentences of 1 to 40 tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(1, 41, rng.integers(0, 31)).tolist() for _ in range(num)]


def all_documents(reader: IndexedReader) -> np.ndarray:
    """The numbers of a file's documents."""
    return np.arange(len(reader.documents) - 1)
