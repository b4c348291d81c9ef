"""CUDA graphs of training passes: what the host says to the GPU is recorded once and said again in one call.

A pass (forward, loss, backward of a micro-batch) of fixed shapes is the same hundreds of kernels each time. Queueing
them takes a host longer than a GPU needs to compute a small model, a short batch, or a layer in float8. The numbers are
those that the recorded kernels compute without a graph, random ones too: PyTorch moves its generator on at each replay.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megatron_bert.errors import UserError
from megatron_bert.parallel.data import call_within
from megatron_bert.parallel.launch import agreed, exchange
from megatron_bert.parallel.overlap import forget_the_last
from megatron_bert.parallel.streams import PassStreams
from megatron_bert.training.microbatch import LaidOut

__all__ = ["PassGraphs", "differentiated"]

log = logging.getLogger(__name__)

_SEEN_BEFORE = 2  # passes of a kind before one is recorded: they compile, and let libraries set themselves up
_KEPT = 6  # recordings at once: the last ones that were used
_MOST = 16  # in all; where batches go on to need others, recording costs more than it saves


Around: TypeAlias = Callable[[], AbstractContextManager[None]]


def differentiated(objective: Any, batch: LaidOut, numbers: Sequence[Any], around: Around | None = None) -> Any:
    """The losses of a batch, as values; their mean's gradients are added to the parameters'.

    Args:
        objective: see `training.step.Minimised`.
        numbers: of the terms that losses are divided by.
        around: makes what the pass is done within.
    """
    with around() if around is not None else nullcontext():
        losses = call_within(objective.model, objective, batch)
        objective.mean(losses, numbers).backward()
    # Not the tensors themselves, which keep the pass alive: a gradient's stream is settled by the first that needs it.
    return type(losses)(*(one.detach() for one in losses))


class _Recorded(NamedTuple):
    """A pass, and the memory that it reads and writes."""

    replay: Callable[[], None]
    reset: Callable[[], None]
    inputs: dict[str, Tensor]
    numbers: Sequence[Tensor]
    losses: Any
    streams: PassStreams


class PassGraphs:
    """Runs the passes of an objective: the first ones of each kind plainly, then recorded.

    A kind is the tensors' shapes; whether the pass is a step's first, which writes gradients where there are none (the
    others add to them); and whether something is put around it. All share the gradients' memory, and `parameter.grad`
    is put there again by the first.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: Counter[Hashable] = Counter()
        self._streams: dict[Hashable, PassStreams] = defaultdict(lambda: PassStreams(device))
        self._recorded: dict[Hashable, _Recorded] = {}
        self._left = _MOST
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._pool: Any = None
        self._beside: Any = None
        self._holds_gradients = False  # whether this step's are in the memory that recordings know

    def differentiated(
        self, objective: Any, batch: LaidOut, numbers: Sequence[Any], around: Around | None = None, *, is_first: bool
    ) -> Any:
        """As the function of this name.

        Args:
            batch: in the CPU's memory.
            numbers: 0-dimensional tensors on the device.
            around: the same for all that have one.
            is_first: of a step, so that there are no gradients yet.

        Raises:
            UserError: a recording was broken off by CUDA, or in the middle of FSDP's work.
        """
        key = (is_first, around is not None, _signature(batch))
        fits = is_first or self._holds_gradients
        if fits and key not in self._recorded and self._left and self._seen[key] >= _SEEN_BEFORE:
            self._try_to_record(objective, batch, numbers, around, key)
        if fits and key in self._recorded:
            return self._replayed(batch, numbers, key)
        self._seen[key] += 1
        if is_first:
            self._holds_gradients = False
        with self._streams[key].watching():
            return differentiated(objective, batch, numbers, around)

    def release(self) -> None:
        """Gives up what was recorded. Before processes part: NCCL ends a group only after the graphs that send in it
        (docs.nvidia.com/dl-cuda-graph/troubleshooting/process-hang.html).
        """
        for recorded in self._recorded.values():
            recorded.reset()
        self._recorded.clear()
        self._gradients = {}

    def _try_to_record(
        self, objective: Any, batch: LaidOut, numbers: Sequence[Any], around: Around | None, key: Any
    ) -> None:
        """Where it fails, nothing is recorded any more, and gradients are what they were. All ranks try at once, for
        they go by the same shapes (`FixedShapes`); where it fails on one, it has failed on all.
        """
        before = {parameter: parameter.grad for parameter in objective.model.parameters()}

        def attempt() -> _Recorded | str:
            try:
                return self._record(objective, batch, numbers, around, key)
            except RuntimeError as error:  # out of memory is one, too
                if isinstance(objective.model, FSDPModule):  # which knows of no pass that is broken off
                    raise _not_recorded(error) from error
                return " ".join(str(error).split())[:200]

        recorded = agreed(attempt)
        reason = next(filter(None, exchange(recorded if isinstance(recorded, str) else "")), None)
        if isinstance(recorded, str) or reason:
            self._left = 0
            self.release()
            forget_the_last()
            for parameter, gradient in before.items():
                parameter.grad = gradient
            log.warning("training passes are not recorded as CUDA graphs, so the host takes part in each: %s", reason)
            return
        self._left -= 1
        if not self._left:
            log.warning("batches of ever new shapes: no more training passes are recorded as CUDA graphs")
        if len(self._recorded) == _KEPT:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[key] = recorded

    def _record(
        self, objective: Any, batch: LaidOut, numbers: Sequence[Any], around: Around | None, key: Any
    ) -> _Recorded:
        """Nothing is computed yet. The very first pass gives gradients their memory."""
        static, own_numbers = batch.to(self._device), [number.clone() for number in numbers]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._put_gradients()
        graph, streams = torch.cuda.CUDAGraph(), self._streams[key]
        with torch.cuda.device(self._device), streams.recording(graph):
            losses = self._captured(graph, lambda: self._pass(objective, static, own_numbers, around, is_first=key[0]))
        gradients = {one: one.grad for one in objective.model.parameters() if one.grad is not None}
        if self._gradients and gradients.keys() != self._gradients.keys():
            raise RuntimeError("passes are of different parameters")
        self._gradients = gradients

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return _Recorded(replay, graph.reset, static.tensors(), own_numbers, losses, streams)

    def _captured(self, graph: Any, function: Callable[[], Any]) -> Any:
        """Its result. An error of its own ends the recording; one of CUDA's leaves PyTorch in no state to go on."""
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # memory that plain passes have used cannot be a recorded one's
        with torch.cuda.stream(self._beside):
            # Of this thread only: others go on to read batches and write checkpoints.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            failed: RuntimeError | None = None
            try:
                result = function()
            except RuntimeError as error:
                failed = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                raise _not_recorded(failed or error) from (failed or error)
        if failed is not None:
            raise failed
        return result

    def _pass(
        self, objective: Any, batch: LaidOut, numbers: Sequence[Any], around: Around | None, *, is_first: bool
    ) -> Any:
        if is_first and self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))
        return differentiated(objective, batch, numbers, around)

    def _put_gradients(self) -> None:
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def _replayed(self, batch: LaidOut, numbers: Sequence[Any], key: Any) -> Any:
        recorded = self._recorded[key] = self._recorded.pop(key)  # the last one used
        given = batch.to(self._device).tensors()
        torch._foreach_copy_([*recorded.inputs.values(), *recorded.numbers], [*given.values(), *numbers])
        if key[0]:
            self._holds_gradients = True
            self._put_gradients()
        recorded.streams.set()
        recorded.replay()
        return type(recorded.losses)(*(one.clone() for one in recorded.losses))


def _not_recorded(error: RuntimeError) -> UserError:
    return UserError(f"a training pass cannot be recorded as a CUDA graph ({error}): set runtime.cuda_graphs=false; "
                     "the run goes on from its last checkpoint")  # fmt: skip


def _signature(batch: LaidOut) -> Hashable:
    """What has to be the same for one recording to serve two batches."""
    layout = batch.layout
    lies = None if layout is None else (type(layout), tuple(layout.batch_shape), layout.max_length)
    return lies, tuple((name, value.dtype, tuple(value.shape)) for name, value in batch.tensors().items())
