"""Where a run's numbers go: a JSON-lines file, a progress bar on a terminal, and TensorBoard if wanted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from megatron_bert.errors import UserError
from megatron_bert.training.records import RecordFile

__all__ = ["MetricsSink"]


class MetricsSink:
    """Writes records to `file` (one JSON object a line, at once) and shows the newest beside a bar.

    Args:
        file: None: nothing is kept or shown; so on every process of a run but the first.
        first_step: of the run where it goes on; records beyond it are removed. 0: the file begins empty.
        progress: show the bar where standard error is a terminal.
        tensorboard: folder for TensorBoard's event files; None: none are written.

    Raises:
        UserError: TensorBoard is wanted and not installed.
    """

    def __init__(
        self,
        file: Path | None,
        num_steps: int,
        *,
        progress: bool,
        first_step: int = 0,
        tensorboard: Path | None = None,
    ) -> None:
        self._events = _event_writer(tensorboard, first_step) if tensorboard and file else None
        self._records = RecordFile(file, first_step) if file else None
        hidden = None if progress and file else True  # None: where there is no terminal
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=hidden, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._events:
            self._events.close()
        if self._records:
            self._records.close()

    def step_done(self) -> None:
        """Moves the bar, which knows the time left."""
        self._bar.update()

    def training(self, step: int, record: dict[str, float]) -> None:
        """Numbers of the steps since the last record, `step` of them done."""
        self._write("training", step, record)
        shown = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in record:
            shown.append(f"MFU {record['mfu']:.1%}")
        self._bar.set_postfix_str(", ".join(shown))

    def validation(self, step: int, record: dict[str, float]) -> None:
        """Numbers over the held-out documents after `step` steps."""
        if not self._records:
            return
        self._write("validation", step, record)
        values = ", ".join(f"{name} {value:.4g}" for name, value in record.items())
        tqdm.write(f"step {step}: validation {values}", file=sys.stderr)

    def skipped(self, step: int, samples: Sequence[object]) -> None:
        """The samples of a step that was not applied."""
        if self._records:
            self._records.append({"kind": "skipped", "step": step, "samples": samples})

    def sync(self) -> None:
        """Waits until every record is on the disk, or raises the OSError that keeps it from there."""
        if self._records:
            self._records.sync()

    def _write(self, kind: str, step: int, record: dict[str, float]) -> None:
        if self._records:
            self._records.append({"kind": kind, "step": step, **record})
        if self._events:
            for name, value in record.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)


def _event_writer(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer; events beyond `first_step`, of a run that was killed, are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # optional, and slow to import
    except ImportError as error:
        raise UserError(
            "runtime.tensorboard: TensorBoard is not installed; install megatron-bert[tensorboard], or leave it out"
        ) from error
    writer: Any = SummaryWriter
    return writer(str(folder), purge_step=first_step + 1 if first_step else None)
