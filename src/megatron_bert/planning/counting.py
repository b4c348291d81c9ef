"""Counts what a step does while it runs: bytes that are alive, and bytes that collectives move.

Made for fake tensors (`torch._subclasses.FakeTensorMode`), which have shapes and no values; real ones count as well.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_bert.planning.communication import Axis, Collective, Kind

__all__ = ["CollectiveCounter", "DryRun", "MemoryCounter"]


@dataclass(frozen=True)
class DryRun:
    """What rank 0 saw in one step.

    Attributes:
        parameters: that it holds.
        peak_bytes: the most that tensors took.
        state_bytes: weights and optimizer states, between steps.
        collectives: of the step.
        seconds: that the dry run took.
    """

    parameters: int
    peak_bytes: int
    state_bytes: int
    collectives: list[Collective]
    seconds: float


class MemoryCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within its block, adds up the storages of all tensors that operators return, until they are freed.

    A GPU's allocator rounds sizes up (to 512 bytes) and keeps what it cannot reuse; neither is counted.

    Attributes:
        live_bytes, peak_bytes: now, and the most since the beginning or `restart_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> MemoryCounter:
        self._patch = _storage_resizes(self._resized)
        self._patch.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._patch.__exit__(*exception)

    def restart_peak(self) -> None:
        """Forgets the peak so far."""
        self.peak_bytes = self.live_bytes

    def watch(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._freed, key)
            self._set(key, storage.nbytes())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch comes back here with this rank's part
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result

    def _resized(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            self._set(storage._cdata, storage.nbytes())

    def _freed(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def _set(self, key: int, num_bytes: int) -> None:
        self.live_bytes += num_bytes - self._sizes[key]
        self._sizes[key] = num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@contextmanager
def _storage_resizes(told: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Tells of every storage that changes its size in place: so FSDP frees what it put together."""
    original: Any = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        told(storage)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


_KINDS: dict[str, Kind] = {
    "_c10d_functional::all_reduce": "all-reduce",
    "_c10d_functional::all_gather_into_tensor": "all-gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce-scatter",
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
}
_by_name: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
_NAMESPACES, _NOT_COUNTED = ("_c10d_functional::", "c10d::"), ("wait_tensor", "barrier")


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within its block, notes every collective of more than one rank.

    Args:
        axes: by the names of process groups.

    Attributes:
        times: that each one counts from now on.
    """

    def __init__(self, axes: Mapping[str, Axis]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.times = 1
        self._axes, self._seen = axes, Counter[Collective]()

    def collectives(self) -> list[Collective]:
        """In the order of their first appearance, equal ones together."""
        return [replace(one, count=count) for one, count in self._seen.items()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith(_NAMESPACES) and not name.endswith(_NOT_COUNTED):
            self._note(_KINDS[name], args, result)
        return result

    def _note(self, kind: Kind, args: tuple[Any, ...], result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
        group = next(group for argument in args[::-1] if (group := _group(argument)) is not None)
        if group.size() > 1:
            num_bytes = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            self._seen[Collective(kind, self._axes[group.group_name], group.size(), num_bytes)] += self.times


def _group(argument: Any) -> dist.ProcessGroup | None:
    """The process group that an argument is or names."""
    try:
        if isinstance(argument, str):
            named: dist.ProcessGroup = _by_name(argument)
            return named
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, ValueError):  # the operation of a reduction
        pass
    return None
