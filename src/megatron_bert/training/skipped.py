"""Steps whose loss or gradient was not finite: counted, reported with their samples, and not endured for ever."""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import Tensor

from megatron_bert.data.samples import SampleKey
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.state import TrainState

__all__ = ["NotFinite", "SkippedSteps"]

log = logging.getLogger(__name__)

_NAMED_SAMPLES = 8  # in the log; the metrics have them all


class NotFinite(ArithmeticError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class _Step(NamedTuple):
    number: int
    applied: Tensor
    keys: list[SampleKey]


class SkippedSteps:
    """Counts in `state` the steps that were not applied.

    Whether one was is known on the device; the host asks for up to `limit` steps together, because asking waits.

    Args:
        limit: so many in a row are too many.
    """

    def __init__(self, state: TrainState, sink: MetricsSink, limit: int) -> None:
        self._state, self._sink, self._limit = state, sink, limit
        self._unknown: list[_Step] = []

    def add(self, step: int, applied: Tensor, keys: list[SampleKey]) -> None:
        """A step that was done, whatever became of it.

        Raises:
            NotFinite: as `count`.
        """
        self._unknown.append(_Step(step, applied, keys))
        if len(self._unknown) >= self._limit:
            self.count()

    def count(self) -> None:
        """Brings the counters up to date.

        Raises:
            NotFinite: `limit` steps in a row were not applied; the row is then forgotten, so that a run that is started
                again can go on.
        """
        steps, self._unknown = self._unknown, []
        worst = 0
        for step in steps:
            applied = bool(step.applied)
            self._state.skipped += not applied
            self._state.skipped_in_a_row = 0 if applied else self._state.skipped_in_a_row + 1
            worst = max(worst, self._state.skipped_in_a_row)
            if not applied:
                self._report(step)
        if worst >= self._limit:
            self._state.skipped_in_a_row = 0
            raise NotFinite(f"the loss or the gradient of {worst} steps in a row was not finite")

    def _report(self, step: _Step) -> None:
        samples = [[key.corpus, key.epoch, key.index] for key in step.keys]
        self._sink.skipped(step.number, samples)
        named = ", ".join(":".join(map(str, sample)) for sample in samples[:_NAMED_SAMPLES])
        more = f" and {len(samples) - _NAMED_SAMPLES} more, see the metrics" if len(samples) > _NAMED_SAMPLES else ""
        log.warning(
            "step %d skipped: loss or gradient not finite; samples (corpus:epoch:index) %s%s", step.number, named, more
        )
