"""The command `megatron-bert` without its seconds of imports: a process that has done them forks for each call.

For tests of many calls. The `megatron-bert` here hands its arguments, directory, environment, open files and the limit
on their size to that process, and ends with the code of its fork, which gets a SIGTERM when this one is gone before. So
does the `torchrun`.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

CLIENT = """#!{python}
import json, os, resource, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = json.dumps([sys.argv, os.getcwd(), dict(os.environ), limit]).encode()
    socket.send_fds(server, [len(said).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(said)
    code = server.recv(8)
    sys.exit(int(code) if code else "the forked megatron-bert ended without a code: see what its server said")
"""


ROOT = Path(__file__).resolve().parents[2]
SERVER = "import sys; sys.path.pop(0); sys.path.append({root!r}); from {module} import serve; serve({folder!r})"


@contextmanager
def forked_command(folder: Path) -> Iterator[Path]:
    """A folder for PATH, in which `megatron-bert` and `torchrun` are the forked ones."""
    code = SERVER.format(root=str(ROOT), module=__name__, folder=str(folder))
    with Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield folder
        assert process.stdin is not None
        process.stdin.close()


def serve(folder: str) -> None:
    """Answers calls, until its standard input ends."""
    from tests.integration import forked_torchrun  # noqa: F401  # with what most calls need

    address = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        for name in ("megatron-bert", "torchrun"):
            client = Path(folder, name)
            client.write_text(CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready", flush=True)
        while 0 not in select.select([server, 0], [], [])[0]:
            connection, _ = server.accept()
            if not os.fork():
                server.close()
                answer(connection)
            connection.close()
    os._exit(0)  # two seconds sooner than an interpreter with all these modules ends


def answer(connection: socket.socket) -> None:
    """In a process of its own: the call in another one, and its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    said = b""
    while len(said) < int.from_bytes(size, "little"):
        part = connection.recv(1 << 16)
        assert part, "the client is gone"
        said += part
    child = os.fork()
    if not child:
        connection.close()
        call(files, *json.loads(said))
    threading.Thread(target=lambda: connection.recv(1) or os.kill(child, signal.SIGTERM), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def call(
    files: list[int], arguments: list[str], directory: str, environment: dict[str, str], file_bytes: list[int]
) -> None:
    """As a shell would have started it."""
    from megatron_bert.cli.main import main
    from tests.integration import forked_torchrun

    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes[0], file_bytes[1]))
    command, *words = arguments
    code: int | str | None = 70
    try:
        code = forked_torchrun.main(words) if Path(command).name == "torchrun" else main(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)
