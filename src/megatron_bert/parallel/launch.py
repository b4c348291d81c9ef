"""The processes of a run: joining them, seeing that they are at the same thing, and ending them together."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from megatron_bert.errors import LostProcess, SharedError, UserError

__all__ = [
    "agreed",
    "check_agreement",
    "exchange",
    "from_first",
    "is_launched",
    "is_lost",
    "joined_processes",
    "largest",
    "local_device",
    "ranks_of",
]

Result = TypeVar("Result")

# gloo's threads let go of the tensors that they sent last, and need Python's lock for it: where the interpreter ends
# first, they abort it.
_LETTING_GO_SECONDS = 0.1

# What gloo and NCCL say where another process is gone or silent.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|timed? ?out|timeout|NCCL|broken pipe|peer|unreachable", re.IGNORECASE
)
_SOURCE_LINE = re.compile(r"^\[\S+:\d+\] ")  # of the library, before what it says


def is_launched() -> bool:
    """Whether `torchrun`, or what sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_lost(error: BaseException | None) -> bool:
    """Whether it is what gloo and NCCL say where another process is gone or silent."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def local_device(device_type: str) -> torch.device:
    """This rank's device: the CPU, or the GPU of its place on the node.

    Raises:
        UserError: the node has fewer GPUs than processes.
    """
    if device_type != "cuda":
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", place + 1))
    if processes > torch.cuda.device_count():  # all of the node's processes find it, and its first one says it
        raise UserError(f"{torch.cuda.device_count()} GPUs for {processes} processes on this node: start one process a "
                        "GPU (torchrun --nproc-per-node)")  # fmt: skip
    return torch.device("cuda", place)


@contextmanager
def joined_processes(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """The processes that `torchrun` started are one group: gloo between CPUs, and NCCL between GPUs where `device` is
    one. Rank, number of ranks and where to meet are read from the environment.

    An error of this rank alone gets a note that names the rank.

    Raises:
        LostProcess: another rank is gone, or was waited for longer than `timeout_seconds`.
    """
    is_gpu, rank = device.type == "cuda", int(os.environ["RANK"])
    if is_gpu:
        torch.cuda.set_device(device)
    try:
        store, _, num_ranks = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if is_gpu else "gloo",
            store=PrefixStore(_attempt(), store),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if is_gpu else None,
        )
        yield
        time.sleep(_LETTING_GO_SECONDS)
    except SharedError:
        raise
    except RuntimeError as error:
        if not is_lost(error):
            error.add_note(f"rank {rank}")
            raise
        reason = _SOURCE_LINE.sub("", str(error).splitlines()[0])
        raise LostProcess(
            f"rank {rank} lost another process of the run, which ended or does not answer ({reason})"
        ) from error
    except Exception as error:
        error.add_note(f"rank {rank}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _attempt() -> str:
    """A name for what the processes say in the store where they meet. `torchrun` without a rendezvous backend keeps one
    store for all its restarts, and processes that are gone have left their addresses in it.
    """
    has_one_store = os.environ.get("GROUP_WORLD_SIZE") == "1" or os.environ.get("TORCHELASTIC_RUN_ID") == "none"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if has_one_store else "attempt"


def exchange(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """What every rank gave, in the order of ranks; alone, its own. All ranks have to call it. For small objects."""
    if not dist.is_initialized():
        return [value]
    everywhere: list[Result] = [value] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, value, group=group)
    return everywhere


def largest(numbers: Sequence[int]) -> list[int]:
    """The largest that any rank gave of each. All ranks have to call it; no device is waited for."""
    if not dist.is_initialized():
        return list(numbers)
    everywhere = torch.tensor(numbers)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    found: list[int] = everywhere.tolist()
    return found


def agreed(function: Callable[[], Result]) -> Result:
    """What `function` gives on this rank, if no rank finds a mistake. All ranks have to call it.

    Raises:
        SharedError: on every rank, where `function` raises a `UserError` or an `OSError` on any; names the ranks.
    """
    if not dist.is_initialized():
        return function()
    result: list[Result] = []
    problem = ""
    cause: Exception | None = None
    try:
        result.append(function())
    except (UserError, OSError) as error:
        problem, cause = _told(error), error
    problems = exchange(problem)
    for first in filter(None, problems):
        ranks = [rank for rank, one in enumerate(problems) if one]
        where = "" if len(ranks) == len(problems) else f"{ranks_of(ranks)}: "
        raise SharedError(f"{where}{first}") from cause
    return result[0]


def from_first(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """What `function` gives on the first rank, on every rank; it is called there only. All ranks have to call this.

    Args:
        group: of all ranks; default: the one that they joined as.

    Raises:
        SharedError: on every rank, where `function` raises a `UserError` or an `OSError`. A process by itself sees that
            error.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, ""]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1], cause = _told(error), error
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, problem = outcome
    if problem:
        raise SharedError(problem) from cause
    return result  # type: ignore[no-any-return]


def _told(error: UserError | OSError) -> str:
    """What to tell the other ranks of an error."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def ranks_of(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0, 3``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compares what should be the same on all ranks: the recipe's fingerprint, versions, the code's.

    Raises:
        SharedError: on every rank, where a fact differs from rank 0's; names the fact and the ranks.
    """
    everywhere = exchange(dict(facts))
    for name, value in everywhere[0].items():
        others = [rank for rank, theirs in enumerate(everywhere) if theirs.get(name) != value]
        if others:
            raise SharedError(f"{name} is {value} on rank 0 and {everywhere[others[0]].get(name)} on "
                              f"{ranks_of(others)}: start all of them alike")  # fmt: skip
