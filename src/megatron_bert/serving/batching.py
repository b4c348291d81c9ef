"""Texts of requests that wait at the same time, predicted together by the one thread that has the model.

Nobody waits for others to come: while a batch is predicted, the next one gathers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from megatron_bert.inference.predictor import Candidates, MaskPredictor
from megatron_bert.inference.texts import MaskedText

__all__ = ["Batcher", "TooBusy"]


class TooBusy(Exception):
    """So many texts wait already that this request is better made later, or elsewhere."""


class _Job(NamedTuple):
    texts: Sequence[MaskedText]
    answer: Future[list[Candidates]]


class Batcher:
    """Predicts for many threads at once.

    Args:
        most_waiting: texts; a request that would make them more is refused.
    """

    def __init__(self, predictor: MaskPredictor, most_waiting: int = 16384) -> None:
        self._predictor, self._most_waiting = predictor, most_waiting
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_waiting, self._is_closed, self._lock = 0, False, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="predicting", daemon=True)
        self._thread.start()

    def predict(self, texts: Sequence[MaskedText]) -> list[Candidates]:
        """Those of each text, once they are there.

        Raises:
            TooBusy: see there; or the batcher is closed.
            UserError: the scores are not numbers.
            OutOfMemoryError: of the GPU.
        """
        answer: Future[list[Candidates]] = Future()
        with self._lock:
            if self._is_closed:
                raise TooBusy("the server ends")
            if self._num_waiting and self._num_waiting + len(texts) > self._most_waiting:
                raise TooBusy(f"{self._num_waiting} texts are waiting")
            self._num_waiting += len(texts)
            self._jobs.put(_Job(texts, answer))
        try:
            return answer.result()
        finally:
            with self._lock:
                self._num_waiting -= len(texts)

    def close(self) -> None:
        """Ends the thread, after what it is at; those that wait are refused."""
        with self._lock:
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs, is_last = self._with_those_that_wait(first)
            self._answer(jobs)
            if is_last:
                return

    def _with_those_that_wait(self, first: _Job) -> tuple[list[_Job], bool]:
        """Jobs of about a batch, and whether the end was among them."""
        jobs, tokens = [first], sum(len(text.ids) for text in first.texts)
        while tokens < self._predictor.batch_tokens:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
            tokens += sum(len(text.ids) for text in job.texts)
        return jobs, False

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            answers = iter(self._predicted([text for job in jobs for text in job.texts]))
        except Exception as error:  # whatever it is, it is the request's that waits for it, and the next may go well
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
                return
            answers = None
        if answers is None:  # one of them alone, as a rule; here, where what the error held is free again
            for job in jobs:
                self._answer([job])
            return
        for job in jobs:
            job.answer.set_result([next(answers) for _ in job.texts])

    def _predicted(self, texts: list[MaskedText]) -> list[Candidates]:
        if self._is_closed:
            raise TooBusy("the server ends")
        found: dict[int, Candidates] = {}
        for indices, candidates in self._predictor.predict(texts):
            found.update(zip(indices, candidates, strict=True))
        return [found[index] for index in range(len(texts))]
