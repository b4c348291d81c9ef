"""Sees that a run moves on. Where a process hangs, the others wait for it without end, and cannot say for whom."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megatron_bert.parallel.launch import ranks_of

__all__ = ["Watch"]

_LOOK_SECONDS = 1.0
_EXIT_CODE = 1


class Watch:
    """Within the block, ends this process when it has not said for `patience_seconds` that it is at something new.

    Each process keeps a line about where it is in the store that all of them met in; the first one that is not behind
    hands the names of those that are to `say`. A process is ended at once, without cleaning up: what it waits for will
    never come. `torchrun` then ends, or starts again, all of them.

    Args:
        say: takes the message, one line.
    """

    def __init__(self, patience_seconds: float, say: Callable[[str], None]) -> None:
        self._patience, self._say = patience_seconds, say
        self._store = dist.distributed_c10d._get_default_store()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._count = 0
        self._ended = threading.Event()
        self.at("the start")
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, what: str) -> None:
        """This process goes on to `what`: a few words, the same on all of them."""
        self._since = time.monotonic()
        self._count += 1
        self._store.set(f"watch/{self._rank}", f"{self._count} {what}")

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            if time.monotonic() - self._since > self._patience:
                self._tell()
                os._exit(_EXIT_CODE)

    def _tell(self) -> None:
        places = [self._store.get(f"watch/{rank}").decode().split(" ", 1) for rank in range(self._size)]
        counts = [int(count) for count, _ in places]
        behind = [rank for rank, count in enumerate(counts) if count < max(counts)]
        ahead = [rank for rank in range(self._size) if rank not in behind]
        if self._rank != ahead[0]:
            time.sleep(_LOOK_SECONDS)  # or torchrun would end the one that speaks before it has spoken
            return
        where = places[behind[0] if behind else 0][1]
        if behind:
            self._say(f"{ranks_of(behind)} did not get past {where} for {self._patience:g} s, and the others wait")
        else:
            self._say(f"no rank got past {where} for {self._patience:g} s")
