"""Documents out of the blocks of text files, and the files that a person names."""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bert.data.reading import Block, Span, read_blocks
from megatron_bert.errors import UserError

__all__ = ["Documents", "expand_inputs", "parse_block", "read_texts"]

_BLANK_LINE = re.compile(r"\n\s*\n")
_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


@dataclass
class Documents:
    """The documents of a block. Empty ones of JSON lines and Parquet are among them.

    begins_inside: the first one goes on from the block before, if that one `ends_inside`.
    dropped: how many were left out, by reason.
    """

    texts: list[str]
    begins_inside: bool = False
    ends_inside: bool = False
    dropped: Counter[str] = field(default_factory=Counter)


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that `patterns` (paths, or globs with ** for folders of any depth) name, in the order given, a glob's
    own in sorted order.

    Raises:
        UserError: a pattern names no file, or a folder, or a file is named twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        given = Path(pattern)
        found = [given] if given.exists() else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        if given.is_dir():
            raise UserError(f"--input {given} is a folder; name its files, for example '{given}/*{_suffix_in(given)}'")
        found = [path for path in found if not path.is_dir()]
        if not found:
            raise UserError(f"--input {pattern}: there is no such file")
        files += found
    for path, times in Counter(files).items():
        if times > 1:
            raise UserError(f"--input names {path} {times} times; name each file once")
    return files


def _suffix_in(folder: Path) -> str:
    """The most frequent ending of the files in `folder`."""
    endings = Counter("".join(path.suffixes[-2:]) for path in folder.iterdir() if path.is_file())
    return endings.most_common(1)[0][0] if endings else ".jsonl"


def read_texts(files: Iterable[Path], json_key: str = "text", *, skip_bad: bool = False) -> Iterator[tuple[str, Block]]:
    """Yields the documents of `files` with the block each is in; one of more than a block comes in pieces.

    Raises:
        UserError: see `read_blocks` and `parse_block`.
    """
    for file in files:
        for block in read_blocks(Span(file), json_key):
            for text in parse_block(block, json_key, skip_bad=skip_bad).texts:
                yield text, block


def parse_block(block: Block, json_key: str = "text", *, skip_bad: bool = False) -> Documents:
    """The documents of a block.

    In plain text a blank line ends a document; the line breaks inside it are kept. In JSON lines each line is an
    object and `json_key` names its text. A null text is dropped. With `skip_bad`, so is a document that is not UTF-8,
    not JSON or has no such key.

    Raises:
        UserError: such a document, with its file and line.
    """
    if block.kind == "rows":
        return _present(block.content)
    if block.problem:
        if skip_bad:
            return Documents([], dropped=Counter({"too long a line": 1}))
        raise UserError(f"{_place(block, 0)}: {block.problem}; is this file JSON lines?")
    text = _decode(block, skip_bad=skip_bad)
    return _from_json_lines(block, text, json_key, skip_bad) if block.kind == "jsonl" else _from_plain(block, text)


def _present(rows: Iterable[object]) -> Documents:
    texts = [_SURROGATE.sub(_REPLACEMENT, row) if not row.isascii() else row for row in rows if isinstance(row, str)]
    return Documents(texts, dropped=_count("null", len(list(rows)) - len(texts)))


def _count(reason: str, times: int) -> Counter[str]:
    return Counter({reason: times} if times else {})


def _decode(block: Block, *, skip_bad: bool) -> str:
    """The content as text; with `skip_bad`, surrogates stand for bytes that are not UTF-8."""
    assert isinstance(block.content, bytes)
    at_start = block.first_line == 1 and not block.span_start and not block.inside_line
    try:
        return block.content.decode("utf-8-sig" if at_start else "utf-8")
    except UnicodeDecodeError as error:
        if skip_bad:
            return block.content.decode("utf-8", "surrogateescape")
        place = _place(block, block.content.count(b"\n", 0, error.start))
        column = error.start - block.content.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{place} is not UTF-8 (byte {column} of the line is 0x{block.content[error.start]:02x}); convert the file "
            f"first, for example with iconv"
        ) from error


def _from_plain(block: Block, text: str) -> Documents:
    # A line break in front lets the pattern see a blank first line, unless that line began in the block before.
    parts = _BLANK_LINE.split(text if block.inside_line else "\n" + text)
    one = len(parts) == 1  # no border in it: what was open stays open, even where a block holds white space alone
    begins_inside = block.inside_document and (one or bool(parts[0].strip()))
    ends_inside = block.cut and (one or bool(parts[-1].strip()))
    documents = [part.strip("\r\n") for part in parts if part.strip() or (one and (begins_inside or ends_inside))]
    good = [document for document in documents if document.isascii() or not _SURROGATE.search(document)]
    if len(good) < len(documents) and (begins_inside or ends_inside):  # its other pieces are kept
        good = [_SURROGATE.sub(_REPLACEMENT, document) for document in documents]
    return Documents(good, begins_inside, ends_inside, _count("not UTF-8", len(documents) - len(good)))


def _from_json_lines(block: Block, text: str, key: str, skip_bad: bool) -> Documents:
    texts: list[str] = []
    dropped: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        found = _text_of(line, key)
        if isinstance(found, _Problem):
            if not skip_bad:
                raise UserError(f"{_place(block, number)}{found.message}")
            dropped[found.reason] += 1
        elif found is None:
            dropped["null"] += 1
        else:
            texts.append(found)
    return Documents(texts, dropped=dropped)


@dataclass
class _Problem:
    """Why a line is not a document: a short reason to count by, and what follows the line's number in a message."""

    reason: str
    message: str


def _text_of(line: str, key: str) -> str | _Problem | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return _Problem("not JSON", f" is not JSON: {error.msg} at character {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets by the thousand
        return _Problem("not JSON", f" is not JSON that can be read: {error}")
    if not isinstance(record, dict):
        return _Problem("not a JSON object", f": a JSON object is wanted, not {type(record).__name__}")
    if key not in record:
        there = ", ".join(repr(name) for name in list(record)[:8]) or "none"
        message = f": there is no key {key!r} (its keys: {there}); choose one with --json-key"
        return _Problem(f"without {key!r}", message)
    text = record[key]
    if text is None:
        return None
    if not isinstance(text, str):
        kind = type(text).__name__
        return _Problem(f"{key!r} not a text", f": the value of {key!r} is not a text but {kind}")
    if text.isascii() or not _SURROGATE.search(text):
        return text
    if _SURROGATE.search(line):
        return _Problem("not UTF-8", " is not UTF-8")
    return _SURROGATE.sub(_REPLACEMENT, text)  # half of an escaped pair, "\ud83d": nothing can encode it


def _place(block: Block, lines_before: int) -> str:
    """The file and the number of a line of a block, `lines_before` of which stand before it."""
    number = block.first_line + lines_before
    if block.span_start:
        with block.file.open("rb") as file:
            left = block.span_start
            while left and (chunk := file.read(min(left, 1 << 20))):
                number += chunk.count(b"\n")
                left -= len(chunk)
    return f"{block.file} line {number}"
