"""Kills a pretraining run with SIGKILL again and again, starts it again each time, and compares what comes out with an
uninterrupted run: every number in its metrics but the timings, the model, and all tensors of the last checkpoint.

    python tools/kill_and_resume.py recipes/demo_cpu.yaml --kills 10 --set runtime.checkpoint_every_steps=50

The kills are spread over the whole run; every other one waits for a checkpoint to be half-written, and every fifth
comes while the run is starting. Exit code 0: bit for bit the same.

With --ranks N the run is N processes under torchrun: one of them is killed each time, and torchrun starts all again.

    python tools/kill_and_resume.py recipes/demo_cpu.yaml --ranks 4 --kills 5 --set mesh.tensor=2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_bert.checkpoint.native import newest_good
from megatron_bert.checkpoint.tensors import read_all_tensors
from megatron_bert.cli.main import main as command
from megatron_bert.training import pretrain

TIMINGS = {"tokens_per_second", "seconds", "data_waiting_share", "mfu", "peak_memory_gib"}
Launch = Callable[[Path], int]


def main() -> int:
    """Runs, kills, compares, and prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("killed"), help="gets whole/ and killed/; emptied first")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fork", action="store_true", help="fork instead of starting the command: saves its start-up")
    parser.add_argument("--ranks", type=int, help="processes under torchrun")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    settings = [word for value in args.set for word in ("--set", value)]
    words = ["pretrain", str(args.recipe), "--json", *settings]
    if args.ranks:
        return kill_ranks(words, args)
    launch: Launch = forker(words) if args.fork else starter(words)

    started = time.monotonic()
    whole = launch(args.folder / "whole")
    begins = wait_for(whole, lambda: (args.folder / "whole" / "metrics.jsonl").exists()) - started
    assert os.waitpid(whole, 0)[1] == 0, "the uninterrupted run failed"
    seconds = time.monotonic() - started
    print(f"uninterrupted: {seconds:.1f} s, {begins:.1f} s of them until training begins", flush=True)

    moments = random.Random(args.seed)
    steps, record_seconds = last_step(args.folder / "whole"), seconds / len(records(args.folder / "whole"))
    during_write = 0
    for kill in range(args.kills):
        after_step = int(steps * (kill + moments.random()) / (args.kills + 1))
        delay = moments.uniform(0.0, begins if kill % 5 == 4 else record_seconds)
        process = launch(args.folder / "killed")
        if kill % 5 != 4:
            wait_for(process, lambda after=after_step: last_step(args.folder / "killed") >= after)
        time.sleep(delay)
        if kill % 2:
            wait_for(process, lambda: bool(unfinished(args.folder / "killed")))
            time.sleep(moments.uniform(0.0, 0.02))
        during_write += kill_run(process, args.folder / "killed")
    code = os.waitpid(launch(args.folder / "killed"), 0)[1]
    assert code == 0, "the last start failed"
    print(f"killed {args.kills} times, {during_write} of them while a checkpoint was being written")
    differences = compare(args.folder / "whole", args.folder / "killed")
    print("\n".join(differences) or "metrics, model and last checkpoint are bit for bit the same")
    return 1 if differences else 0


def kill_ranks(words: list[str], args: argparse.Namespace) -> int:
    """The same with one process of several."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks), "--max-restarts",
                str(args.kills), "-m", "megatron_bert", *words]  # fmt: skip
    whole, killed = args.folder / "whole", args.folder / "killed"
    subprocess.run([*torchrun, "--set", f"output={whole}"], check=True, stdout=subprocess.DEVNULL)
    moments, steps = random.Random(args.seed), last_step(whole)
    with subprocess.Popen([*torchrun, "--set", f"output={killed}"], stdout=subprocess.DEVNULL) as run:
        for kill in range(args.kills):
            after_step = int(steps * (kill + moments.random()) / (args.kills + 1))
            wait_for(
                run.pid, lambda after=after_step: last_step(killed) >= after and len(children(run.pid)) == args.ranks
            )
            rank, process = moments.choice(list(enumerate(children(run.pid))))
            os.kill(process, signal.SIGKILL)
            print(f"killed rank {rank} at step {last_step(killed)}", flush=True)
            wait_for(run.pid, lambda gone=process: gone not in children(run.pid))
        assert run.wait() == 0, "it did not go on by itself"
    differences = compare(whole, killed)
    print("\n".join(differences) or "metrics, model and last checkpoint are bit for bit the same")
    return 1 if differences else 0


def children(process: int) -> list[int]:
    """The processes that it started, the first one first."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def starter(words: list[str]) -> Launch:
    """Starts the real command in a process of its own."""
    return lambda output: (
        subprocess.Popen(
            [sys.executable, "-m", "megatron_bert", *words, "--set", f"output={output}"], stdout=subprocess.DEVNULL
        ).pid
    )


def forker(words: list[str]) -> Launch:
    """Runs the command in a fork of this process, which has imported everything and computed nothing."""
    assert pretrain

    def launch(output: Path) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            code = command([*words, "--set", f"output={output}"])
        finally:
            os._exit(code)

    return launch


def kill_run(process: int, output: Path) -> bool:
    """Kills the run; returns whether it left a checkpoint half-written."""
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status), "the run ended before it could be killed: give it more steps"
    left = bool(unfinished(output))
    print(f"killed at step {last_step(output)}{', a checkpoint half-written' if left else ''}", flush=True)
    return left


def wait_for(process: int, condition: Callable[[], bool]) -> float:
    """Waits until the condition holds, or the process ends; returns when."""
    while not condition() and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    return time.monotonic()


def unfinished(output: Path) -> list[Path]:
    """What of a checkpoint is being written, or was when the process was killed."""
    return list((output / "checkpoints").glob(".step-*.partial"))


def last_step(output: Path) -> int:
    """The last step that the metrics know."""
    file = output / "metrics.jsonl"
    whole_lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return int(json.loads(whole_lines[-1])["step"]) if whole_lines else 0


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs, a line each."""
    differences = []
    if records(whole) != records(killed):
        differences.append("the metrics differ")
    name = "model/model.safetensors"
    if (whole / name).read_bytes() != (killed / name).read_bytes():
        differences.append("the models differ")
    one, other = (read_all_tensors(newest_good(run)) for run in (whole, killed))
    if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
        differences.append("the last checkpoints differ")
    return differences


def records(run: Path) -> list[dict[str, object]]:
    """The metrics without timings."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
