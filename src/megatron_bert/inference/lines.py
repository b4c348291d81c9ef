"""Texts, and where they come from: arguments, or the lines of a file as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_bert.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Text(NamedTuple):
    """A text, and what to call it when something is wrong with it."""

    text: str
    where: str


def texts_of_arguments(arguments: Iterable[str]) -> list[Text]:
    """The arguments as texts. Raises ``UserError`` for bytes that are not UTF-8."""
    texts = [Text(text, f"text {number}") for number, text in enumerate(arguments, start=1)]
    for text, where in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python keeps undecodable bytes as lone surrogates
            raise UserError(f"{where}, character {error.start + 1}: not UTF-8") from error
    return texts


def texts_of_lines(lines: Iterable[bytes], name: str) -> Iterator[Text]:
    """One text a line, as it is read; blank lines are skipped.

    Raises ``UserError`` for a line that is not UTF-8, and at the end where there was no text.
    """
    none_yet = True
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}, byte {error.start + 1}: not UTF-8 (0x{line[error.start]:02x})") from error
        if text.strip():
            none_yet = False
            yield Text(text, where)
    if none_yet:
        raise UserError(f"{name} is empty: one text a line is expected")
