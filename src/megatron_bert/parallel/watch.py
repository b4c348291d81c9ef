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

    Each process keeps a line about where it is in the store that all of them met in; the first one whose patience ends
    hands the names of those that are behind to `say`. A process is ended at once, without cleaning up: what it waits
    for will never come. `torchrun` then ends, or starts again, all of them.

    Args:
        say: takes the message, one line.
    """

    def __init__(self, patience_seconds: float, say: Callable[[str], None]) -> None:
        self._patience, self._say = patience_seconds, say
        self._store = dist.distributed_c10d._get_default_store()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._count, self._beats, self._is_slow = 0, 0, False
        self._ended = threading.Event()
        self.at("the start")
        self._beat()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def at(self, what: str, *, is_slow: bool = False) -> None:
        """This process goes on to `what`: a few words, the same on all of them.

        Args:
            is_slow: it may take any time, as long as all processes give signs of life.
        """
        self._since, self._is_slow = time.monotonic(), is_slow
        self._count += 1
        self._store.set(f"watch/at/{self._rank}", f"{self._count} {what}")

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._beat()
            if time.monotonic() - self._since > self._patience:
                if self._is_slow and not self._silent():
                    self._since = time.monotonic()
                    continue
                try:
                    self._tell()
                finally:
                    os._exit(_EXIT_CODE)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"watch/beat/{self._rank}", str(self._beats))

    def _tell(self) -> None:
        """Names those that are behind, or else those that give no sign of life: stopped, swapped out, cut off."""
        places = [place.split(" ", 1) for place in self._of_all("at")]
        counts = [int(count) for count, _ in places]
        hanging = [rank for rank, count in enumerate(counts) if count < max(counts)] or self._silent()
        if self._store.add("watch/tellers", 1) > 1:
            time.sleep(_LOOK_SECONDS)  # or torchrun would end the one that speaks before it has spoken
        elif hanging:
            where = places[hanging[0]][1]
            self._say(f"{ranks_of(hanging)} did not get past {where} for {self._patience:g} s, and the others wait")
        else:
            self._say(f"no rank got past {places[0][1]} for {self._patience:g} s")

    def _silent(self) -> list[int]:
        """The ranks whose thread here does not run any more."""
        before = self._of_all("beat")
        for _ in range(3):
            time.sleep(_LOOK_SECONDS)
            self._beat()  # others may be looking, too
        after = self._of_all("beat")
        return [rank for rank in range(self._size) if before[rank] == after[rank] and rank != self._rank]

    def _of_all(self, what: str) -> list[str]:
        return [self._store.get(f"watch/{what}/{rank}").decode() for rank in range(self._size)]
