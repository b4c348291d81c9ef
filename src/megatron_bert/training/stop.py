"""SIGTERM and SIGINT as a wish to stop after the step at hand; a second one stops at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

__all__ = ["SharedStop", "StopSignals"]

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Slurm's time limit and systemd send SIGTERM to `torchrun` and to its processes, to which it then sends it, too.
_ECHO_SECONDS = 10


class StopSignals:
    """Within the block, the first SIGTERM or SIGINT is only noted: `received` is its name, until then None.

    The second one does what it does by default: it ends the process. A second SIGTERM that comes within ten seconds of
    the first is the same wish. Outside the main thread, which alone may handle signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
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
        name, is_term = signal.Signals(number).name, number == signal.SIGTERM
        if is_term and self.received == name and time.monotonic() - self._since < _ECHO_SECONDS:
            return
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
        self.received, self._since = name, time.monotonic()
        later = f" after {_ECHO_SECONDS} s" if is_term else ""
        log.warning("%s: stopping after this step; once more%s stops at once", name, later)


class SharedStop:
    """The wish to stop that any process of a run has received, as all of them see it: at the same step.

    Of several processes, asking sends this one's own wish and gives what was sent the time before, so that nobody waits
    for an answer.
    """

    def __init__(self, signals: StopSignals, *, alone: bool) -> None:
        self._signals, self._alone = signals, alone
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._received: str | None = None

    @property
    def received(self) -> str | None:
        """The signal's name. Waits for what was sent."""
        if self._alone:
            return self._signals.received
        if self._sent:
            (number, work), self._sent = self._sent, None
            work.wait()
            self._received = signal.Signals(int(number)).name if int(number) else None
        return self._received

    def __call__(self) -> bool:
        """Whether to stop. All processes have to ask equally often."""
        received = self.received
        if not self._alone:
            own = self._signals.received
            number = torch.tensor(signal.Signals[own].value if own else 0)
            self._sent = number, dist.all_reduce(number, op=dist.ReduceOp.MAX, async_op=True)
        return received is not None
