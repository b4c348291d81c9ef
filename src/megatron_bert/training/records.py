"""A file of JSON lines that a killed run continues without a gap or a repetition and no full disk tears."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["RecordFile"]

log = logging.getLogger(__name__)


class RecordFile:
    """Appends records, each of which has a `step`; each is in the file when `append` returns.

    What the disk has no room for is kept, and written before the next record.

    Args:
        last_step: the records beyond this step are removed first (and a line that was not written whole); 0: all.
    """

    def __init__(self, file: Path, last_step: int = 0) -> None:
        self._file = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self._end = _kept_bytes(file.read_bytes(), last_step)
        self._pending = b""
        os.ftruncate(self._file, self._end)

    def append(self, record: Mapping[str, object]) -> None:
        """Adds a record as one line; JSON has no infinity and no NaN, which are null there."""
        before = bool(self._pending)
        numbers = {name: None if _is_no_number(value) else value for name, value in record.items()}
        self._pending += json.dumps(numbers, allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not before:
                log.warning("records are kept until there is room to write them: %s", error.strerror)

    def sync(self) -> None:
        """Waits until every record is on the disk.

        Raises:
            OSError: there is no room for them.
        """
        self._write()
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file.

        Raises:
            OSError: there is no room for the records that are left.
        """
        try:
            self._write()
        finally:
            os.close(self._file)

    def _write(self) -> None:
        done = 0
        try:
            while done < len(self._pending):
                done += os.pwrite(self._file, self._pending[done:], self._end + done)
        except OSError:
            os.ftruncate(self._file, self._end)  # no half of a line
            raise
        self._end += done
        self._pending = b""


def _is_no_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _kept_bytes(content: bytes, last_step: int) -> int:
    """How far the whole lines reach whose step is not beyond `last_step`."""
    end = 0
    for line in content.splitlines(keepends=True) if last_step else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or record.get("step", 0) > last_step:
            break
        end += len(line)
    return end
