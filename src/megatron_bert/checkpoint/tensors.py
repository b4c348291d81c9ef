"""Named tensors in the format of `torch.distributed.checkpoint`, which a different number of ranks can read back.

That library unpickles the index of a checkpoint (`.metadata`) and whatever is not a tensor without asking what is in
it. Here only tensors are written, and the index is read with an explicit list of allowed types, so that nothing runs
from a file.
"""

from __future__ import annotations

import pathlib
import pickle
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_bert.errors import UserError

# A single process is meant; `warnings.catch_warnings` around a call in a thread would not be safe.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

__all__ = ["read_all_tensors", "read_tensors", "tensor_shapes", "write_tensors"]

_INDEX_TYPES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.Metadata, metadata.MetadataIndex,
        metadata.StorageMeta, metadata.TensorProperties, metadata.TensorStorageMetadata, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.Size, pathlib.PosixPath,
    )
}  # fmt: skip
_INDEX_TYPES[("torch.serialization", "_get_layout")] = torch.serialization._get_layout


def _memory_format(kind: Any, name: str) -> Any:
    """What `getattr` may give here: Python 3.11's first releases pickle a member of an enumeration as a call of it."""
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it takes {name} from {kind}, which has no place there")
    return metadata._MEM_FORMAT_ENCODING[name]


_INDEX_TYPES[("builtins", "getattr")] = _memory_format


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Writes the tensors (in the CPU's memory, or distributed over ranks) to files in `folder`.

    Args:
        group: the processes that write; default: all.

    Raises:
        OSError: what the file system says.
    """
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    writer = _Writer(folder, sync_files=False)  # `CheckpointWriter` syncs all files of a process
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except (CheckpointException, RuntimeError) as error:
        raise _cause(error) from error


def read_tensors(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fills `targets` in place, each rank its own part of a distributed tensor.

    Raises:
        UserError: a name is missing from the checkpoint or has another shape, or the index holds what it should not.
        OSError: what the file system says.
    """
    shapes = tensor_shapes(folder)
    for name, target in targets.items():
        if name not in shapes:
            raise UserError(f"{folder} has no tensor {name}")
        if shapes[name][0] != target.shape:
            raise UserError(
                f"{folder}: {name} has the shape {list(shapes[name][0])}, but the model's is {list(target.shape)}"
            )
    _load(folder, targets)


def read_all_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors in the CPU's memory: those whose names begin with `prefix`, which is taken off.

    Raises:
        UserError: as `read_tensors`.
    """
    shapes = {name: shape for name, shape in tensor_shapes(folder).items() if name.startswith(prefix)}
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes.items()}
    _load(folder, tensors, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def tensor_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and type of every tensor that the checkpoint holds.

    Raises:
        UserError: the index holds something that is not about tensors.
    """
    entries = _Reader(folder).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, metadata.TensorStorageMetadata)
    }


def _load(folder: Path, targets: Mapping[str, Tensor], *, no_dist: bool = False) -> None:
    try:
        load(dict(targets), storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # which is no `Exception`
        raise _cause(error) from error


class _IndexUnpickler(pickle.Unpickler):
    """Builds the types of `torch.distributed.checkpoint`'s index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = _INDEX_TYPES.get((module, name))
        if allowed is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            allowed = getattr(torch, name)
        if allowed is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")
        return allowed


class _Writer(filesystem.FileSystemWriter):
    """Says what the file system said: an exception goes from process to process without its cause."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            raise _cause(error) from None  # it may be `error`, which would be its own cause


class _Reader(filesystem.FileSystemReader):
    """Reads the index with the list of allowed types."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        file = Path(self.path) / ".metadata"
        try:
            index = _IndexUnpickler(BytesIO(file.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{file} is not the index of a checkpoint: {error}") from error
        if not isinstance(index, metadata.Metadata):
            raise UserError(f"{file} is not the index of a checkpoint")
        return index


class _Planner(DefaultLoadPlanner):
    """Takes tensors only."""

    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn}: the checkpoint has an object where a tensor is wanted")


def _cause(error: CheckpointException | RuntimeError) -> BaseException:
    """The `OSError` that the library wrapped, or else the first thing that it did."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    link: BaseException | None = first
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return link or first
