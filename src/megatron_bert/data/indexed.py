"""Megatron-LM's indexed format: the token file PREFIX.bin and its index PREFIX.idx.

Little-endian. PREFIX.bin holds the tokens of all sequences (here: sentences), one after the other. PREFIX.idx holds

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the tokens' type (below)
    uint64    S, the number of sequences
    uint64    D, one more than the number of documents
    int32[S]  the sequences' lengths in tokens
    int64[S]  where each starts in PREFIX.bin, in bytes
    int64[D]  the sequence at which each document starts, and at the end S

Source: `megatron.core.datasets.indexed_dataset` of megatron-core 0.16, whose reader opens what is written here.
PREFIX.json is ours: which vocabulary made the tokens (see `Provenance`), so that a wrong one is noticed in training.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_bert.data.files import sync
from megatron_bert.errors import UserError

__all__ = ["IndexedReader", "IndexedWriter", "Provenance", "files_of", "token_type"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
_CODES = {np.dtype(scalar): code for code, scalar in _TYPES.items()}
_CHUNK_BYTES = 1 << 22
_CHUNK_SENTENCES = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SMALL_VOCABULARY = 65500  # megatron-core's limit for uint16


class Provenance(BaseModel):
    """What PREFIX.json says of a token file: the vocabulary that made it, its size, and which shard it is, if one."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    fingerprint: str
    vocabulary_size: int
    tokenizer: str
    documents: int
    sentences: int
    tokens: int
    shard: str | None = None  # "2/4": the second of four, to be merged


def files_of(prefix: Path) -> tuple[Path, Path, Path]:
    """The three files of a token file: PREFIX.bin, PREFIX.json and PREFIX.idx, whose presence says that it is whole.

    Raises:
        UserError: the prefix has no name, as `.` and `/` have none.
    """
    name = prefix.name
    if not name:
        raise UserError(f"{prefix} is no PREFIX of a token file: its files would have no name")
    return prefix.with_name(name + ".bin"), prefix.with_name(name + ".json"), prefix.with_name(name + ".idx")


def token_type(vocabulary_size: int) -> np.dtype[Any]:
    """uint16 where every token of the vocabulary fits, else int32: the choice that megatron-core makes."""
    return np.dtype(np.uint16 if vocabulary_size < _SMALL_VOCABULARY else np.int32)


class IndexedWriter:
    """Writes a token file aside and gives it its name in `finish`; leaving the block without it removes every trace.

    Memory does not grow: tokens, lengths and document borders go straight to the disk. What a killed run left aside is
    taken over by the next one with this prefix.

    Args:
        prefix: the path without its suffix.
        dtype: the type of the tokens on disk, see `token_type`.

    Raises:
        UserError: another process is writing this token file.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_sequences = self.num_documents = self.num_tokens = 0
        self._covered = 0  # sentences in documents
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._aside = tuple(_aside(path) for path in files_of(prefix))
        names = (self._aside[0], _aside(prefix.with_name(prefix.name + ".lengths")),
                 _aside(prefix.with_name(prefix.name + ".documents")))  # fmt: skip
        self._temporary = {*self._aside, *names}
        self._tokens = names[0].open("ab")
        _claim(self._tokens, prefix)
        self._lengths, self._ends = (name.open("w+b") for name in names[1:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM and error.filename is None:
            error.filename = str(self.prefix)
        for path in self._temporary:
            path.unlink(missing_ok=True)
        for file in (self._lengths, self._ends, self._tokens):
            with suppress(OSError):  # what its buffer held has no room; that has been said
                file.close()

    def add(self, tokens: npt.NDArray[Any], lengths: Int32Array, sentences_per_document: npt.ArrayLike) -> None:
        """Appends whole documents: their tokens end to end, the length of each sentence, and how many each has."""
        self.add_sentences(tokens, lengths)
        self.end_documents(sentences_per_document)

    def add_sentences(self, tokens: npt.NDArray[Any], lengths: Int32Array) -> None:
        """Appends sentences; `end_documents` says later which documents they make up."""
        assert lengths.sum() == len(tokens)
        self._tokens.write(tokens.astype(self.dtype, copy=False).data)
        self._lengths.write(lengths.astype("<i4", copy=False).data)
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)

    def end_documents(self, sentences_per_document: npt.ArrayLike) -> None:
        """Lets the next documents have so many of the sentences that were appended."""
        ends = np.cumsum(sentences_per_document, dtype="<i8") + self._covered
        self._ends.write(ends.data)
        self._covered = int(ends[-1]) if len(ends) else self._covered
        self.num_documents += len(ends)

    def finish(self, provenance: Provenance) -> None:
        """Writes the index, waits for the disk, and renames all three files, the index last.

        Raises:
            OSError: what the file system says; nothing that looks finished is left.
        """
        assert self._covered == self.num_sequences
        self._tokens.flush()
        self._aside[1].write_text(provenance.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
        with self._aside[2].open("wb") as index:
            self._write_index(index)
        final = files_of(self.prefix)
        for aside in self._aside:
            sync(aside)
        final[2].unlink(missing_ok=True)
        for aside, path in zip(self._aside, final, strict=True):
            os.replace(aside, path)

    def _write_index(self, index: BinaryIO) -> None:
        code = _CODES[self.dtype.newbyteorder("=")]
        index.write(_HEADER.pack(_MAGIC, 1, code, self.num_sequences, self.num_documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, index, _CHUNK_BYTES)
        self._lengths.seek(0)
        start = 0
        while chunk := self._lengths.read(_CHUNK_BYTES):
            sizes = np.frombuffer(chunk, "<i4").astype("<i8") * self.dtype.itemsize
            ends = np.cumsum(sizes, dtype="<i8") + start
            index.write((ends - sizes).data)
            start = int(ends[-1])
        index.write(struct.pack("<q", 0))
        self._ends.seek(0)
        shutil.copyfileobj(self._ends, index, _CHUNK_BYTES)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _claim(file: BinaryIO, prefix: Path) -> None:
    """Makes `file`, opened to append, empty and ours until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"another process is writing {prefix}; wait for it or choose another --output") from error
    except OSError:  # a file system without locks
        pass
    file.truncate(0)


class IndexedReader:
    """A token file, memory-mapped: nothing is read until it is used.

    Attributes:
        lengths: int32 [S], tokens of each sentence.
        documents: int64 [D + 1], the sentence at which each of the D documents starts, and at the end S.
        tokens: all tokens, one after the other.
        provenance: what PREFIX.json says, or None for a file that another program wrote.

    Raises:
        UserError: a file is missing, truncated, or not in this format.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        tokens_path, provenance_path, index_path = files_of(prefix)
        for path in (index_path, tokens_path):
            if not path.is_file():
                raise UserError(f"{path} is missing; '{prefix}' should be the --output of megatron-bert preprocess")
        code, num_sequences, num_documents = _read_header(index_path)
        dtype = np.dtype(_TYPES[code])
        if dtype.kind not in "iu":
            raise UserError(f"{index_path}: its values are {dtype.name}; a token file has integers")
        index = np.memmap(index_path, mode="r", dtype=np.uint8)
        wanted = _HEADER.size + 12 * num_sequences + 8 * num_documents
        if len(index) < wanted:
            raise UserError(
                f"{index_path} is truncated: {len(index):,} of {wanted:,} bytes; run megatron-bert preprocess again"
            )
        at = _HEADER.size
        self.lengths = cast(Int32Array, np.frombuffer(index, "<i4", num_sequences, at))
        self._pointers = np.frombuffer(index, "<i8", num_sequences, at + 4 * num_sequences)
        self.documents = cast(Int64Array, np.frombuffer(index, "<i8", num_documents, at + 12 * num_sequences))
        self.tokens = _map_tokens(tokens_path, dtype)
        self._check(index_path, tokens_path)
        self.provenance = _read_provenance(provenance_path)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        """A loader's worker process opens the files again instead of receiving their content."""
        return type(self), (self.prefix,)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> Int64Array:
        """int64 [S], where each sentence starts in `tokens`; unlike the rest it is held in memory."""
        return cast(Int64Array, self._pointers // self.tokens.dtype.itemsize)

    def __getitem__(self, sentence: int) -> npt.NDArray[Any]:
        """The tokens of one sentence, a view into the file."""
        start = int(self._pointers[sentence]) // self.tokens.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[sentence])]

    def _check(self, index_path: Path, tokens_path: Path) -> None:
        documents = self.documents
        if not len(documents) or documents[0] != 0 or documents[-1] != len(self) or (np.diff(documents) < 0).any():
            raise UserError(f"{index_path} contradicts itself: its documents do not cover its {len(self):,} sentences")
        end = 0
        for at in range(0, len(self), _CHUNK_SENTENCES):
            sizes = self.lengths[at : at + _CHUNK_SENTENCES].astype(np.int64) * self.tokens.dtype.itemsize
            ends = np.cumsum(sizes) + end
            if (sizes < 0).any() or (self._pointers[at : at + _CHUNK_SENTENCES] != ends - sizes).any():
                raise UserError(f"{index_path} contradicts itself: its sentences do not follow one another")
            end = int(ends[-1])
        wanted = end // self.tokens.dtype.itemsize
        if wanted > len(self.tokens):
            raise UserError(
                f"{tokens_path} is truncated: {len(self.tokens):,} of {wanted:,} tokens; "
                f"run megatron-bert preprocess again"
            )


def _read_header(path: Path) -> tuple[int, int, int]:
    with path.open("rb") as index:
        raw = index.read(_HEADER.size)
    if raw[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{path} is not an index in Megatron-LM's indexed format")
    if len(raw) < _HEADER.size:
        raise UserError(f"{path} is truncated: {len(raw)} bytes; run megatron-bert preprocess again")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(raw)
    if version != 1 or code not in _TYPES:
        raise UserError(f"{path}: version {version}, type code {code}; only version 1, codes 1 to 8 are known")
    return code, num_sequences, num_documents


def _map_tokens(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    size = path.stat().st_size
    if not size:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, mode="r", dtype=dtype, shape=(size // dtype.itemsize,))


def _read_provenance(path: Path) -> Provenance | None:
    if not path.is_file():
        return None
    try:
        return Provenance.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"{path} is damaged ({problem}); run megatron-bert preprocess again") from error
