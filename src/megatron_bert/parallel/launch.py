"""The processes of a run: joining them, and seeing that they are at the same thing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_bert.errors import UserError

__all__ = ["check_agreement", "is_launched", "joined_processes", "local_device"]


def is_launched() -> bool:
    """Whether this process is one of several that `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_device(device_type: str) -> torch.device:
    """This rank's device: the CPU, or the GPU of its place on the node."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device_type == "cuda" else torch.device("cpu")
    )


@contextmanager
def joined_processes(device: torch.device, timeout_seconds: float) -> Iterator[None]:
    """The processes that `torchrun` started are one group: NCCL between GPUs, gloo between CPUs. Rank, number of ranks
    and where to meet are read from the environment.

    A rank that waits longer than `timeout_seconds` for another ends with an error.
    """
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if is_gpu else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compares what should be the same on all ranks: the recipe's fingerprint, versions, the code's.

    Raises:
        UserError: on every rank, where a fact differs from rank 0's; names the fact and the ranks.
    """
    everywhere: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, dict(facts))
    for name, value in everywhere[0].items():
        others = [rank for rank, theirs in enumerate(everywhere) if theirs.get(name) != value]
        if others:
            raise UserError(
                f"{name} is {value} on rank 0 and {everywhere[others[0]].get(name)} on rank "
                f"{', '.join(map(str, others))}: start all of them alike"
            )
