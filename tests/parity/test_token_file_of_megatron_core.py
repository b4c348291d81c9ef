"""Token files with megatron-core as the peer: its reader opens ours, ours opens its, and the bytes are the same."""

import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_bert.cli.main import main
from megatron_bert.data.indexed import IndexedReader, IndexedWriter, Provenance, files_of
from tests.integration.tiny_corpus import prepare

CORPORA = Path(os.environ.get("MEGATRON_BERT_DATA", "../shared/data")).resolve()

Documents = list[list[list[int]]]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """megatron-core's module; importing it takes seconds, so only these tests do."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def random_documents(largest: int) -> Documents:
    draw = np.random.default_rng(largest)
    return [
        [draw.integers(0, largest, draw.integers(1, 40)).tolist() for _ in range(draw.integers(1, 9))]
        for _ in range(200)
    ]


def write_theirs(module: Any, prefix: Path, documents: Documents, dtype: type) -> None:
    builder = module.IndexedDatasetBuilder(str(prefix) + ".bin", dtype=dtype)
    for document in documents:
        lengths = [len(sentence) for sentence in document]
        builder.add_document(torch.tensor([token for sentence in document for token in sentence]), lengths)
    builder.finalize(str(prefix) + ".idx")


def write_ours(prefix: Path, documents: Documents, dtype: type) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            tokens = np.array([token for sentence in document for token in sentence])
            writer.add(tokens, np.array([len(sentence) for sentence in document], np.int32), [len(document)])
        numbers = dict.fromkeys(("vocabulary_size", "documents", "sentences", "tokens"), 0)
        writer.finish(Provenance(fingerprint="", tokenizer="", **numbers))


def read(sentences: Any, borders: Sequence[int]) -> Documents:
    found = [[int(token) for token in sentences[at]] for at in range(len(sentences))]
    return [found[begin:end] for begin, end in zip(borders, borders[1:], strict=False)]


def read_theirs(module: Any, prefix: Path) -> Documents:
    dataset = module.IndexedDataset(str(prefix))
    return read(dataset, dataset.document_indices.tolist())


def read_ours(prefix: Path) -> Documents:
    reader = IndexedReader(prefix)
    return read(reader, reader.documents.tolist())


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint16, 65_000), (np.int32, 1_000_000)])
def test_both_ways_and_byte_for_byte(theirs: Any, tmp_path: Path, dtype: type, largest: int) -> None:
    documents = random_documents(largest)
    write_theirs(theirs, tmp_path / "theirs", documents, dtype)
    write_ours(tmp_path / "ours", documents, dtype)
    assert read_theirs(theirs, tmp_path / "ours") == documents
    assert read_ours(tmp_path / "theirs") == documents
    for ours, peer in zip(files_of(tmp_path / "ours")[::2], files_of(tmp_path / "theirs")[::2], strict=True):
        assert ours.read_bytes() == peer.read_bytes()


def test_what_preprocess_writes(theirs: Any, tmp_path: Path) -> None:
    prepare(tmp_path)
    found = read_theirs(theirs, tmp_path / "text")
    assert found == read_ours(tmp_path / "text")
    assert [len(document) for document in found] == [5] * 40


@pytest.mark.skipif(not CORPORA.is_dir(), reason="needs the corpora")
@pytest.mark.parametrize(("corpus", "vocabulary", "language"), [("zhwiki", "bert-base-chinese", "zh")])
def test_real_text(theirs: Any, tmp_path: Path, corpus: str, vocabulary: str, language: str) -> None:
    with lzma.open(CORPORA / "corpus" / f"{corpus}.jsonl.xz") as lines:
        raw = [next(lines) for _ in range(300)]
    (tmp_path / "part.jsonl").write_bytes(b"".join(raw))
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "vocab.txt").write_bytes((CORPORA / "vocab" / f"{vocabulary}-vocab.txt").read_bytes())
    words = ["preprocess", "--input", "part.jsonl", "--tokenizer", "tok", "--output", "text", "--language", language]
    words[2::2] = [word if word == language else str(tmp_path / word) for word in words[2::2]]
    assert main([*words, "--workers", "2"]) == 0
    found = read_theirs(theirs, tmp_path / "text")
    assert found == read_ours(tmp_path / "text")
    assert len(found) == len(raw)
    assert (
        sum(len(sentence) for document in found for sentence in document)
        > sum(len(json.loads(r)["text"]) for r in raw) / 2
    )
