"""A function over many items in worker processes: results in order, few items at a time, no worker outlives us."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, NamedTuple, TypeVar, cast

from megatron_bert.errors import UserError

__all__ = ["available_cores", "ordered_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items a worker that are in work or done and not yet asked for


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yields `make()(item)` for each of `items`, in their order, whatever `num_workers`.

    `make` and the items are pickled; each worker calls `make` once. At most two items a worker are held. Without
    workers, or for a single item, everything happens in this process. Closing the iterator ends the workers, and so
    does the end of this process, however it ends.

    Raises:
        UserError: a worker was killed.
        Exception: what the function or the iteration over `items` raised, in its place in the order.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if num_workers < 1 or len(first) < 2:
        if first:
            yield from map(make(), chain(first, items))
        return
    workers: _Workers[Item, Result] = _Workers(make)
    threads = ThreadPoolExecutor(num_workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in chain(first, items):
            waiting.append(threads.submit(workers.call, item))
            while waiting and (waiting[0].done() or len(waiting) > _AHEAD * num_workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        workers.end()
        threads.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    process: SpawnProcess
    connection: Connection


class _Workers(Generic[Item, Result]):
    """As many processes as there are calls at the same time. Each call sends one item and waits for its result."""

    def __init__(self, make: Callable[[], Callable[[Item], Result]]) -> None:
        self._make = make
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all: list[_Worker] = []
        self._ended = False

    def call(self, item: Item) -> Result:
        """The function's result for `item`, from a worker that has nothing to do or from a new one."""
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = self._start()
        try:
            worker.connection.send(item)
            result = worker.connection.recv()
        except (EOFError, OSError) as error:
            raise UserError(
                "a worker process was killed, perhaps because memory ran out; try fewer --workers"
            ) from error
        self._idle.put(worker)
        if isinstance(result, _Raised):
            raise result.error
        return cast(Result, result)

    def end(self) -> None:
        """Ends every worker at once; what they were doing is not wanted any more."""
        self._ended = True
        for worker in self._all:
            worker.process.kill()
        for worker in self._all:
            worker.process.join()

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        resource_tracker.ensure_running()  # started by the first process, it would unblock the signals again
        # Ctrl-C and a scheduler's SIGTERM reach every process of the group; the workers leave them to us.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        worker = _Worker(process, ours)
        self._all.append(worker)
        if self._ended:
            process.kill()
        return worker


class _Raised(NamedTuple):
    error: Exception


def _serve(connection: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """A worker's life: answers items until the other end of the pipe is gone."""
    try:
        function = make()
        while True:
            item = connection.recv()
            try:
                result = function(item)
            except Exception as error:
                result = _Raised(error)
            connection.send(result)
    except (EOFError, OSError):
        return
