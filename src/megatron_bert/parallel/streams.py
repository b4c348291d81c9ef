"""Random numbers of sharded and of replicated regions.

Tensor-parallel ranks start from one seed and draw the same numbers wherever they compute the same values. Where each
computes its own part (attention heads, tokens under sequence parallelism), their masks have to differ: for the time of
such a region, the stream is replaced by one that follows from the common stream's state and the rank.

So the common stream is all the state there is. Whoever saves and restores it, a checkpoint or the recomputation of
activations (`torch.utils.checkpoint`), gets the ranks' own streams with it, for any number of ranks.

A CUDA graph cannot ask for a state. So where a pass is to be recorded, it is first seen where in the common stream its
regions begin (`PassStreams`); from that their streams follow, at each replay, as they would without a graph.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch

__all__ = ["PassStreams", "key", "own_stream"]

_CUDA_STATE = "<QQ"  # seed and offset, as PyTorch's CUDA generator gives its state


@contextmanager
def own_stream(rank: int, device: torch.device) -> Iterator[None]:
    """Within the block, `device` draws from this rank's own stream; the common one moves on by one number."""
    generator = _default_generator(device)
    watcher = _watchers[-1] if _watchers else None
    if watcher is not None and watcher.remaining is not None:
        with watcher.recorded_region(generator, device):
            yield
        return
    state = generator.get_state()
    if watcher is not None:
        watcher.note(rank, state)
    torch.rand((), device=device)
    common = generator.get_state()
    generator.manual_seed(key(state.numpy().tobytes(), rank))
    try:
        yield
    finally:
        generator.set_state(common)


@dataclass
class PassStreams:
    """The streams of a pass's regions, in the order in which it enters them.

    Attributes:
        device: a GPU.
        regions: the rank of each, and how far in the common stream it begins from where the pass does.
        generators: what each draws from in a recorded pass.
        remaining: of these, those that a pass being recorded has not entered yet.
    """

    device: torch.device
    regions: list[tuple[int, int]] = field(default_factory=list)
    generators: list[torch.Generator] = field(default_factory=list)
    remaining: Iterator[torch.Generator] | None = None
    _start: int = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a pass that is not recorded: takes down where its regions begin."""
        self.regions, self._start = [], _cuda_state(_default_generator(self.device).get_state())[1]
        with self._in_force():
            yield

    @contextmanager
    def recording(self, graph: Any) -> Iterator[None]:
        """Around the recording of a pass that was watched before, as `graph` (a `torch.cuda.CUDAGraph`)."""
        self.generators = [torch.Generator(self.device) for _ in self.regions]
        for generator in self.generators:
            graph.register_generator_state(generator)
        self.remaining = iter(self.generators)
        try:
            with self._in_force():
                yield
        finally:
            self.remaining = None

    def set(self) -> None:
        """Before each replay."""
        if not self.generators:
            return
        seed, offset = _cuda_state(_default_generator(self.device).get_state())
        for (rank, distance), generator in zip(self.regions, self.generators, strict=True):
            generator.manual_seed(key(struct.pack(_CUDA_STATE, seed, offset + distance), rank))

    def note(self, rank: int, state: torch.Tensor) -> None:
        """A region of this rank begins here."""
        self.regions.append((rank, _cuda_state(state)[1] - self._start))

    @contextmanager
    def recorded_region(self, generator: Any, device: torch.device) -> Iterator[None]:
        """What `own_stream` does in a pass that is being recorded."""
        assert self.remaining is not None
        common = generator.graphsafe_get_state()
        torch.rand((), device=device)
        generator.graphsafe_set_state(next(self.remaining).graphsafe_get_state())
        try:
            yield
        finally:
            generator.graphsafe_set_state(common)

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        _watchers.append(self)
        try:
            yield
        finally:
            _watchers.pop()


_watchers: list[PassStreams] = []  # of the pass at hand: none or one


def _cuda_state(state: torch.Tensor) -> tuple[int, int]:
    seed, offset = struct.unpack(_CUDA_STATE, state.numpy().tobytes())
    return seed, offset


def key(*parts: bytes | int | str) -> int:
    """A seed of 63 bits that follows from all of `parts`; any other parts give, for all purposes, another seed."""
    digest = blake2b(digest_size=8)
    for part in parts:
        encoded = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator
