"""One process a run: a lock on the run's folder, which the system takes back however the process ends."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_bert.errors import UserError

__all__ = ["run_locked"]

log = logging.getLogger(__name__)


@contextmanager
def run_locked(folder: Path) -> Iterator[None]:
    """Holds the run in `folder` (made where it is missing) for this process. Its children do not hold it, so that a
    killed run can be started again at once. A folder that was made here and that nothing came into is removed.

    Raises:
        UserError: another process holds it.
        OSError: what the file system says.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            raise UserError(f"{folder} is in use by {owner}; wait for it, or choose another output") from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): keep other processes out of it", folder, error.strerror)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [".lock"]:
                shutil.rmtree(folder)
