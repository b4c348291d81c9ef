"""Processes that are killed, asked to stop, hang or differ: the real command under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.integration.tiny_corpus import prepare, write_recipe

PATIENCE_SECONDS = 120
REAL, FORKED = "torch.distributed.run", "tests.integration.forked_torchrun"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder)
    write_recipe(
        folder, training={"steps": 400, "warmup_steps": 2, "batch_samples": 8}, model__num_attention_heads=2,
        runtime={"log_every_steps": 5, "evaluate_every_steps": 1000, "checkpoint_every_steps": 20, "device": "cpu"},
    )  # fmt: skip
    return folder


@contextmanager
def started(
    folder: Path, output: Path, *options: str, restarts: int = 0, processes: int = 2, torchrun: str = REAL
) -> Iterator[subprocess.Popen[str]]:
    """Processes under torchrun, none of which outlives the block."""
    words = [
        sys.executable, "-m", torchrun, "--nproc-per-node", str(processes), "--max-restarts", str(restarts),
        "-m", "megatron_bert", "pretrain", str(folder / "recipe.yaml"), "--set", f"output={output}", *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        try:
            yield process
        finally:
            left = children(process.pid)
            for one in (*left, process.pid):
                with suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)


def children(process: int) -> list[int]:
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def last_step(output: Path) -> int:
    file = output / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "too long"
        time.sleep(0.05)


def losses(output: Path, kind: str = "training") -> dict[int, float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == kind}


def test_a_killed_rank_and_a_signal(folder: Path, tmp_path: Path) -> None:
    """torchrun starts all again, from the last checkpoint; SIGTERM to one rank then saves and ends all of them."""
    output = tmp_path / "run"
    with started(folder, output, "--set", "mesh.tensor=2", restarts=1, torchrun=FORKED) as process:
        wait_for(process, lambda: last_step(output) >= 25 and any((output / "checkpoints").glob("step-*")))
        before = losses(output)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        wait_for(process, lambda: last_step(output) >= 60 and len(children(process.pid)) == 2)
        os.kill(children(process.pid)[1], signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
        assert process.returncode == 0, said
    # gloo once in a hundred times does not tell the survivor, which torchrun then ends after its 30 s.
    assert "lost another process of the run" in said or "forcefully exiting via 9" in said, said
    assert "going on from" in said
    after = losses(output)
    assert {step: after[step] for step in before} == before
    stopped = max(int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
    assert 60 <= stopped < 400


def test_a_rank_that_hangs_is_named(folder: Path, tmp_path: Path) -> None:
    """Each an interpreter of its own, as people start them."""
    output = tmp_path / "run"
    with started(folder, output, "--set", "mesh.timeout_seconds=5") as process:
        wait_for(process, lambda: last_step(output) >= 5)
        hanging = children(process.pid)[1]
        os.kill(hanging, signal.SIGSTOP)
        wait_for(process, lambda: len(children(process.pid)) < 2)
        os.kill(hanging, signal.SIGKILL)
        said = process.communicate(timeout=PATIENCE_SECONDS)[1]
    assert process.returncode
    assert "megatron-bert pretrain: rank 1 did not get past" in said, said
    assert "for 5 s, and the others wait" in said


def test_ranks_with_different_recipes(folder: Path, tmp_path: Path, command: Path) -> None:
    words = f"{command}/megatron-bert pretrain {folder}/recipe.yaml --set output={tmp_path}/run"
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python",
            "bash", "-c", f"{words} --set training.seed=$RANK",
        ],
        capture_output=True, text=True, timeout=PATIENCE_SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode
    lines = [line for line in run.stderr.splitlines() if line.startswith("megatron-bert")]
    assert len(lines) == 1
    assert "the recipe (its fingerprint) is" in lines[0]
    assert "on rank 1: start all of them alike" in lines[0]
