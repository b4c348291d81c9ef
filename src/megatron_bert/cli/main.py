"""The frame of the command: finds the verb, parses its options, runs it, and turns errors into one line.

Exit codes: 0 done; 1 our mistake; 2 the person's mistake (options, files, disk); 130 interrupted;
141 whoever read our output stopped reading (what a shell reports for SIGPIPE).
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import importlib.metadata
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from megatron_bert.cli import VERBS, is_first_process
from megatron_bert.errors import LostProcess, SharedError, UserError

PROGRAM = "megatron-bert"
EXIT_OURS, EXIT_THEIRS, EXIT_INTERRUPTED, EXIT_PIPE_CLOSED = 1, 2, 130, 141
# `torchrun` ends all processes when the first one ends: one that leaves the line to another waits until it is said.
_SILENCE_SECONDS = 2


class VerbParser(argparse.ArgumentParser):
    """An argument parser that raises ``UserError`` instead of printing its usage, and names the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (--?[\w-]+).*", message, flags=re.DOTALL)
        near = nearest(unknown[1], self._option_string_actions) if unknown else ""
        raise UserError(f"{message}{near} ('{self.prog} --help' lists the options)")


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known word closest to ``word``, or nothing where none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``megatron-bert`` with ``argv`` (default: the process's arguments) and return its exit code."""
    _open_missing_streams()
    words, debug = _without_debug(sys.argv[1:] if argv is None else argv)
    name = f"{PROGRAM} {words[0]}" if words and words[0] in VERBS else PROGRAM
    try:
        code = _run(words)
        sys.stdout.flush()  # here, where a full disk is still an error that we can name
        return code
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_PIPE_CLOSED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        _abandon_stdout_unless_it_works()
        is_to_say = _is_to_say(error)
        if not is_to_say:
            time.sleep(_SILENCE_SECONDS)
            if is_to_say := not isinstance(error, SharedError | LostProcess | KeyboardInterrupt):  # nobody has said it
                error.add_note(f"rank {os.environ.get('RANK')}")
        line, code = _explain(error)
        if is_to_say:
            print(f"{name}: {line}", file=sys.stderr, flush=True)
        if isinstance(error, LostProcess):
            os._exit(code)  # gloo would wait up to half a minute for the one that is gone, and others for this one
        return code


def _open_missing_streams() -> None:
    """A process that was started without standard input, output or error (`<&-`, `>&-`) reads nothing, writes nowhere.

    In the order of their numbers: each is given its own again, which no file that is opened later can then have.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _run(words: list[str]) -> int:
    if not words:
        print(_help(), file=sys.stderr)
        return EXIT_THEIRS
    if words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"{PROGRAM} {_version()}")
        return 0
    if words[0] not in VERBS:
        kind = "option" if words[0].startswith("-") else "verb"
        raise UserError(f"unknown {kind} {words[0]!r}{nearest(words[0], VERBS)}; the verbs are {', '.join(VERBS)}")
    return _run_verb(words[0], words[1:])


def _run_verb(name: str, words: list[str]) -> int:
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    parser = VerbParser(prog=f"{PROGRAM} {name}", description=module.__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # --help has printed its text
        return int(stop.code or 0)
    with _log_on_stderr(f"{PROGRAM} {name}"):
        return int(module.run(args))


@contextmanager
def _log_on_stderr(prefix: str) -> Iterator[None]:
    """Shows what the package logs, one line each, on the first process of a run; other packages' logs are theirs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{prefix}: %(message)s"))
    logger = logging.getLogger("megatron_bert")
    # Transformers imports torchao where it is installed, which tells what it cannot load.
    quiet = [logging.getLogger(library) for library in ("torchao", "torch.utils._pytree")]
    levels = {one: one.level for one in (logger, *quiet)}
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_first_process() else logging.CRITICAL)
    for one in quiet:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for one, level in levels.items():
            one.setLevel(level)


def _without_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """``argv`` without ``--debug``, which may stand anywhere before a ``--``, and whether it was there."""
    end = argv.index("--") if "--" in argv else len(argv)
    words = [word for word in argv[:end] if word != "--debug"]
    return words + list(argv[end:]), len(words) < end


def _explain(error: BaseException) -> tuple[str, int]:
    """The one line about ``error``, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT_INTERRUPTED
    rank = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))  # of an error that others do not have
    if isinstance(error, UserError):
        return f"error: {rank}{_one_line(error)}", EXIT_THEIRS
    if isinstance(error, LostProcess):
        return f"error: {_one_line(error)}", EXIT_OURS
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        if error.errno == errno.ENOSPC and not where:
            where = "cannot write the output: "
        return f"error: {rank}{where}{error.strerror or _one_line(error)}", EXIT_THEIRS
    return f"internal error: {rank}{type(error).__name__}: {_one_line(error)} (--debug shows the traceback)", EXIT_OURS


def _is_to_say(error: BaseException) -> bool:
    """Whether to say it at once. Of several processes that `torchrun` started, the first one says what all were told,
    the first of each node what all of them find, and each one what it alone finds.
    """
    if getattr(error, "__notes__", ()):
        return True
    return is_first_process() if isinstance(error, SharedError) else os.environ.get("LOCAL_RANK", "0") == "0"


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s*\n\s*", " ", str(error).strip())


def _abandon_stdout_unless_it_works() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()


def _abandon_stdout() -> None:
    """Send what is left in standard output's buffer nowhere, or Python complains about it when it exits."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a real file: a test's capture, a closed stream
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: {PROGRAM} VERB [options]\n\n"
        f"MegatronBERT: the models, their training, and the tools around them.\n\n"
        f"verbs:\n{verbs}\n\n"
        f"options:\n"
        f"  -h, --help  show this text; '{PROGRAM} VERB --help' shows a verb's own\n"
        f"  --version   show the version\n"
        f"  --debug     show the traceback of an error (anywhere on the line)"
    )


def _version() -> str:
    try:
        return importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its source folder)"
