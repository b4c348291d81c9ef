"""Every ```sh block of every page under docs/ runs, in order, in a folder of its own.

`$MODEL` is a tiny model with a tokenizer. A page that needs more makes it in its own blocks, or gets it from `prepare`.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bert.cli.main import main
from tests.integration.tiny_corpus import prepare
from tests.integration.tiny_megatron import write_tiny_megatron
from tests.integration.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
GPU_PAGES = {"roofline"}  # whose command is a benchmark
REAL_TORCHRUN = {"pretrain"}  # ranks in interpreters of their own, which differ as forks of one do not
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.stem not in GPU_PAGES)


def finished_run(folder: Path) -> None:
    """A short pretraining run in `folder`/run."""
    assert main(["pretrain", str(prepare(folder)), "--json"]) == 0


def what_can_be_converted(folder: Path) -> None:
    finished_run(folder)
    write_tiny_megatron(folder)


# What a page finds in its folder before its first block, by the page's name.
PREPARE: dict[str, Callable[[Path], None]] = {"convert": what_can_be_converted, "plot": finished_run}


def run_page(page: Path, folder: Path, model: Path, command: Path) -> "subprocess.CompletedProcess[str]":
    """Runs the page's blocks inside `folder`, with the `megatron-bert` and `torchrun` in `command`."""
    path = os.pathsep.join([str(command), str(Path(sys.executable).parent), os.environ["PATH"]])
    runner = [sys.executable, str(ROOT / "tools" / "run_commands.py"), "--directory", str(folder), str(page)]
    environment = {**os.environ, "PATH": path, "MODEL": str(model), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(runner, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, tmp_path, tmp_path_factory, model, command):
    PREPARE.get(page.stem, lambda folder: None)(tmp_path)
    if page.stem in REAL_TORCHRUN:
        alone = tmp_path_factory.mktemp("command") / "megatron-bert"
        alone.symlink_to(command / "megatron-bert")
        command = alone.parent
    result = run_page(page, tmp_path, model, command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "== " in result.stdout  # at least one block


def test_there_is_a_page_for_fill_mask():
    assert "fill-mask" in [page.stem for page in PAGES]


def test_a_command_that_fails_is_found(tmp_path, model, command):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\nmegatron-bert fill-mask --model $MODEL 'the [MASK]'\n```\n\n```sh\nmegatron-bert fill-msk\n```\n"
    )
    result = run_page(page, tmp_path, model, command)
    assert result.returncode == 2
    assert "did you mean 'fill-mask'?" in result.stderr
