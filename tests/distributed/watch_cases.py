"""What a test of the watch runs in each process of a world."""

from __future__ import annotations

import threading
from unittest.mock import patch

import torch.distributed as dist

from megatron_bert.parallel import watch


def told_of(silent: int | None, *, is_slow: bool, seconds: float = 2) -> tuple[list[str], bool]:
    """What this rank says, and whether it ends, where all are at one thing for longer than the watch is patient, and
    one of them gives no sign of life.
    """
    said, ended = list[str](), threading.Event()
    with patch.object(watch, "_LOOK_SECONDS", 0.25), patch.object(watch.os, "_exit", lambda code: ended.set()):
        here = watch.Watch(0.4, said.append)
        here.at("step 7", is_slow=is_slow)
        here._store.delete_key("watch/tellers")  # of the case before
        dist.barrier()
        if dist.get_rank() != silent:
            with here:
                ended.wait(seconds)
    dist.barrier()
    return said, ended.is_set()
