"""The token file against its published layout: bytes built here by hand, and files of ours taken apart by hand."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_bert.data.indexed import IndexedReader, IndexedWriter, Provenance, files_of, token_type
from megatron_bert.errors import UserError

SENTENCES = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
DOCUMENTS = [2, 2]  # sentences of each
PROVENANCE = Provenance(fingerprint="f", vocabulary_size=20, tokenizer="t", documents=2, sentences=4, tokens=10)


def write(prefix: Path, dtype: str = "uint16") -> None:
    """Writes SENTENCES as DOCUMENTS, in two calls."""
    with IndexedWriter(prefix, dtype) as writer:
        for chosen, documents in ((SENTENCES[:2], DOCUMENTS[:1]), (SENTENCES[2:], DOCUMENTS[1:])):
            tokens = np.array([token for sentence in chosen for token in sentence])
            writer.add(tokens, np.array([len(sentence) for sentence in chosen], np.int32), documents)
        writer.finish(PROVENANCE)


def by_hand(prefix: Path, code: int, dtype: str) -> None:
    """The same file, put together from megatron-core's description of it."""
    lengths = [len(sentence) for sentence in SENTENCES]
    size = np.dtype(dtype).itemsize
    pointers = [size * sum(lengths[:at]) for at in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", 4) + struct.pack("<Q", 3)
    index += struct.pack("<4i", *lengths) + struct.pack("<4q", *pointers) + struct.pack("<3q", 0, 2, 4)
    tokens, _, idx = files_of(prefix)
    tokens.write_bytes(np.array(sum(SENTENCES, []), dtype=dtype).tobytes())
    idx.write_bytes(index)


@pytest.mark.parametrize(("dtype", "code"), [("uint16", 8), ("int32", 4)])
def test_bytes_are_those_of_the_format(tmp_path: Path, dtype: str, code: int) -> None:
    write(tmp_path / "ours", dtype)
    by_hand(tmp_path / "theirs", code, dtype)
    for ours, theirs in zip(files_of(tmp_path / "ours")[::2], files_of(tmp_path / "theirs")[::2], strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("dtype", "code"), [("uint16", 8), ("int32", 4), ("int64", 5), ("uint8", 1)])
def test_reads_a_file_of_another_program(tmp_path: Path, dtype: str, code: int) -> None:
    by_hand(tmp_path / "theirs", code, dtype)
    reader = IndexedReader(tmp_path / "theirs")
    assert [reader[at].tolist() for at in range(len(reader))] == SENTENCES
    assert reader.documents.tolist() == [0, 2, 4]
    assert reader.provenance is None


def test_round_trip_and_provenance(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "text")
    reader = IndexedReader(tmp_path / "deep" / "text")
    assert [reader[at].tolist() for at in range(len(reader))] == SENTENCES
    assert reader.provenance == PROVENANCE
    again = pickle.loads(pickle.dumps(reader))
    assert again.tokens.tolist() == reader.tokens.tolist()
    assert len(pickle.dumps(reader)) < 1000  # the path travels, not the content
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["text.bin", "text.idx", "text.json"]


def test_nothing_is_left_of_an_unfinished_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "text", "int32") as writer:
        writer.add(np.arange(3), np.array([3], np.int32), [1])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_token_type() -> None:
    assert token_type(65499) == np.uint16
    assert token_type(65500) == np.int32


def truncated(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: files_of(p)[2].unlink(), r"text\.idx is missing"),
        (lambda p: files_of(p)[0].unlink(), r"text\.bin is missing"),
        (lambda p: files_of(p)[2].write_bytes(b"PK\x03\x04" + bytes(100)), "not an index in Megatron-LM's"),
        (lambda p: truncated(files_of(p)[2], 0), "not an index in Megatron-LM's"),
        (lambda p: truncated(files_of(p)[2], 20), r"text\.idx is truncated"),
        (lambda p: truncated(files_of(p)[2], 60), r"text\.idx is truncated: 60 of 106 bytes"),
        (lambda p: truncated(files_of(p)[0], 12), r"text\.bin is truncated: 6 of 10 tokens"),
        (lambda p: truncated(files_of(p)[0], 0), r"text\.bin is truncated: 0 of 10 tokens"),
        (lambda p: truncated(files_of(p)[1], 10), r"text\.json is damaged"),
        (lambda p: by_hand(p, 7, "float32"), "values are float32"),
        (lambda p: by_hand(p, 99, "int32"), "type code 99"),
        (lambda p: swap_pointers(files_of(p)[2]), "do not follow one another"),
        (lambda p: last_document(files_of(p)[2]), "do not cover its 4 sentences"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path / "text")
    damage(tmp_path / "text")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        IndexedReader(tmp_path / "text")


def swap_pointers(index: Path) -> None:
    """Exchanges the places of the first two sentences."""
    raw = bytearray(index.read_bytes())
    at = 34 + 16
    raw[at : at + 16] = raw[at + 8 : at + 16] + raw[at : at + 8]
    index.write_bytes(raw)


def last_document(index: Path) -> None:
    """Lets the last document end after the last sentence."""
    index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 5))
