"""Text files of tasks."""

from __future__ import annotations

from pathlib import Path

from megatron_bert.errors import UserError

__all__ = ["read_text"]


def read_text(file: Path) -> str:
    """The file's text. Raises `UserError` where there is none, or it is not UTF-8."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    contents = file.read_bytes()
    try:
        return contents.decode("utf-8")
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8 (0x{contents[error.start]:02x})") from error
