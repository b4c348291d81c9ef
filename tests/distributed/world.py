"""Processes joined by gloo, started once, that run one function after another."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["tests.distributed.cases"]  # by the server that a test process starts once, whoever asks for it first
PATIENCE_SECONDS = 300  # eight processes on two cores that others use too


class World:
    """`size` ranks. What they import is imported once, by the server that they are forked from."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._folder.name, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What `case`, a function of a module, returned on each rank; a failure is an assertion here."""
        for pipe in self._pipes:
            pipe.send((case, args, kwargs))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(PATIENCE_SECONDS), f"rank {rank} did not answer in {PATIENCE_SECONDS} s; {failures}"
            failed, result = pipe.recv()
            (failures if failed else results).append(f"rank {rank}:\n{result}" if failed else result)
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_SECONDS - 60)
    )
    while True:
        try:
            case, args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((False, case(*args, **kwargs)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()
