"""Text files -> blocks of whole lines, in order and in constant memory, without looking at what the lines say.

Splitting a file here and parsing its blocks elsewhere (`text.py`) lets any number of workers do the parsing. Where a
block ends depends on the text alone, never on workers, compression or shards.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from io import FileIO, RawIOBase
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import zstandard

from megatron_bert.errors import UserError

__all__ = ["Block", "Span", "is_divisible", "read_blocks", "span_border"]

_COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: _ZstdFile(raw),
}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_TEXT_BORDERS = (b"\n\n", b"\n\r\n")  # a blank line that holds spaces is seen later, by the parser
_BLOCK_BYTES = 1 << 20  # of text that is parsed and tokenized together
_LONGEST_JSON_LINE_BYTES = 64 << 20
_LOOK_SECONDS = 0.5  # between looks at a pipe
_PARQUET_ROWS = 16  # decoded at a time: documents may be long
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError)

Kind = Literal["text", "jsonl", "rows"]


class Block(NamedTuple):
    """Consecutive lines of a file.

    content: the lines as they are in the file ("text", "jsonl"), or a text a row ("rows", of Parquet).
    first_line: number of the first one, counted from 1 at `span_start`.
    inside_document, inside_line: it begins in the middle of one ("text" only: a document of any length is read).
    cut: it ends in the middle of a document.
    problem: what is wrong with a line that is too long to be content; such a block holds nothing else.
    consumed_bytes: how much of the file is read when this block is.
    """

    file: Path
    kind: Kind
    content: bytes | list[str | None]
    first_line: int
    consumed_bytes: int
    span_start: int = 0
    inside_document: bool = False
    inside_line: bool = False
    cut: bool = False
    problem: str = ""


class Span(NamedTuple):
    """A file, or with `start` and `end` (bytes, None: its end) a part of one that is divisible."""

    file: Path
    start: int = 0
    end: int | None = None


def read_blocks(span: Span, json_key: str) -> Iterator[Block]:
    """Yields the blocks of a file or a part of one. Its name says what it is: .jsonl, .ndjson, .json; .parquet;
    anything else is plain text. All but Parquet may be compressed: .gz, .xz, .zst.

    Raises:
        UserError: a damaged or half-downloaded file; a Parquet file without a column of texts called `json_key`.
        OSError: what the file system says.
    """
    kind, compression = _kind_of(span.file)
    if kind == "rows":
        yield from _rows(span.file, json_key)
        return
    with _Source(str(span.file)) as raw:
        if span.start:
            raw.seek(span.start)
        opened = _COMPRESSIONS[compression](raw) if compression else raw
        stream = _Stream(span, raw, opened)
        yield from (_jsonl_blocks if kind == "jsonl" else _text_blocks)(stream)


def is_divisible(file: Path) -> bool:
    """Whether parts of the file can be read by themselves: it is neither compressed nor Parquet."""
    kind, compression = _kind_of(file)
    return kind != "rows" and not compression


def span_border(file: Path, offset: int) -> int:
    """The first border between documents at or after `offset` bytes in a divisible file; its size if there is none.

    A border is the start, a line break in JSON lines, a blank line in plain text. Where an offset lies decides alone,
    so those who divide a file agree without talking.
    """
    if offset <= 0:
        return 0
    borders = (b"\n",) if _kind_of(file)[0] == "jsonl" else _TEXT_BORDERS
    with file.open("rb") as raw:
        begin = max(offset - 3, 0)
        raw.seek(begin)
        held, base = b"", begin
        while chunk := raw.read(_BLOCK_BYTES):
            held += chunk
            ends = [at for border in borders if (at := _first_end(held, border, offset - base)) is not None]
            if ends:
                return base + min(ends)
            base += len(held) - len(held[-2:])
            held = held[-2:]
    return file.stat().st_size


def _first_end(held: bytes, border: bytes, least: int) -> int | None:
    """Where the first `border` that ends at `least` or later ends in `held`."""
    at = held.find(border, max(least - len(border), 0))
    return None if at < 0 else at + len(border)


def _kind_of(file: Path) -> tuple[Kind, str]:
    """What the file's name says it is, and its compression's suffix or nothing."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    last = suffixes[-1] if suffixes else ""
    if last == ".parquet" and not compression:
        return "rows", ""
    return ("jsonl" if last in _JSON_LINES else "text"), compression


class _Source(FileIO):
    """A file without a buffer. A signal that comes just before a read of a pipe that has nothing to give does not end
    that read, so a pipe is read when it has something, and between looks for it the signal is seen.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes; none at the end."""
        while not self.seekable() and not wait([self.fileno()], _LOOK_SECONDS):
            pass
        return super().read(size)


class _Stream:
    """The bytes of a span, decompressed, and what its blocks have in common."""

    def __init__(self, span: Span, raw: RawIOBase, opened: Any) -> None:
        self._span = span
        self._raw = raw
        self._opened = opened
        self._left = None if span.end is None else span.end - span.start
        self.line = 1

    def fill(self, held: bytes, size: int) -> bytes:
        """`held` with more of the file after it, `size` bytes in all, or fewer at the end of the file."""
        parts, wanted = [held], size - len(held)
        while wanted > 0 and (part := self._read(wanted)):
            parts.append(part)
            wanted -= len(part)
        return b"".join(parts)

    def block(self, kind: Kind, content: bytes, **marks: Any) -> Block:
        """The next block; the lines in it are counted."""
        first = self.line
        self.line += content.count(b"\n")
        span = self._span
        consumed = self._raw.tell() - span.start if self._raw.seekable() else 0
        return Block(span.file, kind, content, first, consumed, span_start=span.start, **marks)

    def skip_line_breaks(self, held: bytes) -> bytes:
        """`held` without the line breaks that it begins with; they are counted."""
        rest = held.lstrip(b"\r\n")
        self.line += held.count(b"\n", 0, len(held) - len(rest))
        return rest

    def _read(self, size: int) -> bytes:
        if self._left is not None:
            size = min(size, self._left)
        try:
            part: bytes = self._opened.read(size)
        except _DAMAGE as error:
            raise UserError(
                f"{self._span.file} is damaged or incomplete after line {self.line - 1} ({error}); "
                f"download or compress it again"
            ) from error
        if self._left is not None:
            self._left -= len(part)
        return part


def _jsonl_blocks(stream: _Stream) -> Iterator[Block]:
    held = b""
    while held := stream.fill(held, max(_BLOCK_BYTES, len(held) + 1)):
        size = len(held)
        end = held.rfind(b"\n") + 1 if size >= _BLOCK_BYTES else size
        while not end and size < _LONGEST_JSON_LINE_BYTES:  # a long line
            held = stream.fill(held, 2 * size)
            end = held.find(b"\n", size) + 1
            if len(held) < 2 * size and not end:
                break
            size = len(held)
        if not end and len(held) >= _LONGEST_JSON_LINE_BYTES:
            held, problem = _skip_line(stream), f"the line is longer than {_LONGEST_JSON_LINE_BYTES >> 20} MiB"
            yield stream.block("jsonl", b"", problem=problem)
            stream.line += 1
            continue
        end = end or len(held)
        yield stream.block("jsonl", held[:end])
        held = held[end:]


def _skip_line(stream: _Stream) -> bytes:
    """What follows the line that is being read."""
    while held := stream.fill(b"", _BLOCK_BYTES):
        if end := held.find(b"\n") + 1:
            return held[end:]
    return b""


def _text_blocks(stream: _Stream) -> Iterator[Block]:
    held, inside_document, inside_line = b"", False, False
    while held := stream.fill(held, _BLOCK_BYTES):
        if not inside_document and held[:1] in (b"\r", b"\n"):
            held = stream.skip_line_breaks(held)
            continue
        cut, cut_line, end = False, False, len(held)
        if len(held) >= _BLOCK_BYTES:
            end = max(held.rfind(border) + len(border) if border in held else 0 for border in _TEXT_BORDERS)
            if not end:  # a long document
                cut, end = True, held.rfind(b"\n") + 1
            if not end:  # a long line
                cut_line, end = True, _end_of_last_word(held)
        yield stream.block("text", held[:end], inside_document=inside_document, inside_line=inside_line, cut=cut)
        held, inside_document, inside_line = held[end:], cut, cut_line


def _end_of_last_word(held: bytes) -> int:
    """Behind the last space, or where there is none behind the last whole UTF-8 character."""
    if at := held.rfind(b" ") + 1:
        return at
    end = len(held) - 1
    while end > len(held) - 4 and held[end] & 0xC0 == 0x80:
        end -= 1
    return end


class _ZstdFile:
    """Decompresses a stream of zstd frames; unlike the library's own reader it notices when the last one is cut off."""

    def __init__(self, raw: RawIOBase) -> None:
        self._raw = raw
        self._library = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._library.decompressobj()
        self._begun = False
        self._unused = b""
        self._text = b""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end."""
        while not self._text and (chunk := self._unused or self._raw.read(1 << 14) or b""):
            if self._frame.eof:
                self._frame = self._library.decompressobj()
            self._text = self._frame.decompress(chunk)
            self._unused = self._frame.unused_data if self._frame.eof else b""
            self._begun = not self._frame.eof
        if not self._text and self._begun:
            raise EOFError("it ends inside a frame")
        text, self._text = self._text[:size], self._text[size:]
        return text


def _rows(file: Path, column: str) -> Iterator[Block]:
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra
        import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError as error:
        raise UserError(f"{file}: Parquet needs pyarrow; pip install 'megatron-bert[parquet]'") from error
    size = file.stat().st_size
    with file.open("rb"):  # so that the system says what is wrong with opening it
        row = 0
    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BLOCK_BYTES) as table:
            _check_column(file, table.schema_arrow, column, pyarrow.types)
            total = max(table.metadata.num_rows, 1)
            held: list[str | None] = []
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False):
                held += cast("list[str | None]", batch.column(0).to_pylist())
                if sum(len(text or "") for text in held) >= _BLOCK_BYTES:
                    yield Block(file, "rows", held, row + 1, size * (row + len(held)) // total)
                    row, held = row + len(held), []
            if held:
                yield Block(file, "rows", held, row + 1, size)
    except (pyarrow.ArrowException, OSError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{file} is damaged or incomplete after row {row} ({line}); download it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: a text after row {row} is not UTF-8") from error


def _check_column(file: Path, schema: Any, column: str, types: Any) -> None:
    if column not in schema.names:
        there = ", ".join(map(repr, schema.names[:8])) or "none"
        raise UserError(f"{file}: there is no column {column!r} (its columns: {there}); choose one with --json-key")
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(is_text(kind) for is_text in (types.is_string, types.is_large_string, types.is_string_view)):
        raise UserError(f"{file}: column {column!r} does not hold texts but {kind}; choose another with --json-key")
