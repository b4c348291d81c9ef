"""A corpus divided among machines, and the token files that they made put together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from megatron_bert.data.files import refuse_to_overwrite
from megatron_bert.data.indexed import IndexedReader, IndexedWriter, Provenance, files_of
from megatron_bert.data.reading import Span, is_divisible, span_border
from megatron_bert.errors import UserError

__all__ = ["WHOLE", "Shard", "merge"]

_CHUNK = 1 << 16  # sentences copied at a time


@dataclass(frozen=True, order=True)
class Shard:
    """The `number`-th of `count` parts of the input, counted from 1.

    The input's bytes, all files one after the other, are divided into `count` equal parts. A part begins at the first
    document that begins in it; a compressed or Parquet file belongs as a whole to the part in which it begins. So the
    parts, put together in order, are the whole, and everyone finds the same parts without talking.
    """

    number: int
    count: int

    @classmethod
    def of(cls, text: str) -> Self:
        """The shard that "2/8" means.

        Raises:
            UserError: it is not of this form, or not within 1 and the count.
        """
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
        if not found or int(found[1]) > int(found[2]):
            raise UserError(f"--shard {text!r} is not a part such as 1/8, 2/8 ... 8/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def spans(self, files: Sequence[Path]) -> list[Span]:
        """What of `files` this shard reads.

        Raises:
            UserError: a part is wanted, and a file is a pipe, which has no size.
            OSError: a file cannot be opened.
        """
        sizes = [file.stat().st_size for file in files]
        starts = [0, *accumulate(sizes)]
        if self == WHOLE:
            return [Span(file) for file in files]
        for file in files:
            if not file.is_file():
                raise UserError(f"--shard {self}: {file} is no file on a disk, so it cannot be divided")
        begin, end = (starts[-1] * number // self.count for number in (self.number - 1, self.number))
        spans = []
        for file, start, size in zip(files, starts, sizes, strict=False):
            if is_divisible(file):
                first, last = (span_border(file, min(max(at - start, 0), size)) for at in (begin, end))
                if first < last:
                    spans.append(Span(file, first, last))
            elif begin <= start < end:
                spans.append(Span(file))
        return spans


WHOLE = Shard(1, 1)


def merge(prefixes: Sequence[Path], output: Path, *, overwrite: bool = False, progress: bool = False) -> Provenance:
    """Writes the token file `output` with the documents of the token files `prefixes`, in this order.

    All shards of a run, put together, are byte for byte the token file of an undivided run; they are taken in their
    order, whatever the order given.

    Raises:
        UserError: a token file is bad or of another vocabulary, a shard is missing or there twice, or nothing is in
            them.
        OSError: what the file system says; nothing that looks finished is left.
    """
    refuse_to_overwrite(list(files_of(output)), overwrite=overwrite)
    parts = _in_order([_part(prefix) for prefix in prefixes])
    first = parts[0].made
    for part in parts:
        if (part.made.fingerprint, part.reader.tokens.dtype) != (first.fingerprint, parts[0].reader.tokens.dtype):
            raise UserError(f"{part.prefix} and {parts[0].prefix} were made with different vocabularies")
    total = sum(part.made.tokens for part in parts)
    if not total:
        raise UserError(f"the token files hold no text: {', '.join(str(part.prefix) for part in parts)}")
    bar: tqdm[Any] = tqdm(total=total, unit=" tokens", unit_scale=True, delay=2, disable=None if progress else True)
    with bar, IndexedWriter(output, parts[0].reader.tokens.dtype) as writer:
        for part in parts:
            _copy(part.reader, writer, bar)
        made = first.model_copy(
            update={
                "documents": writer.num_documents,
                "sentences": writer.num_sequences,
                "tokens": writer.num_tokens,
                "shard": None,
            }
        )
        writer.finish(made)
    return made


class _Part(NamedTuple):
    prefix: Path
    reader: IndexedReader
    made: Provenance


def _part(prefix: Path) -> _Part:
    reader = IndexedReader(prefix)
    if reader.provenance is None:
        raise UserError(f"{files_of(prefix)[1]} is missing, so nothing says which vocabulary made {prefix}")
    return _Part(prefix, reader, reader.provenance)


def _in_order(parts: list[_Part]) -> list[_Part]:
    """The parts as given, or where they are shards, in the order of the shards."""
    shards = [None if part.made.shard is None else Shard.of(part.made.shard) for part in parts]
    found = [shard for shard in shards if shard is not None]
    if not found:
        return parts
    count = found[0].count
    if len(found) < len(parts) or any(shard.count != count for shard in found):
        names = ", ".join(f"{part.prefix} ({part.made.shard or 'no shard'})" for part in parts)
        raise UserError(f"these are not the shards of one run: {names}")
    numbers = sorted(shard.number for shard in found)
    for number in range(1, count + 1):
        times = numbers.count(number)
        if times != 1:
            raise UserError(f"shard {number}/{count} is {'missing' if not times else f'there {times} times'}")
    return [part for _, part in sorted(zip(found, parts, strict=True), key=lambda pair: pair[0])]


def _copy(reader: IndexedReader, writer: IndexedWriter, bar: tqdm[Any]) -> None:
    """Appends what `reader` has, a few million sentences at a time."""
    start = 0
    for at in range(0, len(reader), _CHUNK):
        lengths = reader.lengths[at : at + _CHUNK]
        num = int(lengths.sum(dtype=np.int64))
        writer.add_sentences(reader.tokens[start : start + num], lengths)
        start += num
        bar.update(num)
    for at in range(0, len(reader.documents) - 1, _CHUNK):
        writer.end_documents(np.diff(reader.documents[at : at + _CHUNK + 1]))
