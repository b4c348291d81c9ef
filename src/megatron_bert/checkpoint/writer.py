"""Writes checkpoints beside the training that goes on: copied at once, written by a thread, renamed when whole."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from megatron_bert.checkpoint.manifest import Files, describe, write_manifest
from megatron_bert.checkpoint.native import (
    best_step,
    checkpoint_of,
    checkpoints_folder,
    list_checkpoints,
    state_file,
    step_of,
    streams_file,
)
from megatron_bert.checkpoint.tensors import write_tensors
from megatron_bert.data.files import sync, written_aside
from megatron_bert.parallel.launch import is_lost

__all__ = ["CheckpointWriter", "Snapshot", "remove_unfinished"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. The tensors may be the ones in use: `CheckpointWriter.save` copies them.

    tensors: weights and optimizer states, named with the prefixes of `checkpoint.native`.
    state, streams: what JSON can hold.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    streams: Mapping[str, Any]


class CheckpointWriter:
    """Keeps the last `keep` checkpoints of the run in the folder `run`.

    `save` returns as soon as the tensors are copied into the CPU's memory (page-locked where there is a GPU, and used
    again the next time), so no checkpoint ever mixes two steps. One checkpoint is written at a time; the next `save`
    waits for it. A disk that is full is said aloud and does not end the run: earlier checkpoints are as good as before,
    and the next `save` tries again. Leaving the block waits for what is being written, unless another process is gone:
    the others' parts are no checkpoint.

    Args:
        group: the processes that share the run, all of which save at the same step, each its own parts; a group that
            nothing else uses. None: this process is alone.
    """

    def __init__(self, run: Path, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self._run, self._keep, self._group = run, keep, group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._gpu = torch.cuda.is_available()
        # What is under the public `DefaultStager`, which in PyTorch 2.11 can be used only once.
        self._stager = StateDictStager(pin_memory=self._gpu, share_memory=False)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[OSError | None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gone = is_lost(error)
        try:
            if not gone:
                self.wait()
        finally:
            self._thread.shutdown(wait=not gone)
            self._stager.close()  # type: ignore[no-untyped-call]

    def save(self, snapshot: Snapshot, first: Callable[[], None] | None = None) -> None:
        """Copies the snapshot and begins to write it; what became of the one before it is in the log.

        Args:
            first: writes what has to be on the disk before this checkpoint; where it raises OSError there will be none.
        """
        self.wait()
        try:
            self._together(first or _nothing)
        except OSError as error:
            self._pending = Future()
            self._pending.set_result(_reported(snapshot.step, error))
            return
        tensors = self._stager.stage(dict(snapshot.tensors), non_blocking=self._gpu)
        if self._gpu:
            torch.cuda.synchronize()
        copied = Snapshot(snapshot.step, tensors, snapshot.state, snapshot.streams)
        self._pending = self._thread.submit(self._write, copied)

    def wait(self) -> OSError | None:
        """Waits until nothing is being written; returns why the last one could not be, or None."""
        pending, self._pending = self._pending, None
        return pending.result() if pending else None

    def _write(self, snapshot: Snapshot) -> OSError | None:
        try:
            with ExitStack() as stack:
                aside = self._together(lambda: self._begin(snapshot.step, stack))[0]
                assert aside
                files = self._together(lambda: self._fill(aside, snapshot))
                self._together(lambda: self._finish(aside, snapshot.step, files, stack))
        except OSError as error:
            return _reported(snapshot.step, error)
        return None

    def _begin(self, step: int, stack: ExitStack) -> Path | None:
        """The folder to write to, made by the first process."""
        if self._rank:
            return None
        return stack.enter_context(written_aside(checkpoint_of(self._run, step), folder=True))

    def _fill(self, aside: Path, snapshot: Snapshot) -> Files:
        """Writes this process's part, and describes its files."""
        write_tensors(aside, snapshot.tensors, self._group)
        streams_file(aside, self._rank).write_text(json.dumps(snapshot.streams), encoding="utf-8")
        mine = [*aside.glob(f"__{self._rank}_*"), streams_file(aside, self._rank)]
        if not self._rank:
            state_file(aside).write_text(json.dumps(snapshot.state), encoding="utf-8")
            mine += [state_file(aside), aside / ".metadata"]
        for file in mine:
            sync(file)  # by the machine that wrote it; another one cannot
        return describe(mine)

    def _finish(self, aside: Path, step: int, files: Sequence[Files], stack: ExitStack) -> None:
        """The first process makes it a checkpoint."""
        if self._rank:
            return
        for name in (name for part in files for name in part):
            if not (aside / name).is_file():
                raise FileNotFoundError(
                    errno.ENOENT, f"{name}, of another process, is not here: all nodes have to share the output folder"
                )
        write_manifest(aside, files)
        stack.close()
        sync(checkpoints_folder(self._run))
        self._prune(step)

    def _together(self, part: Callable[[], Result]) -> list[Result]:
        """What `part` gave on each process. Where it fails on one, it fails on all."""
        try:
            mine: Any = part()
        except OSError as error:
            mine = error
        everywhere = [mine]
        if self._group is not None:
            everywhere = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(everywhere, mine, group=self._group)
        for one in everywhere:
            if isinstance(one, OSError):
                raise one
        return everywhere

    def _prune(self, newest: int) -> None:
        """Removes what is not among the last `keep` up to `newest`, nor the best that one of them names; what is beyond
        was damaged when the run began.
        """
        kept = [path for path in list_checkpoints(self._run) if step_of(path) <= newest][: self._keep]
        kept += [checkpoint_of(self._run, best) for path in kept if (best := best_step(path))]
        for path in list_checkpoints(self._run):
            if path not in kept:
                try:
                    shutil.rmtree(path)
                except OSError as error:  # the new one is there all the same
                    log.warning("%s could not be removed (%s); the next checkpoint tries again", path, error.strerror)


def _nothing() -> None:
    pass


def _reported(step: int, error: OSError) -> OSError:
    reason = error.strerror or error
    log.warning(
        "the checkpoint of step %d could not be written (%s); those before it are as good as ever", step, reason
    )
    return error


def remove_unfinished(run: Path) -> None:
    """Removes what a killed process was writing: a checkpoint, or the model. Only for whoever holds the run's lock."""
    for path in (*checkpoints_folder(run).glob(".step-*.partial"), *run.glob(".model.*.partial")):
        shutil.rmtree(path, ignore_errors=True)
