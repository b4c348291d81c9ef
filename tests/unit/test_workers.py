"""Worker processes: results in order, nothing left running, and what a killed one is told as."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from megatron_bert.data.reading import Span, read_blocks
from megatron_bert.data.workers import ordered_map
from megatron_bert.errors import UserError


def slow_for_small() -> Callable[[int], tuple[int, int]]:
    def work(number: int) -> tuple[int, int]:
        if number == 13:
            raise UserError("thirteen")
        if number == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05 if number % 3 == 0 else 0)
        return number * number, os.getpid()

    return work


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_are_in_order(num_workers: int) -> None:
    results = list(ordered_map(slow_for_small, range(12), num_workers))
    assert [square for square, _ in results] == [number * number for number in range(12)]
    pids = {pid for _, pid in results}
    assert len(pids) == max(num_workers, 1)
    assert (os.getpid() in pids) is (num_workers == 0)


def test_few_items_are_taken_ahead() -> None:
    taken: list[int] = []
    items = (taken.append(number) or number for number in range(12))  # type: ignore[func-returns-value]
    for at, _ in enumerate(ordered_map(slow_for_small, items, 2), 1):
        assert len(taken) <= at + 2 * 2 + 1


@pytest.mark.parametrize("items", [[], [5]])
def test_little_work_starts_no_process(items: list[int]) -> None:
    assert list(ordered_map(slow_for_small, items, 2)) == [(item * item, os.getpid()) for item in items]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("bad", [13, 99])
def test_an_error_comes_in_its_place_and_ends_the_workers(bad: int) -> None:
    pids = []
    with pytest.raises(UserError, match="thirteen" if bad == 13 else "a worker process was killed"):
        for _, pid in ordered_map(slow_for_small, [1, 2, 3, bad, 4, 5, 6, 7, 8], 2):
            pids.append(pid)
    assert len(pids) == 3
    assert not any(map(alive, pids))


def test_closing_ends_the_workers() -> None:
    results = ordered_map(slow_for_small, range(12), 2)
    pids = [next(results)[1] for _ in range(3)]
    assert any(map(alive, pids))
    results.close()
    assert not any(map(alive, pids))


def interrupt_elsewhere() -> None:
    """An interrupt that another thread takes: the main one finds it noted, but no call that it waits in is ended. So
    it also is where a signal comes just before the call.
    """

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()


@contextmanager
def interrupted() -> Iterator[list[float]]:
    """The block ends by an interrupt, which comes after a second (the time stands in the list), soon after it."""
    sent: list[float] = []
    timer = threading.Timer(1, lambda: (sent.append(time.monotonic()), interrupt_elsewhere()))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield sent
        assert time.monotonic() - sent[0] < 5
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def sleeper() -> Callable[[int], None]:
    return time.sleep


def test_an_interrupt_is_seen_while_workers_work() -> None:
    with interrupted():
        list(ordered_map(sleeper, [20, 20, 20], 2))


def test_an_interrupt_is_seen_while_a_pipe_is_empty(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    late = threading.Timer(20, os.write, (end, b"1" * 8))
    late.start()
    try:
        with interrupted():
            next(read_blocks(Span(pipe, 0, 8), "text"))
    finally:
        late.cancel()
        os.close(end)


def test_an_interrupt_during_the_start_of_a_worker_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[SpawnProcess] = []
    start = SpawnProcess.start

    def interrupt_start(process: SpawnProcess) -> None:
        start(process)
        started.append(process)
        interrupt_elsewhere()

    monkeypatch.setattr(SpawnProcess, "start", interrupt_start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(ordered_map(sleeper, [20, 20, 20], 2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == 1
    assert not started[0].is_alive()
