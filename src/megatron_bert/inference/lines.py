"""Texts in chunks, and where they come from: arguments, or the lines of a file or of a stream as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import BinaryIO, NamedTuple

from megatron_bert.errors import UserError

CHUNK_TEXTS = 1024  # of a file, read and sorted by length together
_READ_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Text(NamedTuple):
    """A text, and what to call it when something is wrong with it."""

    text: str
    where: str


def texts_of_arguments(arguments: Iterable[str]) -> list[Text]:
    """The arguments as one chunk of texts. Raises ``UserError`` for bytes that are not UTF-8."""
    texts = [Text(text, f"text {number}") for number, text in enumerate(arguments, start=1)]
    for text, where in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python keeps undecodable bytes as lone surrogates
            raise UserError(f"{where}, character {error.start + 1}: not UTF-8") from error
    return texts


def texts_of_file(file: BinaryIO, name: str) -> Iterator[list[Text]]:
    """The lines of a file, ``CHUNK_TEXTS`` at a time; as ``texts_of_lines``."""
    return texts_of_lines(iter(lambda: list(islice(file, CHUNK_TEXTS)), []), name)


def texts_of_stream(stream: BinaryIO, name: str) -> Iterator[list[Text]]:
    """The lines of a stream, as many at a time as have arrived; as ``texts_of_lines``."""
    return texts_of_lines(_lines_as_they_come(stream), name)


def texts_of_lines(chunks: Iterable[list[bytes]], name: str) -> Iterator[list[Text]]:
    """One text a line, called by its number; blank lines are skipped.

    Raises ``UserError`` for a line that is not UTF-8, and at the end where there was no text.
    """
    number, none_yet = 0, True
    for lines in chunks:
        texts = []
        for line in lines:
            number += 1
            text = _decode(line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line, f"{name}, line {number}")
            if text.strip():
                texts.append(Text(text, f"{name}, line {number}"))
        if texts:
            none_yet = False
            yield texts
    if none_yet:
        raise UserError(f"{name} is empty: one text a line is expected")


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}, byte {error.start + 1}: not UTF-8 (0x{line[error.start]:02x})") from error


def _lines_as_they_come(stream: BinaryIO) -> Iterator[list[bytes]]:
    unfinished: list[bytes] = []
    while block := stream.read1(_READ_BYTES):  # type: ignore[attr-defined]
        *finished, rest = block.split(b"\n")
        if finished:
            finished[0] = b"".join([*unfinished, finished[0]])
            unfinished = []
            yield finished
        unfinished.append(rest)
    if last := b"".join(unfinished):
        yield [last]
