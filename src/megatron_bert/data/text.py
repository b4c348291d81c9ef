"""Documents out of text files: plain text and JSON lines, each optionally .gz or .xz, in constant memory."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_bert.errors import UserError

__all__ = ["Document", "expand_inputs", "read_documents"]

_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}


class Document(NamedTuple):
    """One document's text, and where it starts: the file and its line, counted from 1."""

    text: str
    file: Path
    line: int


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that `patterns` (paths or globs) name, in the order given, a glob's own in sorted order.

    Raises:
        UserError: a pattern names no file, or a folder.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).exists() else [Path(name) for name in sorted(glob.glob(pattern))]
        if not found:
            raise UserError(f"--input {pattern}: there is no such file")
        for path in found:
            if path.is_dir():
                raise UserError(f"--input {path} is a folder; name its files, for example '{path}/*.jsonl'")
        files += found
    return files


def read_documents(file: Path, json_key: str = "text") -> Iterator[Document]:
    """Yields the documents of one file, empty ones of JSON lines included.

    In plain text a blank line ends a document; the line breaks inside it are kept. In JSON lines (.jsonl, .ndjson,
    .json, before a .gz or .xz) each line is an object and `json_key` names its text.

    Raises:
        UserError: not UTF-8, bad JSON, a missing key, a damaged or half-downloaded compressed file; with file and line.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    opener = _COMPRESSIONS.get(suffixes[-1], open) if suffixes else open
    kind = suffixes[:-1] if suffixes and suffixes[-1] in _COMPRESSIONS else suffixes
    with opener(file, "rb") as stream:
        lines = _lines(stream, file)
        if kind and kind[-1] in _JSON_LINES:
            yield from _json_lines(lines, file, json_key)
        else:
            yield from _blank_line_separated(lines, file)


def _lines(stream: BinaryIO, file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their line break; the numbers start at 1."""
    number = 0
    raw_lines = iter(stream)
    while True:
        try:
            raw = next(raw_lines, None)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise UserError(
                f"{file} is damaged or incomplete after line {number} ({error}); download or compress it again"
            ) from error
        if raw is None:
            return
        number += 1
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} line {number} is not UTF-8 (byte {error.start + 1} of the line is "
                f"0x{raw[error.start]:02x}); convert the file first, for example with iconv"
            ) from error
        yield number, text.rstrip("\r\n")


def _blank_line_separated(lines: Iterator[tuple[int, str]], file: Path) -> Iterator[Document]:
    held: list[str] = []
    first = 1
    for number, line in lines:
        if line.strip():
            first = first if held else number
            held.append(line)
        elif held:
            yield Document("\n".join(held), file, first)
            held = []
    if held:
        yield Document("\n".join(held), file, first)


def _json_lines(lines: Iterator[tuple[int, str]], file: Path, key: str) -> Iterator[Document]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} line {number} is not JSON: {error.msg} at character {error.colno}") from error
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise UserError(f"{file} line {number}: {_key_problem(record, key)}")
        yield Document(record[key], file, number)


def _key_problem(record: object, key: str) -> str:
    if not isinstance(record, dict):
        return f"a JSON object is wanted, not {type(record).__name__}"
    if key in record:
        return f"the value of {key!r} is not a text but {type(record[key]).__name__}"
    there = ", ".join(repr(name) for name in list(record)[:8]) or "none"
    return f"there is no key {key!r} (its keys: {there}); choose one with --json-key"
