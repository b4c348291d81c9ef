"""Where a run's numbers go: a JSON-lines file, and a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

__all__ = ["MetricsSink"]


class MetricsSink:
    """Writes records to `file` (one JSON object a line, flushed at once) and shows the newest beside a bar.

    Args:
        progress: show the bar where standard error is a terminal.
    """

    def __init__(self, file: Path, num_steps: int, *, progress: bool) -> None:
        self._stream = file.open("w", encoding="utf-8")
        self._bar = tqdm(total=num_steps, unit="step", disable=None if progress else True, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._stream.close()

    def step_done(self) -> None:
        """Moves the bar, which knows the time left."""
        self._bar.update()

    def training(self, step: int, record: dict[str, float]) -> None:
        """Numbers of the steps since the last record, `step` of them done."""
        self._write({"kind": "training", "step": step, **record})
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s")

    def validation(self, step: int, record: dict[str, float]) -> None:
        """Numbers over the held-out documents after `step` steps."""
        self._write({"kind": "validation", "step": step, **record})
        values = ", ".join(f"{name} {value:.4g}" for name, value in record.items())
        tqdm.write(f"step {step}: validation {values}", file=sys.stderr)

    def _write(self, record: dict[str, object]) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
