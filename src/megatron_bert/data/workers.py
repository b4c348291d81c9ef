"""A function over many items in worker processes: results in order, few items at a time, no worker outlives us.

Everything happens in the calling thread: an interrupt may come anywhere, and one that leaves a lock of a thread pool
taken would keep the process from ending.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, NamedTuple, TypeVar, cast

from megatron_bert.errors import UserError

__all__ = ["available_cores", "ordered_map"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items a worker that are in work or done and not yet asked for
_LOOK_SECONDS = 0.5  # a signal that comes just before a wait does not end it; it is seen after this
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    workers: _Workers[Item, Result] = _Workers(make, num_workers)
    waiting: deque[_Call] = deque()
    try:
        for item in chain(first, items):
            waiting.append(workers.call(item))
            while waiting and (waiting[0].is_done or len(waiting) > _AHEAD * num_workers):
                yield workers.result(waiting.popleft())
        while waiting:
            yield workers.result(waiting.popleft())
    finally:
        workers.end()


@dataclass
class _Call:
    result: Any = None
    is_done: bool = False


@dataclass
class _Worker:
    """A process, the call it has in hand, and what it gets each time it asks: `make`, then items."""

    process: SpawnProcess
    connection: Connection
    to_send: list[Any]
    call: _Call


class _Workers(Generic[Item, Result]):
    """Up to `num_workers` processes, started when there is something to do. Each has one item at a time."""

    def __init__(self, make: Callable[[], Callable[[Item], Result]], num_workers: int) -> None:
        self._make = make
        self._num_workers = num_workers
        self._all: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}
        self._calls: deque[tuple[_Call, Item]] = deque()  # that no worker has yet
        atexit.register(self.end)  # for whoever does not close the iterator

    def call(self, item: Item) -> _Call:
        """Lets a worker have `item`, now or when one is idle."""
        call = _Call()
        self._calls.append((call, item))
        self._exchange(0)
        return call

    def result(self, call: _Call) -> Result:
        """Waits for the function's result."""
        while not call.is_done:
            self._exchange(_LOOK_SECONDS)
        if isinstance(call.result, _Raised):
            raise call.result.error
        return cast(Result, call.result)

    def end(self) -> None:
        """Ends every worker at once; what they were doing is not wanted any more."""
        with _signals_held():
            for worker in self._all:
                worker.process.kill()
            for worker in self._all:
                worker.process.join()
            atexit.unregister(self.end)

    def _exchange(self, seconds: float) -> None:
        """Hears what workers have to say, waiting so long for the first, and gives idle ones the next items."""
        for connection in wait(self._busy, seconds):
            self._hear(self._busy[cast(Connection, connection)])
        while self._calls and (self._idle or len(self._all) < self._num_workers):
            call, item = self._calls.popleft()
            if not self._idle:
                self._start(call, item)
                continue
            worker = self._idle.pop()
            worker.call = call
            self._busy[worker.connection] = worker
            self._send(worker, item)

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.connection.recv()
        except (EOFError, OSError) as error:
            self._lose(worker, error)
            return
        if worker.to_send:
            self._send(worker, worker.to_send.pop(0))
        else:
            self._done(worker, said)
            self._idle.append(worker)

    def _send(self, worker: _Worker, what: Any) -> None:
        try:
            worker.connection.send(what)
        except OSError as error:
            self._lose(worker, error)

    def _lose(self, worker: _Worker, error: Exception) -> None:
        lost = UserError("a worker process was killed, perhaps because memory ran out; try fewer --workers")
        lost.__cause__ = error
        self._done(worker, _Raised(lost))

    def _done(self, worker: _Worker, result: Any) -> None:
        del self._busy[worker.connection]
        worker.call.result, worker.call.is_done = result, True

    def _start(self, call: _Call, item: Item) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        with _signals_held():
            resource_tracker.ensure_running()  # started by the first process, it would unblock the signals again
            # Ctrl-C and a scheduler's SIGTERM reach every process of the group; the workers leave them to us.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                process.start()
                worker = _Worker(process, ours, [self._make, item], call)
                self._all.append(worker)
                self._busy[ours] = worker
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Within the block a SIGINT or SIGTERM is noted; it does what it does when the block ends. The handlers are
    changed, too, because a thread of a library may take a signal that is blocked in this one.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler runs
        yield
        return
    noted: list[int] = []
    before = {held: signal.signal(held, lambda number, frame: noted.append(number)) for held in _SIGNALS}
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)
        for number in noted:
            signal.raise_signal(number)


class _Raised(NamedTuple):
    error: Exception


def _serve(connection: Connection) -> None:
    """A worker's life: asks for `make`, then for items, and answers them until the other end of the pipe is gone."""
    with suppress(EOFError, OSError):
        connection.send(None)
        function = connection.recv()()
        connection.send(None)
        while True:
            item = connection.recv()
            try:
                result = function(item)
            except Exception as error:
                result = _Raised(error)
            connection.send(result)
