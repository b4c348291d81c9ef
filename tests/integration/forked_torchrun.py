"""`torchrun`, whose processes are forks of it: what they import is imported once, and a restart imports nothing.

They are its children all the same, each in a session of its own, with their environments, and end as Python does.
What comes from interpreters that differ, say in the order of a set, is seen only where they are started as usual.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from megatron_bert.cli.main import main as command
from megatron_bert.tasks import setup  # noqa: F401  # what the processes need
from megatron_bert.training import pretrain  # noqa: F401

COMMAND = (sys.executable, "-u", "-m", "megatron_bert")


class Fork:
    """What `torchrun` uses of `subprocess.Popen`."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **_: object) -> None:
        assert args[:4] == COMMAND, args
        self._args, self._code = args, None
        self.pid = os.fork()
        if not self.pid:
            become(args, env)

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if ended else None
        return self._code

    def wait(self, timeout: float) -> None:
        """Until it has ended."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self._args, timeout)
            time.sleep(0.01)


def become(args: tuple[str, ...], environment: dict[str, str]) -> None:
    """As if `args` had been started in this process."""
    os.setsid()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["megatron-bert", *args[len(COMMAND) :]]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)
    code = 1
    try:
        code = command()
    except BaseException:
        traceback.print_exc()
    ctypes.pythonapi.Py_Exit(code)


def main(arguments: list[str]) -> int:
    """Runs `torchrun` with these."""
    subprocess_handler.Popen = Fork
    run.main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
