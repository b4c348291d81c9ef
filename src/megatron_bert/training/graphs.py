"""CUDA graphs of training passes: what the host says to the GPU is recorded once and said again in one call.

A pass (forward, loss, backward of a micro-batch) of fixed shapes is the same hundreds of kernels each time. Queueing
them takes a host longer than a GPU needs to compute a small model, a short batch, or a layer in float8. The numbers are
those that the recorded kernels compute without a graph, random ones too: PyTorch moves its generator on at each replay.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_bert.parallel.streams import PassStreams
from megatron_bert.training.microbatch import LaidOut

__all__ = ["PassGraphs"]

log = logging.getLogger(__name__)

_SEEN_BEFORE = 2  # passes of the same shapes before one is recorded: they compile, and let libraries set themselves up
_MOST_GRAPHS = 4  # kept at once; batches of other shapes are run without


class _Recorded(NamedTuple):
    """A pass, and the memory that it reads and writes."""

    graph: Any
    inputs: dict[str, Tensor]
    numbers: Sequence[Tensor]
    losses: Any
    streams: PassStreams


class PassGraphs:
    """Runs the passes of an objective: the first of each shape plainly, then recorded.

    The first pass of a step writes gradients where there are none, the others add to them: two recordings. All share
    the gradients' memory, and `parameter.grad` is put there again by the first.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._seen: Counter[Hashable] = Counter()
        self._streams: dict[Hashable, PassStreams] = defaultdict(lambda: PassStreams(device))
        self._recorded: dict[Hashable, _Recorded] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._pool: Any = None
        self._holds_gradients = False  # whether this step's are in the memory that recordings know
        self._works = True

    def differentiate(self, objective: Any, batch: LaidOut, numbers: Sequence[Any], *, is_first: bool) -> Any:
        """The losses of a batch in the CPU's memory; their mean's gradients are added to the parameters'.

        Args:
            objective: see `training.step.Minimised`.
            numbers: of the terms that losses are divided by, 0-dimensional, on the device.
            is_first: of a step, so that there are no gradients yet.
        """
        key = (is_first, _signature(batch))
        if key not in self._recorded:
            may_record = self._works and (is_first or self._holds_gradients) and len(self._recorded) < _MOST_GRAPHS
            if not may_record or self._seen[key] < _SEEN_BEFORE:
                return self._plainly(objective, batch, numbers, key)
            try:
                self._recorded[key] = self._record(objective, batch, numbers, key)
            except RuntimeError as error:  # out of memory is one, too
                self._give_up(objective, error, is_first)
                return self._plainly(objective, batch, numbers, key)
        if not (is_first or self._holds_gradients):
            return self._plainly(objective, batch, numbers, key)
        return self._replayed(self._recorded[key], batch, numbers, is_first)

    def _plainly(self, objective: Any, batch: LaidOut, numbers: Sequence[Any], key: Any) -> Any:
        self._seen[key] += 1
        if key[0]:
            self._holds_gradients = False
        with self._streams[key].watching():
            losses = objective(batch)
        objective.mean(losses, numbers).backward()
        return _detached(losses)

    def _record(self, objective: Any, batch: LaidOut, numbers: Sequence[Any], key: Any) -> _Recorded:
        """Nothing is computed yet. The very first pass gives gradients their memory."""
        static, streams = batch.to(objective.device), self._streams[key]
        own_numbers = [number.clone() for number in numbers]
        self._put_gradients()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: others go on to read batches and write checkpoints.
        with streams.recording(graph), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._pass(objective, static, own_numbers, is_first=key[0])
        gradients = {one: one.grad for one in objective.model.parameters() if one.grad is not None}
        if self._gradients and gradients.keys() != self._gradients.keys():
            raise RuntimeError("passes are of different parameters")
        self._gradients = gradients
        return _Recorded(graph, static.tensors(), own_numbers, losses, streams)

    def _pass(self, objective: Any, batch: LaidOut, numbers: Sequence[Any], *, is_first: bool) -> Any:
        if is_first and self._gradients:
            torch._foreach_zero_(list(self._gradients.values()))
        losses = objective(batch)
        objective.mean(losses, numbers).backward()
        return _detached(losses)

    def _put_gradients(self) -> None:
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def _replayed(self, recorded: _Recorded, batch: LaidOut, numbers: Sequence[Any], is_first: bool) -> Any:
        given = batch.to(next(iter(recorded.inputs.values())).device).tensors()
        torch._foreach_copy_([*recorded.inputs.values(), *recorded.numbers], [*given.values(), *numbers])
        if is_first:
            self._holds_gradients = True
            self._put_gradients()
        recorded.streams.set()
        recorded.graph.replay()
        return type(recorded.losses)(*(one.clone() for one in recorded.losses))

    def _give_up(self, objective: Any, error: RuntimeError, is_first: bool) -> None:
        """Passes are run plainly from now on."""
        self._works = False
        log.warning("a training pass could not be recorded as a CUDA graph, so the host takes part in each: %s",
                    " ".join(str(error).split())[:200])  # fmt: skip
        if is_first:
            for parameter in objective.model.parameters():
                parameter.grad = None


def _detached(losses: Any) -> Any:
    """What keeps no pass alive: a gradient's stream is settled by the first pass that needs it."""
    return type(losses)(*(one.detach() for one in losses))


def _signature(batch: LaidOut) -> Hashable:
    """What has to be the same for one recording to serve two batches."""
    layout = batch.layout
    lies = None if layout is None else (type(layout), tuple(layout.batch_shape), layout.max_length)
    return lies, tuple((name, value.dtype, tuple(value.shape)) for name, value in batch.tensors().items())
