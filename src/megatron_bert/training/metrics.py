"""Where a run's numbers go: a JSON-lines file, and a progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from megatron_bert.training.records import RecordFile

__all__ = ["MetricsSink"]


class MetricsSink:
    """Writes records to `file` (one JSON object a line, at once) and shows the newest beside a bar.

    Args:
        first_step: of the run where it goes on; records beyond it are removed. 0: the file begins empty.
        progress: show the bar where standard error is a terminal.
    """

    def __init__(self, file: Path, num_steps: int, *, progress: bool, first_step: int = 0) -> None:
        self._records = RecordFile(file, first_step)
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", disable=None if progress else True, dynamic_ncols=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._records.close()

    def step_done(self) -> None:
        """Moves the bar, which knows the time left."""
        self._bar.update()

    def training(self, step: int, record: dict[str, float]) -> None:
        """Numbers of the steps since the last record, `step` of them done."""
        self._records.append({"kind": "training", "step": step, **record})
        self._bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s")

    def validation(self, step: int, record: dict[str, float]) -> None:
        """Numbers over the held-out documents after `step` steps."""
        self._records.append({"kind": "validation", "step": step, **record})
        values = ", ".join(f"{name} {value:.4g}" for name, value in record.items())
        tqdm.write(f"step {step}: validation {values}", file=sys.stderr)

    def skipped(self, step: int, samples: Sequence[object]) -> None:
        """The samples of a step that was not applied."""
        self._records.append({"kind": "skipped", "step": step, "samples": samples})

    def sync(self) -> None:
        """Waits until every record is on the disk, or raises the OSError that keeps it from there."""
        self._records.sync()
