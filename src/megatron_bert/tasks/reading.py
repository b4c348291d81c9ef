"""Text files of tasks."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bert.errors import UserError

__all__ = ["json_lines", "lines", "read_text", "suffix_of"]

_COMPRESSED = (".gz", ".xz")


def read_text(file: Path) -> str:
    """The file's text, without a byte order mark; .gz and .xz are decompressed.

    Raises `UserError` where there is none, where it is damaged, or not UTF-8.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    contents = _decompressed(file)
    try:
        return contents.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8 (0x{contents[error.start]:02x})") from error


def suffix_of(file: Path) -> str:
    """The suffix that says the format: ".jsonl" of "dev.jsonl.xz"."""
    return next((suffix for suffix in reversed(file.suffixes) if suffix not in _COMPRESSED), "")


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, without its end, and where it is: "FILE, line N". Raises as `read_text`."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip(" \r"):  # a line of tabs is a row of empty fields
            yield line.removesuffix("\r"), f"{file}, line {number}"


def json_lines(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The object of each line that is not blank, and where it is. Raises `UserError`, too, for a line that is none."""
    for line, where in lines(file):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise UserError(f"{where}: a JSON object is expected")
        yield entry, where


def _decompressed(file: Path) -> bytes:
    contents = file.read_bytes()
    try:
        if file.suffix == ".xz":
            return lzma.decompress(contents)
        return gzip.decompress(contents) if file.suffix == ".gz" else contents
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file} is damaged or incomplete ({error})") from error
