"""The command's frame: verbs, exit codes, one line an error, and how fast it answers."""

import errno
import io
import logging
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_bert.cli import VERBS, Verb
from megatron_bert.cli import main as frame
from megatron_bert.errors import LostProcess, SharedError, UserError

BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
COMMAND = [sys.executable, "-m", "megatron_bert"]


@pytest.fixture
def verb(monkeypatch):
    """Puts a verb `probe` in the table; the test sets what its `run` does."""
    module = SimpleNamespace(__doc__="Probe.", run=lambda args: 0)
    module.add_arguments = lambda parser: parser.add_argument("--top-k", type=int)
    monkeypatch.setitem(VERBS, "probe", Verb("probe_module", "a probe"))
    monkeypatch.setitem(sys.modules, "probe_module", module)
    return module


def raising(error):
    def run(args):
        raise error

    return run


def test_help_is_quick_and_imports_nothing_heavy():
    script = "import sys; from megatron_bert.cli.main import main; main(['--help']); print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    modules = set(output.splitlines()[-1].split())
    assert all(verb in output for verb in VERBS)
    assert not modules & {"torch", "transformers", "numpy", "tokenizers", "pydantic"}


def test_help_answers_in_under_three_tenths_of_a_second():
    """Of processor time, so that a busy machine does not matter; the least of five."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*COMMAND, "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_light_module_and_help(name):
    script = f"import sys; from megatron_bert.cli.main import main; code = main(['{name}', '--help']); " \
             "assert 'torch' not in sys.modules; sys.exit(code)"  # fmt: skip
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"megatron-bert {name}" in result.stdout


@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [("--version", ">&-", 0), ("--version", "2>&-", 0), ("fill-mask", "<&-", 2), ("nothing", ">&- 2>&-", 2)],
)
def test_a_stream_that_is_closed_is_an_empty_one(words, closed, code):
    """What a service or a cron job may start with: nothing to read, and nobody who listens."""
    line = f"{sys.executable} -m megatron_bert {words} {closed}"
    result = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert ("standard input is empty" in result.stderr) == (words == "fill-mask")
    assert "internal error" not in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.startswith("megatron-bert ") == (closed == "2>&-")


def test_version(capsys):
    assert frame.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megatron-bert ")


def test_without_a_verb_it_shows_the_help_on_stderr(capsys):
    assert frame.main([]) == 2
    captured = capsys.readouterr()
    assert (captured.out, "verbs:" in captured.err) == ("", True)


def test_a_mistyped_verb_names_the_nearest(capsys):
    assert frame.main(["fil-mask"]) == 2
    assert capsys.readouterr().err.startswith(
        "megatron-bert: error: unknown verb 'fil-mask' (did you mean 'fill-mask'?)"
    )


def test_a_mistyped_option_names_the_nearest(verb, capsys):
    assert frame.main(["probe", "--topk", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-bert probe: error: unrecognized arguments: --topk 3 (did you mean '--top-k'?)")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("bad\n   thing"), "error: bad thing", 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.txt"), "error: x.txt: No such file or dir", 2),
        (OSError(errno.ENOSPC, "No space left on device"), "error: cannot write the output: No space left on dev", 2),
        (OSError("words of a library"), "error: words of a library", 2),
        (KeyError("k"), "internal error: KeyError: 'k' (--debug shows the traceback)", 1),
        (ValueError("v"), "internal error: ValueError: v", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_errors_are_one_line_and_an_exit_code(verb, capsys, error, line, code):
    verb.run = raising(error)
    assert frame.main(["probe"]) == code
    told = capsys.readouterr().err
    assert told.startswith(f"megatron-bert probe: {line}")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("bad thing"), "megatron-bert probe: error: rank 3: bad thing\n"),
        (SharedError("bad thing"), ""),
        (LostProcess("gone"), ""),
        (KeyboardInterrupt(), ""),
    ],
)
def test_what_one_rank_finds_that_the_others_do_not_end_for(verb, capsys, monkeypatch, error, said):
    """torchrun ends it while it is silent, where another one of the node says the same."""
    ended = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(frame, "_SILENCE_SECONDS", 0)
    monkeypatch.setattr(frame.os, "_exit", ended.append)
    verb.run = raising(error)
    assert frame.main(["probe"]) > 0
    assert capsys.readouterr().err == said
    assert ended == ([1] if isinstance(error, LostProcess) else [])


@pytest.mark.parametrize("words", [["--debug", "probe"], ["probe", "--debug"], ["probe", "--top-k", "1", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(verb, capsys, words):
    verb.run = raising(UserError("bad thing"))
    assert frame.main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("megatron-bert probe: error: bad thing\n")


def test_debug_after_two_dashes_is_a_text():
    assert frame._without_debug(["fill-mask", "--", "--debug"]) == (["fill-mask", "--", "--debug"], False)


def test_what_the_package_logs_is_shown_once_with_the_verb(verb, capsys):
    def run(args):
        logging.getLogger("megatron_bert.anything").info("seen")
        return 0

    verb.run = run
    for _ in range(2):
        assert frame.main(["probe"]) == 0
        assert capsys.readouterr().err == "megatron-bert probe: seen\n"
    assert not logging.getLogger("megatron_bert").handlers


def test_a_full_disk_is_seen_at_the_last_flush():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, check=False
        )
    assert result.returncode == 2
    assert result.stderr == "megatron-bert: error: cannot write the output: No space left on device\n"


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, env=BUFFERED, check=False
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_closed_pipe_within_a_verb(verb, capsys, monkeypatch):
    verb.run = raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert frame.main(["probe"]) == 141
    assert capsys.readouterr().err == ""
