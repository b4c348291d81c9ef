"""Rows of CSV, TSV and JSON lines, each with its file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_bert.errors import UserError
from megatron_bert.tasks.reading import json_lines, lines, read_text, suffix_of

__all__ = ["Fields", "table_rows"]

# By column. A field that is not there is None; those beyond the last column are a list under None.
Fields = dict[str | None, Any]

_JSON = {".jsonl", ".json", ".ndjson"}


def table_rows(path: Path, header: Sequence[str] = ()) -> Iterator[tuple[Fields, str]]:
    """Each row's fields, and where it is.

    .csv has quotes (RFC 4180); .tsv, .txt and other names have tabs and no quotes, as GLUE's files; .jsonl, .json and
    .ndjson are JSON lines; .gz or .xz may follow. The first row names the columns, unless `header` does.

    Raises:
        UserError: a file that cannot be read, or a line that is not of its format.
    """
    suffix = suffix_of(path)
    if suffix in _JSON:
        yield from json_lines(path)  # type: ignore[misc]
        return
    names = list(header)
    for values, where in _csv(path) if suffix == ".csv" else _tsv(path):
        if not names:
            names = [name.strip() for name in values]
            twice = [name for name in names if name and names.count(name) > 1]
            if twice:
                raise UserError(f"{where}: two columns are named {twice[0]!r}")
            continue
        fields: Fields = dict(zip_longest(names, values[: len(names)]))
        if len(values) > len(names):
            fields[None] = values[len(names) :]
        yield fields, where


def _tsv(path: Path) -> Iterator[tuple[list[str], str]]:
    for line, where in lines(path):
        yield line.split("\t"), where


def _csv(path: Path) -> Iterator[tuple[list[str], str]]:
    text = read_text(path)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a field may be longer than Python thinks it is
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for values in reader:
            if values:
                yield values, f"{path}, line {line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV: {error}") from error
