"""How far the reading of many files is: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tqdm import tqdm

from megatron_bert.data.reading import Span

__all__ = ["InputProgress"]

logger = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 60


class InputProgress:
    """Shows what is done a second, such as documents and tokens, and the time left by the bytes of input read.

    Args:
        spans: what will be read, in this order.
        show: nothing is shown without it.
    """

    def __init__(self, spans: Sequence[Span], *, show: bool) -> None:
        self._sizes = [(span.file, (span.file.stat().st_size if span.end is None else span.end) - span.start)
                       for span in spans]  # fmt: skip
        self._show = show
        self._done = 0  # bytes of the files before the current one
        self._at = 0
        self._counts: Counter[str] = Counter()
        self._begun = self._told = time.monotonic()
        self._bar = tqdm(
            total=sum(size for _, size in self._sizes), unit="B", unit_scale=True, delay=2,
            disable=not (show and sys.stderr.isatty()),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, file: Path, consumed_bytes: int, **more: int) -> None:
        """`file` is read up to `consumed_bytes`, and so much more of each thing named came of it."""
        self._counts.update(more)
        while self._sizes[self._at][0] != file:
            self._done += self._sizes[self._at][1]
            self._at += 1
        now = time.monotonic()
        seconds = max(now - self._begun, 1e-9)
        rates = ", ".join(f"{number / seconds:,.0f} {name}/s" for name, number in self._counts.items())
        done = self._done + consumed_bytes
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(done - self._bar.n)
        if self._show and self._bar.disable and now - self._told > _LOG_EVERY_SECONDS:
            self._told = now
            total = sum(size for _, size in self._sizes)
            left = seconds * (total - done) / max(done, 1)
            logger.info("%.1f %% of the input, %s, %.0f minutes left", 100 * done / max(total, 1), rates, left / 60)
