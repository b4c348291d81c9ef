"""Stands in for `tests/distributed_testing_utils.py`: runs a function in several processes of one group."""

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.world import PRELOADED

from ..package import install


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`run_distributed(2)(f)(*args)` calls `f(rank, *args)` in two processes joined by gloo; raises what any raises."""

    def around(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            name = (function.__module__, function.__qualname__)
            multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
            arguments = (world_size, _free_port(), name, args)
            mp.start_processes(_process, args=arguments, nprocs=world_size, start_method="forkserver")

        return run

    return around


def _process(rank: int, world_size: int, port: int, name: tuple[str, str], args: tuple[Any, ...]) -> None:
    """One process: makes Transformers' test files importable as the parent did, then calls the named function."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    install({"distributed_testing_utils": sys.modules[__name__]})
    function = getattr(importlib.import_module(name[0]), name[1])
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
