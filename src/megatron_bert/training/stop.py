"""SIGTERM and SIGINT as a wish to stop after the step at hand; a second one stops at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopSignals"]

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Within the block, the first SIGTERM or SIGINT is only noted: `received` is its name, until then None.

    The second one does what it does by default: it ends the process. Outside the main thread, which alone may handle
    signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that inherited this: its parent decides when it ends
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
        self.received = signal.Signals(number).name
        log.warning("%s: stopping after this step; once more stops at once", self.received)
